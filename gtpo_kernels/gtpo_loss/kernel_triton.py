"""The `triton` backend of the fused losses: one sweep turns a row of logits into its gradient.

A row that fits one block is read once and written once; a longer one is read twice.  Where there are few long rows,
they are split over programs: statistics, then slopes, then the gradient.  From hidden states the sweep runs in place
between matrix products of the library.
"""

import triton
import triton.language as tl
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.kernel_torch import loss_slope as loss_slope_of
from gtpo_kernels.clipped_loss.kernel_triton import clipped_loss
from gtpo_kernels.clipped_loss.reference import counted_tokens
from gtpo_kernels.gtpo_loss.kernel_torch import ChunkSweep, LossPass
from gtpo_kernels.gtpo_loss.reference import LossInputs
from gtpo_kernels.token_logprobs.kernel_torch import empty_statistics
from gtpo_kernels.token_logprobs.kernel_triton_sweeps import (
    adjacent_columns,
    max_block,
    row_plan,
    sweep_gradient,
    sweep_statistics,
)
from gtpo_kernels.triton_math import (
    LAUNCH,
    RowScale,
    below_max,
    contiguous,
    d_cap,
    device_of,
    load_row_block,
    log_sum_and_entropy,
    loss_slope,
    precise_exp,
    rounded,
    row_scale,
    row_scaling,
    row_statistics,
    squash,
    streamed_statistics,
    target_logprob,
)


@triton.jit(do_not_specialize=["stride_units", "d_stride_units", "vocab_units"])
def sweep_kernel(
    logits_ptr,
    d_logits_ptr,
    rows_ptr,
    targets_ptr,
    advantages_ptr,
    loss_mask_ptr,
    old_logprobs_ptr,
    inverse_temperature: tl.float64,
    row_inverse_ptr,
    softcap: tl.float64,
    inverse_softcap: tl.float64,
    denominator_ptr,
    clip_low: tl.float64,
    clip_high: tl.float64,
    logprobs_ptr,
    entropy_ptr,
    stride_units,
    d_stride_units,
    vocab_units,
    UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALL_METRICS: tl.constexpr,
):
    """Program i: row i of the logits.  d_logits_ptr: may be logits_ptr; None where no gradient is needed."""
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    HAS_GRADIENT: tl.constexpr = d_logits_ptr is not None
    vocab = vocab_units * UNIT
    lanes = tl.arange(0, BLOCK_V)
    i = tl.program_id(0).to(tl.int64)
    row = i
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i)
    in_mask = tl.load(loss_mask_ptr + row) != 0
    advantage = tl.load(advantages_ptr + row).to(ACC)
    active = in_mask & (advantage != 0.0)
    counted = active
    if ALL_METRICS:
        counted = in_mask
    if HAS_GRADIENT:
        d_row_ptr = d_logits_ptr + i * d_stride_units.to(tl.int64) * UNIT
    if counted:
        row_ptr = logits_ptr + i * stride_units.to(tl.int64) * UNIT
        row_inverse, exact_scale = row_scale(inverse_temperature, row_inverse_ptr, row, softcap, HAS_SOFTCAP)
        scale = exact_scale.to(ACC)
        if ONE_BLOCK:
            y = load_row_block(row_ptr, lanes, vocab, inverse_softcap, HAS_SOFTCAP, ACC)
            y_max, total, moment, weights = row_statistics(y, scale)
        else:
            y_max, total, moment = streamed_statistics(
                row_ptr, 0, vocab, inverse_softcap, scale, HAS_SOFTCAP, ACC, BLOCK_V
            )
        target = tl.load(targets_ptr + row).to(tl.int32)
        y_target = squash(tl.load(row_ptr + target).to(ACC), inverse_softcap, HAS_SOFTCAP)
        if HAS_GRADIENT:
            # Every thread has loaded it: where d_logits are the logits, a fast one would else overwrite what a slow one
            # has still to read.  Loaded before the reductions, which have barriers, it would cost a register too many.
            tl.debug_barrier()
        log_sum, entropy = log_sum_and_entropy(total, moment)
        logprob = target_logprob(y_target, y_max, exact_scale, log_sum)
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        if HAS_GRADIENT and active:
            old_logprob = logprob
            if old_logprobs_ptr is not None:
                old_logprob = tl.load(old_logprobs_ptr + row).to(ACC)
            slope = loss_slope(logprob, old_logprob, advantage, tl.load(denominator_ptr), clip_low, clip_high)
            # slope (1[v = target] - p_v) / temperature, with all that is common to a row taken together
            slope *= row_inverse.to(ACC)
            d_target = slope * (1.0 - tl.exp(logprob))
            factor = -slope * precise_exp(-log_sum)
            if ONE_BLOCK:
                d_logits = tl.where(lanes == target, d_target, weights * factor)
                if HAS_SOFTCAP:
                    d_logits = d_cap(d_logits, y)
                tl.store(d_row_ptr + lanes, rounded(d_logits, d_logits_ptr.dtype.element_ty), mask=lanes < vocab)
            else:
                # backwards: the end of the row was read last, and may still be in the cache
                blocks = tl.cdiv(vocab, BLOCK_V)
                for block in range(blocks):
                    columns = (blocks - 1 - block) * BLOCK_V + lanes
                    y = load_row_block(row_ptr, columns, vocab, inverse_softcap, HAS_SOFTCAP, ACC)
                    d_logits = tl.where(columns == target, d_target, tl.exp(below_max(y, y_max, scale)) * factor)
                    if HAS_SOFTCAP:
                        d_logits = d_cap(d_logits, y)
                    stored = rounded(d_logits, d_logits_ptr.dtype.element_ty)
                    tl.store(d_row_ptr + columns, stored, mask=columns < vocab)
    if HAS_GRADIENT and not active:
        zeros = tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty)
        for start in range(0, vocab, BLOCK_V):
            tl.store(d_row_ptr + start + lanes, zeros, mask=start + lanes < vocab)


def sweep(logits: Tensor, d_logits: Tensor | None, rows: Tensor | None, state: LossPass) -> None:
    """Write d_logits, which may be the logits [n, V] themselves, and what the state keeps of rows [n] (None: all)."""
    num_rows, vocab = logits.shape
    i, scale = state.inputs, row_scaling(*state.scale)
    has_softcap = scale.softcap != 0.0
    plan = row_plan(num_rows, vocab, max_block(logits, has_softcap), has_softcap, logits, d_logits)
    if plan.splits > 1:
        split_sweep(logits, d_logits, rows, state, scale)
        return
    with device_of(logits):
        sweep_kernel[(num_rows,)](
            logits,
            d_logits,
            rows,
            i.targets,
            i.advantages,
            i.loss_mask,
            i.old_logprobs,
            *scale,
            state.denominator,
            i.terms.clip_low,
            i.terms.clip_high,
            state.logprobs,
            state.entropy,
            logits.stride(0) // plan.unit,
            0 if d_logits is None else d_logits.stride(0) // plan.unit,
            vocab // plan.unit,
            UNIT=plan.unit,
            BLOCK_V=plan.block,
            ONE_BLOCK=plan.one_block,
            HAS_SOFTCAP=has_softcap,
            ALL_METRICS=i.all_metrics,
            num_warps=plan.num_warps,
            **LAUNCH,
        )


def split_sweep(logits: Tensor, d_logits: Tensor | None, rows: Tensor | None, state: LossPass, scale: RowScale) -> None:
    """`sweep` of a few long rows, each split over programs."""
    i = state.inputs
    statistics = empty_statistics(state.logprobs)._replace(logprobs=state.logprobs, entropy=state.entropy)
    counted = counted_tokens(i.advantages, i.loss_mask, i.terms, i.all_metrics)
    sweep_statistics(logits, rows, counted, i.targets, scale, statistics)
    if d_logits is None:
        return
    silent = ~(i.loss_mask & (i.advantages != 0))
    slope = loss_slope_of(
        state.logprobs,
        i.advantages.to(state.dtype).masked_fill(silent, 0.0),
        None if i.old_logprobs is None else i.old_logprobs.to(state.dtype),
        state.denominator,
        i.terms.clip_low,
        i.terms.clip_high,
    )
    # a slope of 0 writes zeros, whatever the row holds
    slope.masked_fill_(silent, 0.0)
    sweep_gradient(logits, d_logits, rows, i.targets, scale, slope, None, statistics)


def contiguous_inputs(inputs: LossInputs) -> LossInputs:
    """The inputs as kernels index them, by row alone."""
    i = inputs
    return i._replace(
        targets=i.targets.contiguous(),
        advantages=i.advantages.contiguous(),
        loss_mask=i.loss_mask.contiguous(),
        old_logprobs=contiguous(i.old_logprobs),
        row_temperature=contiguous(i.row_temperature),
    )


def gtpo_loss(logits: Tensor, inputs: LossInputs, need_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_logits [N, V] in the logits' dtype, or [0] where not needed)."""
    d_logits = logits.new_empty(logits.shape if need_logits else (0,))
    state = LossPass(contiguous_inputs(inputs), accumulator_dtype(logits.dtype))
    sweep(adjacent_columns(logits), d_logits if need_logits else None, None, state)
    return *state.finish(clipped_loss), d_logits


def gtpo_loss_(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [11]); logits [N, V], contiguous, become d_logits."""
    state = LossPass(contiguous_inputs(inputs), accumulator_dtype(logits.dtype))
    sweep(logits, logits, None, state)
    return state.finish(clipped_loss)


def chunk_sweep(inputs: LossInputs) -> ChunkSweep:
    """The `ChunkSweep` of this backend."""

    def sweep_(logits: Tensor, rows: Tensor, state: LossPass, gradient: bool) -> None:
        sweep(logits, logits if gradient else None, rows, state)

    return ChunkSweep(contiguous_inputs(inputs), sweep_)
