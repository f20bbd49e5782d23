"""The definition of `clipped_loss`: plain PyTorch, differentiable, exact in float64 for float64 inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype

MAX_LOG_RATIO = 20.0


class LossMetrics(NamedTuple):
    """What the pass saw, each a scalar tensor without gradient, on the loss's device.

    Fractions, means and the maximum run over the counted tokens: those of the loss mask with an advantage other than
    0 (all those of the loss mask with metrics="all"), less the `nonfinite_tokens`.  0 where nothing was counted.

    clip_low_fraction: ratio < 1 - clip_low with a negative advantage (gradient cut to 0).
    clip_high_fraction: ratio > 1 + clip_high with a positive advantage (gradient cut to 0).
    approx_kl_k1, approx_kl_k3: means of -log ratio and of ratio - 1 - log ratio, estimates of KL(old || new) in nats.
    entropy: mean entropy in nats; None where the op was not given it.
    ratio_mean, ratio_max: of exp(logprob - old_logprob), after the clamp.
    logprob_mean: mean log-probability.
    num_active_tokens: tokens that were computed; num_active_tokens + dropped_tokens is the size of the loss mask.
    dropped_tokens: tokens of the loss mask left out because their advantage is 0 (they stay in the denominator).
    nonfinite_tokens: computed tokens whose log-probability, new or old, is infinite: loss and gradient 0.
    """

    clip_low_fraction: Tensor
    clip_high_fraction: Tensor
    approx_kl_k1: Tensor
    approx_kl_k3: Tensor
    entropy: Tensor | None
    ratio_mean: Tensor
    ratio_max: Tensor
    logprob_mean: Tensor
    num_active_tokens: Tensor
    dropped_tokens: Tensor
    nonfinite_tokens: Tensor


class ClippedLoss(NamedTuple):
    """loss: scalar, float32 (float64 for float64 inputs).  metrics: see `LossMetrics`."""

    loss: Tensor
    metrics: LossMetrics


def clipped_loss_reference(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    old_logprobs: Tensor | None,
    entropy: Tensor | None,
    num_loss_tokens: Tensor | None,
    clip_low: float,
    clip_high: float,
    all_metrics: bool,
) -> ClippedLoss:
    """`clipped_loss` as its definition; see `gtpo_kernels.clipped_loss`."""
    accumulator = accumulator_dtype(logprobs.dtype)
    active = loss_mask & (advantages != 0)
    counted = counted_tokens(advantages, loss_mask, all_metrics)
    # What lies outside is replaced before any arithmetic, because 0 * NaN is NaN, in the gradient too.
    logprobs = logprobs.to(accumulator).masked_fill(~counted, 0.0)
    advantages = advantages.detach().to(accumulator).masked_fill(~active, 0.0)
    old = (
        logprobs.detach() if old_logprobs is None else old_logprobs.detach().to(accumulator).masked_fill(~counted, 0.0)
    )
    nonfinite = logprobs.detach().isinf() | old.isinf()

    log_ratio = (logprobs - old).masked_fill(nonfinite, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    denominator = loss_denominator(num_loss_tokens, loss_mask, accumulator)
    loss = -surrogate.masked_fill(nonfinite | ~active, 0.0).sum() / denominator

    live = counted & ~nonfinite
    num_live = live.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.detach().to(accumulator).masked_fill(~live, 0.0).sum() / num_live

    ratio_where_live = ratio.detach().masked_fill(~live, 0.0)
    metrics = LossMetrics(
        clip_low_fraction=mean((ratio < 1.0 - clip_low) & (advantages < 0)),
        clip_high_fraction=mean((ratio > 1.0 + clip_high) & (advantages > 0)),
        approx_kl_k1=mean(-log_ratio),
        approx_kl_k3=mean(torch.expm1(log_ratio) - log_ratio),
        entropy=None if entropy is None else mean(entropy),
        ratio_mean=mean(ratio),
        # a leading 0 makes the maximum of no rows 0
        ratio_max=torch.cat([ratio_where_live.new_zeros(1), ratio_where_live]).max(),
        logprob_mean=mean(logprobs),
        num_active_tokens=counted.sum().to(accumulator),
        dropped_tokens=(loss_mask & ~counted).sum().to(accumulator),
        nonfinite_tokens=(nonfinite & counted).sum().to(accumulator),
    )
    return ClippedLoss(loss, metrics)


def counted_tokens(advantages: Tensor, loss_mask: Tensor, all_metrics: bool) -> Tensor:
    """[N] bool: the loss mask, without the tokens of zero advantage unless the metrics ask for them."""
    return loss_mask if all_metrics else loss_mask & (advantages != 0)


def loss_denominator(num_loss_tokens: Tensor | None, loss_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """num_loss_tokens, or the size of the loss mask; 1 where that is 0, since the sum over no tokens is 0."""
    count = (loss_mask.sum() if num_loss_tokens is None else num_loss_tokens).to(dtype)
    return torch.where(count > 0, count, torch.ones_like(count))
