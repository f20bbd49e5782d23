"""`clipped_loss`: the public function, and its registration with torch.library."""

from typing import Any, Literal

import torch
from torch import Tensor

from gtpo_kernels.backend import run_kernel, select_backend
from gtpo_kernels.checks import accumulator_dtype, check_choice, check_tensor, check_values
from gtpo_kernels.clipped_loss.reference import ClippedLoss, LossMetrics, clipped_loss_reference

FAMILY = "clipped_loss"
MetricsChoice = Literal["active", "all"]


def clipped_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    num_loss_tokens: float | Tensor | None = None,
    metrics: MetricsChoice = "active",
    backend: str | None = None,
) -> ClippedLoss:
    """Clipped policy loss of per-token log-probabilities, with one ratio a token and asymmetric clipping.

    With rho_i = exp(clamp(logprobs_i - old_logprobs_i, -20, 20)):
        loss = -1 / num_loss_tokens * sum_{i in loss_mask} min(rho_i A_i, clip(rho_i, 1 - clip_low, 1 + clip_high) A_i).
    The gradient is 0 where the clamp acts.

    logprobs, advantages: [N] float.  Gradient flows to logprobs only.
    loss_mask: [N] bool, None for all.  What the other tokens hold (NaN, -inf) is never read.
    old_logprobs: [N] float, log-probabilities before this optimizer step; None means logprobs.detach(), ratio 1.
    entropy: [N] float, for the metric of that name only.
    num_loss_tokens: the loss tokens of the whole optimizer step, of all micro-batches and ranks; None counts the mask.
    metrics: "active" counts tokens with an advantage other than 0, "all" every token of the loss mask.
    Returns (loss, metrics), see `LossMetrics`.  A token of infinite log-probability, new or old, has loss and
    gradient 0.
    One backward pass only: it scales the gradient in place.
    Raises ValueError for other shapes, dtypes, devices or values; BackendUnavailable where a backend cannot run.
    Source: arXiv 1707.06347 (clipping), arXiv 2503.14476 (asymmetric, token-mean), arXiv 2511.14846 (turn advantages).

    >>> loss, metrics = clipped_loss(
    ...     torch.tensor([-1.0, -1.0]), torch.tensor([1.0, -1.0]), old_logprobs=torch.tensor([-1.5, -1.0]))
    >>> round(loss.item(), 4), metrics.clip_high_fraction.item()   # -(1.28 - 1) / 2
    (-0.14, 0.5)
    """
    check_tensor("logprobs", logprobs, layout="[N]", shape=(None,), kind="float")
    mask, denominator = check_loss_arguments(
        logprobs, advantages, loss_mask, old_logprobs, clip_low, clip_high, num_loss_tokens, metrics
    )
    if entropy is not None:
        check_tensor("entropy", entropy, layout="[N]", shape=logprobs.shape, kind="float", device=logprobs.device)
    name = select_backend(FAMILY, backend, logprobs.device)
    rows = (logprobs, advantages, mask, old_logprobs, entropy, denominator)
    if name == "reference":
        check_num_loss_tokens(denominator)
        return clipped_loss_reference(*rows, clip_low, clip_high, metrics == "all")
    need = torch.is_grad_enabled() and logprobs.requires_grad
    loss, packed, _ = _clipped_loss(*rows, clip_low, clip_high, metrics == "all", need, True, name)
    return ClippedLoss(loss, unpack_metrics(packed, has_entropy=entropy is not None))


def check_loss_arguments(
    like: Tensor,
    advantages: Tensor,
    loss_mask: Tensor | None,
    old_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    num_loss_tokens: float | Tensor | None,
    metrics: MetricsChoice,
) -> tuple[Tensor, Tensor | None]:
    """(Loss mask [N] bool, num_loss_tokens as a scalar tensor or None), once all of it fits `like` [N, ...]."""
    rows, device = like.shape[:1], like.device
    check_tensor("advantages", advantages, layout="[N]", shape=rows, kind="float", device=device)
    if loss_mask is None:
        loss_mask = torch.ones(rows, dtype=torch.bool, device=device)
    check_tensor("loss_mask", loss_mask, layout="[N]", shape=rows, kind="bool", device=device)
    if old_logprobs is not None:
        check_tensor("old_logprobs", old_logprobs, layout="[N]", shape=rows, kind="float", device=device)
    for name, clip, most in (("clip_low", clip_low, 1.0), ("clip_high", clip_high, float("inf"))):
        if not 0.0 <= clip <= most:
            raise ValueError(f"{name} must lie in [0, {most:g}], got {clip}")
    check_choice("metrics", metrics, ("active", "all"))
    if num_loss_tokens is None:
        return loss_mask, None
    if not isinstance(num_loss_tokens, Tensor):
        if not 0 <= num_loss_tokens < float("inf"):
            raise ValueError(f"num_loss_tokens must be 0 or more and finite, got {num_loss_tokens}")
        return loss_mask, torch.full((), num_loss_tokens, dtype=torch.float64, device=device)
    if num_loss_tokens.numel() != 1:
        raise ValueError(f"num_loss_tokens must be one number, got shape {tuple(num_loss_tokens.shape)}")
    return loss_mask, num_loss_tokens.detach().to(device).reshape(())


def check_num_loss_tokens(num_loss_tokens: Tensor | None) -> None:
    """Refuse a negative or non-finite denominator that came as a tensor."""
    if num_loss_tokens is not None:
        holds = (num_loss_tokens >= 0) & num_loss_tokens.isfinite()
        check_values(holds, "num_loss_tokens must be 0 or more and finite, got a tensor that is not")


def unpack_metrics(packed: Tensor, *, has_entropy: bool) -> LossMetrics:
    """Name the entries of the metrics vector that came out of an op."""
    metrics = LossMetrics(*packed.detach().unbind())
    return metrics if has_entropy else metrics._replace(entropy=None)


@torch.library.custom_op("gtpo_kernels::clipped_loss", mutates_args=())
def _clipped_loss(
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
    consume: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_num_loss_tokens(num_loss_tokens)
    outputs: tuple[Tensor, Tensor, Tensor] = run_kernel(
        FAMILY,
        backend,
        "clipped_loss",
        logprobs.device,
        logprobs,
        advantages,
        loss_mask,
        old_logprobs,
        entropy,
        num_loss_tokens,
        clip_low,
        clip_high,
        all_metrics,
        need_gradient,
    )
    return outputs


@_clipped_loss.register_fake
def _(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_gradient = rest[-3]
    loss, metrics = empty_loss(logprobs)
    return loss, metrics, loss.new_empty(logprobs.shape if need_gradient else (0,))


def empty_loss(like: Tensor) -> tuple[Tensor, Tensor]:
    """Fake outputs: the loss [] and its metrics, in the accumulator dtype."""
    dtype = accumulator_dtype(like.dtype)
    return like.new_empty((), dtype=dtype), like.new_empty(len(LossMetrics._fields), dtype=dtype)


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of every op that computes its gradients in the forward pass.

    Outputs are (loss, metrics, *gradients of the first inputs); the last inputs are (consume, backend).  With `consume`
    the caller keeps no gradient output, so backward may overwrite them.
    """
    ctx.mark_non_differentiable(*output[1:])
    # or backward would be handed zeros as large as the gradients
    ctx.set_materialize_grads(False)
    ctx.consume = inputs[-2]
    ctx.spent = False
    ctx.dtype = inputs[0].dtype
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*output[2:])


def scale_gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """backward of such an op: kept gradients times the upstream one, in place with `consume`, and then only once."""
    if ctx.spent:
        raise RuntimeError("backward ran twice: the first scaled the kept gradients in place; call the op again")
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    for i, kept in enumerate(ctx.saved_tensors):
        if ctx.needs_input_grad[i]:
            # A compiler traces with a subclass of Tensor, and decides itself which buffers to reuse.
            in_place = ctx.consume and type(kept) is Tensor
            ctx.spent |= in_place
            if not (in_place and _is_one(grad_loss)):
                kept = kept.mul_(grad_loss) if in_place else kept * grad_loss
            gradients[i] = kept.to(ctx.dtype)
    return tuple(gradients)


def _is_one(grad_loss: Tensor) -> bool:
    """Whether scaling changes nothing, where looking costs no wait for a device."""
    return grad_loss.device.type == "cpu" and bool(grad_loss == 1.0)


_clipped_loss.register_autograd(scale_gradients, setup_context=keep_gradients)
