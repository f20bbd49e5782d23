"""`gtpo_loss_` and `gtpo_loss` beside eager PyTorch and the floor; `python -m benchmarks.logits` prints the table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.linear import ALLOWED_ERROR, CPU_BACKENDS
from benchmarks.logits import LogitsBatch, contestants, exact_outputs, make_batch
from benchmarks.measure import Contestant, Outputs


@pytest.fixture(scope="module")
def batch(smoke: bool) -> LogitsBatch:
    return make_batch(*((64, 257) if smoke else (1024, 151936)))


@pytest.fixture(scope="module")
def exact(batch: LogitsBatch) -> Outputs:
    return exact_outputs(batch)


@pytest.mark.parametrize("contestant", contestants(CPU_BACKENDS), ids=lambda c: c.name)
def bench_gtpo_loss(
    contestant: Contestant[LogitsBatch], batch: LogitsBatch, exact: Outputs, measure: Callable[..., Any]
) -> None:
    num_rows, vocab = batch.logits.shape
    measure(contestant, batch, exact, ALLOWED_ERROR[torch.float32], num_rows=num_rows, vocab=vocab)
