"""Packing trajectories into one row of tokens for training.

Alignment is done here, once: row i of the hidden states predicts `targets[i]`, and `loss_mask[i]`, `advantages[i]` and
`rollout_logprobs[i]` belong to that target. The last token of a sequence predicts nothing and is not an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequence:
    """One trajectory as training sees it: its ids, and for each id its advantage, whether it counts in the loss, the
    log-prob that the sampler reported (advantage and log-prob are 0 where not sampled), and its turn (-1 where not
    sampled; None takes all of the loss for one turn).

    All lists have the length of `token_ids`; entries belong to the token at the same place.
    """

    token_ids: list[int]
    advantages: list[float]
    loss_mask: list[bool]
    rollout_logprobs: list[float]
    turn_ids: list[int] | None = None

    def __post_init__(self) -> None:
        lists = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lengths = {name: len(values) for name, values in lists.items() if values is not None}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all lists of a sequence must have one length, got {lengths}")
        if len(self.token_ids) < 2:
            raise ValueError(f"a sequence needs at least 2 tokens to predict one, got {len(self.token_ids)}")


@dataclass(frozen=True)
class Batch:
    """Packed rows, each [N] unless said: `input_ids`, `position_ids` (from 0 in each sequence), `targets`,
    `advantages`, `loss_mask`, `rollout_logprobs`, `turn_ids` (no two sequences share one), `old_logprobs`,
    `ref_logprobs`; `cu_seqlens` [B+1] int32."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    turn_ids: Tensor
    cu_seqlens: Tensor
    lengths: list[int]
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


def pack(sequences: Sequence[PackedSequence], *, device: torch.device | str = "cpu") -> Batch:
    """Packs sequences back to back. A sequence of T tokens gives T - 1 rows.

    >>> sequence = PackedSequence([7, 8, 9], [0.0, 2.0, 2.0], [False, True, True], [0.0, -1.0, -2.0])
    >>> batch = pack([sequence, sequence])
    >>> batch.input_ids.tolist(), batch.targets.tolist(), batch.position_ids.tolist()
    ([7, 8, 7, 8], [8, 9, 8, 9], [0, 1, 0, 1])
    >>> batch.advantages.tolist(), batch.cu_seqlens.tolist()
    ([2.0, 2.0, 2.0, 2.0], [0, 2, 4])
    """
    if not sequences:
        raise ValueError("there must be at least one sequence to pack, got none")
    lengths = [len(sequence.token_ids) - 1 for sequence in sequences]

    def rows(name: str, dtype: torch.dtype, *, inputs: bool = False) -> Tensor:
        part = slice(None, -1) if inputs else slice(1, None)
        return torch.tensor([x for s in sequences for x in getattr(s, name)[part]], dtype=dtype, device=device)

    return Batch(
        input_ids=rows("token_ids", torch.long, inputs=True),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
        targets=rows("token_ids", torch.long),
        advantages=rows("advantages", torch.float32),
        loss_mask=rows("loss_mask", torch.bool),
        rollout_logprobs=rows("rollout_logprobs", torch.float32),
        turn_ids=torch.tensor(_turn_ids(sequences), dtype=torch.long, device=device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32),
        lengths=lengths,
    )


def _turn_ids(sequences: Sequence[PackedSequence]) -> list[int]:
    """Turns of all rows, numbered on from sequence to sequence."""
    packed: list[int] = []
    first = 0
    for sequence in sequences:
        turns = sequence.turn_ids
        if turns is None:
            turns = [0 if is_counted else -1 for is_counted in sequence.loss_mask]
        packed += [first + turn if turn >= 0 else -1 for turn in turns[1:]]
        first += max(turns) + 1
    return packed


def split_by_tokens(sequences: Sequence[PackedSequence], *, max_tokens: int) -> list[list[PackedSequence]]:
    """Micro-batches in order, each of at most `max_tokens` rows; a longer sequence is a micro-batch of its own."""
    groups: list[list[PackedSequence]] = []
    room = 0
    for sequence in sequences:
        rows = len(sequence.token_ids) - 1
        if not groups or rows > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(sequence)
        room -= rows
    return groups
