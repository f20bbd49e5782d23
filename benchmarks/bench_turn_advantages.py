"""`turn_advantages` beside verl's loops and the floor; `python -m benchmarks.credit` has larger sizes too."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.credit import CONTESTANTS, CreditBatch, exact_outputs, make_batch
from benchmarks.measure import Contestant, Outputs


@pytest.fixture(scope="module")
def batch(smoke: bool) -> CreditBatch:
    return make_batch(*((16, 3) if smoke else (1024, 256)))


@pytest.fixture(scope="module")
def exact(batch: CreditBatch) -> Outputs:
    return exact_outputs(batch)


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda c: c.name)
def bench_turn_advantages(
    contestant: Contestant[CreditBatch], batch: CreditBatch, exact: Outputs, measure: Callable[..., Any]
) -> None:
    measure(
        contestant,
        batch,
        exact,
        1e-4,
        num_trajectories=batch.num_trajectories,
        num_turns=len(batch.turn_rewards),
        num_tokens=len(batch.turn_ids),
    )
