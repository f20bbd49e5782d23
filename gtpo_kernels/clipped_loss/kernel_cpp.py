"""The `cpp` backend of `clipped_loss`: one compiled loop over the tokens, in float64, on the CPU."""

import torch
from torch import Tensor

from gtpo_kernels import _cpu
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.reference import loss_denominator
from gtpo_kernels.turn_advantages.kernel_cpp import buffer, buffer_or_none


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
    outputs = _cpu.clipped_loss(
        buffer(logprobs, torch.float64),
        buffer(advantages, torch.float64),
        buffer(loss_mask, torch.bool),
        buffer_or_none(old_logprobs, torch.float64),
        buffer_or_none(entropy, torch.float64),
        denominator=loss_denominator(num_loss_tokens, loss_mask, torch.float64).item(),
        clip_low=clip_low,
        clip_high=clip_high,
        all_metrics=all_metrics,
        need_gradient=need_gradient,
    )
    dtype = accumulator_dtype(logprobs.dtype)
    loss, metrics, d_logprobs = (torch.as_tensor(output, dtype=dtype) for output in outputs)
    return loss, metrics, d_logprobs
