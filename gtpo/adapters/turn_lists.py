"""Turns of ragged lists, as trainers hold them before they are padded."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from gtpo.adapters.layouts import turn_ids_of_runs
from gtpo.adapters.ragged import flat_floats, flat_ints


def padded_turn_ids(sampled: Sequence[Sequence[int]], *, name: str = "loss_mask") -> Tensor:
    """[B, longest] int32: each unbroken run of sampled tokens is a turn; -1 for tool output and padding.

    sampled: for each trajectory one 0 or 1 a token.  name: of the argument, for the error.
    Raises ValueError for other numbers.

    >>> padded_turn_ids([[1, 0, 1], [1]]).tolist()
    [[0, -1, 1], [0, -1, -1]]
    """
    width = max(map(len, sampled), default=0)
    try:
        # a byte a token: a tensor of integers takes ten times as long.  One more, since a buffer must not be empty
        data = bytearray(b"".join(bytes(list(row)).ljust(width, b"\0") for row in sampled) + b"\0")
    except (TypeError, ValueError):
        data = bytearray(b"\2")
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.max() > 1:
        raise ValueError(f"{name} must hold 0 and 1 only, as integers or bools")
    return turn_ids_of_runs(flat[:-1].view(torch.bool).view(len(sampled), width))


def padded(rows: Sequence[Sequence[int]], *, name: str = "turn_ids") -> Tensor:
    """[B, longest] int64, -1 where a list is shorter.  name: of the argument, for the error.

    >>> padded([[0, 0, 1], [0]]).tolist()
    [[0, 0, 1], [0, -1, -1]]
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    inside = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
    return torch.full(inside.shape, -1).masked_scatter_(inside, flat_ints(name, rows))


def turn_lengths(turn_ids: Tensor) -> list[list[int]]:
    """Tokens of each turn of each row.  turn_ids: [B, T], -1 where not sampled.

    >>> turn_lengths(torch.tensor([[0, 0, -1, 1], [-1, -1, -1, -1]]))
    [[2, 1], []]
    """
    num_turns = F.pad(turn_ids, (0, 1), value=-1).amax(dim=1) + 1
    places = _places(turn_ids, num_turns).flatten()
    counts = iter(torch.bincount(places, minlength=int(num_turns.sum())).tolist())
    return [[*islice(counts, count)] for count in num_turns.tolist()]


def advantages_by_token(advantages: Sequence[Sequence[float]], turn_ids: Tensor) -> Tensor:
    """[B, T] float32: the advantage of each token's turn, 0 where `turn_ids` [B, T] is -1.

    advantages: one list a trajectory, with a number for each of its turns.

    >>> advantages_by_token([[1.0, 2.0], [3.0]], torch.tensor([[0, -1, 1], [0, 0, -1]])).tolist()
    [[1.0, 0.0, 2.0], [3.0, 3.0, 0.0]]
    """
    num_turns = torch.tensor([len(row) for row in advantages], dtype=turn_ids.dtype)
    flat = flat_floats("advantages", [*advantages, [0.0]])
    return flat.index_select(0, _places(turn_ids, num_turns).flatten()).view(turn_ids.shape)


def _places(turn_ids: Tensor, num_turns: Tensor) -> Tensor:
    """[B, T]: the number, over all rows, of each token's turn; where it has none, the number of all turns."""
    first = num_turns.cumsum(0, dtype=turn_ids.dtype) - num_turns
    return torch.where(turn_ids >= 0, turn_ids + first[:, None], int(num_turns.sum()))
