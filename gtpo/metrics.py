"""The metrics of a step, as plain numbers. TRL's names where TRL has the metric; pure functions of the step's records.

Timing fields end in `_s` or `_per_s`; everything else repeats bit for bit under one seed.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gtpo.credit import Scored
from gtpo.rewards import is_void_turn
from gtpo.types import StopReason, ToolResult, ToolStatus, Trajectory
from gtpo_kernels import LossMetrics

# of a rollout, without lost trajectories
Groups = Sequence[Sequence[Scored]]

_TRL_NAMES = {
    "entropy": "entropy",
    "clip_low_fraction": "clip_ratio/low_mean",
    "clip_high_fraction": "clip_ratio/high_mean",
    "ref_kl": "kl",
}


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """Metrics of trajectories, rewards and credit."""
    trajectories = [scored.trajectory for group in groups for scored in group]
    flat_rewards = [scored.rewards for group in groups for scored in group]
    flat_credit = [scored.credit for group in groups for scored in group]
    lengths = [sum(len(turn.completion_ids) for turn in t.turns) for t in trajectories]
    totals = [sum(reward.rewards) for reward in flat_rewards]
    turns = [turn for t in trajectories for turn in t.turns]
    calls = [result for turn in turns for result in turn.results]
    correct = [lp for t in trajectories if t.is_success for turn in t.turns for lp in turn.rollout_logprobs]
    after_tools = [lp for t in trajectories for turn in t.turns[1:] for lp in turn.rollout_logprobs]
    spreads = [_std([sum(scored.rewards.rewards) for scored in group]) for group in groups]
    metrics = {
        "reward": _mean(totals),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean([float(spread == 0) for spread in spreads]),
        "success": _mean([float(t.is_success) for t in trajectories]),
        "outcome": _mean([t.outcome for t in trajectories]),
        "num_completion_tokens": float(sum(lengths)),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([float(t.stop is StopReason.TRUNCATED) for t in trajectories]),
        "completions/correct_logprob": _mean(correct),
        "completions/min_logprob_after_tools": min(after_tools, default=0.0),
        "turns/mean": _mean([len(t.turns) for t in trajectories]),
        "turns/max": float(max(len(t.turns) for t in trajectories)),
        "turns/void_ratio": _mean([float(is_void_turn(t, i)) for t in trajectories for i in range(len(t.turns))]),
        "turn_reward/mean": _mean([value for reward in flat_rewards for value in reward.rewards]),
        "turn_reward/format_fault_ratio": _mean([float(fault) for reward in flat_rewards for fault in reward.faults]),
        "turn_return/mean": _mean([value for item in flat_credit for value in item.returns]),
        "turn_return/std": _std([value for item in flat_credit for value in item.returns]),
        "turn_advantage/abs_max": max(abs(value) for item in flat_credit for value in item.advantages),
        "shaping/similarity": _mean([sum(reward.terms["similarity"]) for reward in flat_rewards]),
        "shaping/execution": _mean([value for reward in flat_rewards for value in reward.terms["execution"]]),
        "tools/calls_per_task": _mean([t.num_calls for t in trajectories]),
        "tools/call_frequency": _mean([float(t.num_calls > 0) for t in trajectories]),
        "tools/failure_frequency": _mean([float(result.status is not ToolStatus.OK) for result in calls]),
        "tools/invalid_calls_per_task": _mean([t.num_invalid_calls for t in trajectories]),
    }
    stops = Counter(t.stop for t in trajectories)
    metrics |= {f"stop/{stop.value}": float(stops[stop]) for stop in StopReason}
    return metrics


def reward_term_metrics(groups: Groups) -> dict[str, float]:
    """For each term of the rewards: mean and deviation over turns; the correlation of its sum over a trajectory with
    success (with the outcome, where that is graded), and of its value with the turn's advantage. A correlation is 0
    where one side does not vary.
    """
    flat = [scored.rewards for group in groups for scored in group]
    advantages = [value for group in groups for scored in group for value in scored.credit.advantages]
    # where outcomes are 0 or 1, the success
    success = [scored.trajectory.outcome for group in groups for scored in group]
    metrics: dict[str, float] = {}
    for name in sorted({name for reward in flat for name in reward.terms}):
        terms = [reward.terms.get(name, [0.0] * len(reward.rewards)) for reward in flat]
        values = [value for term in terms for value in term]
        metrics |= {
            f"reward_term/{name}/mean": _mean(values),
            f"reward_term/{name}/std": _std(values),
            f"reward_term/{name}/success_correlation": _correlation([math.fsum(term) for term in terms], success),
            f"reward_term/{name}/advantage_correlation": _correlation(values, advantages),
        }
    return metrics


def measure_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The mean of each measure of the episodes' grades, over the trajectories that have it."""
    names = sorted({name for trajectory in trajectories for name in trajectory.measures})
    return {f"measure/{name}": _mean([t.measures[name] for t in trajectories if name in t.measures]) for name in names}


def tool_metrics(trajectories: Sequence[Trajectory], names: Sequence[str]) -> dict[str, float]:
    """Calls by status; for each tool of `names`: calls, failures and time-outs among them, attempts after the first,
    seconds of work and of waiting a call (0 without a call), where calls by code in the sandbox count like the model's
    own.

    Lost trajectories count here, since a tool may be why they are lost.
    """
    results: dict[str, list[ToolResult]] = {name: [] for name in names}
    for trajectory in trajectories:
        for turn in trajectory.turns:
            for call, result in zip(turn.calls, turn.results, strict=True):
                for name, made in ((call.name, result), *result.calls):
                    if name in results and not made.is_invalid_call:
                        results[name].append(made)
    of_all = Counter(result.status for t in trajectories for turn in t.turns for result in turn.results)
    metrics = {f"tools/status/{status.value}": float(of_all[status]) for status in ToolStatus}
    for name, found in results.items():
        statuses = Counter(result.status for result in found)
        metrics |= {
            f"tools/{name}/calls": float(len(found)),
            f"tools/{name}/failures": float(len(found) - statuses[ToolStatus.OK]),
            f"tools/{name}/timeouts": float(statuses[ToolStatus.TIMEOUT]),
            f"tools/{name}/retries": float(sum(result.num_retries for result in found)),
            f"tools/{name}/latency_mean_s": _mean([result.seconds for result in found]),
            f"tools/{name}/latency_max_s": max((result.seconds for result in found), default=0.0),
            f"tools/{name}/queue_mean_s": _mean([result.queue_seconds for result in found]),
        }
    return metrics


def update_metrics(parts: Sequence[LossMetrics], gaps: Sequence[Tensor]) -> dict[str, float]:
    """The loss's metrics over the micro-batches of a step: counts add up, maxima stay, means weigh by active tokens.

    gaps: for each micro-batch |log-prob of the trainer - log-prob of the sampler| of each token in the loss.
    Empty where no micro-batch had a token in the loss.
    """
    if not parts:
        return {}
    rows = [{name: float(value) for name, value in part._asdict().items() if value is not None} for part in parts]
    weights = [row["num_active_tokens"] for row in rows]
    merged: dict[str, float] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.endswith("_tokens"):
            merged[name] = sum(values)
        elif name.endswith("_max"):
            merged[name] = max(values)
        else:
            merged[name] = sum(w * v for w, v in zip(weights, values, strict=True)) / max(sum(weights), 1.0)
    gap = torch.cat(list(gaps))
    named = {_TRL_NAMES.get(name, f"loss/{name}"): value for name, value in merged.items()}
    return named | {
        "sampling/sampling_logp_difference/mean": float(gap.mean()),
        "sampling/sampling_logp_difference/max": float(gap.max()),
    }


def turn_rows(step: int, groups: Groups) -> Iterator[dict[str, Any]]:
    """The table of a step: one row a turn."""
    for group in groups:
        for trajectory, rewards, credit in group:
            for number in range(len(trajectory.turns)):
                yield _turn_row(
                    step,
                    trajectory,
                    number,
                    reward=rewards.rewards[number],
                    terms={name: values[number] for name, values in rewards.terms.items()},
                    return_=credit.returns[number],
                    advantage=credit.advantages[number],
                    outcome=trajectory.outcome,
                )


def lost_turn_rows(step: int, lost: Sequence[Trajectory]) -> Iterator[dict[str, Any]]:
    """The same table for lost trajectories, which earn nothing: what turns earn is None."""
    for trajectory in lost:
        for number in range(len(trajectory.turns)):
            yield _turn_row(
                step, trajectory, number, reward=None, terms=None, return_=None, advantage=None, outcome=None
            )


def _turn_row(
    step: int,
    trajectory: Trajectory,
    number: int,
    *,
    reward: float | None,
    terms: Mapping[str, float] | None,
    return_: float | None,
    advantage: float | None,
    outcome: float | None,
) -> dict[str, Any]:
    turn = trajectory.turns[number]
    return {
        "step": step,
        "task": trajectory.task.id,
        "trajectory": trajectory.sample,
        "turn": number,
        "text": turn.text,
        "tools": [call.name for call in turn.calls],
        "results": [{"status": result.status.value, "text": result.text} for result in turn.results],
        "tokens": len(turn.completion_ids),
        "reward": reward,
        "reward_terms": terms,
        "return": return_,
        "advantage": advantage,
        "outcome": outcome,
        "stop": trajectory.stop.value,
        "expected_answer": trajectory.task.answer,
        "given_answer": trajectory.answer,
        "policy_version": turn.policy_version,
        "seconds": turn.seconds,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's, and exactly 0 where one of the two does not vary.

    >>> _correlation([0.0, 1.0, 2.0], [1.0, 0.5, 0.0]), _correlation([1.0, 1.0], [0.0, 1.0])
    (-1.0, 0.0)
    """
    spread = _std(first) * _std(second)
    if spread == 0:
        return 0.0
    means = _mean(first), _mean(second)
    covariance = _mean([(a - means[0]) * (b - means[1]) for a, b in zip(first, second, strict=True)])
    return min(max(round(covariance / spread, 12), -1.0), 1.0)


def _std(values: Sequence[float]) -> float:
    """Population standard deviation, and exactly 0 where all values are equal."""
    if not values or min(values) == max(values):
        return 0.0
    mean = _mean(values)
    return float(_mean([(value - mean) ** 2 for value in values]) ** 0.5)
