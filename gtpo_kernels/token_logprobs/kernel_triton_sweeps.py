"""Triton sweeps over rows of logits, statistics and gradient, and the plan by which kernels cut a row.

A row that fits one block is read once; a longer one is streamed, and where there are few of those, split over programs
whose parts a second kernel merges in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtpo_kernels.token_logprobs.reference import RowStatistics
from gtpo_kernels.triton_math import (
    INF,
    LAUNCH,
    RowScale,
    below_max,
    d_logits_block,
    device_of,
    load_row_block,
    log_sum_and_entropy,
    rounded,
    row_scale,
    row_statistics,
    shift_statistics,
    squash,
    streamed_statistics,
    target_logprob,
)

VECTOR_BYTES = 16
# Longest row that a sweep keeps in registers between its read and its write.
MAX_BLOCK = 32768
# Elements of one step of a longer one.
STREAM_BLOCK = 4096
# Fewer rows than this leave multiprocessors idle, so long ones are split, into about as many programs in all.
FEW_ROWS = 256
SPLIT_PROGRAMS = 1024
MERGE_ROWS = 32


class RowPlan(NamedTuple):
    """How the rows of a [n, V] matrix are cut.

    unit: a factor of V and of the row strides that makes 16 bytes, so that loads are as wide; 1 where there is none.
    block: elements of one step.  one_block: a row is one step.  splits: programs a row.
    """

    unit: int
    block: int
    one_block: bool
    splits: int
    num_warps: int


def max_block(logits: Tensor, has_softcap: bool, capability: int | None = None) -> int:
    """Longest row that is one block: elements that a program's registers hold, less what the arithmetic takes.

    capability: of the NVIDIA GPU, None for that of the logits.
    """
    if logits.dtype == torch.float64:
        return MAX_BLOCK // 4
    # of float32 the compiler for sm_100 and later keeps a little more
    crowded = logits.dtype == torch.float32 and (capability or compute_capability(logits)) >= 100
    return MAX_BLOCK // 2 if has_softcap or crowded else MAX_BLOCK


def compute_capability(tensor: Tensor) -> int:
    """90 for sm_90; 0 where there is no NVIDIA GPU."""
    if not tensor.is_cuda or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def row_plan(
    num_rows: int, vocab: int, most: int, has_softcap: bool, logits: Tensor, d_logits: Tensor | None = None
) -> RowPlan:
    """The plan, by sizes, dtype and alignment alone.  logits, d_logits: [n, V] with adjacent columns.

    most: elements of the longest row that is one block.
    """
    unit = VECTOR_BYTES // logits.element_size()
    matrices = [logits] if d_logits is None else [logits, d_logits]
    aligned = all(x.stride(0) % unit == 0 and x.data_ptr() % VECTOR_BYTES == 0 for x in matrices)
    unit = unit if aligned and vocab % unit == 0 else 1
    whole = triton.next_power_of_2(vocab)
    if whole <= most:
        return RowPlan(unit, whole, True, 1, warps(whole, has_softcap))
    blocks = triton.cdiv(vocab, STREAM_BLOCK)
    splits = 1 if num_rows >= FEW_ROWS else min(blocks, triton.cdiv(SPLIT_PROGRAMS, max(num_rows, 1)))
    # rounding up the blocks of a split can leave the last ones without any
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))
    return RowPlan(unit, STREAM_BLOCK, False, splits, warps(STREAM_BLOCK, has_softcap))


def warps(block: int, has_softcap: bool) -> int:
    """Warps of a program that works on `block` elements at once: 16 a thread, 8 with a cap; 32 at most."""
    lanes = 64 if torch.version.hip else 32
    return max(1, min(block // ((8 if has_softcap else 16) * lanes), 1024 // lanes))


@triton.jit
def store_statistics(
    logprobs_ptr, entropy_ptr, row_max_ptr, log_sum_ptr, row, mask, y_target, y_max, total, moment, scale
):
    log_sum, entropy = log_sum_and_entropy(total, moment)
    tl.store(logprobs_ptr + row, target_logprob(y_target, y_max, scale, log_sum), mask=mask)
    tl.store(entropy_ptr + row, entropy, mask=mask)
    tl.store(row_max_ptr + row, y_max * scale.to(log_sum.dtype), mask=mask)
    tl.store(log_sum_ptr + row, log_sum, mask=mask)


@triton.jit(do_not_specialize=["stride_units", "vocab_units", "splits"])
def statistics_kernel(
    logits_ptr,
    rows_ptr,
    counted_ptr,
    targets_ptr,
    inverse_temperature: tl.float64,
    row_inverse_ptr,
    softcap: tl.float64,
    inverse_softcap: tl.float64,
    parts_ptr,
    y_target_ptr,
    logprobs_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    stride_units,
    vocab_units,
    splits,
    UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program (i, s): the statistics of part s of row i of the logits; if SPLIT, to be merged."""
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    i = program // splits
    part = (program % splits).to(tl.int32)
    row = i
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i)
    if counted_ptr is not None:  # noqa: SIM102 - `and` of a compile-time and a run-time condition evaluates both
        if tl.load(counted_ptr + row) == 0:
            return
    vocab = vocab_units * UNIT
    row_ptr = logits_ptr + i * stride_units.to(tl.int64) * UNIT
    _, exact_scale = row_scale(inverse_temperature, row_inverse_ptr, row, softcap, HAS_SOFTCAP)
    scale = exact_scale.to(ACC)
    y_target = squash(tl.load(row_ptr + tl.load(targets_ptr + row)).to(ACC), inverse_softcap, HAS_SOFTCAP)
    if ONE_BLOCK:
        y = load_row_block(row_ptr, tl.arange(0, BLOCK_V), vocab, inverse_softcap, HAS_SOFTCAP, ACC)
        y_max, total, moment, _ = row_statistics(y, scale)
    else:
        length = tl.cdiv(tl.cdiv(vocab, BLOCK_V), splits) * BLOCK_V
        first = part * length
        end = tl.minimum(first + length, vocab)
        y_max, total, moment = streamed_statistics(
            row_ptr, first, end, inverse_softcap, scale, HAS_SOFTCAP, ACC, BLOCK_V
        )
    if SPLIT:
        part_ptr = parts_ptr + program * 3
        tl.store(part_ptr, y_max)
        tl.store(part_ptr + 1, total)
        tl.store(part_ptr + 2, moment)
        tl.store(y_target_ptr + row, y_target, mask=part == 0)
    else:
        store_statistics(
            logprobs_ptr, entropy_ptr, row_max_ptr, log_sum_ptr, row, True, y_target, y_max, total, moment, exact_scale
        )


@triton.jit(do_not_specialize=["num_rows", "splits"])
def merge_kernel(
    rows_ptr,
    counted_ptr,
    inverse_temperature: tl.float64,
    row_inverse_ptr,
    softcap: tl.float64,
    inverse_softcap: tl.float64,
    parts_ptr,
    y_target_ptr,
    logprobs_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    num_rows,
    splits,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The parts of BLOCK_N rows, [n, splits, 3], merged in order."""
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = i < num_rows
    row = i
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i, mask=mask, other=0)
    if counted_ptr is not None:
        mask = mask & (tl.load(counted_ptr + row, mask=mask, other=0) != 0)
    row = tl.where(mask, row, 0)
    _, exact_scale = row_scale(inverse_temperature, row_inverse_ptr, row, softcap, HAS_SOFTCAP)
    scale = exact_scale.to(ACC)
    y_max = tl.full((BLOCK_N,), -INF, ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    moment = tl.zeros((BLOCK_N,), ACC)
    for part in range(splits):
        part_ptr = parts_ptr + (i * splits + part) * 3
        part_max = tl.load(part_ptr, mask=mask, other=0.0)
        part_total = tl.load(part_ptr + 1, mask=mask, other=0.0)
        part_moment = tl.load(part_ptr + 2, mask=mask, other=0.0)
        new_max = tl.maximum(y_max, part_max)
        total, moment = shift_statistics(total, moment, y_max, new_max, scale)
        part_total, part_moment = shift_statistics(part_total, part_moment, part_max, new_max, scale)
        total += part_total
        moment += part_moment
        y_max = new_max
    y_target = tl.load(y_target_ptr + row, mask=mask, other=0.0)
    store_statistics(
        logprobs_ptr, entropy_ptr, row_max_ptr, log_sum_ptr, row, mask, y_target, y_max, total, moment, exact_scale
    )


@triton.jit(do_not_specialize=["stride_units", "d_stride_units", "vocab_units"])
def gradient_kernel(
    logits_ptr,
    d_logits_ptr,
    rows_ptr,
    targets_ptr,
    inverse_temperature: tl.float64,
    row_inverse_ptr,
    softcap: tl.float64,
    inverse_softcap: tl.float64,
    d_logprobs_ptr,
    d_entropy_ptr,
    logprobs_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    stride_units,
    d_stride_units,
    vocab_units,
    UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program (i, b): block b of row i of d_logits, which may be the logits themselves; 0 where nothing flows back."""
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    HAS_ENTROPY: tl.constexpr = d_entropy_ptr is not None
    vocab = vocab_units * UNIT
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(vocab, BLOCK_V)
    i = program // blocks
    columns = (program % blocks).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = i
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i)
    d_row_ptr = d_logits_ptr + i * d_stride_units.to(tl.int64) * UNIT
    d_logprob = tl.load(d_logprobs_ptr + row).to(ACC)
    flows = d_logprob != 0.0
    d_entropy = tl.full((), 0.0, ACC)
    if HAS_ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + row).to(ACC)
        flows = flows | (d_entropy != 0.0)
    if flows:
        row_inverse, scale = row_scale(inverse_temperature, row_inverse_ptr, row, softcap, HAS_SOFTCAP)
        row_ptr = logits_ptr + i * stride_units.to(tl.int64) * UNIT
        y = load_row_block(row_ptr, columns, vocab, inverse_softcap, HAS_SOFTCAP, ACC)
        d_logprob = tl.where(tl.load(logprobs_ptr + row) == -INF, 0.0, d_logprob)
        # row_max is the same product for the largest y, and here too it is rounded before the difference is taken
        d_logits = d_logits_block(
            y,
            below_max(y * scale.to(ACC), tl.load(row_max_ptr + row), 1.0),
            tl.load(log_sum_ptr + row),
            columns == tl.load(targets_ptr + row).to(tl.int32),
            row_inverse.to(ACC),
            d_logprob,
            d_entropy,
            tl.load(entropy_ptr + row),
            HAS_SOFTCAP,
            HAS_ENTROPY,
        )
        tl.store(d_row_ptr + columns, rounded(d_logits, d_logits_ptr.dtype.element_ty), mask=columns < vocab)
    else:
        zeros = tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty)
        tl.store(d_row_ptr + columns, zeros, mask=columns < vocab)


def adjacent_columns(logits: Tensor) -> Tensor:
    """The logits [n, V], or a copy of them where neighbours in a row are not neighbours in memory."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def sweep_statistics(
    logits: Tensor,
    rows: Tensor | None,
    counted: Tensor | None,
    targets: Tensor,
    scale: RowScale,
    statistics: RowStatistics,
) -> None:
    """Write the statistics of rows [n] (None: all), whose logits [n, V] are given. counted: [N] bool, which."""
    num_rows, vocab = logits.shape
    # they are read once either way
    plan = row_plan(num_rows, vocab, STREAM_BLOCK, scale.softcap != 0.0, logits)
    parts = y_target = None
    if plan.splits > 1:
        parts = statistics.logprobs.new_empty(num_rows * plan.splits * 3)
        y_target = torch.empty_like(statistics.logprobs)
    with device_of(logits):
        statistics_kernel[(num_rows * plan.splits,)](
            logits,
            rows,
            counted,
            targets,
            *scale,
            parts,
            y_target,
            *statistics,
            logits.stride(0) // plan.unit,
            vocab // plan.unit,
            plan.splits,
            UNIT=plan.unit,
            BLOCK_V=plan.block,
            ONE_BLOCK=plan.one_block,
            SPLIT=plan.splits > 1,
            HAS_SOFTCAP=scale.softcap != 0.0,
            num_warps=plan.num_warps,
            **LAUNCH,
        )
    if parts is not None and y_target is not None:
        merge_parts(parts, y_target, num_rows, plan.splits, rows, counted, scale, statistics)


def merge_parts(
    parts: Tensor,
    y_target: Tensor,
    num_rows: int,
    splits: int,
    rows: Tensor | None,
    counted: Tensor | None,
    scale: RowScale,
    statistics: RowStatistics,
) -> None:
    """Write the statistics of the rows whose parts [n, splits, 3] are given."""
    with device_of(parts):
        merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
            rows,
            counted,
            *scale,
            parts,
            y_target,
            *statistics,
            num_rows,
            splits,
            BLOCK_N=MERGE_ROWS,
            HAS_SOFTCAP=scale.softcap != 0.0,
            num_warps=1,
            **LAUNCH,
        )


def sweep_gradient(
    logits: Tensor,
    d_logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    scale: RowScale,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
) -> None:
    """Write d_logits [n, V], which may be the logits themselves, of rows [n], by default all."""
    num_rows, vocab = logits.shape
    plan = row_plan(num_rows, vocab, STREAM_BLOCK, scale.softcap != 0.0, logits, d_logits)
    with device_of(logits):
        gradient_kernel[(num_rows * triton.cdiv(vocab, plan.block),)](
            logits,
            d_logits,
            rows,
            targets,
            *scale,
            grad_logprobs,
            grad_entropy,
            *statistics,
            logits.stride(0) // plan.unit,
            d_logits.stride(0) // plan.unit,
            vocab // plan.unit,
            UNIT=plan.unit,
            BLOCK_V=plan.block,
            HAS_SOFTCAP=scale.softcap != 0.0,
            num_warps=plan.num_warps,
            **LAUNCH,
        )
