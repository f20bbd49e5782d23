"""Turns and their credit for `gtpo.adapters.trl`, from the lists that TRL generates; nothing here imports TRL."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gtpo.adapters.layouts import list_turn_advantages, turn_ids_of_runs


class ScoredRow(NamedTuple):
    """One completion, as ranks exchange it.

    turn_rewards: of each of its turns; None: no reward function applied.  num_tokens: of each of its turns.
    outcome: the part of the rewards that came as one number.  messages: of each turn, where the credit asks for them.
    """

    turn_rewards: list[float] | None
    num_tokens: list[int]
    outcome: float = 0.0
    messages: "list[TurnMessages] | None" = None


class TurnMessages(NamedTuple):
    """state: the tool output right before the turn, None before the first.  calls: whether the turn calls a tool."""

    state: tuple[str, ...] | None
    calls: bool


def group_advantages(rows: Sequence[ScoredRow], group_size: int, credit: Mapping[str, Any]) -> list[list[float]]:
    """Advantages of the turns of each row.  rows: of all ranks, whole groups of `group_size` one after another.

    credit: options of `gtpo.adapters.layouts`.
    A row that no reward function scored has advantages 0 and leaves the statistics of its group.

    >>> rows = [ScoredRow([0.0, 1.0], [2, 1]), ScoredRow([0.0], [3]), ScoredRow(None, [1])]
    >>> [[round(a, 3) for a in row] for row in group_advantages(rows, 3, {"gamma": 1.0})]
    [[0.577, 0.577], [-1.155], [0.0]]
    """
    if len(rows) % group_size:
        raise ValueError(f"there must be whole groups of {group_size} rows, got {len(rows)}: were the ranks gathered?")
    scored = [index for index, row in enumerate(rows) if row.turn_rewards is not None]
    advantages = [[0.0] * len(row.num_tokens) for row in rows]
    values = list_turn_advantages(
        [rows[index].turn_rewards or [] for index in scored],
        [index // group_size for index in scored],
        num_tokens=[rows[index].num_tokens for index in scored],
        **credit,
    )
    for index, row in zip(scored, values, strict=True):
        advantages[index] = row
    return advantages


def options_of_batch(rows: Sequence[ScoredRow], needs: set[str]) -> dict[str, Any]:
    """Of the scored rows, what a credit needs beside their rewards; see `gtpo.adapters.options.PER_BATCH`."""
    scored = [row for row in rows if row.turn_rewards is not None]
    messages = [row.messages or [] for row in scored]
    found: dict[str, Any] = {
        "outcomes": [row.outcome for row in scored],
        "anchor_ids": [[turn.state for turn in turns] for turns in messages],
        "turns_with_calls": [[turn.calls for turn in turns] for turns in messages],
    }
    return {name: found[name] for name in needs}


def padded_turn_ids(
    completion_ids: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]] | None,
    given: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """[B, longest] int: the turn of each id, -1 for tool output and padding, from TRL's lists before they are padded.

    sampled: 1 for sampled ids; TRL puts the template's tokens of a tool message between two turns, so they never touch.
    given: the turns themselves, as a `rollout_func` may return them.
    Raises ValueError for lists of other lengths, and for a mask of other numbers than 0 and 1.

    >>> padded_turn_ids([[7, 8, 9], [7]], [[1, 0, 1], [1]]).tolist()
    [[0, -1, 1], [0, -1, -1]]
    """
    lengths = [len(ids) for ids in completion_ids]
    for name, rows in (("turn_ids", given), ("env_mask", sampled)):
        if rows is not None and [len(row) for row in rows] != lengths:
            raise ValueError(f"{name} must have one entry for each id of each completion, got other lengths")
    inside = torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]
    if given is not None:
        flat = torch.tensor([*chain.from_iterable(given)], dtype=torch.long)
        return torch.full(inside.shape, -1).masked_scatter_(inside, flat)
    if sampled is None:
        return turn_ids_of_runs(inside)
    try:
        # a thousand times faster than a tensor of integers, and one entry more, since a buffer must not be empty
        data = bytearray(b"".join(bytes(list(row)) for row in sampled) + b"\0")
    except (TypeError, ValueError):
        raise ValueError("env_mask must hold 0 and 1 only, as integers or bools") from None
    return turn_ids_of_runs(torch.zeros_like(inside).masked_scatter_(inside, torch.frombuffer(data, dtype=torch.bool)))


def turn_lengths(turn_ids: Tensor) -> list[list[int]]:
    """Tokens of each turn of each row.  turn_ids: [B, T], -1 where not sampled.

    >>> turn_lengths(torch.tensor([[0, 0, -1, 1], [-1, -1, -1, -1]]))
    [[2, 1], []]
    """
    num_turns = F.pad(turn_ids, (0, 1), value=-1).amax(dim=1) + 1
    ends = num_turns.cumsum(0)
    flat = (turn_ids + (ends - num_turns)[:, None])[turn_ids >= 0]
    counts = torch.bincount(flat, minlength=int(num_turns.sum())).tolist()
    return [counts[end - count : end] for end, count in zip(ends.tolist(), num_turns.tolist(), strict=True)]


def advantages_by_token(advantages: Sequence[Sequence[float]], turn_ids: Tensor) -> Tensor:
    """[B, T] float32: the advantage of each token's turn, 0 where `turn_ids` [B, T] is -1.

    >>> advantages_by_token([[1.0, 2.0], [3.0]], torch.tensor([[0, -1, 1], [0, 0, -1]])).tolist()
    [[1.0, 0.0, 2.0], [3.0, 3.0, 0.0]]
    """
    flat = torch.tensor([*chain.from_iterable(advantages), 0.0])  # the last of which the index -1 finds
    counts = torch.tensor([len(row) for row in advantages])
    return flat[torch.where(turn_ids >= 0, turn_ids + (counts.cumsum(0) - counts)[:, None], -1)]


def check_turns(num_turns: Sequence[int], completions: Sequence[Any]) -> None:
    """Refuse masks that disagree with the messages: turns that touch would share one advantage in silence."""
    for row, (counted, messages) in enumerate(zip(num_turns, completions, strict=True)):
        if isinstance(messages, str):
            continue
        written = sum(message["role"] == "assistant" for message in messages)
        if counted != written:
            raise RuntimeError(
                f"completion {row} has {written} assistant messages, but its tool mask shows {counted} turns: does the "
                "chat template render tool messages?"
            )


def messages_of_turns(completion: Any, num_turns: int) -> list[TurnMessages]:
    """What a credit may ask of the turns of one completion, TRL's list of messages.

    Raises ValueError for text, in which turns cannot be seen, if there are more than one, and for other numbers of
    assistant messages than of turns.

    >>> look = {"role": "assistant", "tool_calls": [{}]}
    >>> messages_of_turns([look, {"role": "tool", "content": "a box"}, {"role": "assistant", "content": "done"}], 2)
    [TurnMessages(state=None, calls=True), TurnMessages(state=('a box',), calls=False)]
    """
    turns: list[TurnMessages] = []
    seen: tuple[str, ...] = ()
    for message in [{"role": "assistant"}] if isinstance(completion, str) else completion:
        if message["role"] == "assistant":
            turns.append(TurnMessages(seen if turns else None, bool(message.get("tool_calls"))))
            seen = ()
        else:
            seen = (*seen, str(message.get("content")))
    if len(turns) != num_turns:
        raise ValueError(
            f"this credit asks for the messages of each turn: there are {len(turns)}, but the completion has "
            f"{num_turns} turns"
        )
    return turns
