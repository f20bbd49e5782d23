"""Turn advantages for the layouts that trainers hold their batches in: padded, packed, token rewards, plain lists.

One call each, and no trainer is needed.  All entries stand at the place of their token (nothing is shifted), and every
call takes whole groups: before micro-batches, before rows are shuffled, and from all ranks.

`options` are those of a credit: gamma, scope, population, ddof, eps and the other fields of a `gtpo.methods.Term`, or
`terms`, a list of these, and `whiten`; left out, they are GTPO's.  Or `method` names a preset that `gtpo methods`
lists, and the others change it: method="grpo", eps=1e-4; where it has several terms by number: method="matchtir",
terms={1: {"gamma": 1.0}}.  Its rewards and its loss are the trainer's.  `backend` is that of `turn_advantages`.
With the fields come what some credits need of the batch, and no other takes:
    outcomes: B numbers, for quantity="outcome" (MT-GRPO).
    anchor_ids: for each trajectory one label a turn, equal for turns taken in one state, for scope="group_anchor"
        (GiGPO).
    turns_with_calls: for each trajectory one bool a turn, for terms of turns="with_calls" (MT-GRPO).
    named_rewards: for each name, for each trajectory one float a turn, for terms about one `reward` (GDPO).
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gtpo.adapters.options import PER_BATCH, CreditSettings, credit_settings
from gtpo.adapters.ragged import flat_floats, flat_ints
from gtpo.credit import credit_advantages
from gtpo_kernels import TurnAdvantages
from gtpo_kernels.checks import check_tensor

GRPO: dict[str, Any] = {"gamma": 1.0, "population": "trajectories"}
"""Options under which a trajectory's rewards are summed and normalised in its group: arXiv 2402.03300."""

RaggedRewards = Sequence[Sequence[float]] | Tensor
Labels = Iterable[Hashable] | Tensor


class TokenCredit(NamedTuple):
    """One entry a token, 0 where it was not sampled.  advantages, returns: [B, T] float32."""

    advantages: Tensor
    returns: Tensor


def padded_turn_advantages(
    turn_rewards: RaggedRewards,
    turn_ids: Tensor,
    group_ids: Labels,
    *,
    num_turns: Tensor | None = None,
    loss_mask: Tensor | None = None,
    group_size: int | None = None,
    allow_empty_turns: bool = False,
    **options: Any,
) -> TokenCredit:
    """Advantages of a padded batch: `turn_advantages` of each token's turn.

    turn_rewards: one list of floats for each trajectory, or [B, J] float, of which `num_turns` [B] count (None: all J).
    turn_ids: [B, T] int, the number of the turn within its trajectory from 0, -1 for prompt, tool and padding tokens.
    group_ids: B labels of any kind, equal for trajectories of one task.
    loss_mask: [B, T] bool or 0 / 1; only compared: it must mark no token without a turn.  TRL's `tool_mask`, for one,
        is padded with 1: multiply it by `completion_mask` first.
    group_size: if given, every group must have this many trajectories: a group that is split over ranks has fewer.
    allow_empty_turns: take rewards of turns that no token has.  They flow into the returns of the turns before them,
        and leave the statistics; else they are refused, since what is meant is mostly another number of turns.
    Raises ValueError for shapes, numbers and masks that do not fit each other.
    Source: arXiv 2511.14846.

    >>> credit = padded_turn_advantages([[0.0, 1.0], [0.0]], torch.tensor([[0, -1, 1], [0, 0, -1]]), "aa", gamma=1.0)
    >>> [[round(a, 3) for a in row] for row in credit.advantages.tolist()]
    [[0.577, 0.0, 0.577], [-1.155, -1.155, 0.0]]
    """
    check_tensor("turn_ids", turn_ids, layout="[B, T]", shape=(None, None), kind="int")
    rewards, cu_turns = _flat_turns(turn_rewards, num_turns, turn_ids.shape[0], turn_ids.device)
    groups = number_groups(group_ids, turn_ids.shape[0], group_size=group_size, device=turn_ids.device)
    if loss_mask is not None:
        _check_mask(loss_mask, turn_ids)
    first_turns = cu_turns[:-1, None]
    _check_turn_numbers(turn_ids, cu_turns.diff()[:, None])
    flat_ids = torch.where(turn_ids >= 0, turn_ids + first_turns, -1).flatten()
    if not allow_empty_turns:
        _check_all_turns_have_tokens(flat_ids, cu_turns)
    return _by_token(_advantages(rewards, cu_turns, groups, flat_ids, options), flat_ids, turn_ids.shape)


def packed_turn_advantages(
    turn_rewards: RaggedRewards,
    turn_ids: Tensor,
    cu_seqlens: Tensor,
    group_ids: Labels,
    *,
    num_turns: Tensor | None = None,
    loss_mask: Tensor | None = None,
    group_size: int | None = None,
    allow_empty_turns: bool = False,
    **options: Any,
) -> TokenCredit:
    """Advantages of a packed batch: as `padded_turn_advantages`, with turn_ids [N] and cu_seqlens [B+1] int.

    turn_ids number the turns of each trajectory from 0.  The results are [N].

    >>> turn_ids, cu_seqlens = torch.tensor([0, -1, 1, 0, 0]), torch.tensor([0, 3, 5])
    >>> credit = packed_turn_advantages([[0.0, 1.0], [0.0]], turn_ids, cu_seqlens, [7, 7], gamma=1.0)
    >>> [round(a, 3) for a in credit.advantages.tolist()]
    [0.577, 0.0, 0.577, -1.155, -1.155]
    """
    check_tensor("turn_ids", turn_ids, layout="[N]", shape=(None,), kind="int")
    device = turn_ids.device
    check_tensor("cu_seqlens", cu_seqlens, layout="[B+1]", shape=(None,), kind="int", device=device)
    lengths = cu_seqlens.diff()
    if cu_seqlens.shape[0] < 1 or cu_seqlens[0] != 0 or cu_seqlens[-1] != turn_ids.shape[0] or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to N = {turn_ids.shape[0]} without decreasing")
    rewards, cu_turns = _flat_turns(turn_rewards, num_turns, lengths.shape[0], device)
    groups = number_groups(group_ids, lengths.shape[0], group_size=group_size, device=device)
    if loss_mask is not None:
        _check_mask(loss_mask, turn_ids)
    _check_turn_numbers(turn_ids, cu_turns.diff().repeat_interleave(lengths))
    flat_ids = torch.where(turn_ids >= 0, turn_ids + cu_turns[:-1].repeat_interleave(lengths), -1)
    if not allow_empty_turns:
        _check_all_turns_have_tokens(flat_ids, cu_turns)
    return _by_token(_advantages(rewards, cu_turns, groups, flat_ids, options), flat_ids, turn_ids.shape)


def token_reward_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    group_ids: Labels,
    *,
    turn_ids: Tensor | None = None,
    group_size: int | None = None,
    **options: Any,
) -> TokenCredit:
    """Advantages from rewards that lie on tokens, verl's `token_level_rewards`.

    token_level_rewards: [B, T] float.  A reward belongs to the turn of its token, or, on a tool token, to the turn
        before it, which caused the tool output; rewards of one turn are added.
    response_mask: [B, T] bool or 0 / 1, 1 for sampled tokens.
    turn_ids: [B, T] int as for `padded_turn_advantages`; None takes each run of 1s for a turn, `turn_ids_of_runs`.
    A trajectory without sampled tokens has no turn: it leaves the statistics, its reward with it.
    Raises ValueError also for a reward before the first sampled token of its trajectory.

    >>> rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    >>> credit = token_reward_advantages(rewards, torch.tensor([[1, 0, 1], [1, 1, 0]]), ["a", "a"], gamma=1.0)
    >>> [[round(a, 3) for a in row] for row in credit.advantages.tolist()]
    [[0.577, 0.0, 0.577], [-1.155, -1.155, 0.0]]
    """
    check_tensor("token_level_rewards", token_level_rewards, layout="[B, T]", shape=(None, None), kind="float")
    shape, device = token_level_rewards.shape, token_level_rewards.device
    mask = _as_bool("response_mask", response_mask, shape, device)
    groups = number_groups(group_ids, shape[0], group_size=group_size, device=device)
    if turn_ids is None:
        starts = _run_starts(mask)
    else:
        check_tensor("turn_ids", turn_ids, layout="[B, T]", shape=shape, kind="int", device=device)
        _check_mask(mask, turn_ids, name="response_mask")
        starts = _turn_starts(turn_ids)
    # the number, over the whole batch, of the last turn that began at or before a token
    last_begun = starts.flatten().cumsum(0, dtype=torch.int32) - 1
    cu_turns = torch.nn.functional.pad(starts.sum(dim=1).cumsum(0), (1, 0))
    flat_ids = last_begun.masked_fill(~mask.flatten(), -1)

    places = token_level_rewards.flatten().nonzero().squeeze(1)
    rows, turns = places // max(shape[1], 1), last_begun[places]
    has_turns = cu_turns.diff()[rows] > 0
    early = has_turns & (turns < cu_turns[rows])
    if early.any():
        row, column = divmod(int(places[early][0]), shape[1])
        raise ValueError(
            f"token_level_rewards must not lie before the first sampled token: row {row}, column {column} has one"
        )
    values = token_level_rewards.flatten()[places[has_turns]]
    rewards = token_level_rewards.new_zeros(int(cu_turns[-1])).index_add_(0, turns[has_turns], values)
    return _by_token(_advantages(rewards, cu_turns, groups, flat_ids, options), flat_ids, shape)


def list_turn_advantages(
    turn_rewards: Sequence[Sequence[float]],
    group_ids: Labels,
    *,
    num_tokens: Sequence[Sequence[int]] | None = None,
    group_size: int | None = None,
    **options: Any,
) -> list[list[float]]:
    """Advantages of plain lists: one list of turn rewards for each trajectory gives one list of turn advantages.

    num_tokens: sampled tokens of each turn; None takes one each.  A turn without tokens leaves the statistics.

    >>> [[round(a, 3) for a in row] for row in list_turn_advantages([[0.0, 1.0], [0.0]], ["a", "a"], gamma=1.0)]
    [[0.577, 0.577], [-1.155]]
    """
    rewards, cu_turns = _flat_turns(turn_rewards, None, len(turn_rewards), torch.device("cpu"))
    counts = cu_turns.diff().tolist()
    settings, of_batch = _settings(options)
    turn_ids = torch.arange(rewards.shape[0])
    if num_tokens is not None:
        if [len(row) for row in num_tokens] != counts:
            raise ValueError("num_tokens must have one entry for every turn of turn_rewards, got other lengths")
        lengths = flat_ints("num_tokens", num_tokens)
        if (lengths < 0).any():
            raise ValueError(f"num_tokens must be 0 or more, got {int(lengths.min())}")
        # only whether there are any counts elsewhere, and one token says so
        turn_ids = turn_ids.repeat_interleave(lengths) if settings.counts_tokens else turn_ids[lengths > 0]
    groups = number_groups(group_ids, len(counts), group_size=group_size)
    values = _of_settings(settings, of_batch, rewards, cu_turns, groups, turn_ids).turn_advantages.tolist()
    ends = cu_turns.tolist()
    return [values[first:end] for first, end in pairwise(ends)]


def number_groups(
    group_ids: Labels,
    num_trajectories: int,
    *,
    group_size: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """[B] int64: labels of any kind (strings, a NumPy array of ids, a tensor) as numbers, in order of appearance.

    Raises ValueError if there are not B labels, or if a group has not `group_size` trajectories (None: any number).

    >>> number_groups(["x", "y", "x"], 3).tolist()
    [0, 1, 0]
    >>> number_groups(["x", "y", "x"], 3, group_size=2)
    Traceback (most recent call last):
    ...
    ValueError: group_ids: every group must have group_size=2 trajectories, but 'y' has 1: was it split over ranks?
    """
    labels = _labels("group_ids", group_ids)
    if len(labels) != num_trajectories:
        raise ValueError(
            f"group_ids must have one label for each of {num_trajectories} trajectories, got {len(labels)}"
        )
    counts = Counter(labels)
    wrong = next((label for label, count in counts.items() if group_size not in (None, count)), None)
    if wrong is not None:
        raise ValueError(
            f"group_ids: every group must have group_size={group_size} trajectories, but {wrong!r} has "
            f"{counts[wrong]}: was it split over ranks?"
        )
    numbers = {label: number for number, label in enumerate(counts)}
    return torch.tensor([numbers[label] for label in labels], dtype=torch.long, device=device)


def turn_ids_of_runs(loss_mask: Tensor) -> Tensor:
    """[B, T] int32: each unbroken run of sampled tokens is a turn, numbered from 0 in its row; -1 elsewhere.

    Right where at least one token that was not sampled stands between two turns, as chat templates put it; two turns
    that touch would count as one, so pass explicit turn ids where you have them.

    >>> turn_ids_of_runs(torch.tensor([[1, 1, 0, 1, 0]])).tolist()
    [[0, 0, -1, 1, -1]]
    """
    if not isinstance(loss_mask, Tensor) or loss_mask.dim() != 2:
        got = f"shape {tuple(loss_mask.shape)}" if isinstance(loss_mask, Tensor) else type(loss_mask).__name__
        raise ValueError(f"loss_mask must be a tensor [B, T], got {got}")
    mask = _as_bool("loss_mask", loss_mask, loss_mask.shape, loss_mask.device)
    return (_run_starts(mask).cumsum(1, dtype=torch.int32) - 1).masked_fill(~mask, -1)


def _advantages(
    turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, options: Mapping[str, Any]
) -> TurnAdvantages:
    settings, of_batch = _settings(options)
    return _of_settings(settings, of_batch, turn_rewards, cu_turns, group_ids, turn_ids)


def _settings(options: Mapping[str, Any]) -> tuple[CreditSettings, dict[str, Any]]:
    """The credit, and what of the batch it takes."""
    of_batch = {name: options[name] for name in PER_BATCH if options.get(name) is not None}
    settings = credit_settings({k: v for k, v in options.items() if k not in PER_BATCH}, given=of_batch)
    unused = sorted(of_batch.keys() - settings.needs)
    if unused:
        raise ValueError(f"{', '.join(unused)} must be left out: no term of this credit takes them")
    return settings, of_batch


def _of_settings(
    settings: CreditSettings,
    of_batch: Mapping[str, Any],
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
) -> TurnAdvantages:
    tensors: dict[str, Any] = {}
    device, counts = turn_rewards.device, cu_turns.diff().tolist() if of_batch else []
    if "outcomes" in of_batch:
        outcomes = torch.as_tensor(of_batch["outcomes"], device=device)
        tensors["outcomes"] = outcomes.to(turn_rewards.dtype)
    if "anchor_ids" in of_batch:
        numbers: dict[Hashable, int] = {}
        labels = _flat_by_turn("anchor_ids", of_batch["anchor_ids"], counts)
        tensors["anchor_ids"] = torch.tensor(
            [numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.long, device=device
        )
    if "turns_with_calls" in of_batch:
        calls = _flat_by_turn("turns_with_calls", of_batch["turns_with_calls"], counts)
        tensors["turns_with_calls"] = torch.tensor(calls, dtype=torch.bool, device=device)
    if "named_rewards" in of_batch:
        tensors["named_rewards"] = {
            name: torch.tensor(_flat_by_turn(f"named_rewards[{name!r}]", rows, counts), device=device).double()
            for name, rows in of_batch["named_rewards"].items()
        }
    return credit_advantages(
        settings.credit, turn_rewards, cu_turns, group_ids, turn_ids, backend=settings.backend, **tensors
    )


def _flat_by_turn(name: str, rows: Any, counts: Sequence[int]) -> list[Any]:
    """The entries of ragged lists, one a turn."""
    lists = [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
    found = [len(row) for row in lists]
    if found != list(counts):
        raise ValueError(f"{name} must have one list for each trajectory, one entry a turn: {counts}, got {found}")
    return [*chain.from_iterable(lists)]


def _labels(name: str, labels: Any) -> list[Hashable]:
    """Labels as a list; refuses what cannot be told apart."""
    if not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) != 1:
        got = f"shape {tuple(labels.shape)}" if hasattr(labels, "shape") else repr(labels)
        raise ValueError(f"{name} must be a list, an array [B] or a tensor [B] of labels, got {got}")
    found: list[Any] = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    for label in found:
        if not isinstance(label, Hashable) or label != label:
            raise ValueError(f"{name} must have labels that can be told apart, got {label!r}")
    return found


def _run_starts(mask: Tensor) -> Tensor:
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts


def _turn_starts(turn_ids: Tensor) -> Tensor:
    """[B, T] bool: the first token of each turn.  Refuses numbers that do not run 0, 1, 2 ... through a row."""
    highest = torch.nn.functional.pad(turn_ids, (1, 0), value=-1).cummax(dim=1).values
    steps = highest.diff(dim=1)
    falls = (turn_ids >= 0) & (turn_ids < highest[:, 1:])
    if (steps > 1).any() or falls.any():
        row = int(((steps > 1) | falls).any(dim=1).nonzero()[0])
        raise ValueError(f"turn_ids must number the turns of a row 0, 1, 2 and so on in order, row {row} does not")
    return steps > 0


def _by_token(credit: TurnAdvantages, turn_ids: Tensor, shape: torch.Size) -> TokenCredit:
    returns = torch.nn.functional.pad(credit.returns, (0, 1))[turn_ids.long()]
    return TokenCredit(credit.advantages.view(shape), returns.view(shape))


def _flat_turns(
    turn_rewards: RaggedRewards, num_turns: Tensor | None, num_trajectories: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """([K] rewards, [B+1] cu_turns) of ragged or padded rewards."""
    if isinstance(turn_rewards, Tensor):
        check_tensor("turn_rewards", turn_rewards, layout="[B, J]", shape=(num_trajectories, None), kind="float")
        width = turn_rewards.shape[1]
        if num_turns is None:
            num_turns = torch.full((num_trajectories,), width, device=turn_rewards.device)
        check_tensor("num_turns", num_turns, layout="[B]", shape=(num_trajectories,), kind="int")
        if ((num_turns < 0) | (num_turns > width)).any():
            raise ValueError(f"num_turns must lie in [0, {width}], the width of turn_rewards, got {num_turns.tolist()}")
        counted = torch.arange(width, device=turn_rewards.device) < num_turns[:, None]
        flat = turn_rewards[counted]
    else:
        if num_turns is not None:
            raise ValueError("num_turns must be None where turn_rewards are lists, which have their own lengths")
        if len(turn_rewards) != num_trajectories:
            raise ValueError(
                f"turn_rewards must have one list for each of {num_trajectories} trajectories, got {len(turn_rewards)}"
            )
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in turn_rewards]
        for row in rows:
            if not isinstance(row, Sequence) or isinstance(row, str):
                raise ValueError(f"turn_rewards must have a list of floats for each trajectory, got {row!r}")
        flat = flat_floats("turn_rewards", rows)
        num_turns = torch.tensor([len(row) for row in rows], dtype=torch.long)
    cu_turns = torch.nn.functional.pad(num_turns.cumsum(0), (1, 0))
    return flat.to(device), cu_turns.to(device)


def _as_bool(name: str, mask: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """The mask as bool; refuses other shapes, devices and values."""
    if not isinstance(mask, Tensor) or mask.shape != shape or mask.device != device:
        got = f"{tuple(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must have shape {tuple(shape)} on {device}, got {got}")
    if mask.dtype == torch.bool:
        return mask
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"{name} must be bool or hold 0 and 1 only")
    return mask != 0


def _check_mask(mask: Tensor, turn_ids: Tensor, name: str = "loss_mask") -> None:
    """Refuse a mask that marks tokens without a turn.  It may leave out turns: truncated trajectories, say."""
    wrong = (_as_bool(name, mask, turn_ids.shape, turn_ids.device) & (turn_ids < 0)).nonzero()
    if len(wrong):
        place = ", ".join(map(str, wrong[0].tolist()))
        raise ValueError(
            f"{name} must mark only tokens that have a turn, but it marks [{place}], where turn_ids is -1, and "
            f"{len(wrong) - 1} more: a mask padded with 1, such as TRL's tool_mask, must be multiplied by the mask "
            "of the real tokens first"
        )


def _check_turn_numbers(turn_ids: Tensor, num_turns: Tensor) -> None:
    """Refuse turns that have no reward.  num_turns: those of each token's trajectory."""
    wrong = ((turn_ids < -1) | (turn_ids >= num_turns)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        allowed = int(num_turns.expand_as(turn_ids)[place])
        raise ValueError(
            f"turn_ids must number the turns of each trajectory from 0 (-1: not sampled), but at {list(place)} it is "
            f"{int(turn_ids[place])} where turn_rewards has {allowed} turns"
        )


def _check_all_turns_have_tokens(turn_ids: Tensor, cu_turns: Tensor) -> None:
    """Refuse rewards of turns that are not there.  turn_ids: [N], of the whole batch."""
    has_tokens = turn_ids.new_zeros(int(cu_turns[-1]) + 1, dtype=torch.bool)
    has_tokens[turn_ids.long()] = True
    missing = (~has_tokens[:-1]).nonzero()
    if len(missing):
        turn = int(missing[0])
        row = int(torch.searchsorted(cu_turns, turn, right=True)) - 1
        raise ValueError(
            f"turn_rewards must be of turns that have tokens, but turn {turn - int(cu_turns[row])} of trajectory {row} "
            f"has none in turn_ids, and {len(missing) - 1} more: pass allow_empty_turns=True if that is meant"
        )
