"""`linear_gtpo_loss` beside eager PyTorch and the floor; `python -m benchmarks.linear` has the peers too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.linear import (
    ALLOWED_ERROR,
    CPU_BACKENDS,
    EAGER,
    FLOORS,
    LinearBatch,
    exact_outputs,
    make_batch,
    our_contestants,
)
from benchmarks.measure import Contestant, Outputs


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["all-rows", "30%-masked"])
def batch(request: pytest.FixtureRequest, smoke: bool) -> LinearBatch:
    return make_batch(*((64, 257, 32) if smoke else (2048, 32768, 512)), mask_fraction=request.param)


@pytest.fixture(scope="module")
def exact(batch: LinearBatch) -> Outputs:
    return exact_outputs(batch)


@pytest.mark.parametrize("contestant", [*FLOORS, *our_contestants(CPU_BACKENDS), EAGER], ids=lambda c: c.name)
def bench_linear_gtpo_loss(
    contestant: Contestant[LinearBatch], batch: LinearBatch, exact: Outputs, measure: Callable[..., Any]
) -> None:
    num_rows, width = batch.hidden.shape
    measure(
        contestant,
        batch,
        exact,
        ALLOWED_ERROR[torch.float32],
        num_rows=num_rows,
        active_rows=int(batch.loss_mask.sum()),
        vocab=len(batch.weight),
        width=width,
    )
