"""The `torch` backend of `clipped_loss`: the slope of every token in closed form, so a backward pass needs no graph."""

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.reference import (
    MAX_LOG_RATIO,
    NUM_CLIPPED_METRICS,
    LossTerms,
    clipped_loss_reference,
    loss_denominator,
    pack_metrics,
)


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
    terms = LossTerms(clip_low, clip_high)
    loss, metrics = clipped_loss_reference(
        logprobs, advantages, loss_mask, old_logprobs, entropy, num_loss_tokens, terms, all_metrics
    )
    accumulator = accumulator_dtype(logprobs.dtype)
    packed = pack_metrics(loss, metrics[:NUM_CLIPPED_METRICS])
    if not need_gradient:
        return loss, packed, loss.new_empty(0)
    d_logprobs = loss.new_zeros(logprobs.shape)
    rows = (loss_mask & (advantages != 0)).nonzero().squeeze(1)
    d_logprobs[rows] = loss_slope(
        logprobs[rows].to(accumulator),
        advantages[rows].to(accumulator),
        None if old_logprobs is None else old_logprobs[rows].to(accumulator),
        loss_denominator(num_loss_tokens, loss_mask, accumulator),
        clip_low,
        clip_high,
    )
    return loss, packed, d_logprobs


def loss_slope(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    denominator: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """d loss / d logprob of counted tokens: -ratio * advantage / denominator; 0 if clipped, clamped, infinite."""
    log_ratio = torch.zeros_like(logprobs) if old_logprobs is None else logprobs - old_logprobs
    ratio = log_ratio.exp()
    # a NaN is no infinity, so it fails neither test below and stays to be seen
    infinite = logprobs.isinf() if old_logprobs is None else logprobs.isinf() | old_logprobs.isinf()
    clamped = log_ratio.abs() > MAX_LOG_RATIO
    clipped = torch.where(advantages > 0, ratio > 1.0 + clip_high, ratio < 1.0 - clip_low)
    cut = infinite | clamped | (clipped & ~advantages.isnan())
    return (-ratio * advantages / denominator).masked_fill(cut, 0.0)
