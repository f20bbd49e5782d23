"""The definition of `turn_returns` and `turn_advantages`: a loop over turns, and statistics in float64."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype


class TurnAdvantages(NamedTuple):
    """The credit of a batch, float32 (float64 for float64 rewards).

    advantages: [N], of each token's turn; 0 where turn_ids is -1.
    turn_advantages: [K]; 0 for turns without tokens.
    returns: [K], discounted.
    """

    advantages: Tensor
    turn_advantages: Tensor
    returns: Tensor


class CreditRule(NamedTuple):
    """How returns become advantages; see `gtpo_kernels.turn_advantages`."""

    gamma: float
    scope: str
    population: str
    ddof: int
    eps: float


def turn_returns_reference(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """[K] float64: R_k = r_k + gamma * R_{k+1} within each trajectory; see `gtpo_kernels.turn_returns`."""
    returns = turn_rewards.double().clone()
    bounds = cu_turns.tolist()
    for first, end in pairwise(bounds):
        for k in range(end - 2, first - 1, -1):
            returns[k] += gamma * returns[k + 1]
    return returns


def turn_advantages_reference(
    turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, rule: CreditRule
) -> TurnAdvantages:
    """`turn_advantages` as its definition; see `gtpo_kernels.turn_advantages`."""
    returns = turn_returns_reference(turn_rewards, cu_turns, rule.gamma)
    has_tokens = torch.zeros_like(turn_rewards, dtype=torch.bool)
    has_tokens[turn_ids[turn_ids >= 0].long()] = True
    turns: dict[object, list[int]] = {}  # scope -> its turns with tokens
    entries: dict[object, list[int]] = {}  # scope -> the turns whose returns make its statistics
    bounds = cu_turns.tolist()
    for trajectory, (first, end) in enumerate(pairwise(bounds)):
        with_tokens = [k for k in range(first, end) if has_tokens[k]]
        for k in with_tokens:
            group = int(group_ids[trajectory])
            scope = {"group": group, "batch": 0, "group_turn": (group, k - first), "none": k}[rule.scope]
            turns.setdefault(scope, []).append(k)
            if rule.population == "turns" or k == with_tokens[0]:
                entries.setdefault(scope, []).append(k)

    advantages = torch.zeros_like(returns)
    for scope, ks in turns.items():
        if rule.scope == "none":
            advantages[ks] = returns[ks]
            continue
        population = returns[entries[scope]]
        # Without a spread there is nothing to compare, and dividing rounding errors by eps would invent a difference.
        if population.max() > population.min():
            std = population.std(correction=rule.ddof)
            advantages[ks] = (returns[ks] - population.mean()) / (std + rule.eps)
    return look_up_by_turn(advantages, returns, turn_ids, accumulator_dtype(turn_rewards.dtype))


def look_up_by_turn(advantages: Tensor, returns: Tensor, turn_ids: Tensor, dtype: torch.dtype) -> TurnAdvantages:
    """Round to the output dtype, and give every token the advantage of its turn."""
    # one more entry of 0, which the index -1 finds
    by_turn = torch.cat([advantages, advantages.new_zeros(1)]).to(dtype)
    return TurnAdvantages(by_turn[turn_ids.long()], by_turn[:-1].clone(), returns.to(dtype))
