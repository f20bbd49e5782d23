"""`gtpo_loss_`: the loss of `gtpo_loss`, and its gradient where the logits were."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gtpo_kernels import ClippedLoss, gtpo_loss, gtpo_loss_
from tests.kernels.conftest import (
    NAN,
    Case,
    assert_close,
    assert_equal,
    cpu_only,
    edge_logits,
    fit,
    logits_loss_case,
    loss_and_gradients,
    row_temperature,
    sizes,
)

FAMILY = "gtpo_loss"


def in_place(case: Case, **options: Any) -> tuple[Tensor, ClippedLoss]:
    """(What the logits became, the result)."""
    logits = case["logits"].clone()
    return logits, gtpo_loss_(**{**case, "logits": logits}, **options)


@sizes
def test_the_logits_become_their_gradient(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    num_rows, vocab = fit(backend, *shape[:2])
    case = logits_loss_case(num_rows, vocab, dtype=dtype, temperature=row_temperature(num_rows), softcap=8.0)
    for metrics in ("active", "all"):
        options: Case = {"metrics": metrics, "num_loss_tokens": 40, "backend": backend}
        d_logits, result = in_place(case, **options)
        expected = gtpo_loss(**case, **options)
        assert_equal([result.loss, *result.metrics], [expected.loss, *expected.metrics])
        # the upstream gradient is 1, so no bit may differ
        assert_equal([d_logits], loss_and_gradients(gtpo_loss, case, ["logits"], **options)[1:])


def test_edge_rows(backend: str) -> None:
    case = {**edge_logits(), "advantages": torch.linspace(-1, 1, 9) + 0.05}
    d_logits, _ = in_place(case, backend=backend)
    assert d_logits.isfinite().all()
    assert_close([d_logits], loss_and_gradients(gtpo_loss, case, ["logits"], backend="reference")[1:])


def test_rows_outside_become_zero_whatever_they_held(backend: str) -> None:
    case = logits_loss_case(13, 19, seed=2)
    silent = ~case["loss_mask"] | (case["advantages"] == 0)
    assert silent.any()
    clean, _ = in_place(case, backend=backend)
    poisoned = {**case, "logits": case["logits"].masked_fill(silent[:, None], NAN)}
    d_logits, result = in_place(poisoned, backend=backend)
    assert_equal([d_logits], [clean])
    assert not d_logits[silent].any()
    assert result.loss.isfinite()
    nothing, _ = in_place({**poisoned, "loss_mask": torch.zeros(13, dtype=torch.bool)}, backend=backend)
    assert not nothing.any()


def test_gradients_go_on_into_the_head(backend: str) -> None:
    case = logits_loss_case(8, 9)
    hidden, weight = torch.linspace(-1, 1, 40).view(8, 5), torch.linspace(1, -1, 45).view(9, 5)
    expected = weight.clone().requires_grad_()
    gtpo_loss(**{**case, "logits": hidden @ expected.T}, backend=backend).loss.backward()
    weight.requires_grad_()
    logits = hidden @ weight.T
    d_logits = logits.detach()
    gtpo_loss_(**{**case, "logits": d_logits}, backend=backend)
    logits.backward(d_logits)
    torch.testing.assert_close(weight.grad, expected.grad)


def test_a_repeat_is_bitwise_equal(kernel: str) -> None:
    case = logits_loss_case(*fit(kernel, 252, 507))
    assert_equal(*([d, *result.metrics] for d, result in (in_place(case, backend=kernel) for _ in range(2))))


class LargestResult(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else (out,):
            if isinstance(result, Tensor) and not any(result is arg for arg in args):
                self.elements = max(self.elements, result.numel())
        return out


@cpu_only
def test_no_second_matrix_is_made() -> None:
    # one elementwise block of 2**17 elements is the most that is held beside the logits
    num_rows, vocab = 300, 4001
    targets, advantages = torch.zeros(num_rows).long(), torch.ones(num_rows)
    logits = torch.zeros(num_rows, vocab)
    with LargestResult() as largest:
        gtpo_loss_(logits, targets, advantages, backend="torch")
    assert largest.elements <= 2**17 < num_rows * vocab


def run(logits: Tensor) -> Tensor:
    return gtpo_loss_(logits, torch.tensor([0, 1]), torch.tensor([1.0, -1.0])).loss


@pytest.mark.parametrize("fullgraph", [True, False])
def test_it_says_that_it_cannot_be_compiled(fullgraph: bool) -> None:
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="gtpo_loss_ runs eagerly only: call gtpo_loss under"):
        torch.compile(run, fullgraph=fullgraph, backend="aot_eager")(torch.zeros(2, 4))


@cpu_only
def test_bad_arguments_are_named(backend: str) -> None:
    rows: Case = {"targets": torch.tensor([0, 1]), "advantages": torch.ones(2), "backend": backend}
    bad: list[tuple[Case, str]] = [
        ({"logits": torch.zeros(2, 4, requires_grad=True)}, "logits must not require grad: pass logits.detach()"),
        ({"logits": torch.zeros(4, 2).T}, r"logits must be contiguous, got strides \(1, 2\) for shape \(2, 4\)"),
        ({"logits": torch.zeros(2)}, r"logits must be \[N, V\], got shape \(2,\)"),
        ({"logits": torch.zeros(2, 1)}, r"targets must lie in \[0, 1\), got values from 0 to 1"),
        ({"logits": torch.zeros(2, 4), "softcap": NAN}, "softcap must be positive and finite, or None, got nan"),
        ({"logits": torch.zeros(2, 4), "temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            gtpo_loss_(**{**rows, **changes})
