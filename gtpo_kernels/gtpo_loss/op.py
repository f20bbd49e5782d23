"""`gtpo_loss` and `linear_gtpo_loss`: the public functions, and their registration with torch.library."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gtpo_kernels.backend import run_kernel, select_backend
from gtpo_kernels.checks import (
    check_no_tangent,
    check_row_temperature,
    check_softcap,
    check_targets,
    check_tensor,
    check_vocab,
    split_temperature,
)
from gtpo_kernels.clipped_loss.op import (
    PPO,
    TERMS_SCHEMA,
    MetricsChoice,
    check_loss_arguments,
    check_loss_terms,
    check_num_loss_tokens,
    check_term_values,
    empty_loss,
    keep_gradients,
    scale_gradients,
    unpack_metrics,
)
from gtpo_kernels.clipped_loss.reference import ClippedLoss, LossRule, LossTerms, counted_tokens, weighted
from gtpo_kernels.gtpo_loss.chunked import chunked_linear_loss
from gtpo_kernels.gtpo_loss.reference import (
    GradientFilter,
    LossInputs,
    gtpo_loss_reference,
    gtpo_loss_reference_,
    linear_gtpo_loss_reference,
)
from gtpo_kernels.gtpo_loss.ruled import ruled_gtpo_loss, ruled_gtpo_loss_
from gtpo_kernels.token_logprobs.op import check_head, empty_head_gradients
from gtpo_kernels.turn_advantages.op import TurnCredit

FAMILY = "gtpo_loss"
EAGER_ONLY = "gtpo_loss_ runs eagerly only: call gtpo_loss under torch.compile"


def gtpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | TurnCredit,
    *,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
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
    """`clipped_loss(token_logprobs(logits, targets).logprobs, advantages)` in one pass, gradient included.

    logits: [N, V] float32, float64, bfloat16 or float16, where row i predicts targets[i].  targets: [N] int32 or int64.
    advantages: [N] float, or a `TurnCredit` from which they are computed; its tokens are then the default loss mask.
    temperature: a positive number or [N]; divides the logits.
    softcap: a positive number, bounds the logits before that as for `token_logprobs`; None for no cap.
    loss_mask, old_logprobs, num_loss_tokens, metrics, and all from clip_low to ratio_ids: as for `clipped_loss`.
    Returns (loss, metrics), see `LossMetrics`.  Rows outside the loss mask have no effect, whatever they hold, nor
    have those of advantage 0 where there is no KL or entropy term.
    With gradients on, the forward pass allocates d_logits beside the logits.  One backward pass only: it scales
    them in place.
    Raises ValueError for other shapes, dtypes, devices or values; BackendUnavailable where a backend cannot run.
    Source: arXiv 2511.14846.

    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss, metrics = gtpo_loss(logits, torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
    >>> loss.backward()
    >>> logits.grad[0].tolist()
    [-0.375, 0.125, 0.125, 0.125]
    """
    check_tensor("logits", logits, layout="[N, V]", shape=(None, None), kind="float")
    check_vocab("logits", logits, dim=1)
    name = select_backend(FAMILY, backend, logits.device)
    terms = check_loss_terms(logits, clip_low, clip_high, rule, ref_logprobs, token_weights, ratio_ids)
    inputs = _loss_inputs(
        logits,
        targets,
        advantages,
        loss_mask,
        old_logprobs,
        temperature,
        softcap,
        num_loss_tokens,
        terms,
        metrics,
        backend,
    )
    if name == "reference":
        return gtpo_loss_reference(logits, _checked_values(inputs, logits.shape[1]))
    check_no_tangent(logits=logits)
    need = torch.is_grad_enabled() and logits.requires_grad
    loss, packed, _ = _gtpo_loss(logits, *inputs.flat(), need, True, name)
    return ClippedLoss(loss, unpack_metrics(packed, terms, has_entropy=True))


def gtpo_loss_(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | TurnCredit,
    *,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
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
    """`gtpo_loss` that overwrites its logits with d loss / d logits: no second [N, V] is held.

    logits: [N, V], contiguous, without requires_grad.  Rows without gradient, whatever they held, become 0.
    Everything else: as for `gtpo_loss`, but that the loss carries no graph: pass the gradient on as below.
    Eager only: autograd cannot be registered on an op that mutates its input.
    Raises ValueError also for logits that are not contiguous or require a gradient; RuntimeError under torch.compile.

    >>> hidden, weight = torch.eye(2), torch.zeros(4, 2, requires_grad=True)
    >>> logits = hidden @ weight.T
    >>> d_logits = logits.detach()   # the same memory
    >>> loss, metrics = gtpo_loss_(d_logits, torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
    >>> logits.backward(d_logits)
    >>> weight.grad.tolist()[:2]
    [[-0.375, -0.125], [0.125, 0.375]]
    """
    if isinstance(logits, FakeTensor):
        raise RuntimeError(EAGER_ONLY)
    if torch.compiler.is_compiling():
        # a plain raise makes the compiler run this frame eagerly, without a word; after a graph break it stands
        torch._dynamo.graph_break(msg=EAGER_ONLY)
        raise RuntimeError(EAGER_ONLY)
    check_tensor("logits", logits, layout="[N, V]", shape=(None, None), kind="float")
    check_vocab("logits", logits, dim=1)
    if logits.requires_grad:
        raise ValueError("logits must not require grad: pass logits.detach(), then call logits.backward() with it")
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, got strides {logits.stride()} for shape {tuple(logits.shape)}")
    name = select_backend(FAMILY, backend, logits.device)
    terms = check_loss_terms(logits, clip_low, clip_high, rule, ref_logprobs, token_weights, ratio_ids)
    inputs = _loss_inputs(
        logits,
        targets,
        advantages,
        loss_mask,
        old_logprobs,
        temperature,
        softcap,
        num_loss_tokens,
        terms,
        metrics,
        backend,
    )
    inputs = _checked_values(inputs, logits.shape[1])
    # kernels write to memory that autograd does not see: a graph that has saved these logits must refuse to go backward
    torch.autograd.graph.increment_version(logits)
    if name == "reference":
        return gtpo_loss_reference_(logits, inputs)
    check_no_tangent(logits=logits)
    with torch.no_grad():
        loss, packed = _turn_into_d_logits(name, logits, inputs)
    return ClippedLoss(loss, unpack_metrics(packed, terms, has_entropy=True))


def _turn_into_d_logits(backend: str, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(Loss, metrics); logits, contiguous, become d_logits."""
    if not inputs.terms.is_clipped_surrogate:
        return ruled_gtpo_loss_(backend, logits, inputs)
    outputs: tuple[Tensor, Tensor] = run_kernel(FAMILY, backend, "gtpo_loss_", logits.device, logits, inputs)
    return outputs


def linear_gtpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor | TurnCredit,
    *,
    bias: Tensor | None = None,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    rule: LossRule = PPO,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    ratio_ids: Tensor | None = None,
    num_loss_tokens: float | Tensor | None = None,
    metrics: MetricsChoice = "active",
    chunk_rows: int | None = None,
    skip_clipped: bool = False,
    filter_eps: float = 0.0,
    backend: str | None = None,
) -> ClippedLoss:
    """`gtpo_loss(hidden @ weight.T + bias, ...)` that never holds the [N, V] logits.

    hidden: [N, D] float32, float64, bfloat16 or float16.  weight: [V, D] and bias: [V], of any of these dtypes, as
        for `linear_token_logprobs`.
    chunk_rows: rows projected at once; None chooses by memory.  The result does not depend on it beyond rounding.
    skip_clipped: leave rows whose gradient is exactly 0 (clipped, clamped, infinite) out of the two gradient products.
    filter_eps: leave a block of 256 vocabulary entries out of a chunk's gradient products if, in every row,
        sum |p_v - 1[v = target]| over the block is at most filter_eps.  0.0 is exact; error: docs/numerics.md.
    Everything else: as for `gtpo_loss`.
    Each chunk of logits is projected once and turned into its own gradient (6NVD floating-point operations with
    backward): the forward pass does the work, backward only scales.  Inputs that need no gradient get none allocated.
    With ratio_ids all log-probabilities come first, and the chunks are projected a second time (8NVD).

    >>> hidden, weight = torch.eye(2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    >>> loss, metrics = linear_gtpo_loss(hidden, weight, torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
    >>> loss.backward()
    >>> weight.grad.tolist()[:2]
    [[-0.375, -0.125], [0.125, 0.375]]
    """
    check_head(hidden, weight, bias, chunk_rows)
    if (skip_clipped or filter_eps) and (rule.kl != "none" or rule.entropy_coef):
        raise ValueError("skip_clipped and filter_eps are for losses without a kl or entropy term, got one with it")
    if not 0.0 <= filter_eps < 1.0:
        raise ValueError(f"filter_eps must lie in [0, 1), got {filter_eps}")
    name = select_backend(FAMILY, backend, hidden.device)
    terms = check_loss_terms(hidden, clip_low, clip_high, rule, ref_logprobs, token_weights, ratio_ids)
    inputs = _loss_inputs(
        hidden,
        targets,
        advantages,
        loss_mask,
        old_logprobs,
        temperature,
        softcap,
        num_loss_tokens,
        terms,
        metrics,
        backend,
    )
    if name == "reference":
        return linear_gtpo_loss_reference(hidden, weight, bias, _checked_values(inputs, weight.shape[0]))
    check_no_tangent(hidden=hidden, weight=weight, bias=bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, packed, *_ = _linear_gtpo_loss(
        hidden, weight, bias, *inputs.flat(), chunk_rows, skip_clipped, filter_eps, *needs, True, name
    )
    return ClippedLoss(loss, unpack_metrics(packed, terms, has_entropy=True))


def _loss_inputs(
    like: Tensor,
    targets: Tensor,
    advantages: Tensor | TurnCredit,
    loss_mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    num_loss_tokens: float | Tensor | None,
    terms: LossTerms,
    metrics: MetricsChoice,
    backend: str | None,
) -> LossInputs:
    """The checked inputs of both losses.  like: [N, ...], the logits or hidden states."""
    check_tensor("targets", targets, layout="[N]", shape=like.shape[:1], kind="int", device=like.device)
    value, per_row = split_temperature(temperature, like)
    if isinstance(advantages, TurnCredit):
        loss_mask = advantages.turn_ids >= 0 if loss_mask is None else loss_mask
        advantages = advantages.advantages(backend=backend)
    mask, denominator = check_loss_arguments(like, advantages, loss_mask, old_logprobs, num_loss_tokens, metrics)
    return LossInputs(
        targets,
        advantages,
        mask,
        old_logprobs,
        value,
        per_row,
        check_softcap(softcap),
        denominator,
        terms,
        metrics == "all",
    )


def _checked_values(inputs: LossInputs, vocab: int) -> LossInputs:
    """The inputs, weighted, less values that no row to be computed can have; other rows are never looked at."""
    check_num_loss_tokens(inputs.num_loss_tokens)
    check_term_values(inputs.terms, inputs.loss_mask)
    advantages, terms = weighted(inputs.advantages, inputs.terms)
    inputs = inputs._replace(advantages=advantages, terms=terms)
    skipped = ~counted_tokens(advantages, inputs.loss_mask, terms, inputs.all_metrics)
    check_targets(inputs.targets.masked_fill(skipped, 0), vocab)
    if inputs.row_temperature is not None:
        check_row_temperature(inputs.row_temperature.masked_fill(skipped, 1.0))
    return inputs


# The fields of `LossInputs`, flat, as arguments of an op.
INPUTS_SCHEMA = (
    "Tensor targets, Tensor advantages, Tensor loss_mask, Tensor? old_logprobs, float temperature, "
    f"Tensor? row_temperature, float softcap, Tensor? num_loss_tokens, {TERMS_SCHEMA}, bool all_metrics"
)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of d_logits from the forward pass to backward, for logits of `dtype`.

    float16 would round most of a large vocabulary's d_logits to 0 before a loss scale multiplies them.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op(
    "gtpo_kernels::gtpo_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {INPUTS_SCHEMA}, bool need_logits, bool consume, str backend) -> (Tensor, Tensor, Tensor)",
)
def _gtpo_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *flat, need_logits, _, backend = rest
    inputs = _checked_values(LossInputs.from_flat(flat), logits.shape[1])
    if need_logits and kept_dtype(logits.dtype) != logits.dtype:
        d_logits = logits.to(kept_dtype(logits.dtype), memory_format=torch.contiguous_format)
        return *_turn_into_d_logits(backend, d_logits, inputs), d_logits
    if not inputs.terms.is_clipped_surrogate:
        return ruled_gtpo_loss(backend, logits, inputs, need_logits)
    outputs: tuple[Tensor, Tensor, Tensor] = run_kernel(
        FAMILY, backend, "gtpo_loss", logits.device, logits, inputs, need_logits
    )
    return outputs


@_gtpo_loss.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *flat, need_logits, _, _ = rest
    terms = LossInputs.from_flat(flat).terms
    dtype = kept_dtype(logits.dtype) if need_logits else logits.dtype
    return *empty_loss(logits, terms), logits.new_empty(logits.shape if need_logits else (0,), dtype=dtype)


_gtpo_loss.register_autograd(scale_gradients, setup_context=keep_gradients)


@torch.library.custom_op(
    "gtpo_kernels::linear_gtpo_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, {INPUTS_SCHEMA}, SymInt? chunk_rows, bool skip_clipped,"
    " float filter_eps, bool need_hidden, bool need_weight, bool need_bias, bool consume, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_gtpo_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *flat, chunk_rows, skip_clipped, filter_eps, need_hidden, need_weight, need_bias, _, backend = rest
    inputs = _checked_values(LossInputs.from_flat(flat), weight.shape[0])
    needs, gradient_filter = (need_hidden, need_weight, need_bias), GradientFilter(skip_clipped, filter_eps)
    return chunked_linear_loss(backend, hidden, weight, bias, inputs, chunk_rows, needs, gradient_filter)


@_linear_gtpo_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *flat, _, _, _, need_hidden, need_weight, need_bias, _, _ = rest
    gradients = empty_head_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias))
    return *empty_loss(gradients[0], LossInputs.from_flat(flat).terms), *gradients


_linear_gtpo_loss.register_autograd(scale_gradients, setup_context=keep_gradients)
