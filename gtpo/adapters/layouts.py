"""Turn advantages for the layouts that trainers hold their batches in: padded, packed, token rewards, plain lists.

One call each, and no trainer is needed.  All entries stand at the place of their token (nothing is shifted), and every
call takes whole groups: before micro-batches, before rows are shuffled, and from all ranks.

`options` are the keywords of `gtpo_kernels.turn_advantages`: gamma, scope, population, ddof, eps, backend; left out,
they are GTPO's.  Or `method` names a preset that `gtpo methods` lists, and the others are fields of it: method="rloo".
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gtpo.credit import method_advantages
from gtpo.methods import METHODS, Method
from gtpo_kernels import TurnAdvantages, turn_advantages
from gtpo_kernels.checks import check_tensor

GRPO: dict[str, Any] = {"gamma": 1.0, "population": "trajectories"}
"""Options under which a trajectory's rewards are summed and normalised in its group: arXiv 2402.03300."""

RaggedRewards = Sequence[Sequence[float]] | Tensor


class TokenCredit(NamedTuple):
    """One entry a token, 0 where it was not sampled.  advantages, returns: [B, T] float32."""

    advantages: Tensor
    returns: Tensor


def padded_turn_advantages(
    turn_rewards: RaggedRewards,
    turn_ids: Tensor,
    group_ids: Iterable[Hashable] | Tensor,
    *,
    num_turns: Tensor | None = None,
    loss_mask: Tensor | None = None,
    group_size: int | None = None,
    **options: Any,
) -> TokenCredit:
    """Advantages of a padded batch: `turn_advantages` of each token's turn.

    turn_rewards: one list of floats for each trajectory, or [B, J] float, of which `num_turns` [B] count (None: all J).
    turn_ids: [B, T] int, the number of the turn within its trajectory from 0, -1 for prompt, tool and padding tokens.
    group_ids: B labels of any kind, equal for trajectories of one task.
    loss_mask: [B, T] bool or 0 / 1; only compared: it must mark no token without a turn.  TRL's `tool_mask`, for one,
        is padded with 1: multiply it by `completion_mask` first.
    group_size: if given, every group must have this many trajectories: a group that is split over ranks has fewer.
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
    return _by_token(_advantages(rewards, cu_turns, groups, flat_ids, options), flat_ids, turn_ids.shape)


def packed_turn_advantages(
    turn_rewards: RaggedRewards,
    turn_ids: Tensor,
    cu_seqlens: Tensor,
    group_ids: Iterable[Hashable] | Tensor,
    *,
    num_turns: Tensor | None = None,
    loss_mask: Tensor | None = None,
    group_size: int | None = None,
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
    return _by_token(_advantages(rewards, cu_turns, groups, flat_ids, options), flat_ids, turn_ids.shape)


def token_reward_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    group_ids: Iterable[Hashable] | Tensor,
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
    group_ids: Iterable[Hashable],
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
    counts = [len(row) for row in turn_rewards]
    rewards, cu_turns = _flat_turns(turn_rewards, None, len(counts), torch.device("cpu"))
    turn_ids = torch.arange(rewards.shape[0])
    if num_tokens is not None:
        if [len(row) for row in num_tokens] != counts:
            raise ValueError("num_tokens must have one entry for every turn of turn_rewards, got other lengths")
        turn_ids = turn_ids.repeat_interleave(torch.tensor([n for row in num_tokens for n in row], dtype=torch.long))
    groups = number_groups(group_ids, len(counts), group_size=group_size)
    values = _advantages(rewards, cu_turns, groups, turn_ids, options).turn_advantages
    return [row.tolist() for row in values.split(counts)]


def number_groups(
    group_ids: Iterable[Hashable] | Tensor,
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
    labels: list[Hashable] = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids)
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
    mask = _as_bool("loss_mask", loss_mask, loss_mask.shape, loss_mask.device)
    return (_run_starts(mask).cumsum(1, dtype=torch.int32) - 1).masked_fill(~mask, -1)


def _advantages(
    turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, options: Mapping[str, Any]
) -> TurnAdvantages:
    """`turn_advantages` with these keywords, or the credit of a preset with these fields."""
    if "method" not in options:
        return turn_advantages(turn_rewards, cu_turns, group_ids, turn_ids, **options)
    fields = dict(options)
    name = fields.pop("method")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    unknown = sorted(fields.keys() - Method.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"a method has no field {', '.join(unknown)}")
    method = dataclasses.replace(METHODS[name], **fields)
    return method_advantages(method, turn_rewards, cu_turns, group_ids, turn_ids)


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
        scalars = [row for row in turn_rewards if not isinstance(row, Sequence | Tensor)]
        if scalars:
            raise ValueError(f"turn_rewards must have a list of floats for each trajectory, got {scalars[0]!r}")
        flat = torch.tensor([float(reward) for row in turn_rewards for reward in row], dtype=torch.float32)
        num_turns = torch.tensor([len(row) for row in turn_rewards], dtype=torch.long)
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
