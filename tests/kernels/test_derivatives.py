"""What kernels differentiate: reverse mode, once.  Anything else is refused, and never a constant without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gtpo_kernels import (
    CreditTerm,
    LossRule,
    TurnAdvantages,
    clipped_loss,
    combined_advantages,
    gtpo_loss,
    gtpo_loss_,
    linear_gtpo_loss,
    linear_token_logprobs,
    token_logprobs,
    turn_advantages,
    turn_returns,
)
from gtpo_kernels.turn_advantages.reference import CreditRule
from tests.kernels.conftest import Case, backends, emulated, interpreted, loss_case

FAMILY = "gtpo_loss"
# torch's own forward mode scripts its decompositions when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
CREDIT = pytest.mark.parametrize("credit_backend", backends("turn_advantages"))
RULES = {"clipped": LossRule(), "ruled": LossRule("cispo", entropy_coef=0.1)}
Scalar = Callable[[Tensor], Tensor]


def scalars(backend: str) -> dict[str, tuple[Scalar, Tensor]]:
    """By name, every function of one differentiable argument, and that argument."""
    case = loss_case(5, 7, 3, seed=1)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    rows: Case = {name: case[name] for name in ("targets", "advantages", "loss_mask", "old_logprobs")}
    head: Case = {name: case[name] for name in ("hidden", "weight", "bias")}
    options: Case = {"backend": backend}
    # what refuses is above the backends: slow ones show it for one leaf of the head
    leaves = ["weight"] if interpreted(backend) or emulated(backend) else list(head)
    of: dict[str, tuple[Scalar, Tensor]] = {
        "token_logprobs": (lambda x: token_logprobs(x, rows["targets"], **options).logprobs.sum(), logits),
        "token entropy": (lambda x: token_logprobs(x, rows["targets"], **options).entropy.sum(), logits),
    }
    for name in leaves:

        def from_head(x: Tensor, name: str = name) -> Tensor:
            return linear_token_logprobs(**{**head, name: x}, targets=rows["targets"], **options).logprobs.sum()

        of[f"linear_token_logprobs {name}"] = (from_head, head[name])
    for label, rule in RULES.items():
        of[f"gtpo_loss {label}"] = (lambda x, rule=rule: gtpo_loss(x, **rows, rule=rule, **options).loss, logits)
        for name in leaves:

            def linear(x: Tensor, name: str = name, rule: LossRule = rule) -> Tensor:
                return linear_gtpo_loss(**{**head, name: x}, **rows, rule=rule, **options).loss

            of[f"linear_gtpo_loss {name} {label}"] = (linear, head[name])
    return of


def clipped_scalars(backend: str) -> dict[str, tuple[Scalar, Tensor]]:
    logprobs, advantages = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0])
    rule = RULES["ruled"]

    def of_entropy(x: Tensor) -> Tensor:
        return clipped_loss(logprobs, advantages, entropy=x, rule=rule, backend=backend).loss

    return {
        "clipped_loss": (lambda x: clipped_loss(x, advantages, backend=backend).loss, logprobs),
        "clipped_loss ruled": (
            lambda x: clipped_loss(x, advantages, rule=LossRule("cispo"), backend=backend).loss,
            logprobs,
        ),
        "clipped_loss entropy": (of_entropy, torch.tensor([0.5, 0.7])),
    }


def all_scalars(kernel: str) -> dict[str, tuple[Scalar, Tensor]]:
    return {**scalars(kernel), **(clipped_scalars(kernel) if kernel in backends("clipped_loss") else {})}


def test_forward_mode_is_refused(kernel: str) -> None:
    for name, (function, x) in all_scalars(kernel).items():
        with pytest.raises(NotImplementedError, match="has a forward-mode tangent: kernels differentiate in reverse"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            # what has no tangent is no matter
            assert function(x).isfinite(), name
            with pytest.raises(NotImplementedError, match="has a forward-mode tangent"):
                function(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="logits has a forward-mode tangent"):
        logits = forward_ad.make_dual(torch.zeros(1, 2), torch.ones(1, 2))
        gtpo_loss_(logits, torch.tensor([0]), torch.ones(1), backend=kernel)


def test_a_second_derivative_is_refused(kernel: str) -> None:
    for name, (function, x) in all_scalars(kernel).items():
        leaf = x.clone().requires_grad_()
        with pytest.raises(NotImplementedError, match="create_graph is not supported: kernels give first derivatives"):
            torch.autograd.grad(function(leaf), leaf, create_graph=True)
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        assert not gradient.requires_grad, name


def test_the_definition_has_any_derivative() -> None:
    for name, (function, x) in {**scalars("reference"), **clipped_scalars("reference")}.items():
        tangent = torch.linspace(-1, 1, x.numel()).view_as(x)
        (gradient,) = torch.autograd.grad(function(leaf := x.clone().requires_grad_()), leaf, create_graph=True)
        _, derivative = torch.func.jvp(function, (x,), (tangent,))
        torch.testing.assert_close(derivative, (gradient * tangent).sum().detach(), msg=name)


def test_gradients_of_many_upstreams_at_once(kernel: str) -> None:
    for name, (function, x) in all_scalars(kernel).items():
        leaf = x.clone().requires_grad_()
        upstream = torch.tensor([1.0, -2.0, 0.0])
        (many,) = torch.autograd.grad(function(leaf), leaf, upstream, is_grads_batched=True)
        (one,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(many, upstream.view(3, *[1] * x.dim()) * one, msg=name)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_graph_that_saved_the_logits_refuses_to_go_backward(rule: LossRule, backend: str) -> None:
    # a kernel writes to memory that autograd does not see; tanh has saved what it gave
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for logits, saved in (((y := x.tanh()).detach(), y), (((y := x.tanh()).detach())[:2], y)):
        version = logits._version
        gtpo_loss_(logits, torch.tensor([0, 4, 1])[: len(logits)], torch.ones(len(logits)), rule=rule, backend=backend)
        assert logits._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


def test_logits_of_inference_mode_have_no_version(kernel: str) -> None:
    with torch.inference_mode():
        logits = torch.zeros(1, 2)
        gtpo_loss_(logits, torch.tensor([0]), torch.ones(1), backend=kernel)
        assert logits.tolist() == [[-0.5, 0.5]]


@CREDIT
def test_credit_refuses_forward_mode(credit_backend: str) -> None:
    rewards, cu_turns, ids = torch.tensor([1.0, 0.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 0])
    term = CreditTerm(CreditRule("outcome"))
    credits: list[Callable[[Tensor], Any]] = [
        lambda x: turn_returns(x, cu_turns, backend=credit_backend),
        lambda x: turn_advantages(x, cu_turns, ids, torch.arange(2), backend=credit_backend),
        lambda x: combined_advantages(
            rewards, cu_turns, ids, torch.arange(2), [term], outcomes=x, backend=credit_backend
        ),
    ]
    for function in credits:
        assert isinstance(function(rewards), Tensor | TurnAdvantages)
        with pytest.raises(NotImplementedError, match="has a forward-mode tangent"):
            torch.func.jvp(lambda x, function=function: tuple(function(x)), (rewards,), (rewards,))
