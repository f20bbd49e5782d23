"""The Triton tile kernel from hidden states: statistics of rows whose logits are never written."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtpo_kernels.token_logprobs.kernel_triton_sweeps import (
    SPLIT_PROGRAMS,
    VECTOR_BYTES,
    compute_capability,
    merge_parts,
)
from gtpo_kernels.token_logprobs.reference import RowStatistics
from gtpo_kernels.triton_math import (
    INF,
    INTERPRETED,
    LAUNCH,
    LOG_ZERO,
    RowScale,
    below_max,
    contiguous,
    device_of,
    row_scale,
    shift_statistics,
    squash,
)


class TilePlan(NamedTuple):
    """The tile of `linear_token_logprobs`: rows, vocabulary, width; unit: a factor of the width that makes 16 bytes."""

    unit: int
    rows: int
    vocab: int
    width: int
    num_warps: int
    num_stages: int


def tile_plan(hidden: Tensor, weight: Tensor, capability: int | None = None) -> TilePlan:
    """By dtype, alignment and device alone.  float32 products are of full precision, so without tensor cores."""
    unit = VECTOR_BYTES // min(hidden.element_size(), weight.element_size())
    aligned = all(x.data_ptr() % VECTOR_BYTES == 0 for x in (hidden, weight)) and hidden.shape[1] % unit == 0
    unit = unit if aligned else 1
    stages = 2 if torch.version.hip else 3
    if hidden.dtype != weight.dtype or hidden.dtype == torch.float32:
        return TilePlan(unit, 64, 64, 32, 4, stages)
    # there tensor cores take their operands from registers
    small = (capability or compute_capability(hidden)) in (80, 86, 89, 120)
    return TilePlan(unit, 128, 64 if small else 128, 64, 8, stages)


@triton.jit(do_not_specialize=["num_rows", "vocab", "width_units", "splits"])
def tile_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    inverse_temperature: tl.float64,
    row_inverse_ptr,
    softcap: tl.float64,
    inverse_softcap: tl.float64,
    parts_ptr,
    y_target_ptr,
    num_rows,
    vocab,
    width_units,
    splits,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (s, b): the statistics of BLOCK_N rows over part s of the vocabulary, to be merged."""
    width = width_units * UNIT
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    # neighbours share the rows of the weight
    part = tl.program_id(0) // row_blocks
    rows = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_rows
    rows = tl.where(in_rows, rows, 0)
    targets = tl.load(targets_ptr + rows)
    _, scale = row_scale(inverse_temperature, row_inverse_ptr, rows, softcap, HAS_SOFTCAP)
    scale = tl.zeros((BLOCK_N,), tl.float32) + scale.to(tl.float32)
    length = tl.cdiv(tl.cdiv(vocab, BLOCK_V), splits) * BLOCK_V
    first = part * length
    end = tl.minimum(first + length, vocab)
    y_max = tl.full((BLOCK_N,), -INF, tl.float32)
    y_target = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, end, BLOCK_V):
        columns = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        in_vocab = columns < vocab
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for depth in range(0, width, BLOCK_D):
            lanes = depth + tl.arange(0, BLOCK_D)
            in_width = lanes[None, :] < width
            hidden = tl.load(hidden_ptr + rows[:, None] * width + lanes[None, :], mask=in_width, other=0.0)
            weight_ptrs = weight_ptr + columns[:, None] * width + lanes[None, :]
            weight = tl.load(weight_ptrs, mask=in_vocab[:, None] & in_width, other=0.0)
            if UPCAST:
                hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
            logits = tl.dot(hidden, tl.trans(weight), logits, input_precision="ieee")
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + columns, mask=in_vocab, other=0.0).to(tl.float32)[None, :]
        y = tl.where(in_vocab[None, :], squash(logits, inverse_softcap, HAS_SOFTCAP), -INF)
        is_target = columns[None, :] == targets[:, None]
        y_target += tl.sum(tl.where(is_target, y, 0.0), 1)
        new_max = tl.maximum(y_max, tl.max(y, 1))
        total, moment = shift_statistics(total, moment, y_max, new_max, scale)
        below = below_max(y, new_max[:, None], scale[:, None])
        weights = tl.exp(below)
        total += tl.sum(weights, 1)
        moment += tl.sum(weights * tl.maximum(below, LOG_ZERO), 1)
        y_max = new_max
    part_ptrs = parts_ptr + (rows * splits + part) * 3
    tl.store(part_ptrs, y_max, mask=in_rows)
    tl.store(part_ptrs + 1, total, mask=in_rows)
    tl.store(part_ptrs + 2, moment, mask=in_rows)
    tl.store(y_target_ptr + rows, y_target, mask=in_rows & (targets >= first) & (targets < end))


def tile_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: RowScale,
    statistics: RowStatistics,
) -> None:
    """Write the statistics of every row of hidden @ weight.T + bias."""
    num_rows, width = hidden.shape
    vocab = weight.shape[0]
    hidden, weight, bias = hidden.contiguous(), weight.contiguous(), contiguous(bias)
    tile = tile_plan(hidden, weight)
    row_blocks, vocab_blocks = triton.cdiv(num_rows, tile.rows), triton.cdiv(vocab, tile.vocab)
    splits = min(vocab_blocks, triton.cdiv(SPLIT_PROGRAMS, max(row_blocks, 1)))
    splits = triton.cdiv(vocab_blocks, triton.cdiv(vocab_blocks, splits))
    parts = statistics.logprobs.new_empty(num_rows * splits * 3)
    y_target = torch.empty_like(statistics.logprobs)
    with device_of(hidden):
        tile_kernel[(row_blocks * splits,)](
            hidden,
            weight,
            bias,
            targets,
            *scale,
            parts,
            y_target,
            num_rows,
            vocab,
            width // tile.unit,
            splits,
            UNIT=tile.unit,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.vocab,
            BLOCK_D=tile.width,
            HAS_SOFTCAP=scale.softcap != 0.0,
            UPCAST=INTERPRETED.value or hidden.dtype != weight.dtype,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **LAUNCH,
        )
    merge_parts(parts, y_target, num_rows, splits, None, None, scale, statistics)
