"""The pytest-benchmark entry to the contestants of the tables; with GTPO_BENCH_SMOKE=1 at tiny sizes."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measure import Contestant, Outputs, relative_errors
from gtpo_kernels import BackendUnavailable

SMOKE = os.environ.get("GTPO_BENCH_SMOKE") == "1"


@pytest.fixture(scope="session")
def smoke() -> bool:
    """Whether to run at tiny sizes."""
    return SMOKE


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(contestant, batch, exact, allowed, **facts): check one, then time it; `facts` go beside the figure."""

    def run(contestant: Contestant[Any], batch: Any, exact: Outputs, allowed: float, **facts: object) -> None:
        try:
            call = contestant.prepare(batch)
        except BackendUnavailable as reason:
            pytest.skip(str(reason))

        def reset() -> None:
            if contestant.reset is not None:
                contestant.reset(batch)

        reset()
        errors = relative_errors(call(), exact)
        assert all(error <= allowed for error in errors.values()), errors
        spent = []

        def counted() -> None:
            start = time.process_time()
            call()
            spent.append(time.process_time() - start)

        benchmark.pedantic(counted, setup=reset, rounds=1 if SMOKE else 5, warmup_rounds=0 if SMOKE else 1)
        # of all threads, so it can exceed the wall time; the warm-up call is in the mean
        cpu_ms = round(1e3 * sum(spent) / len(spent), 1)
        benchmark.extra_info.update(facts, threads=torch.get_num_threads(), cpu_ms=cpu_ms)

    return run
