"""Credit: from turn rewards to one advantage for every sampled token, once for a whole rollout.

The arithmetic is `gtpo_kernels.combined_advantages`; this module lays a `CreditSum` and trajectories out
as its arguments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gtpo.batch import PackedSequence
from gtpo.methods import CreditSum, Term
from gtpo.rewards import TurnRewards, is_void_turn
from gtpo.types import StopReason, Trajectory
from gtpo_kernels import CreditRule, CreditTerm, TurnAdvantages, combined_advantages
from gtpo_kernels.turn_advantages.checks import check_rule
from gtpo_kernels.turn_advantages.op import Others

# verl adds 1e-8 to the variance; this differs from it by less than 1e-6 of the result where the deviation is above 0.1
_WHITEN = CreditRule("turn_reward", scope="batch", population="tokens", eps=1e-8)


@dataclass(frozen=True)
class Credit:
    """For one trajectory: `returns`, what the first term of the credit normalises, and `advantages`, one a turn."""

    returns: list[float]
    advantages: list[float]


class Scored(NamedTuple):
    """A trajectory with what its turns earned and what credit made of it."""

    trajectory: Trajectory
    rewards: TurnRewards
    credit: Credit


def credit_advantages(
    credit: CreditSum,
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    *,
    outcomes: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    turns_with_calls: Tensor | None = None,
    named_rewards: Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> TurnAdvantages:
    """The advantages of a credit: `gtpo_kernels.combined_advantages` of its terms.

    outcomes [B] and anchor_ids [K] as there.  turns_with_calls: [K] bool, for terms of turns="with_calls".
    named_rewards: [K] each, the terms that turn_rewards is the sum of, for terms about one `reward`.
    Raises ValueError where the credit needs one of them and it is None, and as `combined_advantages` does.

    >>> from gtpo.methods import METHODS
    >>> batch = [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 3]), torch.tensor([5, 5]), torch.arange(3)]
    >>> credit_advantages(METHODS["dr_grpo"].credit, *batch).turn_advantages.tolist()
    [0.5, 0.5, -0.5]
    """
    terms = []
    for term, rule in zip(credit.terms, credit_rules(credit), strict=False):
        turns, others = _turns(term, turns_with_calls)
        states = None
        if term.context and anchor_ids is not None:
            states, turns = with_context(anchor_ids, cu_turns, term.context)
        rewards = _named(term.reward, named_rewards) if term.reward else None
        terms.append(CreditTerm(rule, term.weight, turns, others, rewards, states))
    return combined_advantages(
        turn_rewards,
        cu_turns,
        group_ids,
        turn_ids,
        terms,
        average=credit.average,
        then=_WHITEN if credit.whiten else None,
        outcomes=outcomes,
        anchor_ids=anchor_ids,
        backend=backend,
    )


def group_advantages(
    credit: CreditSum,
    rewards: Sequence[Sequence[float]],
    *,
    outcomes: Sequence[float] | None = None,
    anchors: Sequence[Sequence[int]] | None = None,
    calls: Sequence[Sequence[bool]] | None = None,
    named: Mapping[str, Sequence[Sequence[float]]] | None = None,
    digits: int = 4,
) -> list[list[float]]:
    """`credit_advantages` of one group given as lists, for examples: a list a trajectory, an entry and a token a turn.

    >>> from gtpo.methods import METHODS
    >>> group_advantages(METHODS["rloo"].credit, [[0.0, 1.0], [0.0], [0.0]])
    [[1.0, 1.0], [-0.5], [-0.5]]
    """
    lengths = [len(trajectory) for trajectory in rewards]

    def flat(values: Sequence[Sequence[float]] | None, dtype: torch.dtype) -> Tensor | None:
        return None if values is None else torch.tensor([x for part in values for x in part], dtype=dtype)

    turn_rewards = flat(rewards, torch.float64)
    assert turn_rewards is not None
    found = credit_advantages(
        credit,
        turn_rewards,
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        torch.arange(sum(lengths)),
        outcomes=None if outcomes is None else torch.tensor(outcomes, dtype=torch.float64),
        anchor_ids=flat(anchors, torch.long),
        turns_with_calls=flat(calls, torch.bool),
        named_rewards={name: flat(values, torch.float64) for name, values in (named or {}).items()},  # type: ignore[misc]
    )
    return [[round(x, digits) + 0.0 for x in part.tolist()] for part in found.turn_advantages.split(lengths)]


def credit_rules(credit: CreditSum) -> list[CreditRule]:
    """The rules of the terms, then the one that whitens their sum, if it does."""
    rules = [CreditRule(*(getattr(term, name) for name in CreditRule._fields)) for term in credit.terms]
    return [*rules, _WHITEN] if credit.whiten else rules


def check_credit(credit: CreditSum) -> None:
    """Raises ValueError for fields of the credit that contradict one another or lie outside what they may be."""
    for number, rule in enumerate(credit_rules(credit)):
        try:
            check_rule(rule)
        except ValueError as error:
            raise ValueError(f"credit.terms.{number}.{error}") from None


def assign_credit(
    groups: Sequence[Sequence[Trajectory]], rewards: Sequence[Sequence[TurnRewards]], credit: CreditSum
) -> list[list[Scored]]:
    """All groups of a rollout with returns and advantages. Lost trajectories are left out: a group keeps its size."""
    trajectories = [trajectory for group in groups for trajectory in group]
    flat_rewards = [reward for group in rewards for trajectory in group for reward in trajectory.rewards]
    num_turns = [len(trajectory.turns) for trajectory in trajectories]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    turn_ids = [k for k, turn in enumerate(turns) for _ in turn.completion_ids]
    names = {term.reward for term in credit.terms if term.reward}
    of_turns = [reward for group in rewards for reward in group]
    result = credit_advantages(
        credit,
        torch.tensor(flat_rewards, dtype=torch.float32),
        torch.tensor([0, *num_turns]).cumsum(0).to(torch.int32),
        torch.tensor([number for number, group in enumerate(groups) for _ in group]),
        torch.tensor(turn_ids, dtype=torch.long),
        outcomes=torch.tensor([trajectory.outcome for trajectory in trajectories], dtype=torch.float32),
        anchor_ids=torch.tensor(anchor_ids(trajectories), dtype=torch.long),
        turns_with_calls=torch.tensor([bool(turn.calls) for turn in turns], dtype=torch.bool),
        named_rewards={
            name: torch.tensor([x for reward in of_turns for x in reward.terms[name]], dtype=torch.float32)
            for name in names
            if all(name in reward.terms for reward in of_turns)
        },
    )
    per_trajectory = iter(
        Credit(returns.tolist(), advantages.tolist())
        for returns, advantages in zip(
            result.returns.split(num_turns), result.turn_advantages.split(num_turns), strict=True
        )
    )
    return [
        [
            Scored(trajectory, earned, next(per_trajectory))
            for trajectory, earned in zip(group, group_rewards, strict=True)
        ]
        for group, group_rewards in zip(groups, rewards, strict=True)
    ]


def anchor_ids(trajectories: Sequence[Trajectory]) -> list[int]:
    """One number a turn, equal for turns that the same tool output came before; first turns share one."""
    numbers: dict[tuple[str, ...] | None, int] = {}
    ids = []
    for trajectory in trajectories:
        state: tuple[str, ...] | None = None
        for turn in trajectory.turns:
            ids.append(numbers.setdefault(state, len(numbers)))
            state = tuple(result.text for result in turn.results)
    return ids


def with_context(anchor_ids: Tensor, cu_turns: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """([K] int, [K] bool): ids equal where the states of a turn and of `context` turns before it are, and whether the
    trajectory has so many turns before.

    >>> ids, has = with_context(torch.tensor([0, 1, 2, 0, 1, 5]), torch.tensor([0, 3, 6]), 1)
    >>> has.tolist(), bool(ids[1] == ids[4]), bool(ids[2] == ids[5])
    ([False, True, True, False, True, True], True, False)
    """
    turn = torch.arange(len(anchor_ids), device=anchor_ids.device)
    has = turn - cu_turns[:-1].long().repeat_interleave(cu_turns.diff().long()) >= context
    history = torch.stack([anchor_ids[(turn - back).clamp(min=0)] for back in range(context + 1)], dim=1)
    return torch.unique(history, dim=0, return_inverse=True)[1], has


def _named(name: str, named_rewards: Mapping[str, Tensor] | None) -> Tensor:
    if named_rewards is None or name not in named_rewards:
        known = ", ".join(named_rewards or {}) or "none"
        raise ValueError(f"named_rewards must hold {name!r}, which a term of the credit is about, got {known}")
    return named_rewards[name]


def _turns(term: Term, turns_with_calls: Tensor | None) -> tuple[Tensor | None, Others]:
    if term.turns == "all":
        return None, "leave"
    if turns_with_calls is None:
        raise ValueError("turns_with_calls must be [K] for a term of turns='with_calls', got None")
    return turns_with_calls, term.others


def to_sequences(
    groups: Sequence[Sequence[Scored]], *, mask_truncated: bool, mask_void_turns: bool
) -> list[PackedSequence]:
    """All trajectories of a rollout, each as `to_sequence` gives it."""
    return [
        to_sequence(trajectory, credit, mask_truncated=mask_truncated, mask_void_turns=mask_void_turns)
        for group in groups
        for trajectory, _, credit in group
    ]


def to_sequence(
    trajectory: Trajectory, credit: Credit, *, mask_truncated: bool, mask_void_turns: bool
) -> PackedSequence:
    """The trajectory as training sees it. Masked out of the loss: prompt and tool tokens, and on demand all of a
    truncated trajectory or of one with a void turn; these keep their place in the group's statistics."""
    is_masked = (mask_truncated and trajectory.stop is StopReason.TRUNCATED) or (
        mask_void_turns and any(is_void_turn(trajectory, turn) for turn in range(len(trajectory.turns)))
    )
    turns = trajectory.turn_index_of_tokens()
    logprobs = [0.0] * len(trajectory.prompt_ids)
    for turn in trajectory.turns:
        logprobs += turn.rollout_logprobs
        logprobs += [0.0] * len(turn.tool_ids)
    return PackedSequence(
        token_ids=trajectory.token_ids(),
        advantages=[0.0 if turn < 0 else credit.advantages[turn] for turn in turns],
        loss_mask=[turn >= 0 and not is_masked for turn in turns],
        rollout_logprobs=logprobs,
        turn_ids=turns,
    )
