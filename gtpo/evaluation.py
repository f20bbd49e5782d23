"""Evaluation: success, avg@k, pass@k, turns and calls of sampled trajectories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb

from gtpo.types import StopReason, Trajectory


@dataclass(frozen=True)
class Evaluation:
    """Means over trajectories; `pass_at_k` is a mean over tasks. Lost trajectories are counted, not scored.

    outcome: the mean grade, of which `success` counts the 1s alone.
    measures: the means of what the episodes' grades measured, over the trajectories that have it.
    """

    num_tasks: int
    samples: int
    success: float
    pass_at_k: float
    turns: float
    calls: float
    invalid_calls: float
    lost: int
    outcome: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement, is right: 1 - C(n - c, k) / C(n, k).

    Source: arXiv 2107.03374, equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 2)
    (0.25, 1.0, 0.0)
    """
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def evaluate_groups(groups: Sequence[Sequence[Trajectory]]) -> Evaluation:
    """`groups` holds the attempts at each task; avg@k is `success`, the mean of outcomes equal to 1."""
    scored = [[t for t in group if t.stop is not StopReason.LOST] for group in groups]
    trajectories = [trajectory for group in scored for trajectory in group]
    if not trajectories:
        raise ValueError("there must be at least one trajectory that was not lost, got none")

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Evaluation(
        num_tasks=len(groups),
        samples=max(len(group) for group in groups),
        success=mean([float(t.is_success) for t in trajectories]),
        pass_at_k=mean(
            [pass_at_k(len(group), sum(t.is_success for t in group), len(group)) for group in scored if group]
        ),
        turns=mean([float(len(t.turns)) for t in trajectories]),
        calls=mean([float(t.num_calls) for t in trajectories]),
        invalid_calls=mean([float(t.num_invalid_calls) for t in trajectories]),
        lost=sum(len(group) for group in groups) - len(trajectories),
        outcome=mean([t.outcome for t in trajectories]),
        measures={
            name: mean([t.measures[name] for t in trajectories if name in t.measures])
            for name in sorted({name for t in trajectories for name in t.measures})
        },
    )
