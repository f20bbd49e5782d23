"""Packing: alignment of rows with their targets, and micro-batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gtpo.batch import PackedSequence, pack, split_by_tokens
from tests.trainer.conftest import make_sequence

LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=12)


@given(lengths=LENGTHS)
def test_a_row_belongs_to_the_token_that_it_predicts(lengths: list[int]) -> None:
    sequences = [
        PackedSequence(
            [100 * number + i for i in range(length)],
            [float(i) for i in range(length)],
            [i % 2 == 1 for i in range(length)],
            [-float(i) for i in range(length)],
        )
        for number, length in enumerate(lengths)
    ]
    batch = pack(sequences)
    row = 0
    for number, length in enumerate(lengths):
        assert batch.cu_seqlens[number] == row and batch.lengths[number] == length - 1
        for i in range(1, length):
            assert batch.input_ids[row] == 100 * number + i - 1
            assert batch.targets[row] == 100 * number + i
            assert (batch.position_ids[row], batch.advantages[row]) == (i - 1, i)
            assert (batch.loss_mask[row], batch.rollout_logprobs[row]) == (i % 2 == 1, -i)
            row += 1
    assert batch.cu_seqlens[-1] == row == len(batch.targets)
    assert batch.num_loss_tokens == sum(length // 2 for length in lengths)


def test_dtypes_are_those_of_the_ops() -> None:
    batch = pack([make_sequence([1, 2, 3])])
    assert batch.cu_seqlens.dtype is torch.int32 and batch.targets.dtype is torch.int64
    assert batch.loss_mask.dtype is torch.bool and batch.advantages.dtype is torch.float32
    assert batch.old_logprobs is None


@given(lengths=LENGTHS, max_tokens=st.integers(1, 30))
def test_micro_batches_keep_order_and_cover_all(lengths: list[int], max_tokens: int) -> None:
    sequences = [make_sequence(range(length)) for length in lengths]
    groups = split_by_tokens(sequences, max_tokens=max_tokens)
    assert [id(sequence) for group in groups for sequence in group] == [id(sequence) for sequence in sequences]
    for group in groups:
        assert len(group) == 1 or sum(len(sequence.token_ids) - 1 for sequence in group) <= max_tokens


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sequence to pack, got none"):
        pack([])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have one length, got .*'advantages': 1"):
        PackedSequence([1, 2], [0.0], [False, True], [0.0, 0.0])


def test_a_sequence_without_a_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens to predict one, got 1"):
        PackedSequence([1], [0.0], [False], [0.0])
