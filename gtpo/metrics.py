"""The metrics of a step, as plain numbers. TRL's names where TRL has the metric; pure functions of the step's records.

Timing fields end in `_s` or `_per_s`; everything else repeats bit for bit under one seed.
"""

from collections import Counter
from collections.abc import Sequence

from gtpo.credit import Credit
from gtpo.rewards import TurnRewards, has_format_fault, is_void_turn
from gtpo.types import StopReason, ToolStatus, Trajectory

Groups = Sequence[Sequence[Trajectory]]


def rollout_metrics(
    groups: Groups, rewards: Sequence[Sequence[TurnRewards]], credit: Sequence[Sequence[Credit]]
) -> dict[str, float]:
    """Metrics of trajectories, rewards and credit. `groups` are without lost trajectories."""
    trajectories = [trajectory for group in groups for trajectory in group]
    flat_rewards = [reward for group in rewards for reward in group]
    flat_credit = [item for group in credit for item in group]
    lengths = [sum(len(turn.completion_ids) for turn in t.turns) for t in trajectories]
    totals = [sum(reward.rewards) for reward in flat_rewards]
    turns = [turn for t in trajectories for turn in t.turns]
    calls = [result for turn in turns for result in turn.results]
    correct = [lp for t in trajectories if t.outcome == 1 for turn in t.turns for lp in turn.rollout_logprobs]
    spreads = [_std([sum(reward.rewards) for reward in group]) for group in rewards]
    metrics = {
        "reward": _mean(totals),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean([float(spread == 0) for spread in spreads]),
        "success": _mean([float(t.outcome == 1) for t in trajectories]),
        "num_completion_tokens": float(sum(lengths)),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([float(t.stop is StopReason.TRUNCATED) for t in trajectories]),
        "completions/correct_logprob": _mean(correct),
        "turns/mean": _mean([len(t.turns) for t in trajectories]),
        "turns/max": float(max(len(t.turns) for t in trajectories)),
        "turns/void_ratio": _mean([float(is_void_turn(t, i)) for t in trajectories for i in range(len(t.turns))]),
        "turn_reward/mean": _mean([value for reward in flat_rewards for value in reward.rewards]),
        "turn_reward/format_fault_ratio": _mean(
            [float(has_format_fault(t, i)) for t in trajectories for i in range(len(t.turns))]
        ),
        "turn_return/mean": _mean([value for item in flat_credit for value in item.returns]),
        "turn_return/std": _std([value for item in flat_credit for value in item.returns]),
        "turn_advantage/abs_max": max(abs(value) for item in flat_credit for value in item.advantages),
        "shaping/similarity": _mean([reward.similarity for reward in flat_rewards]),
        "shaping/execution": _mean([value for reward in flat_rewards for value in reward.execution]),
        "tools/calls_per_task": _mean([t.num_calls for t in trajectories]),
        "tools/call_frequency": _mean([float(t.num_calls > 0) for t in trajectories]),
        "tools/failure_frequency": _mean([float(result.status is not ToolStatus.OK) for result in calls]),
        "tools/invalid_calls_per_task": _mean([t.num_invalid_calls for t in trajectories]),
    }
    statuses = Counter(result.status for result in calls)
    metrics |= {f"tools/status/{status.value}": float(statuses[status]) for status in ToolStatus}
    stops = Counter(t.stop for t in trajectories)
    metrics |= {f"stop/{stop.value}": float(stops[stop]) for stop in StopReason}
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _std(values: Sequence[float]) -> float:
    """Population standard deviation, and exactly 0 where all values are equal."""
    if not values or min(values) == max(values):
        return 0.0
    mean = _mean(values)
    return float(_mean([(value - mean) ** 2 for value in values]) ** 0.5)
