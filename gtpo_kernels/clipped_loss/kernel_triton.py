"""The `triton` backend of `clipped_loss`: sums of each block of tokens in float64, then all blocks in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.reference import NUM_CLIPPED_METRICS, LossMetrics, loss_denominator
from gtpo_kernels.triton_math import (
    INF,
    LAUNCH,
    MAX_LOG_RATIO,
    contiguous,
    device_of,
    expm1_minus,
    loss_slope,
    precise_exp,
    scalar,
)

TOKENS = 1024
# Entries of a block's sums: the loss, the metrics in their order, the number of live tokens.
NUM_SUMS = tl.constexpr(13)
RATIO_MAX = tl.constexpr(1 + LossMetrics._fields.index("ratio_max"))
LIVE = tl.constexpr(12)
WIDTH = 16


@triton.jit(do_not_specialize=["num_tokens"])
def block_kernel(
    logprobs_ptr,
    advantages_ptr,
    loss_mask_ptr,
    old_logprobs_ptr,
    entropy_ptr,
    denominator_ptr,
    clip_low: tl.float64,
    clip_high: tl.float64,
    sums_ptr,
    d_logprobs_ptr,
    num_tokens,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_METRICS: tl.constexpr,
):
    """Program b: the sums [WIDTH] of BLOCK_N tokens, and their slopes where d_logprobs_ptr is not None."""
    ACC: tl.constexpr = denominator_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = token < num_tokens
    in_mask = tl.load(loss_mask_ptr + token, mask=mask, other=0) != 0
    advantage = tl.load(advantages_ptr + token, mask=in_mask, other=0.0).to(ACC)
    active = in_mask & (advantage != 0.0)
    counted = active
    if ALL_METRICS:
        counted = in_mask
    logprob = tl.load(logprobs_ptr + token, mask=counted, other=0.0).to(ACC)
    old_logprob = logprob
    if old_logprobs_ptr is not None:
        old_logprob = tl.load(old_logprobs_ptr + token, mask=counted, other=0.0).to(ACC)
    nonfinite = (tl.abs(logprob) == INF) | (tl.abs(old_logprob) == INF)
    live = counted & (nonfinite == 0)
    # comparisons rather than minimum and maximum: a NaN stays to be seen
    log_ratio = tl.where(live, logprob - old_logprob, 0.0)
    log_ratio = tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
    log_ratio = tl.where(log_ratio < -MAX_LOG_RATIO, -MAX_LOG_RATIO, log_ratio)
    ratio = precise_exp(log_ratio)
    low, high = scalar(1.0 - clip_low, ACC), scalar(1.0 + clip_high, ACC)
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    surrogate = tl.where(live & active, tl.minimum(ratio * advantage, clipped * advantage), 0.0)
    ratio = tl.where(live, ratio, 0.0)
    entropy = tl.zeros((BLOCK_N,), ACC)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + token, mask=live, other=0.0).to(ACC)

    row_ptr = sums_ptr + tl.program_id(0).to(tl.int64) * WIDTH
    tl.store(row_ptr, -total(surrogate))
    tl.store(row_ptr + 1, total(live & (ratio < low) & (advantage < 0.0)))
    tl.store(row_ptr + 2, total(live & (ratio > high) & (advantage > 0.0)))
    tl.store(row_ptr + 3, -total(log_ratio))
    tl.store(row_ptr + 4, total(expm1_minus(log_ratio)))
    tl.store(row_ptr + 5, total(entropy))
    tl.store(row_ptr + 6, total(ratio))
    tl.store(row_ptr + 7, tl.max(ratio, 0).to(tl.float64))
    tl.store(row_ptr + 8, total(tl.where(live, logprob, 0.0)))
    tl.store(row_ptr + 9, total(counted))
    tl.store(row_ptr + 10, total(in_mask & (counted == 0)))
    tl.store(row_ptr + 11, total(counted & nonfinite))
    tl.store(row_ptr + 12, total(live))
    if d_logprobs_ptr is not None:
        slope = loss_slope(logprob, old_logprob, advantage, tl.load(denominator_ptr), clip_low, clip_high)
        tl.store(d_logprobs_ptr + token, tl.where(active, slope, 0.0), mask=mask)


@triton.jit
def total(values):
    return tl.sum(values.to(tl.float64), 0)


@triton.jit(do_not_specialize=["num_blocks"])
def combine_kernel(
    sums_ptr, denominator_ptr, loss_ptr, metrics_ptr, num_blocks, BLOCK_B: tl.constexpr, WIDTH: tl.constexpr
):
    """The sums of all blocks, [blocks, WIDTH], to the loss and the metrics; one program, so in one order."""
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    entry = tl.arange(0, WIDTH)
    in_sums = entry < NUM_SUMS
    sums = tl.zeros((WIDTH,), tl.float64)
    largest = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, num_blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        mask = (block < num_blocks)[:, None] & in_sums[None, :]
        part = tl.load(sums_ptr + block[:, None].to(tl.int64) * WIDTH + entry[None, :], mask=mask, other=0.0)
        sums += tl.sum(part, 0)
        largest = tl.maximum(largest, tl.max(part, 0))
    # a NaN among the ratios is in their sum, the entry before, and not in their maximum
    ratio_sum = tl.sum(tl.where(entry == RATIO_MAX - 1, sums, 0.0), 0)
    num_live = tl.maximum(tl.sum(tl.where(entry == LIVE, sums, 0.0), 0), 1.0)
    denominator = tl.load(denominator_ptr).to(tl.float64)
    value = tl.where(entry == 0, sums / denominator, tl.where(entry <= RATIO_MAX + 1, sums / num_live, sums))
    value = tl.where(entry == RATIO_MAX, tl.where(ratio_sum == ratio_sum, largest, ratio_sum), value).to(ACC)
    tl.store(loss_ptr + entry, value, mask=entry == 0)
    tl.store(metrics_ptr + entry - 1, value, mask=(entry > 0) & (entry < LIVE))


def clipped_loss(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    old_logprobs: Tensor | None,
    entropy: Tensor | None,
    num_loss_tokens: Tensor | None,
    clip_low: float,
    clip_high: float,
    all_metrics: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_logprobs [N], or [0] where not needed)."""
    dtype = accumulator_dtype(logprobs.dtype)
    num_tokens = logprobs.shape[0]
    num_blocks = triton.cdiv(num_tokens, TOKENS)
    denominator = loss_denominator(num_loss_tokens, loss_mask, dtype)
    sums = logprobs.new_empty((num_blocks, WIDTH), dtype=torch.float64)
    loss, metrics = logprobs.new_empty((), dtype=dtype), logprobs.new_empty(NUM_CLIPPED_METRICS, dtype=dtype)
    d_logprobs = logprobs.new_empty(num_tokens if need_gradient else 0, dtype=dtype)
    with device_of(logprobs):
        block_kernel[(num_blocks,)](
            logprobs.contiguous(),
            advantages.contiguous(),
            loss_mask.contiguous(),
            contiguous(old_logprobs),
            contiguous(entropy),
            denominator,
            clip_low,
            clip_high,
            sums,
            d_logprobs if need_gradient else None,
            num_tokens,
            BLOCK_N=TOKENS,
            WIDTH=WIDTH,
            ALL_METRICS=all_metrics,
            num_warps=4,
            **LAUNCH,
        )
        combine_kernel[(1,)](
            sums, denominator, loss, metrics, num_blocks, BLOCK_B=64, WIDTH=WIDTH, num_warps=4, **LAUNCH
        )
    return loss, metrics, d_logprobs
