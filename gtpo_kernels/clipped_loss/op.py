"""`clipped_loss`: the public function, and its registration with torch.library."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from gtpo_kernels.backend import run_kernel, select_backend
from gtpo_kernels.checks import (
    accumulator_dtype,
    check_choice,
    check_first_order,
    check_no_tangent,
    check_tensor,
    check_values,
)
from gtpo_kernels.clipped_loss.reference import (
    NUM_CLIPPED_METRICS,
    ClippedLoss,
    LossMetrics,
    LossRule,
    LossTerms,
    Penalty,
    Surrogate,
    clipped_loss_reference,
    pack_metrics,
    weighted,
)
from gtpo_kernels.clipped_loss.ruled import ruled_slopes

FAMILY = "clipped_loss"
PPO = LossRule()
# What the numbers of a rule's gate are, where it has one.
GATES = {
    "sapo": ("tau where A > 0", "tau elsewhere"),
    "vespo": ("k where A >= 0", "lambda there", "k elsewhere", "lambda there"),
}
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
    rule: LossRule = PPO,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    ratio_ids: Tensor | None = None,
    num_loss_tokens: float | Tensor | None = None,
    metrics: MetricsChoice = "active",
    backend: str | None = None,
) -> ClippedLoss:
    """Clipped policy loss of per-token log-probabilities, by default with one ratio a token and asymmetric clipping.

    With rho_i = exp(clamp(logprobs_i - old_logprobs_i, -20, 20)):
        loss = -1 / num_loss_tokens * sum_{i in loss_mask} min(rho_i A_i, clip(rho_i, 1 - clip_low, 1 + clip_high) A_i).
    The gradient is 0 where the clamp acts.

    logprobs, advantages: [N] float.  Gradient flows to logprobs, and to entropy where the rule has a bonus for it.
    loss_mask: [N] bool, None for all.  What the other tokens hold (NaN, -inf) is never read.
    old_logprobs: [N] float, log-probabilities before this optimizer step; None means logprobs.detach(), ratio 1.
    entropy: [N] float, for the metric of that name, and the bonus of the rule.
    rule: another loss of a token, with further terms: see `LossRule`.
    ref_logprobs: [N] float, of the reference policy; required with, and only with, a rule's kl.
    token_weights: [N] float, 0 or more: times the loss of a token, see `loss_mean`.  None for 1.
    ratio_ids: [N] int, 0 or more in the loss mask: tokens of one id share one ratio, the geometric mean of theirs
        (turn ids: one ratio a turn; sequence ids: GSPO).  The gradient of a token is that of its own advantage,
        rho_i = sg(shared rho) exp(logprobs_i - sg(logprobs_i)): GSPO-token, which with one advantage an id is GSPO.
        None for a ratio a token.
    num_loss_tokens: the loss tokens of the whole optimizer step, of all micro-batches and ranks; None counts the mask.
    metrics: "active" counts tokens that may have a gradient (advantage other than 0, or any with a KL or entropy
        term), "all" every token of the loss mask.
    Returns (loss, metrics), see `LossMetrics`.  A token of infinite log-probability, new or old, has loss and
    gradient 0.
    One backward pass only: it scales the gradient in place.
    Raises ValueError for other shapes, dtypes, devices or values; BackendUnavailable where a backend cannot run.
    Source: arXiv 1707.06347 (clipping), arXiv 2503.14476 (asymmetric, token-mean), arXiv 2511.14846 (turn advantages),
    arXiv 2507.18071 (shared ratios).

    >>> loss, metrics = clipped_loss(
    ...     torch.tensor([-1.0, -1.0]), torch.tensor([1.0, -1.0]), old_logprobs=torch.tensor([-1.5, -1.0]))
    >>> round(loss.item(), 4), metrics.clip_high_fraction.item()   # -(1.28 - 1) / 2
    (-0.14, 0.5)
    >>> shared = clipped_loss(   # one ratio, exp((0.5 + 0) / 2), for both
    ...     torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]), old_logprobs=torch.tensor([-1.5, -1.0]),
    ...     clip_high=1.0, ratio_ids=torch.tensor([0, 0]))
    >>> round(shared.loss.item(), 4)
    -1.284
    """
    check_tensor("logprobs", logprobs, layout="[N]", shape=(None,), kind="float")
    mask, denominator = check_loss_arguments(logprobs, advantages, loss_mask, old_logprobs, num_loss_tokens, metrics)
    terms = check_loss_terms(logprobs, clip_low, clip_high, rule, ref_logprobs, token_weights, ratio_ids)
    if entropy is not None:
        check_tensor("entropy", entropy, layout="[N]", shape=logprobs.shape, kind="float", device=logprobs.device)
        entropy = entropy if terms.entropy_coef else entropy.detach()
    elif terms.entropy_coef:
        raise ValueError("entropy must be given with an entropy_coef, got None")
    name = select_backend(FAMILY, backend, logprobs.device)
    if name == "reference":
        check_num_loss_tokens(denominator)
        check_term_values(terms, mask)
        advantages, terms = weighted(advantages, terms)
        return clipped_loss_reference(
            logprobs, advantages, mask, old_logprobs, entropy, denominator, terms, metrics == "all"
        )
    check_no_tangent(logprobs=logprobs, entropy=entropy)
    need = torch.is_grad_enabled() and (logprobs.requires_grad or (entropy is not None and entropy.requires_grad))
    loss, packed, *_ = _clipped_loss(
        logprobs, entropy, advantages, mask, old_logprobs, denominator, *terms, metrics == "all", need, True, name
    )
    return ClippedLoss(loss, unpack_metrics(packed, terms, has_entropy=entropy is not None))


def check_loss_arguments(
    like: Tensor,
    advantages: Tensor,
    loss_mask: Tensor | None,
    old_logprobs: Tensor | None,
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
    check_choice("metrics", metrics, ("active", "all"))
    if num_loss_tokens is None:
        return loss_mask, None
    if not isinstance(num_loss_tokens, Tensor):
        if not 0 <= num_loss_tokens < float("inf"):
            raise ValueError(f"num_loss_tokens must be 0 or more and finite, got {num_loss_tokens}")
        # Apple's GPUs have no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return loss_mask, torch.full((), num_loss_tokens, dtype=dtype, device=device)
    if num_loss_tokens.numel() != 1:
        raise ValueError(f"num_loss_tokens must be one number, got shape {tuple(num_loss_tokens.shape)}")
    return loss_mask, num_loss_tokens.detach().to(device).reshape(())


def check_loss_terms(
    like: Tensor,
    clip_low: float,
    clip_high: float,
    rule: LossRule,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    ratio_ids: Tensor | None,
) -> LossTerms:
    """The terms of the loss, once they fit each other and `like` [N, ...]."""
    rows, device = like.shape[:1], like.device
    for name, clip, most in (("clip_low", clip_low, 1.0), ("clip_high", clip_high, float("inf"))):
        if not 0.0 <= clip <= most:
            raise ValueError(f"{name} must lie in [0, {most:g}], got {clip}")
    check_choice("surrogate", rule.surrogate, get_args(Surrogate))
    check_choice("kl", rule.kl, get_args(Penalty))
    if rule.dual_clip is not None:
        if rule.surrogate != "ppo":
            raise ValueError(f"dual_clip is a bound of the surrogate 'ppo', got it with {rule.surrogate!r}")
        if not 1.0 < rule.dual_clip < float("inf"):
            raise ValueError(f"dual_clip must be more than 1 and finite, or None, got {rule.dual_clip}")
    if len(rule.gate) != len(GATES.get(rule.surrogate, ())) or not all(0.0 < x < float("inf") for x in rule.gate):
        expected = ", ".join(GATES.get(rule.surrogate, ())) or "nothing"
        raise ValueError(f"gate must be ({expected}) for the surrogate {rule.surrogate!r}, positive, got {rule.gate}")
    for name in ("kl_coef", "entropy_coef"):
        if not 0.0 <= getattr(rule, name) < float("inf"):
            raise ValueError(f"{name} must be 0 or more and finite, got {getattr(rule, name)}")
    if (rule.kl != "none") != (ref_logprobs is not None):
        got = "None" if ref_logprobs is None else "a tensor"
        raise ValueError(f"ref_logprobs must be given with a kl term, and only then, got {got} with kl={rule.kl!r}")
    for name, values in (("ref_logprobs", ref_logprobs), ("token_weights", token_weights)):
        if values is not None:
            check_tensor(name, values, layout="[N]", shape=rows, kind="float", device=device)
    if ratio_ids is not None:
        check_tensor("ratio_ids", ratio_ids, layout="[N]", shape=rows, kind="int", device=device)
    return LossTerms(clip_low, clip_high, *rule, ref_logprobs, token_weights, ratio_ids)


def check_term_values(terms: LossTerms, loss_mask: Tensor) -> None:
    """Refuse weights and ids that a token of the loss mask cannot have."""
    if terms.token_weights is not None:
        weights = terms.token_weights
        holds = (~loss_mask | ((weights >= 0) & weights.isfinite())).all()
        check_values(holds, "token_weights must be 0 or more and finite in the loss mask, got values that are not")
    if terms.ratio_ids is not None:
        holds = (~loss_mask | (terms.ratio_ids >= 0)).all()
        check_values(holds, "ratio_ids must be 0 or more in the loss mask, got a negative one")


def check_num_loss_tokens(num_loss_tokens: Tensor | None) -> None:
    """Refuse a negative or non-finite denominator that came as a tensor."""
    if num_loss_tokens is not None:
        holds = (num_loss_tokens >= 0) & num_loss_tokens.isfinite()
        check_values(holds, "num_loss_tokens must be 0 or more and finite, got a tensor that is not")


def unpack_metrics(packed: Tensor, terms: LossTerms, *, has_entropy: bool) -> LossMetrics:
    """Name the entries of the metrics vector that came out of an op."""
    metrics = LossMetrics(*packed.detach().unbind())
    return metrics._replace(
        entropy=metrics.entropy if has_entropy else None,
        clip_dual_fraction=None if terms.dual_clip is None else metrics.clip_dual_fraction,
        ref_kl=None if terms.kl == "none" else metrics.ref_kl,
    )


# The fields of `LossTerms` as arguments of an op.
TERMS_SCHEMA = (
    "float clip_low, float clip_high, str surrogate, float? dual_clip, str kl, float kl_coef, float entropy_coef, "
    "float[] gate, Tensor? ref_logprobs, Tensor? token_weights, Tensor? ratio_ids"
)


@torch.library.custom_op(
    "gtpo_kernels::clipped_loss",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor? entropy, Tensor advantages, Tensor loss_mask, Tensor? old_logprobs,"
    f" Tensor? num_loss_tokens, {TERMS_SCHEMA}, bool all_metrics, bool need_gradient, bool consume, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _clipped_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    old_logprobs: Tensor | None,
    num_loss_tokens: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *flat_terms, all_metrics, need_gradient, _, backend = rest
    terms = LossTerms(*flat_terms)
    check_num_loss_tokens(num_loss_tokens)
    check_term_values(terms, loss_mask)
    advantages, terms = weighted(advantages, terms)
    rows = (logprobs, advantages, loss_mask, old_logprobs)
    d_logprobs = d_entropy = logprobs.new_empty(0, dtype=accumulator_dtype(logprobs.dtype))
    if terms.is_clipped_surrogate:
        arguments = (entropy, num_loss_tokens, terms.clip_low, terms.clip_high, all_metrics, need_gradient)
        loss, packed, d_logprobs = run_kernel(FAMILY, backend, "clipped_loss", logprobs.device, *rows, *arguments)
    else:
        loss, metrics = clipped_loss_reference(*rows, entropy, num_loss_tokens, terms, all_metrics)
        packed = pack_metrics(loss, metrics)
        if need_gradient:
            d_logprobs, of_entropy = ruled_slopes(*rows, num_loss_tokens, terms)
            d_entropy = d_entropy if of_entropy is None else of_entropy
    return loss, packed, d_logprobs, d_entropy if d_entropy is not d_logprobs else d_entropy.clone()


@_clipped_loss.register_fake
def _(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # the fields of LossTerms stand before (all_metrics, need_gradient, consume, backend)
    *before, _, need_gradient, _, _ = rest
    terms = LossTerms(*before[-len(LossTerms._fields) :])
    loss, metrics = empty_loss(logprobs, terms)
    shape = logprobs.shape if need_gradient else (0,)
    return loss, metrics, loss.new_empty(shape), loss.new_empty(shape if terms.entropy_coef else (0,))


def empty_loss(like: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Fake outputs: the loss [] and its metrics, in the accumulator dtype."""
    dtype = accumulator_dtype(like.dtype)
    num_metrics = NUM_CLIPPED_METRICS if terms.is_clipped_surrogate else len(LossMetrics._fields)
    return like.new_empty((), dtype=dtype), like.new_empty(num_metrics, dtype=dtype)


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
    ctx.dtypes = [given.dtype if isinstance(given, Tensor) else None for given in inputs[: len(output) - 2]]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*output[2:])


def scale_gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """backward of such an op: kept gradients times the upstream one, in place with `consume`, and then only once."""
    check_first_order()
    if ctx.spent:
        raise RuntimeError("backward ran twice: the first scaled the kept gradients in place; call the op again")
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    for i, kept in enumerate(ctx.saved_tensors):
        if ctx.needs_input_grad[i]:
            # A compiler traces with a subclass of Tensor, and decides itself which buffers to reuse.
            in_place = ctx.consume and type(kept) is Tensor and not is_batched(grad_loss)
            ctx.spent |= in_place
            if not (in_place and _is_one(grad_loss)):
                kept = kept.mul_(grad_loss) if in_place else kept * grad_loss
            gradients[i] = kept.to(ctx.dtypes[i])
    return tuple(gradients)


def is_batched(tensor: Tensor) -> bool:
    """Whether one tensor stands for many, as under vmap or `is_grads_batched`."""
    return is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)


def _is_one(grad_loss: Tensor) -> bool:
    """Whether scaling changes nothing, where looking costs no wait for a device."""
    return grad_loss.device.type == "cpu" and bool(grad_loss == 1.0)


_clipped_loss.register_autograd(scale_gradients, setup_context=keep_gradients)
