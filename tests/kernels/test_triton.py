"""The `triton` backend where rows are long: streamed by one program, or split over several; and what it refuses."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_kernels import BackendUnavailable, ClippedLoss, gtpo_loss, gtpo_loss_, linear_gtpo_loss, token_logprobs
from gtpo_kernels.testing import assert_matches_reference, run_trial
from gtpo_kernels.token_logprobs import kernel_torch
from gtpo_kernels.token_logprobs import kernel_triton_sweeps as sweeps
from tests.kernels.conftest import (
    HEAD,
    INF,
    Case,
    assert_equal,
    cpu_only,
    draws,
    edge_logits,
    logits_case,
    logits_loss_case,
    loss_case,
)

KERNEL = "triton"


@pytest.fixture(params=["streamed", "split"])
def long_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks of 128, so that a row of 293 is a long one."""
    monkeypatch.setattr(sweeps, "MAX_BLOCK", 128)
    monkeypatch.setattr(sweeps, "STREAM_BLOCK", 128)
    monkeypatch.setattr(sweeps, "FEW_ROWS", 0 if request.param == "streamed" else 256)
    return str(request.param)


def test_the_plan(long_rows: str) -> None:
    logits = torch.zeros(13, 293)
    plan = sweeps.row_plan(13, 293, sweeps.max_block(logits, has_softcap=False), False, logits)
    assert (plan.one_block, plan.block, plan.unit) == (False, 128, 1)
    assert plan.splits == (1 if long_rows == "streamed" else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_long_rows_per_token(dtype: torch.dtype, long_rows: str) -> None:
    cases = draws(KERNEL, logits_case, 13, 293, dtype=dtype)
    for options in ({"temperature": 1.3, "softcap": 4.0}, {}):
        assert_matches_reference(token_logprobs, [{**case, **options} for case in cases], ["logits"], backend=KERNEL)


@pytest.mark.parametrize("head", [{"temperature": 0.7, "softcap": 4.0}, {}], ids=["capped", "plain"])
def test_long_rows_of_the_loss(head: Case, long_rows: str) -> None:
    cases = draws(KERNEL, logits_loss_case, 13, 293, scalar=True, **head)
    assert_matches_reference(gtpo_loss, cases, ["logits"], backend=KERNEL, metrics="all", num_loss_tokens=50)


def test_long_rows_of_infinities(long_rows: str) -> None:
    case = edge_logits()
    # nothing finite in the first block, and in one row only one logit at all
    wide = torch.full((9, 293), -INF)
    wide[:, 240:277] = case["logits"]
    wide[8] = -INF
    wide[8, 250] = 3.0
    targets = case["targets"] + 240
    assert_matches_reference(token_logprobs, [{"logits": wide, "targets": targets}], ["logits"], backend=KERNEL)
    wide_grad = wide.clone().requires_grad_()
    loss = gtpo_loss(wide_grad, targets, torch.ones(9), backend=KERNEL).loss
    loss.backward()
    assert wide_grad.grad is not None
    assert wide_grad.grad.isfinite().all()


def test_long_rows_in_place(long_rows: str) -> None:
    case = logits_loss_case(13, 293)
    leaf = case.pop("logits").requires_grad_()
    loss, metrics = gtpo_loss(leaf, **case, backend=KERNEL)
    loss.backward()
    logits = leaf.detach().clone()
    in_place = gtpo_loss_(logits, **case, backend=KERNEL)
    assert_equal([in_place.loss, *in_place.metrics], [loss, *metrics])
    assert_equal([logits], [leaf.grad])


@pytest.mark.parametrize(
    ("vocab", "dtype", "unit"),
    [(512, torch.bfloat16, 8), (516, torch.bfloat16, 1), (516, torch.float32, 4), (517, torch.float32, 1)],
)
def test_loads_are_16_bytes_wide_where_rows_are_aligned(vocab: int, dtype: torch.dtype, unit: int) -> None:
    logits = torch.zeros(4, vocab, dtype=dtype)
    assert sweeps.row_plan(4, vocab, 1024, False, logits).unit == unit
    # rows that start off a 16-byte boundary
    assert sweeps.row_plan(4, vocab, 1024, False, torch.zeros(4, vocab + 1, dtype=dtype)[:, 1:]).unit == 1


@pytest.mark.parametrize("vocab", [512, 517])
def test_aligned_and_other_rows_give_the_same(vocab: int) -> None:
    logits, targets = logits_case(5, vocab)["logits"], torch.tensor([0, 1, 2, vocab - 1, 7])
    shifted = torch.zeros(5, vocab + 1)
    shifted[:, 1:] = logits
    results = [token_logprobs(x, targets, backend=KERNEL) for x in (logits, shifted[:, 1:])]
    assert_equal(*results)


@cpu_only
def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET")
    with pytest.raises(BackendUnavailable, match="backend='triton' needs an NVIDIA or AMD GPU, or TRITON_INTERPRET=1"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(1).long(), backend=KERNEL)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_products_of_bfloat16_err_no_more_than_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a GPU's products do, where d_logits too are rounded to bfloat16: here with the operands upcast
    def multiply_(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
        assert (out.dtype, left.dtype, right.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        product = left.float() @ right.float()
        out.copy_(out + product if add else product)

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor, backend: str, **rows: Any) -> ClippedLoss:
        logits = (hidden.float() @ weight.float().T + bias.float()).to(hidden.dtype)
        return gtpo_loss(logits, **rows, backend=backend)

    monkeypatch.setattr(kernel_torch, "product_operands", lambda device, dtype, _: dtype)
    monkeypatch.setattr(kernel_torch, "multiply_", multiply_)
    case = loss_case(29, 293, 19, dtype=torch.bfloat16)
    exact = run_trial(linear_gtpo_loss, case, HEAD, torch.float64, {"backend": "reference"}).gradients
    ours = run_trial(linear_gtpo_loss, case, HEAD, None, {"backend": name, "chunk_rows": 10}).gradients
    usual = run_trial(eager, case, HEAD, None, {"backend": "reference"}).gradients
    for leaf in HEAD:
        error, usual_error = ((x[leaf].double() - exact[leaf]).abs().max() for x in (ours, usual))
        assert error <= usual_error
