"""The `torch` backend of turn credit: no loop over turns, no atomics, statistics of sorted segments in float64."""

from collections.abc import Callable

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
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    anchor_ids: Tensor | None,
    rule: CreditRule,
) -> TurnAdvantages:
    """One rule; for quantity="outcome", turn_rewards has the outcome at each trajectory's first turn."""
    num_tokens = torch.bincount(turn_ids.long() + 1, minlength=turn_rewards.shape[0] + 1)[1:]
    x, advantages = exact_advantages(
        turn_rewards, cu_turns, group_ids, num_tokens, anchor_ids, rule, turn_returns, normalise
    )
    advantages = advantages.masked_fill(num_tokens == 0, 0.0)
    return look_up_by_turn(advantages, x, turn_ids, accumulator_dtype(turn_rewards.dtype))


def exact_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    num_tokens: Tensor,
    anchor_ids: Tensor | None,
    rule: CreditRule,
    turn_returns: Callable[[Tensor, Tensor, float], Tensor],
    normalise: Callable[[Tensor, Tensor, Tensor, Tensor, CreditRule], Tensor],
) -> tuple[Tensor, Tensor]:
    """(x, A) of a rule on any backend, [K] float64 each; turns without tokens are not 0 yet.

    num_tokens: [K] int, of each turn.  turn_returns, normalise: those of the backend.
    """
    turn = torch.arange(turn_rewards.shape[0], device=turn_rewards.device)
    trajectory = trajectory_of_turn(cu_turns, turn)
    first = cu_turns.long()[trajectory]
    x = turn_returns(turn_rewards, cu_turns, rule.gamma_before)
    if rule.per_trajectory:
        x = x[first]
    advantages = x
    if rule.scope != "none":
        scope = scope_of_turn(group_ids, trajectory, turn - first, anchor_ids, rule.scope)
        entry = entry_of_turn(num_tokens > 0, first, rule.population)
        mass = num_tokens.double() if rule.population == "tokens" else torch.ones_like(x)
        advantages = normalise(x, scope, entry, mass, rule)
    if rule.gamma_after:
        advantages = turn_returns(advantages, cu_turns, rule.gamma_after)
    return x, advantages


def trajectory_of_turn(cu_turns: Tensor, turn: Tensor) -> Tensor:
    """[K] int64: the trajectory that each turn belongs to."""
    return torch.searchsorted(cu_turns[1:].long().contiguous(), turn, right=True)


def entry_of_turn(has_tokens: Tensor, first: Tensor, population: str) -> Tensor:
    """[K] int64: the turn whose value is k's own entry in the population, -1 where there is none.

    first: [K], the first turn of k's trajectory.
    """
    turn = torch.arange(len(first), device=first.device)
    if population != "trajectories":
        return turn.masked_fill(~has_tokens, -1)
    # of each turn, the nearest one from there on that has tokens; it counts where it is of the same trajectory
    nearest = turn.masked_fill(~has_tokens, len(first)).flip(0).cummin(0).values.flip(0)
    entry = nearest[first]
    return entry.masked_fill(torch.cat([first, first.new_full((1,), -1)])[entry] != first, -1)


def scope_of_turn(
    group_ids: Tensor, trajectory: Tensor, position: Tensor, anchor_ids: Tensor | None, scope: str
) -> Tensor:
    """[K] int64: equal for turns that share statistics.  position: of the turn in its trajectory."""
    if scope == "batch" or not len(trajectory):
        return torch.zeros_like(trajectory)
    group = torch.unique(group_ids, return_inverse=True)[1][trajectory]
    if scope == "group":
        return group
    second = position if anchor_ids is None else torch.unique(anchor_ids, return_inverse=True)[1]
    return group * (second.max() + 1) + second


def normalise(x: Tensor, scope: Tensor, entry: Tensor, mass: Tensor, rule: CreditRule) -> Tensor:
    """[K] float64: x by the statistics of its scope; mass: [K], what turn k weighs where it is an entry."""
    members = (entry == torch.arange(len(x), device=x.device)).nonzero().squeeze(1)
    order = members[scope[members].argsort(stable=True)]
    present, lengths = torch.unique_consecutive(scope[order], return_counts=True)
    if not len(present):
        return torch.zeros_like(x)

    def reduce(values: Tensor, how: str) -> Tensor:
        # segment reductions add in a fixed order; scattered adds would not on a GPU
        return torch.segment_reduce(values, how, lengths=lengths)

    values, weights = x[order], mass[order]
    total, weighted, low = reduce(weights, "sum"), reduce(weights * values, "sum"), reduce(values, "min")
    spread = reduce(values, "max") > low
    # the mean of equal numbers may differ from them by rounding
    mean = torch.where(spread, weighted / total, low)
    squares = weights * (values - mean.repeat_interleave(lengths)).square()
    std = (reduce(squares, "sum") / (total - rule.ddof).clamp(min=1)).sqrt()
    row = torch.searchsorted(present, scope).clamp(max=len(present) - 1)
    centre = torch.zeros_like(x) if rule.centre == "none" else mean[row]
    if rule.centre == "leave_one_out":
        own_mass = mass[entry].masked_fill(entry < 0, 0.0)
        others = (weighted[row] - own_mass * x[entry]) / (total[row] - own_mass).clamp(min=1)
        centre = torch.where(spread[row], others, centre)
    normalised, alone = x - centre, x
    if rule.scale == "std":
        normalised = torch.where(spread[row], normalised / (std[row] + rule.eps), 0.0)
        alone = x / (1.0 + rule.eps)
    alone = alone if rule.singleton == "keep" else torch.zeros_like(x)
    normalised = torch.where(lengths[row] == 1, alone, normalised)
    return torch.where(present[row] == scope, normalised, 0.0)
