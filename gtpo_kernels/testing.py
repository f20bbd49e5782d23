"""The error budget: how far a kernel may be from its definition.  For tests, of kernels outside this package too.

A kernel is held against the reference in float64, and allowed twice the error that the reference itself makes in
float32 on the same inputs, plus four roundings of the largest value.  Nothing is tuned by hand: one rule
serves every op, shape and dtype.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype


class Trial(NamedTuple):
    """What one run of an op gave, by name: its outputs, and the gradients of the arguments that were asked for."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "actual") -> None:
    """max|actual - exact| <= 2 max|plain - exact| + 4 eps max|exact| over the finite values; the others must be equal.

    actual: of the kernel.  plain: of the reference in float32, rounded once to the dtype of `actual`.  exact: of the
    reference in float64.  eps: of the accumulator, float64 for float64 results and float32 for every other.
    name: for the message.
    Raises AssertionError, also where dtypes or shapes differ.

    >>> exact = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    >>> assert_within_budget(exact.float(), exact.float(), exact)
    >>> assert_within_budget(exact.float() * 1.001, exact.float(), exact, "logprobs")
    Traceback (most recent call last):
    ...
    AssertionError: logprobs is off by 0.001 at 0 (1.001 instead of 1), allowed 4.77e-07
    """
    _require(actual.dtype == plain.dtype, f"{name} is {actual.dtype} instead of {plain.dtype}")
    shapes = [tuple(x.shape) for x in (actual, plain, exact)]
    _require(shapes[0] == shapes[1] == shapes[2], f"{name} has shape {shapes[0]} instead of {shapes[2]}")
    finite = exact.isfinite()
    for other in (actual, plain):
        same = torch.allclose(other[~finite].double(), exact[~finite], equal_nan=True)
        _require(
            same and bool(other[finite].isfinite().all()), f"{name} has other non-finite values than the reference"
        )
    if not finite.any():
        return
    error, plain_error = ((x.double() - exact).masked_fill(~finite, 0.0).abs() for x in (actual, plain))
    eps = torch.finfo(accumulator_dtype(actual.dtype)).eps
    allowed = 2 * plain_error.max() + 4 * eps * exact[finite].abs().max()
    worst = int(error.argmax())
    _require(
        bool(error.max() <= allowed),
        f"{name} is off by {error.max():.3g} at {worst} ({actual.flatten()[worst]:.6g} instead of "
        f"{exact.flatten()[worst]:.6g}), allowed {allowed:.3g}",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def assert_matches_reference(
    op: Callable[..., Any],
    cases: Sequence[Mapping[str, Any]],
    differentiable: Collection[str] = (),
    **options: Any,
) -> None:
    """Outputs of `op`, and gradients of the arguments in `differentiable`, are within the budget of the reference.

    op: a public op of this package, or anything else that takes backend="reference" and returns a (nested) NamedTuple.
    cases: its keyword arguments, a mapping each.  A result is judged over all of them together: one scalar in float32
        can be right by luck, which would leave no budget, so give several cases where an output is a scalar.
    options: further keyword arguments, the same for all runs but `backend`.

    >>> from gtpo_kernels import token_logprobs
    >>> case = {"logits": torch.randn(3, 5), "targets": torch.tensor([0, 4, 2])}
    >>> assert_matches_reference(token_logprobs, [case], ["logits"], backend="torch")
    """
    definition = {**options, "backend": "reference"}
    actual = [run_trial(op, case, differentiable, None, options) for case in cases]
    plain = [run_trial(op, case, differentiable, _plain_dtype(case), definition) for case in cases]
    exact = [run_trial(op, case, differentiable, torch.float64, definition) for case in cases]
    for kind in Trial._fields:
        names = list(getattr(exact[0], kind))
        _require(names == list(getattr(actual[0], kind)), f"{kind} of the kernel and the reference differ")
        for name in names:
            ours, plains, exacts = (
                [getattr(trial, kind)[name].flatten() for trial in trials] for trials in (actual, plain, exact)
            )
            dtype = ours[0].dtype
            label = name if kind == "outputs" else f"d_{name}"
            ours_all, plain_all, exact_all = torch.cat(ours), torch.cat(plains).to(dtype), torch.cat(exacts)
            if dtype == torch.float64:
                # The definition errs as the kernel does: twice its float32 error, at the finer rounding.
                finer = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                plain_all = torch.where(exact_all.isfinite(), exact_all + (plain_all - exact_all) * finer, plain_all)
            assert_within_budget(ours_all, plain_all, exact_all, label)


def _plain_dtype(case: Mapping[str, Any]) -> torch.dtype | None:
    """float32 where something is float64; else None, since the reference upcasts what has 16 bits by itself."""
    has_float64 = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in case.values())
    return torch.float32 if has_float64 else None


def run_trial(
    op: Callable[..., Any],
    arguments: Mapping[str, Any],
    differentiable: Collection[str],
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> Trial:
    """Run `op` forward and backward on its arguments, floating-point tensors cast to `dtype` where one is given.

    The upstream gradient of every differentiable output is random and the same for every dtype and backend.  That of a
    scalar is a power of two: a gradient that the forward pass kept in 16 bits is scaled without rounding it again.
    """
    copies = {name: _copy(value, dtype, name in differentiable) for name, value in arguments.items()}
    outputs = dict(_named_tensors(op(**copies, **options), "output"))
    generator = torch.Generator().manual_seed(0)
    upstream = {name: _random_upstream(value, generator) for name, value in outputs.items()}
    roots = {name: value for name, value in outputs.items() if value.requires_grad}
    leaves = [copies[name] for name in differentiable]
    gradients = torch.autograd.grad(list(roots.values()), leaves, [upstream[name] for name in roots]) if leaves else ()
    return Trial(
        {name: value.detach() for name, value in outputs.items()}, dict(zip(differentiable, gradients, strict=True))
    )


def _random_upstream(output: Tensor, generator: torch.Generator) -> Tensor:
    upstream = torch.randn(output.shape, generator=generator, device="cpu")
    if output.dim() == 0:
        upstream = torch.ldexp(upstream.sign(), torch.frexp(upstream).exponent)
    return upstream.to(output)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with a backward pass that runs it anew.

    `torch.autograd.gradcheck` goes backward twice over one graph: ops that scale kept gradients in place refuse that.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> torch.autograd.grad(recomputed(torch.square)(x), x)[0].item()
    4.0
    """

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return function(*inputs)

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Any:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(function(*inputs), inputs, upstream)

    return Recomputed.apply


def _copy(value: Any, dtype: torch.dtype | None, requires_grad: bool) -> Any:
    """Detached, in the same memory layout: a strided argument stays strided."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach()
    if dtype is not None and copy.is_floating_point():
        copy = copy.to(dtype)
    return copy.requires_grad_(requires_grad) if requires_grad else copy


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """(field name, tensor) for every tensor of a (nested) NamedTuple; fields that are None are left out."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for field, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _named_tensors(part, str(field))
