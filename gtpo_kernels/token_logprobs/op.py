"""`token_logprobs` and `linear_token_logprobs`: the public functions, and their registration with torch.library."""

from typing import Any

import torch
from torch import Tensor

from gtpo_kernels.backend import run_kernel, select_backend
from gtpo_kernels.checks import (
    accumulator_dtype,
    check_first_order,
    check_no_tangent,
    check_row_temperature,
    check_softcap,
    check_targets,
    check_tensor,
    check_vocab,
    split_temperature,
)
from gtpo_kernels.token_logprobs.reference import (
    RowStatistics,
    TokenLogprobs,
    head_dtype,
    linear_token_logprobs_reference,
    token_logprobs_reference,
)

FAMILY = "token_logprobs"


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of every target under its row of logits, with the row's entropy and log-sum-exp.

    With x = cap(logits) / temperature, cap(l) = softcap * tanh(l / softcap), and p = softmax(x) over the vocabulary:
        logprobs_i = x_i[targets_i] - lse_i,   entropy_i = -sum_v p_iv log p_iv (nats),   lse_i = log sum_v exp(x_iv).

    logits: [N, V] float32, float64, bfloat16 or float16; -inf is a valid logit.  targets: [N] int32 or int64 in [0, V).
    temperature: a positive number, from 1e-30 to 1e38, or [N]; no gradient flows to it.
    softcap: a positive number, from 1e-30 to 1e30, None for no cap.  A mask comes after it: a logit of -inf stays -inf.
    Returns [N] each, float32 (float64 for float64 logits); logprobs and entropy are differentiable, lse is not.
    A target at -inf has logprob -inf, without gradient; a row of all -inf has entropy 0 and no gradient at all.
    Raises ValueError for other shapes, dtypes, devices or values; BackendUnavailable where a backend cannot run.
    Source: arXiv 2402.03300, eq. 3 (the policy's per-token log-probability).

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, -float("inf")]])
    >>> token = token_logprobs(logits, torch.tensor([1, 0]))
    >>> [round(value, 4) for value in token.logprobs.tolist()], [round(value, 4) for value in token.entropy.tolist()]
    ([-0.6931, 0.0], [0.6931, 0.0])
    """
    check_tensor("logits", logits, layout="[N, V]", shape=(None, None), kind="float")
    check_vocab("logits", logits, dim=1)
    check_tensor("targets", targets, layout="[N]", shape=(logits.shape[0],), kind="int", device=logits.device)
    value, per_row = split_temperature(temperature, logits)
    cap = check_softcap(softcap)
    name = select_backend(FAMILY, backend, logits.device)
    if name == "reference":
        check_targets(targets, logits.shape[1])
        if per_row is not None:
            check_row_temperature(per_row)
        return token_logprobs_reference(logits, targets, temperature, cap)
    check_no_tangent(logits=logits)
    logprobs, entropy, row_max, log_sum = _token_logprobs(logits, targets, value, per_row, cap, name)
    return TokenLogprobs(logprobs, entropy, (row_max + log_sum).detach())


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """`token_logprobs(hidden @ weight.T + bias, targets)` that never holds the [N, V] logits.

    hidden: [N, D] float32, float64, bfloat16 or float16.  weight: [V, D] and bias: [V], of any of these dtypes: a
        float32 head over bfloat16 states is multiplied in float32.  Gradients have the dtype of what they are for.
    targets, temperature, softcap, results and errors: as for `token_logprobs`; float64 where any input is.
    chunk_rows: rows projected at once; None chooses by memory.  The result does not depend on it beyond rounding.
    The forward pass keeps its inputs alone; the backward pass projects the rows that a gradient reaches once more
    (8NVD in all), for any upstream gradient, and finds their softmax anew.
    `linear_gtpo_loss` needs no second projection.
    Source: arXiv 2411.09009 (cut cross-entropy) for computing it from hidden states.

    >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> token = linear_token_logprobs(hidden, weight, torch.tensor([0, 2]))
    >>> [round(value, 4) for value in token.logprobs.tolist()]
    [-0.5514, -1.5514]
    """
    check_head(hidden, weight, bias, chunk_rows)
    check_tensor("targets", targets, layout="[N]", shape=(hidden.shape[0],), kind="int", device=hidden.device)
    value, per_row = split_temperature(temperature, hidden)
    cap = check_softcap(softcap)
    name = select_backend(FAMILY, backend, hidden.device)
    if name == "reference":
        check_targets(targets, weight.shape[0])
        if per_row is not None:
            check_row_temperature(per_row)
        return linear_token_logprobs_reference(hidden, weight, targets, bias, temperature, cap)
    check_no_tangent(hidden=hidden, weight=weight, bias=bias)
    logprobs, entropy, row_max, log_sum = _linear_token_logprobs(
        hidden, weight, bias, targets, value, per_row, cap, chunk_rows, name
    )
    return TokenLogprobs(logprobs, entropy, (row_max + log_sum).detach())


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None) -> None:
    """Refuse hidden states, a head and a chunk size that do not fit each other."""
    check_tensor("hidden", hidden, layout="[N, D]", shape=(None, None), kind="float")
    device = hidden.device
    check_tensor("weight", weight, layout="[V, D]", shape=(None, hidden.shape[1]), kind="float", device=device)
    check_vocab("weight", weight, dim=0)
    if bias is not None:
        check_tensor("bias", bias, layout="[V]", shape=(weight.shape[0],), kind="float", device=device)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")


@torch.library.custom_op("gtpo_kernels::token_logprobs", mutates_args=())
def _token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_targets(targets, logits.shape[1])
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    arguments = (logits, targets, temperature, row_temperature, softcap)
    return tuple(run_kernel(FAMILY, backend, "token_logprobs", logits.device, *arguments))


@_token_logprobs.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty_statistics(logits, accumulator_dtype(logits.dtype))


@torch.library.custom_op("gtpo_kernels::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    logprobs: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    backend: str,
) -> Tensor:
    d_logits: Tensor = run_kernel(
        FAMILY,
        backend,
        "token_logprobs_backward",
        logits.device,
        grad_logprobs,
        grad_entropy,
        logits,
        targets,
        temperature,
        row_temperature,
        softcap,
        RowStatistics(logprobs, entropy, row_max, log_sum),
    )
    return d_logits


@_token_logprobs_backward.register_fake
def _(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature, row_temperature, ctx.softcap, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, targets, row_temperature, *output)


def _token_logprobs_grad(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    check_first_order()
    logits, targets, row_temperature, *statistics = ctx.saved_tensors
    d_logits = _token_logprobs_backward(
        grad_logprobs,
        grad_entropy,
        logits,
        targets,
        ctx.temperature,
        row_temperature,
        ctx.softcap,
        *statistics,
        ctx.backend,
    )
    return d_logits, None, None, None, None, None


_token_logprobs.register_autograd(_token_logprobs_grad, setup_context=_save_rows)


@torch.library.custom_op("gtpo_kernels::linear_token_logprobs", mutates_args=())
def _linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    chunk_rows: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_targets(targets, weight.shape[0])
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    arguments = (hidden, weight, bias, targets, temperature, row_temperature, softcap, chunk_rows)
    return tuple(run_kernel(FAMILY, backend, "linear_token_logprobs", hidden.device, *arguments))


@_linear_token_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return _empty_statistics(hidden, head_dtype(hidden, weight, bias))


@torch.library.custom_op("gtpo_kernels::linear_token_logprobs_backward", mutates_args=())
def _linear_token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    chunk_rows: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = run_kernel(
        FAMILY,
        backend,
        "linear_token_logprobs_backward",
        hidden.device,
        grad_logprobs,
        grad_entropy,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        row_temperature,
        softcap,
        chunk_rows,
        (need_hidden, need_weight, need_bias),
    )
    return gradients


@_linear_token_logprobs_backward.register_fake
def _(
    grad_logprobs: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_head_gradients(hidden, weight, bias, rest[-4:-1])


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.temperature, row_temperature, *options = inputs
    ctx.softcap, ctx.chunk_rows, ctx.backend = options
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, targets, row_temperature)


def _linear_token_logprobs_grad(
    ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    check_first_order()
    *head, targets, row_temperature = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _linear_token_logprobs_backward(
        grad_logprobs,
        grad_entropy,
        *head,
        targets,
        ctx.temperature,
        row_temperature,
        ctx.softcap,
        ctx.chunk_rows,
        *needs,
        ctx.backend,
    )
    rounded = [
        gradient.to(of.dtype) if need else None for gradient, of, need in zip(gradients, head, needs, strict=True)
    ]
    return *rounded, None, None, None, None, None, None


_linear_token_logprobs.register_autograd(_linear_token_logprobs_grad, setup_context=_save_head)


def _empty_statistics(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Fake outputs: four vectors, one entry a row of `like`."""
    return tuple(like.new_empty(like.shape[0], dtype=dtype) for _ in range(4))


def empty_head_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """Fake outputs: d_hidden [N, D], d_weight [V, D], d_bias [V] in the accumulator dtype; [0] where not needed."""
    dtype = head_dtype(hidden, weight, bias)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if need else (0,), dtype=dtype) for shape, need in zip(shapes, needs, strict=True)
    )
