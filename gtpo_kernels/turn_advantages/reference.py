"""The definition of turn credit: a loop over turns, and statistics in float64."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype

Quantity = Literal["turn_return", "trajectory_return", "outcome", "turn_reward"]
Order = Literal["discount_first", "normalise_first"]
Scope = Literal["group", "batch", "group_turn", "group_anchor", "none"]
Population = Literal["turns", "trajectories", "tokens"]
Centre = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "mean", "none"]
Singleton = Literal["zero", "keep"]


class TurnAdvantages(NamedTuple):
    """The credit of a batch, float32 (float64 for float64 rewards).

    advantages: [N], of each token's turn; 0 where turn_ids is -1.
    turn_advantages: [K]; 0 for turns without tokens.
    returns: [K], discounted: what the first term normalises.
    """

    advantages: Tensor
    turn_advantages: Tensor
    returns: Tensor


class CreditRule(NamedTuple):
    """How rewards become advantages, A_k = Norm(x_k): what x is, and by which statistics it is normalised.

    quantity: x_k is the "turn_return" R_k = r_k + gamma R_{k+1}; the "trajectory_return", R of the trajectory's first
        turn, for all its turns; the "outcome" of its trajectory; or the "turn_reward" r_k, never discounted.
    order: "normalise_first", for turn_return: normalises turn rewards and takes the discounted returns of the result.
    scope: whose values share statistics: "group", "batch", "group_turn" (same group and position in the trajectory),
        "group_anchor" (same group and anchor id), or "none" (A_k = x_k, and nothing below matters).
    population: one entry a turn, one a trajectory (the value at its first turn with tokens), or one a token.
    centre: taken off: the "mean" of the population, that of the population without the trajectory's, turn's or turn's
        tokens' own entry ("leave_one_out"), or nothing ("none").
    scale: divides by "std" + eps, of the population with `ddof` (0 or 1); by the "mean" + eps, with advantages of 0
        where the mean is not above 0; or by nothing ("none").
    singleton: a scope whose population has one entry has advantage 0 ("zero"), or mean 0 and std 1 ("keep").  Entries
        count, not trajectories: a lone trajectory of several turns is none where the population is "turns".
    Where the population has no spread (max == min), "std" gives exactly 0.

    >>> CreditRule(quantity="trajectory_return", gamma=1.0, population="trajectories", scale="none").scope
    'group'
    """

    quantity: Quantity = "turn_return"
    gamma: float = 0.9
    order: Order = "discount_first"
    scope: Scope = "group"
    population: Population = "turns"
    centre: Centre = "mean"
    scale: Scale = "std"
    ddof: int = 1
    eps: float = 1e-6
    singleton: Singleton = "zero"

    @property
    def gamma_before(self) -> float:
        """The discount of the rewards, before the normalisation."""
        discounts = self.quantity in ("turn_return", "trajectory_return") and self.order == "discount_first"
        return self.gamma if discounts else 0.0

    @property
    def gamma_after(self) -> float:
        """The discount of what is normalised already."""
        return self.gamma if self.order == "normalise_first" else 0.0

    @property
    def per_trajectory(self) -> bool:
        """Whether all turns of a trajectory have the value of its first."""
        return self.quantity in ("trajectory_return", "outcome")


def turn_returns_reference(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """[K] float64: R_k = r_k + gamma * R_{k+1} within each trajectory; see `gtpo_kernels.turn_returns`."""
    returns = turn_rewards.double().clone()
    bounds = cu_turns.tolist()
    for first, end in pairwise(bounds):
        for k in range(end - 2, first - 1, -1):
            returns[k] += gamma * returns[k + 1]
    return returns


def turn_advantages_reference(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    anchor_ids: Tensor | None,
    rule: CreditRule,
) -> TurnAdvantages:
    """One rule as its definition; for "outcome", turn_rewards has the outcome at each trajectory's first turn."""
    x = turn_returns_reference(turn_rewards, cu_turns, rule.gamma_before)
    num_tokens = torch.bincount(turn_ids.long() + 1, minlength=len(x) + 1)[1:].tolist()
    anchors = [0] * len(x) if anchor_ids is None else anchor_ids.tolist()
    entries = [-1] * len(x)  # the turn whose value is k's own entry in the population, -1 where there is none
    turns: dict[object, list[int]] = {}  # scope -> its turns
    for trajectory, (first, end) in enumerate(pairwise(cu_turns.tolist())):
        if rule.per_trajectory and end > first:
            x[first:end] = float(x[first])
        with_tokens = [k for k in range(first, end) if num_tokens[k]]
        group = int(group_ids[trajectory])
        for k in range(first, end):
            second = {"group_turn": k - first, "group_anchor": anchors[k]}.get(rule.scope, 0)
            turns.setdefault((0 if rule.scope == "batch" else group, second), []).append(k)
            if rule.population == "trajectories":
                entries[k] = with_tokens[0] if with_tokens else -1
            elif num_tokens[k]:
                entries[k] = k

    advantages = x.clone()
    if rule.scope != "none":
        for ks in turns.values():
            masses = [float(num_tokens[k]) if rule.population == "tokens" else 1.0 for k in ks]
            mass = dict(zip(ks, masses, strict=True))
            advantages[ks] = normalise_scope(x, ks, entries, mass, rule)
    advantages = turn_returns_reference(advantages, cu_turns, rule.gamma_after)
    advantages[torch.tensor(num_tokens, device=x.device) == 0] = 0.0
    return look_up_by_turn(advantages, x, turn_ids, accumulator_dtype(turn_rewards.dtype))


def normalise_scope(
    x: Tensor, ks: list[int], entries: Sequence[int], mass: dict[int, float], rule: CreditRule
) -> Tensor:
    """The normalised values of the turns `ks`, which are one scope."""
    members = [k for k in ks if entries[k] == k]
    values = x[ks]
    if not members:
        return torch.zeros_like(values)
    if len(members) == 1:
        kept = values / (1.0 + rule.eps) if rule.scale == "std" else values
        return kept if rule.singleton == "keep" else torch.zeros_like(values)
    weights, population = x.new_tensor([mass[k] for k in members]), x[members]
    has_spread = bool(population.max() > population.min())
    # the mean of equal numbers may differ from them by rounding
    mean = (weights * population).sum() / weights.sum() if has_spread else population[0]
    if rule.centre == "none":
        centre = torch.zeros_like(values)
    elif rule.centre == "mean" or not has_spread:
        centre = mean.expand(len(ks))
    else:
        own = [(mass[entries[k]], float(x[entries[k]])) if entries[k] >= 0 else (0.0, 0.0) for k in ks]
        own_mass, own_value = x.new_tensor(own).unbind(1)
        centre = ((weights * population).sum() - own_mass * own_value) / (weights.sum() - own_mass)
    if rule.scale == "none":
        return values - centre
    if rule.scale == "mean":
        return over_mean(values - centre, mean.expand(len(ks)), rule.eps)
    # Without a spread there is nothing to compare, and dividing rounding errors by eps would invent a difference.
    if not has_spread:
        return torch.zeros_like(values)
    std = ((weights * (population - mean).square()).sum() / (weights.sum() - rule.ddof)).sqrt()
    return (values - centre) / (std + rule.eps)


def over_mean(centred: Tensor, mean: Tensor, eps: float) -> Tensor:
    """centred / (mean + eps), 0 where the mean is not above 0."""
    return torch.where(mean > 0, centred / (mean + eps), torch.zeros_like(centred))


def look_up_by_turn(advantages: Tensor, returns: Tensor, turn_ids: Tensor, dtype: torch.dtype) -> TurnAdvantages:
    """Round to the output dtype, and give every token the advantage of its turn."""
    # one more entry of 0, which the index -1 finds
    by_turn = torch.cat([advantages, advantages.new_zeros(1)]).to(dtype)
    return TurnAdvantages(by_turn[turn_ids.long()], by_turn[:-1].clone(), returns.to(dtype))
