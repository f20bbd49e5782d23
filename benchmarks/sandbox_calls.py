"""What a call costs in our sandbox and beside it: contestants that run the same cells and must print the same."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gtpo.sandbox import SandboxPool, SandboxSession

CELLS = {
    "print": ("print(1+1)", "2\n"),
    "numpy_sympy": (
        "import numpy as np, sympy\nx = sympy.symbols('x')\n"
        "print(np.arange(6).reshape(2, 3).sum(), sympy.expand((x + 1)**3), sympy.solve(x**2 - 5*x + 6, x))",
        "15 x**3 + 3*x**2 + 3*x + 1 [2, 3]\n",
    ),
}
PROFILES = {"print": "plain", "numpy_sympy": "math"}
NUM_CALLERS = 4


@dataclass
class Row:
    """One contestant and cell. Without figures, `note` says why."""

    name: str
    cell: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    per_s: float | None = None
    note: str = ""


Call = Callable[[str], str]
AsyncCall = Callable[[str], Awaitable[str]]


# The others, as contexts that give a call from code to output.


@contextlib.contextmanager
def cold() -> Iterator[Call]:
    """A new interpreter for every call. No isolation."""
    yield lambda code: _output([sys.executable, "-I", "-c", code])


@contextlib.contextmanager
def bwrap() -> Iterator[Call]:
    """A new interpreter in new namespaces for every call. No system call filter, no limits."""
    if shutil.which("bwrap") is None:
        raise ImportError("bwrap is not installed")
    namespaces = ("--unshare-all", "--die-with-parent", "--new-session")
    files = ("--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev")
    jail = ["bwrap", *namespaces, *files]
    yield lambda code: _output([*jail, sys.executable, "-I", "-c", code])


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def ipykernel() -> Iterator[Call]:
    """A Jupyter kernel that lasts. No isolation."""
    import ipykernel  # noqa: F401
    from jupyter_client.manager import start_new_kernel
    from jupyter_core.utils import ensure_event_loop

    manager, client = start_new_kernel(kernel_name="python3", stderr=subprocess.DEVNULL)

    def call(code: str) -> str:
        printed = io.StringIO()

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.write(message["content"]["text"])

        client.execute_interactive(code, output_hook=hook, timeout=60)
        return printed.getvalue()

    try:
        yield call
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        # the one that its blocking calls made for this thread
        ensure_event_loop().close()


@contextlib.contextmanager
def smolagents() -> Iterator[Call]:
    """An evaluator of syntax trees in the caller's process. Its documentation: not a security sandbox."""
    from smolagents.local_python_executor import LocalPythonExecutor

    executor = LocalPythonExecutor(additional_authorized_imports=["numpy", "sympy"])
    executor.send_tools({})

    def call(code: str) -> str:
        return executor(code).logs

    yield call


OTHERS = (
    (cold, "", NUM_CALLERS),
    (bwrap, "namespaces only", NUM_CALLERS),
    (ipykernel, "no isolation; one kernel, one caller", 1),
    (smolagents, "no isolation; in the caller's process, one caller", 1),
)


def measure_other(context: Any, note: str, num_callers: int, cell: str, num_calls: int) -> Row:
    """Time `num_calls` calls one after the other, then as many by several callers."""
    code, expected = CELLS[cell]
    row = Row(context.__name__, cell, note=note)
    try:
        with context() as call:

            def timed(_: int) -> float:
                start = time.perf_counter()
                printed = call(code)
                took = time.perf_counter() - start
                if printed != expected:
                    raise RuntimeError(f"{context.__name__} printed {printed!r}")
                return took

            timed(0)
            _fill(row, [timed(i) for i in range(num_calls)])
            start = time.perf_counter()
            with ThreadPoolExecutor(num_callers) as callers:
                list((map if num_callers == 1 else callers.map)(timed, range(num_calls)))
            row.per_s = round(num_calls / (time.perf_counter() - start), 1)
    except ImportError as absent:
        row.note = f"absent: {absent}"
    return row


def _fill(row: Row, times_s: list[float]) -> None:
    ordered = sorted(times_s)
    row.p50_ms = round(ordered[len(ordered) // 2] * 1e3, 3)
    row.p99_ms = round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3, 3)


async def measure_ours(num_calls: int) -> list[Row]:
    """The four ways to call our sandbox, for both cells."""
    rows = []
    for cell, (code, expected) in CELLS.items():
        async with SandboxPool(profile=PROFILES[cell], max_concurrent=NUM_CALLERS) as pool:
            sessions = [await pool.open() for _ in range(NUM_CALLERS)]

            async def in_session(session: SandboxSession, code: str, *, rollback: bool) -> str:
                return (await session.run(code, rollback=rollback)).stdout

            async def fresh(code: str) -> str:
                session = await pool.open()
                try:
                    return (await session.run(code, rollback=False)).stdout
                finally:
                    await session.close()

            ways: dict[str, list[AsyncCall]] = {
                "in_place": [lambda c, s=s: in_session(s, c, rollback=False) for s in sessions],
                "snapshot": [lambda c, s=s: in_session(s, c, rollback=True) for s in sessions],
                "stateless": [lambda c: _stdout(pool.run(c))] * NUM_CALLERS,
                "fresh": [fresh] * NUM_CALLERS,
            }
            for name, calls in ways.items():
                row = Row(name, cell, note=NOTES[name])

                async def timed(call: AsyncCall, code: str = code, expected: str = expected) -> float:
                    start = time.perf_counter()
                    printed = await call(code)
                    took = time.perf_counter() - start
                    if printed != expected:
                        raise RuntimeError(f"printed {printed!r}")
                    return took

                await asyncio.gather(*(timed(call) for call in calls))
                _fill(row, [await timed(calls[0]) for _ in range(num_calls)])

                async def many(call: AsyncCall, timed: Callable[[AsyncCall], Awaitable[float]] = timed) -> None:
                    for _ in range(num_calls):
                        await timed(call)

                start = time.perf_counter()
                await asyncio.gather(*(many(call) for call in calls))
                row.per_s = round(len(calls) * num_calls / (time.perf_counter() - start), 1)
                rows.append(row)
            await asyncio.gather(*(session.close() for session in sessions))
    return rows


async def snapshot_over_bwrap(cell: str, num_rounds: int, num_calls: int) -> float | None:
    """How many times as many calls a second snapshot turns are as `bwrap`: the median of rounds that take turns.

    num_calls: of bwrap in a round; ours are ten times as many. None where bwrap is not installed.
    """
    code, expected = CELLS[cell]
    try:
        with bwrap() as call:
            async with SandboxPool(profile=PROFILES[cell], max_concurrent=NUM_CALLERS) as pool:
                sessions = [await pool.open() for _ in range(NUM_CALLERS)]

                def theirs() -> list[str]:
                    with ThreadPoolExecutor(NUM_CALLERS) as callers:
                        return list(callers.map(call, [code] * num_calls))

                async def turns(session: SandboxSession) -> list[str]:
                    return [(await session.run(code)).stdout for _ in range(10 * num_calls // NUM_CALLERS)]

                ratios = []
                for _ in range(num_rounds):
                    start = time.perf_counter()
                    printed = theirs()
                    between = time.perf_counter()
                    lists = await asyncio.gather(*map(turns, sessions))
                    end = time.perf_counter()
                    ours = [output for outputs in lists for output in outputs]
                    if {*printed, *ours} != {expected}:
                        raise RuntimeError(f"printed { ({*printed, *ours} - {expected})!r}")
                    ratios.append((len(ours) / (end - between)) / (len(printed) / (between - start)))
                return statistics.median(ratios)
    except ImportError:
        return None


NOTES = {
    "in_place": "full isolation; a failing cell costs the variables",
    "snapshot": "full isolation; a failing cell is rolled back",
    "stateless": "full isolation; a used jail, a fresh process, no files",
    "fresh": "full isolation; a fresh jail and its end",
}


async def _stdout(call: Awaitable[Any]) -> str:
    return str((await call).stdout)
