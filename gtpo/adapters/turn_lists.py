"""Turns of ragged lists, as trainers hold them before they are padded."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from gtpo.adapters.layouts import turn_ids_of_runs


def padded_turn_ids(sampled: Sequence[Sequence[int]], *, name: str = "loss_mask") -> Tensor:
    """[B, longest] int32: each unbroken run of sampled tokens is a turn; -1 for tool output and padding.

    sampled: for each trajectory one 0 or 1 a token.  name: of the argument, for the error.
    Raises ValueError for other numbers.

    >>> padded_turn_ids([[1, 0, 1], [1]]).tolist()
    [[0, -1, 1], [0, -1, -1]]
    """
    inside = _inside([len(row) for row in sampled])
    try:
        # a thousand times faster than a tensor of integers, and one entry more, since a buffer must not be empty
        data = bytearray(b"".join(bytes(list(row)) for row in sampled) + b"\0")
    except (TypeError, ValueError):
        data = bytearray(b"\2")
    if max(data) > 1:
        raise ValueError(f"{name} must hold 0 and 1 only, as integers or bools")
    flat = torch.frombuffer(data, dtype=torch.bool)
    return turn_ids_of_runs(torch.zeros_like(inside).masked_scatter_(inside, flat))


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, longest] int64, -1 where a list is shorter.

    >>> padded([[0, 0, 1], [0]]).tolist()
    [[0, 0, 1], [0, -1, -1]]
    """
    inside = _inside([len(row) for row in rows])
    flat = torch.tensor([*chain.from_iterable(rows)], dtype=torch.long)
    return torch.full(inside.shape, -1).masked_scatter_(inside, flat)


def _inside(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.long)[:, None]


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

    advantages: one list a trajectory, with a number for each of its turns.

    >>> advantages_by_token([[1.0, 2.0], [3.0]], torch.tensor([[0, -1, 1], [0, 0, -1]])).tolist()
    [[1.0, 0.0, 2.0], [3.0, 3.0, 0.0]]
    """
    flat = torch.tensor([*chain.from_iterable(advantages), 0.0])  # the last of which the index -1 finds
    counts = torch.tensor([len(row) for row in advantages], dtype=torch.long)
    return flat[torch.where(turn_ids >= 0, turn_ids + (counts.cumsum(0) - counts)[:, None], -1)]
