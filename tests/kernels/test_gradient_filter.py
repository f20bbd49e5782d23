"""`skip_clipped` and `filter_eps` of `linear_gtpo_loss`: what they leave out, and the error that this makes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_kernels import linear_gtpo_loss
from gtpo_kernels.gtpo_loss.chunked import FILTER_COLUMNS
from tests.kernels.conftest import (
    HEAD,
    INF,
    Case,
    assert_close,
    assert_equal,
    loss_and_gradients,
    loss_case,
    row_temperature,
)

FAMILY = "gtpo_loss"


def peaked_case(num_rows: int, biases: tuple[float, ...] = (-40.0, -40.0, -40.0), **options: Any) -> Case:
    """Targets in the first block of the vocabulary; `biases` of the three blocks after it, the last of 19 entries."""
    case = loss_case(num_rows, 3 * FILTER_COLUMNS + 19, 6, seed=3, dtype=torch.float64, **options)
    case["targets"] %= FILTER_COLUMNS
    for block, bias in zip(case["bias"][FILTER_COLUMNS:].split(FILTER_COLUMNS), biases, strict=True):
        block += bias
    return {**case, "old_logprobs": None}


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_skipping_clipped_rows_changes_rounding_only(chunk_rows: int, kernel: str) -> None:
    case = loss_case(13, 37, 11, dtype=torch.float64, temperature=0.8)
    # half of the rows are clipped; one is infinite
    case["old_logprobs"][::2] -= case["advantages"][::2].sign()
    case["old_logprobs"][1] = -INF
    kept, skipped = (
        loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=kernel, chunk_rows=chunk_rows, skip_clipped=skip)
        for skip in (False, True)
    )
    # a chunk of one row is clipped or not, so there even the rounding is the same
    (assert_equal if chunk_rows == 1 else assert_close)(skipped, kept)


def test_a_batch_of_clipped_rows_has_no_gradient(kernel: str) -> None:
    case = loss_case(6, 9, 4)
    case["old_logprobs"] -= 2 * case["advantages"].sign()
    results = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=kernel, skip_clipped=True, filter_eps=1e-9)
    assert results[0] != 0
    assert not any(gradient.any() for gradient in results[1:])


@pytest.mark.parametrize("head", [{}, {"temperature": "per row", "softcap": 60.0}], ids=["plain", "scaled"])
def test_the_error_of_filtering_is_bounded(head: Case, kernel: str) -> None:
    num_rows = 13
    options = {name: row_temperature(num_rows) if name == "temperature" else value for name, value in head.items()}
    # next to the first block one that counts, one on either side of the threshold, and one that never counts
    case = peaked_case(num_rows, (-3.0, -7.0, -40.0), **options)

    def run(filter_eps: float) -> list[Tensor]:
        return loss_and_gradients(
            linear_gtpo_loss, case, HEAD, backend=kernel, num_loss_tokens=1, chunk_rows=2, filter_eps=filter_eps
        )

    exact, eps = run(0.0), 1e-3
    filtered = run(eps)
    # of ratio 1 and over one token, the slope of a row is its advantage
    slope = (case["advantages"] * case["loss_mask"]).abs() / options.get("temperature", 1.0)
    error = [(one - other).norm(dim=-1) for one, other in zip(filtered[1:3], exact[1:3], strict=True)]
    bounds = [slope * eps * 2 * case["weight"].norm(dim=1).max(), eps * (slope * case["hidden"].norm(dim=1)).sum()]
    for of_rows, bound in zip(error, bounds, strict=True):
        assert of_rows.max() > 1e-6
        assert (of_rows <= bound).all()
    by_block = [block.norm() for block in filtered[2].split(FILTER_COLUMNS)]
    assert [bool(norm) for norm in by_block] == [True, True, True, False]
    # loss, metrics and the gradient of the bias are exact
    assert_equal([filtered[0], filtered[3]], [exact[0], exact[3]])
    # below the mass of every block nothing is left out
    torch.testing.assert_close(run(1e-60), exact)


def test_a_block_with_a_target_is_kept(kernel: str) -> None:
    case = peaked_case(7)
    case["advantages"] += 5.0
    case["loss_mask"][:] = True
    case["targets"][3] = 2 * FILTER_COLUMNS + 1
    exact, filtered = (
        loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=kernel, filter_eps=eps)[2] for eps in (0.0, 1e-4)
    )
    blocks = [block.any(dim=1).any().item() for block in filtered.split(FILTER_COLUMNS)]
    assert blocks == [True, False, True, False]
    torch.testing.assert_close(
        filtered[2 * FILTER_COLUMNS : 3 * FILTER_COLUMNS], exact[2 * FILTER_COLUMNS : 3 * FILTER_COLUMNS]
    )


def test_a_nan_is_not_filtered(kernel: str) -> None:
    case = peaked_case(3)
    case["advantages"] += 5.0
    case["loss_mask"][:] = True
    case["hidden"][1] = float("nan")
    assert loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=kernel, filter_eps=0.5)[2].isnan().any()
