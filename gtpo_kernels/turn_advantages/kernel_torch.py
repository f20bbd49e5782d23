"""The `torch` backend of turn credit: no loop over turns, no atomics, statistics of sorted segments in float64."""

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.turn_advantages.reference import CreditRule, TurnAdvantages, look_up_by_turn


def turn_returns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """[K] float64.  After step s a turn holds the discounted sum of the next 2^s rewards: log2(K) steps are enough."""
    num_turns = turn_rewards.shape[0]
    # a copy even of float64 rewards: the result of a registered op is memory of its own
    returns = turn_rewards.to(torch.float64, copy=True)
    turn = torch.arange(num_turns, device=turn_rewards.device)
    end = cu_turns.long()[trajectory_of_turn(cu_turns, turn) + 1]
    remaining = end - turn  # turns to the end of the trajectory, this one included
    step = 1
    while step < num_turns:
        ahead = torch.cat([returns[step:], returns.new_zeros(step)]).masked_fill(remaining <= step, 0.0)
        returns = returns + gamma**step * ahead
        step *= 2
    return returns


def turn_advantages(
    turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, rule: CreditRule
) -> TurnAdvantages:
    """See `gtpo_kernels.turn_advantages`."""
    num_turns = turn_rewards.shape[0]
    turn = torch.arange(num_turns, device=turn_rewards.device)
    returns = turn_returns(turn_rewards, cu_turns, rule.gamma)
    has_tokens = torch.zeros(num_turns + 1, dtype=torch.bool, device=turn.device)
    has_tokens[turn_ids.long()] = True  # every writer writes the same; -1 lands in the spare entry
    has_tokens = has_tokens[:-1]
    if rule.scope == "none":
        advantages = returns
    else:
        trajectory = trajectory_of_turn(cu_turns, turn)
        first = cu_turns.long()[trajectory]
        in_population = first_with_tokens(has_tokens, first) if rule.population == "trajectories" else has_tokens
        scope = scope_of_turn(group_ids, trajectory, turn - first, rule.scope)
        advantages = normalise(returns, scope, in_population, rule.ddof, rule.eps)
    advantages = advantages.masked_fill(~has_tokens, 0.0)
    return look_up_by_turn(advantages, returns, turn_ids, accumulator_dtype(turn_rewards.dtype))


def trajectory_of_turn(cu_turns: Tensor, turn: Tensor) -> Tensor:
    """[K] int64: the trajectory that each turn belongs to."""
    return torch.searchsorted(cu_turns[1:].long().contiguous(), turn, right=True)


def first_with_tokens(has_tokens: Tensor, first: Tensor) -> Tensor:
    """[K] bool: the first turn with tokens of each trajectory.  first: [K], the first turn of k's trajectory."""
    tokens_before = torch.cat([has_tokens.new_zeros(1, dtype=torch.long), has_tokens.cumsum(0)])
    return has_tokens & (tokens_before[:-1] == tokens_before[first])


def scope_of_turn(group_ids: Tensor, trajectory: Tensor, position: Tensor, scope: str) -> Tensor:
    """[K] int64: equal for turns that share statistics.  position: of the turn in its trajectory."""
    if scope == "batch" or not len(trajectory):
        return torch.zeros_like(trajectory)
    group = torch.unique(group_ids, return_inverse=True)[1][trajectory]
    return group if scope == "group" else group * (position.max() + 1) + position


def normalise(x: Tensor, scope: Tensor, in_population: Tensor, ddof: int, eps: float) -> Tensor:
    """(x - mean) / (std + eps), [K] float64, by the population of x's scope; 0 where that has no spread."""
    entries = in_population.nonzero().squeeze(1)
    order = entries[scope[entries].argsort(stable=True)]
    present, lengths = torch.unique_consecutive(scope[order], return_counts=True)
    if not len(present):
        return torch.zeros_like(x)
    # Segment reductions add in a fixed order; scattered adds would not on a GPU.
    values = x[order]
    mean = torch.segment_reduce(values, "sum", lengths=lengths) / lengths
    deviation = values - mean.repeat_interleave(lengths)
    variance = torch.segment_reduce(deviation.square(), "sum", lengths=lengths) / (lengths - ddof).clamp(min=1)
    spread = torch.segment_reduce(values, "max", lengths=lengths) > torch.segment_reduce(values, "min", lengths=lengths)
    # a turn outside the population may be of a scope that has none; its value is masked by the caller
    row = torch.searchsorted(present, scope).clamp(max=len(present) - 1)
    return torch.where(spread[row], (x - mean[row]) / (variance[row].sqrt() + eps), 0.0)
