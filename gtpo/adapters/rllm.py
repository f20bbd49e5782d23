"""rLLM: the advantage estimator `gtpo`, which writes one advantage for each token of each step.

    import gtpo.adapters.rllm
    gtpo.adapters.rllm.register()

and `rllm.algorithm.adv_estimator=gtpo`.  A step of rLLM is a turn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gtpo.adapters.layouts import list_turn_advantages

NAME = "gtpo"


def gtpo_advantages(
    rewards: Sequence[np.ndarray], algorithm_config: Any, **kwargs: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """rLLM's `adv_estimator=gtpo`: sets `step.advantage` to a list with the turn's advantage for each response token.

    rewards: one array of trajectory rewards for each group.  A trajectory's reward is its total: what its steps' own
        rewards leave of it lies on the last step.
    algorithm_config: rLLM's; `algorithm_config.gtpo`, if it is there, maps options of `gtpo.adapters.layouts`.
    kwargs["traj_groups"]: the `TrajectoryGroup`s, as rLLM passes them.
    Returns (advantages, returns) by group, for rLLM's metrics: of each trajectory the mean over its tokens, its reward.
    Source: arXiv 2511.14846; the signature is that of `register_adv_estimator` in rllm/trainer/algorithms/advantage.py.
    """
    groups = kwargs.get("traj_groups")
    if groups is None:
        raise ValueError("traj_groups must be passed: the steps stand there, and this rLLM did not give them")
    turn_rewards, num_tokens, labels, trajectories = [], [], [], []
    for number, (group, group_rewards) in enumerate(zip(groups, rewards, strict=True)):
        for trajectory, total in zip(group.trajectories, group_rewards, strict=True):
            turns = [float(step.reward or 0.0) for step in trajectory.steps]
            if turns:
                turns[-1] += float(total) - sum(turns)
            turn_rewards.append(turns)
            num_tokens.append([len(step.response_ids) for step in trajectory.steps])
            labels.append(number)
            trajectories.append(trajectory)
    options = dict(getattr(algorithm_config, "gtpo", None) or {})
    values = list_turn_advantages(turn_rewards, labels, num_tokens=num_tokens, **options)
    means: list[list[float]] = [[] for _ in rewards]
    for trajectory, turns, tokens, number in zip(trajectories, values, num_tokens, labels, strict=True):
        for step, advantage, count in zip(trajectory.steps, turns, tokens, strict=True):
            step.advantage = [advantage] * count
        weighted = sum(advantage * count for advantage, count in zip(turns, tokens, strict=True))
        means[number].append(weighted / max(sum(tokens), 1))
    return [np.asarray(row, dtype=np.float64) for row in means], [np.asarray(row, dtype=np.float64) for row in rewards]


# rLLM would overwrite the lists with one number for each trajectory otherwise
gtpo_advantages.writes_step_advantages = True  # type: ignore[attr-defined]


def register() -> None:
    """Put `gtpo` into rLLM's registry.  Refuses an rLLM that would overwrite the advantages of steps."""
    import inspect

    from rllm.trainer.algorithms import advantage

    if "writes_step_advantages" not in inspect.getsource(advantage):
        raise ImportError(
            "this rLLM overwrites step.advantage with one number for each trajectory: a newer one is needed"
        )
    advantage.register_adv_estimator(NAME)(gtpo_advantages)
