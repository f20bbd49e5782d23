"""`turn_returns`, `turn_advantages`, `combined_advantages` and `TurnCredit`: public functions and registration."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gtpo_kernels.backend import run_kernel, select_backend
from gtpo_kernels.checks import accumulator_dtype, check_choice, check_tensor, check_values
from gtpo_kernels.turn_advantages.checks import (
    check_outcomes,
    check_rule,
    check_turn_ids,
    check_turn_values,
    check_turns,
)
from gtpo_kernels.turn_advantages.reference import (
    CreditRule,
    Population,
    Scope,
    TurnAdvantages,
    look_up_by_turn,
    over_mean,
    turn_advantages_reference,
    turn_returns_reference,
)

FAMILY = "turn_advantages"
Others = Literal["leave", "zero"]


def turn_returns(turn_rewards: Tensor, cu_turns: Tensor, *, gamma: float = 0.9, backend: str | None = None) -> Tensor:
    """Discounted return of every turn: R_k = r_k + gamma * R_{k+1}, restarting at each trajectory.

    turn_rewards: [K] float.  cu_turns: [B+1] int32 or int64 prefix sums of turns a trajectory, cu_turns[-1] == K.
    gamma: in [0, 1], a discount per turn, never per token.
    Returns [K] float32 (float64 for float64 rewards), accumulated in float64.
    Raises ValueError for a NaN reward, for cu_turns that decrease, and for other shapes, dtypes or devices.
    Source: arXiv 2511.14846.

    >>> turn_returns(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 3]), gamma=0.5).tolist()
    [1.5, 1.0, 2.0]
    """
    check_turns(turn_rewards, cu_turns, gamma)
    name = select_backend(FAMILY, backend, turn_rewards.device)
    return _turn_returns(turn_rewards, cu_turns, gamma, name)


def turn_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    *,
    gamma: float = 0.9,
    scope: Scope = "group",
    population: Population = "turns",
    ddof: int = 1,
    eps: float = 1e-6,
    backend: str | None = None,
) -> TurnAdvantages:
    """Advantage of every turn, and of every token by its turn: A_k = (R_k - mean) / (std + eps).

    R_k are the returns of `turn_returns`; mean and std are those of the population of the turn's scope.
    turn_rewards: [K] float.  cu_turns: [B+1] int32 or int64.  group_ids: [B] int, equal for trajectories of one task.
    turn_ids: [N] int, the turn that each token was sampled in, -1 for prompt and tool tokens.
    scope: "group", "batch", "group_turn" (same group and same position in the trajectory), or "none" (A_k = R_k).
    population: "turns" (every turn with tokens), "trajectories" (the return at each trajectory's first turn with
        tokens; the statistics then apply to all its turns; with gamma=1 and a terminal reward this is GRPO), or
        "tokens" (every turn as often as it has tokens).
    ddof: 0 or 1.
    This is one `CreditRule` with mean and std; for its other fields, and for sums of terms, see `combined_advantages`.
    Turns without tokens pass rewards back through the returns, but leave the statistics; their own advantage is 0.
    Statistics are in float64.  A scope without spread (max == min; a single entry) has advantages of exactly 0.
    Give it whole groups, before any split into micro-batches.  No gradient flows.
    Returns (advantages [N], turn_advantages [K], returns [K]), float32 (float64 for float64 rewards).
    Raises ValueError for a NaN reward, for ids out of range, and for other shapes, dtypes, devices or choices.
    Source: arXiv 2511.14846; arXiv 2402.03300 for population="trajectories".

    >>> credit = turn_advantages(
    ...     torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 3]), torch.tensor([7, 7]),
    ...     torch.tensor([-1, 0, 1, 1, -1, 2]), gamma=1.0)
    >>> [round(a, 3) for a in credit.advantages.tolist()]
    [0.0, 0.577, 0.577, 0.577, 0.0, -1.155]
    """
    rule = CreditRule(gamma=gamma, scope=scope, population=population, ddof=ddof, eps=eps)
    return _advantages_of_rule(TurnBatch(turn_rewards, cu_turns, group_ids, turn_ids), rule, backend)


class CreditTerm(NamedTuple):
    """One summand of a credit.

    weight: what the rule's advantages are multiplied by: a number, or [K] float, one a turn.
    turns: [K] bool, the turns it is about, None for all; others get nothing from it.
    others: these "leave" its statistics, or stay there with a reward of "zero".
    rewards: [K] float in the place of `turn_rewards`, for a term about one kind of reward.
    anchor_ids: [K] int in the place of those of the call.
    """

    rule: CreditRule
    weight: float | Tensor = 1.0
    turns: Tensor | None = None
    others: Others = "leave"
    rewards: Tensor | None = None
    anchor_ids: Tensor | None = None


def combined_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    terms: Sequence[CreditTerm],
    *,
    average: bool = False,
    then: CreditRule | None = None,
    outcomes: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    backend: str | None = None,
) -> TurnAdvantages:
    """A weighted sum of normalised quantities, for every turn and token: A_k = sum_l weight_l[k] * Norm_l(x_l[k]).

    turn_rewards [K], cu_turns [B+1], group_ids [B], turn_ids [N]: as for `turn_advantages`.
    terms: at least one; the fields of a `CreditRule` say what x is and how Norm works.
    average: divides the sum, turn by turn, by the sum of the weights of those terms whose advantage there is not 0.
    then: applied to the sum, as to rewards: CreditRule("turn_reward", scope="batch", population="tokens") whitens it.
    outcomes: [B] in the dtype of turn_rewards, for quantity="outcome".
    anchor_ids: [K] int, equal for turns that were taken in the same state, for scope="group_anchor".
    Sums and statistics are in float64, rounded once.  No gradient flows.
    Returns (advantages [N], turn_advantages [K], x of the first term [K]), float32 (float64 for float64 rewards).
    Raises ValueError as `turn_advantages` does, for terms that lack what they need,
    and for fields that do not go together.
    Source: the methods in docs/credit.md, each of which is such a sum.

    >>> group = [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 3]), torch.tensor([7, 7]), torch.arange(3)]
    >>> others = CreditRule("trajectory_return", 1.0, population="trajectories", centre="leave_one_out", scale="none")
    >>> combined_advantages(*group, [CreditTerm(others)]).turn_advantages.tolist()
    [1.0, 1.0, -1.0]
    >>> early = CreditTerm(CreditRule("turn_reward", scope="none"), torch.tensor([0.0, 0.5, 0.0]))
    >>> combined_advantages(*group, [CreditTerm(others), early]).turn_advantages.tolist()
    [1.0, 1.5, -1.0]
    """
    if not terms:
        raise ValueError("terms must hold at least one CreditTerm, got none")
    for term in terms:
        check_choice("others", term.others, get_args(Others))
        if not isinstance(term.weight, Tensor) and not math.isfinite(term.weight):
            raise ValueError(f"weight must be finite, got {term.weight}")
    batch = TurnBatch(turn_rewards, cu_turns, group_ids, turn_ids, outcomes, anchor_ids)
    first_term = terms[0]
    is_plain = all(value is None for value in (first_term.turns, first_term.rewards, first_term.anchor_ids, then))
    has_weight = isinstance(first_term.weight, Tensor) or first_term.weight != 1.0
    if is_plain and not has_weight and len(terms) == 1 and not average:
        return _advantages_of_rule(batch, terms[0].rule, backend)
    if isinstance(outcomes, Tensor):
        check_outcomes(outcomes, turn_rewards, cu_turns)
        batch = batch._replace(outcomes=outcomes.double())
    check_tensor("turn_rewards", turn_rewards, layout="[K]", shape=(None,), kind="float")
    shape, device = tuple(turn_rewards.shape), turn_rewards.device
    dtype = accumulator_dtype(turn_rewards.dtype)
    total, first = torch.zeros_like(turn_rewards, dtype=torch.float64), None
    weight_of_sum = torch.zeros_like(total)
    for rule, weight, turns, others, own_rewards, own_anchors in terms:
        if isinstance(weight, Tensor):
            check_tensor("weight", weight, layout="[K]", shape=shape, kind="float", device=device)
        if own_rewards is not None:
            check_tensor("rewards", own_rewards, layout="[K]", shape=shape, kind="float", device=device)
        ids, rewards = turn_ids, (turn_rewards if own_rewards is None else own_rewards).double()
        if turns is not None:
            check_tensor("turns", turns, layout="[K]", shape=shape, kind="bool", device=device)
            if others == "zero":
                rewards = rewards.masked_fill(~turns, 0.0)
            else:
                ids = _ids_of_turns(turn_ids, turns)
        anchors = batch.anchor_ids if own_anchors is None else own_anchors
        of_term = batch._replace(turn_rewards=rewards, turn_ids=ids, anchor_ids=anchors)
        credit = _advantages_of_rule(of_term, rule, backend)
        share, of_weight = weight * credit.turn_advantages, weight * (credit.turn_advantages != 0)
        # others get nothing, whatever weight they have: 0 * NaN is NaN
        total = total + (share if turns is None else share.masked_fill(~turns, 0.0))
        weight_of_sum = weight_of_sum + (of_weight if turns is None else of_weight.masked_fill(~turns, 0.0))
        first = credit.returns if first is None else first
    if average:
        total = torch.where(weight_of_sum != 0, total / weight_of_sum, 0.0)
    if then is not None:
        total = _advantages_of_rule(batch._replace(turn_rewards=total), then, backend).turn_advantages
    assert first is not None
    return look_up_by_turn(total, first, turn_ids, dtype)


def _ids_of_turns(turn_ids: Tensor, turns: Tensor) -> Tensor:
    """[N]: turn_ids, -1 for tokens of other turns than `turns` [K] bool.  Ids out of range stay, to be refused."""
    num_turns = turns.shape[0]
    known = (turn_ids >= 0) & (turn_ids < num_turns)
    # one more entry, for tokens that have no turn
    of_tokens = torch.cat([turns, turns.new_zeros(1)])[turn_ids.long().masked_fill(~known, num_turns)]
    return turn_ids.masked_fill(known & ~of_tokens, -1)


class TurnBatch(NamedTuple):
    """What one rule is applied to; the fields are those arguments of `combined_advantages`."""

    turn_rewards: Tensor
    cu_turns: Tensor
    group_ids: Tensor
    turn_ids: Tensor
    outcomes: Tensor | None = None
    anchor_ids: Tensor | None = None


def _advantages_of_rule(batch: TurnBatch, rule: CreditRule, backend: str | None) -> TurnAdvantages:
    turn_rewards, cu_turns, group_ids, turn_ids, outcomes, anchor_ids = batch
    check_turns(turn_rewards, cu_turns, rule.gamma)
    check_rule(rule)
    device = turn_rewards.device
    num_turns, num_trajectories = turn_rewards.shape[0], cu_turns.shape[0] - 1
    check_tensor("group_ids", group_ids, layout="[B]", shape=(num_trajectories,), kind="int", device=device)
    check_tensor("turn_ids", turn_ids, layout="[N]", shape=(None,), kind="int", device=device)
    # what this rule does not read does not reach its kernel
    outcomes = outcomes if rule.quantity == "outcome" else None
    anchor_ids = anchor_ids if rule.scope == "group_anchor" else None
    if rule.quantity == "outcome":
        if outcomes is None:
            raise ValueError("outcomes must be [B] for quantity='outcome', got None")
        check_outcomes(outcomes, turn_rewards, cu_turns)
    if rule.scope == "group_anchor":
        if anchor_ids is None:
            raise ValueError("anchor_ids must be [K] for scope='group_anchor', got None")
        check_tensor("anchor_ids", anchor_ids, layout="[K]", shape=(num_turns,), kind="int", device=device)
    name = select_backend(FAMILY, backend, device)
    batch = batch._replace(outcomes=outcomes, anchor_ids=anchor_ids)
    if rule.scale == "mean" and rule.scope != "none" and name != "reference":
        return _over_mean(batch, rule, name)
    outputs = _turn_advantages(*batch, *rule, name)
    return TurnAdvantages(*outputs)


def _over_mean(batch: TurnBatch, rule: CreditRule, backend: str) -> TurnAdvantages:
    """A rule of scale "mean" by the backend's rule without a scale, which tells what the mean is."""
    outcomes = None if batch.outcomes is None else batch.outcomes.double()
    exact = batch._replace(turn_rewards=batch.turn_rewards.double(), outcomes=outcomes)
    _, centred, x = _turn_advantages(*exact, *rule._replace(scale="none"), backend)
    advantages = over_mean(centred, x - centred, rule.eps)
    return look_up_by_turn(advantages, x, batch.turn_ids, accumulator_dtype(batch.turn_rewards.dtype))


def _run(batch: TurnBatch, rule: CreditRule, backend: str) -> TurnAdvantages:
    """Check the values, and run the backend."""
    turn_rewards, cu_turns, group_ids, turn_ids, outcomes, anchor_ids = batch
    check_turn_values(turn_rewards, cu_turns)
    if backend != "cpp":  # which refuses the same as it reads them
        check_turn_ids(turn_ids, turn_rewards.shape[0])
    if outcomes is not None:
        check_values(outcomes.isfinite().all(), "outcomes must be finite, got NaN or infinite outcomes")
        turn_rewards = rewards_of_outcomes(outcomes, cu_turns, turn_rewards.shape[0])
    arguments = (turn_rewards, cu_turns, group_ids, turn_ids, anchor_ids, rule)
    if backend == "reference":
        return turn_advantages_reference(*arguments)
    result: TurnAdvantages = run_kernel(FAMILY, backend, "turn_advantages", turn_rewards.device, *arguments)
    return result


def rewards_of_outcomes(outcomes: Tensor, cu_turns: Tensor, num_turns: int) -> Tensor:
    """[K]: each trajectory's outcome at its first turn, whose return it then is whatever the discount.

    >>> rewards_of_outcomes(torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0, 2, 2, 3]), 3).tolist()
    [3.0, 0.0, 5.0]
    """
    first, end = cu_turns[:-1].long(), cu_turns[1:].long()
    rewards = outcomes.new_zeros(num_turns + 1)
    # trajectories without turns share the spare entry
    rewards[torch.where(end > first, first, num_turns)] = outcomes
    return rewards[:-1]


class TurnCredit(NamedTuple):
    """Credit in turn form, which the fused losses take for per-token advantages.

    The fields are the arguments of `turn_advantages`; or, beside the four tensors, those of `combined_advantages`.

    >>> cu_turns, group_ids, turn_ids = torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.tensor([0, 1, -1])
    >>> credit = TurnCredit(torch.tensor([1.0, 0.0]), cu_turns, group_ids, turn_ids)
    >>> [round(a, 4) for a in credit.advantages().tolist()]
    [0.7071, -0.7071, 0.0]
    """

    turn_rewards: Tensor
    cu_turns: Tensor
    group_ids: Tensor
    turn_ids: Tensor
    gamma: float = 0.9
    scope: Scope = "group"
    population: Population = "turns"
    ddof: int = 1
    eps: float = 1e-6
    terms: tuple[CreditTerm, ...] = ()
    average: bool = False
    then: CreditRule | None = None
    outcomes: Tensor | None = None
    anchor_ids: Tensor | None = None

    def advantages(self, *, backend: str | None = None) -> Tensor:
        """[N], one value a token: `combined_advantages` of `terms` if there are any, else `turn_advantages`.

        Raises ValueError if, beside terms, one of the five fields that only `turn_advantages` has was set, and if,
        without terms, one was that only `combined_advantages` has.
        """
        defaults = self._field_defaults
        changed = [
            name
            for name, value in zip(self._fields[4:], self[4:], strict=True)
            if isinstance(value, Tensor) or value != defaults[name]
        ]
        plain = [name for name in changed if name in self._fields[4:9]]
        if self.terms and plain:
            raise ValueError(f"{', '.join(plain)} must be left out where terms are given")
        if self.terms:
            return combined_advantages(
                self.turn_rewards,
                self.cu_turns,
                self.group_ids,
                self.turn_ids,
                self.terms,
                average=self.average,
                then=self.then,
                outcomes=self.outcomes,
                anchor_ids=self.anchor_ids,
                backend=backend,
            ).advantages
        if set(changed) - set(plain):
            raise ValueError(f"terms must be given with {', '.join(changed)}, got none")
        return turn_advantages(
            self.turn_rewards,
            self.cu_turns,
            self.group_ids,
            self.turn_ids,
            gamma=self.gamma,
            scope=self.scope,
            population=self.population,
            ddof=self.ddof,
            eps=self.eps,
            backend=backend,
        ).advantages


@torch.library.custom_op("gtpo_kernels::turn_returns", mutates_args=())
def _turn_returns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float, backend: str) -> Tensor:
    check_turn_values(turn_rewards, cu_turns)
    arguments = (turn_rewards, cu_turns, gamma)
    if backend == "reference":
        returns = turn_returns_reference(*arguments)
    else:
        returns = run_kernel(FAMILY, backend, "turn_returns", turn_rewards.device, *arguments)
    return returns.to(accumulator_dtype(turn_rewards.dtype), copy=True)


@_turn_returns.register_fake
def _(turn_rewards: Tensor, cu_turns: Tensor, gamma: float, backend: str) -> Tensor:
    return turn_rewards.new_empty(turn_rewards.shape, dtype=accumulator_dtype(turn_rewards.dtype))


@torch.library.custom_op("gtpo_kernels::turn_advantages", mutates_args=())
def _turn_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    outcomes: Tensor | None,
    anchor_ids: Tensor | None,
    quantity: str,
    gamma: float,
    order: str,
    scope: str,
    population: str,
    centre: str,
    scale: str,
    ddof: int,
    eps: float,
    singleton: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    names: tuple[Any, ...] = (quantity, gamma, order, scope, population, centre, scale, ddof, eps, singleton)
    rule = CreditRule(*names)
    batch = TurnBatch(turn_rewards, cu_turns, group_ids, turn_ids, outcomes, anchor_ids)
    credit = _run(batch, rule, backend)
    return credit.advantages, credit.turn_advantages, credit.returns


@_turn_advantages.register_fake
def _(turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, *rest: object) -> tuple[Tensor, ...]:
    dtype = accumulator_dtype(turn_rewards.dtype)
    return tuple(turn_rewards.new_empty(like.shape, dtype=dtype) for like in (turn_ids, turn_rewards, turn_rewards))
