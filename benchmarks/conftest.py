"""Sizes of the benchmarks: real ones, or with GTPO_BENCH_SMOKE=1 tiny ones that only show that everything runs."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

SMOKE = os.environ.get("GTPO_BENCH_SMOKE") == "1"


@pytest.fixture(scope="session")
def smoke() -> bool:
    """Whether to run at tiny sizes."""
    return SMOKE


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(function, **facts): time rounds of one call; CPU milliseconds and `facts` go beside the figure."""

    def run(function: Callable[[], object], **facts: object) -> None:
        calls = 0

        def counted() -> None:
            nonlocal calls
            calls += 1
            function()

        start = time.process_time()
        benchmark.pedantic(counted, rounds=1 if SMOKE else 5, warmup_rounds=0 if SMOKE else 1)
        # of all threads, so it can exceed the wall time; the warm-up call is in the mean
        benchmark.extra_info.update(facts, cpu_ms=round(1e3 * (time.process_time() - start) / calls, 1))

    return run
