"""The work of the chunked ops: their matrix products in units of NVD, and the largest tensor that they make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gtpo_kernels.clipped_loss.reference import LossTerms
from gtpo_kernels.gtpo_loss.chunked import chunked_linear_loss
from gtpo_kernels.gtpo_loss.reference import GradientFilter, LossInputs
from gtpo_kernels.token_logprobs import kernel_torch as token_kernel

N, V, D, CHUNK = 60, 101, 13, 8
ACTIVE = 45
aten = torch.ops.aten


class Work(TorchDispatchMode):
    """Counts floating-point operations of matrix products, and the bytes of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = args[-2:]
            self.products += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else (out,):
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel() * result.element_size())
        return out


def work(function: Callable[[], Any]) -> tuple[float, int]:
    """(Products in units of ACTIVE * V * D, size of the largest tensor in float32 elements)."""
    with Work() as mode:
        function()
    return mode.products / (ACTIVE * V * D), mode.largest // 4


def inputs(all_metrics: bool) -> LossInputs:
    """ACTIVE rows of N: 5 more have an advantage of 0, the last 10 are outside the loss mask."""
    row = torch.arange(N)
    advantages = torch.where(row < ACTIVE, 1.0, 0.0)
    advantages[50:] = 1.0
    return LossInputs(row % V, advantages, row < 50, None, 1.0, None, 0.0, None, LossTerms(0.2, 0.28), all_metrics)


@pytest.mark.parametrize(
    ("needs", "all_metrics", "expected"),
    [
        ((True, True, False), False, 6),
        ((True, False, False), False, 4),  # a frozen head
        ((False, True, True), False, 4),
        ((False, False, False), False, 2),
        ((True, True, False), True, 6 + 2 * 5 / ACTIVE),  # rows of advantage 0 run forward only
    ],
)
def test_the_fused_loss_projects_active_rows_once(
    needs: tuple[bool, bool, bool], all_metrics: bool, expected: float
) -> None:
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.zeros(V)
    products, largest = work(
        lambda: chunked_linear_loss(
            "torch", hidden, weight, bias, inputs(all_metrics), CHUNK, needs, GradientFilter(False, 0.0)
        )
    )
    assert products == pytest.approx(expected)
    assert largest <= max(N * D, V * D, CHUNK * V) < ACTIVE * V


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (LossTerms(0.2, 0.28, "cispo"), 6),
        (LossTerms(0.2, 0.28, ratio_ids=torch.arange(N)), 8),  # no slope is known before all ratios are
    ],
    ids=["own ratios", "shared ratios"],
)
def test_another_rule_projects_again_only_for_shared_ratios(terms: LossTerms, expected: int) -> None:
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    rows = inputs(all_metrics=False)._replace(terms=terms)
    rest = (CHUNK, (True, True, False), GradientFilter(False, 0.0))
    products, largest = work(lambda: chunked_linear_loss("torch", hidden, weight, None, rows, *rest))
    assert products == pytest.approx(expected)
    assert largest <= max(N * D, V * D, CHUNK * V) < ACTIVE * V


def test_clipped_rows_cost_one_product_where_they_are_skipped() -> None:
    hidden, weight = torch.zeros(N, D), torch.randn(V, D)
    rows = inputs(all_metrics=False)
    # all logprobs are -log V, so these old ones clip 15 of the ACTIVE rows
    ratio = torch.where(torch.arange(N) < 15, 2.0, 1.0)
    rows = rows._replace(old_logprobs=-torch.full((N,), float(V)).log() - ratio.log())

    def run(skip_clipped: bool) -> Callable[[], Any]:
        everything = (CHUNK, (True, True, False), GradientFilter(skip_clipped, 0.0))
        return lambda: chunked_linear_loss("torch", hidden, weight, None, rows, *everything)

    assert work(run(False))[0] == pytest.approx(6)
    products, largest = work(run(True))
    assert products == pytest.approx(6 - 4 * 15 / ACTIVE)
    assert largest <= max(N * D, V * D, CHUNK * V)


def test_the_per_token_op_projects_again_only_what_a_gradient_reaches() -> None:
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.arange(N) % V
    rest = (targets, 1.0, None, 0.0, CHUNK)
    forward, largest_forward = work(lambda: token_kernel.linear_token_logprobs(hidden, weight, None, *rest))
    upstream = torch.where(torch.arange(N) < ACTIVE, 1.0, 0.0)
    backward, largest_backward = work(
        lambda: token_kernel.linear_token_logprobs_backward(
            upstream, None, hidden, weight, None, *rest, (True, True, False)
        )
    )
    assert forward == pytest.approx(2 * N / ACTIVE)
    assert backward == pytest.approx(6)
    assert max(largest_forward, largest_backward) <= max(N * D, V * D, CHUNK * V) < ACTIVE * V
