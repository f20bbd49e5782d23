"""`make bench-sandbox`: what a call costs in our sandbox and beside it, and what faults and hostile neighbours cost.

Every contestant runs the same two cells and must print the same. Latencies are of one caller, calls per second of four
callers on the CPUs that are there. Ours have the profile that the cell needs: "plain" and "math".
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gtpo.sandbox import CellStatus, SandboxLimits, SandboxPool, SandboxSession, fork_server

RESULTS = Path(__file__).parent / "results"
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
MIB = 2**20


@dataclass
class Row:
    """One contestant and cell. Without figures, `note` says why."""

    name: str
    cell: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    per_s: float | None = None
    note: str = ""


@dataclass
class Fault:
    """One line of the second table: what was done, and what it cost."""

    name: str
    figure: str
    passed: bool | None


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


NOTES = {
    "in_place": "full isolation; a failing cell costs the variables",
    "snapshot": "full isolation; a failing cell is rolled back",
    "stateless": "full isolation; a used jail, a fresh process, no files",
    "fresh": "full isolation; a fresh jail and its end",
}


async def _stdout(call: Awaitable[Any]) -> str:
    return str((await call).stdout)


# Faults, each in a pool of its own beside sessions that must not notice.


class Good:
    """Sessions that count; `lost()` says how many no longer know their number."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool
        self.sessions: list[SandboxSession] = []
        self.turns = 0

    async def open(self, count: int) -> None:
        self.sessions = [await self.pool.open(f"n = {i}") for i in range(count)]

    async def turn(self) -> float:
        """One turn of all; the longest, in seconds."""

        async def one(session: SandboxSession) -> float:
            start = time.perf_counter()
            await session.run("n += 1000")
            return time.perf_counter() - start

        self.turns += 1
        return max(await asyncio.gather(*(one(session) for session in self.sessions)))

    async def lost(self) -> int:
        results = await asyncio.gather(*(session.run("print(n)") for session in self.sessions))
        return sum(r.stdout != f"{i + 1000 * self.turns}\n" for i, r in enumerate(results))


async def killed(victim: str, num_good: int) -> Fault:
    """SIGKILL for a process of the sandbox while cells run."""
    async with SandboxPool() as pool:
        good = Good(pool)
        await good.open(num_good)
        await good.turn()
        assert pool._server is not None
        family = sorted(_family(pool._server.process.pid))
        turn = asyncio.ensure_future(good.turn())
        await asyncio.sleep(0.002)
        os.kill(family[("launcher", "zygote", "keeper").index(victim)], signal.SIGKILL)
        took, lost = await turn, await good.lost()
        faults, restarts = (pool.metrics()[f"sandbox/{name}"] for name in ("faults", "restarts"))
        figure = f"{lost} of {num_good} sessions lost; {faults:.0f} rebuilt, {restarts:.0f} restart; {took:.2f} s"
        return Fault(f"{victim} killed", figure, lost == 0)


async def hostile_cell(name: str, code: str, num_good: int) -> Fault:
    """One session does its worst; its own variables are as before, the others do not notice."""
    async with SandboxPool(SandboxLimits(cpu_time_s=0.5, wall_time_s=5.0)) as pool:
        good = Good(pool)
        await good.open(num_good)
        bad = await pool.open("kept = 41")
        result, _ = await asyncio.gather(bad.run(code), good.turn())
        after, lost = await bad.run("print(kept)"), await good.lost()
        own = "kept its variables" if after.stdout == "41\n" else "lost its variables"
        figure = f"{lost} of {num_good} sessions lost; the cell: {result.status.value}, its session {own}"
        return Fault(name, figure, lost == 0 and after.stdout == "41\n")


async def jumping_clock(num_good: int) -> Fault:
    """time.time goes an hour back or forth at every call, here and in the fork server."""
    jump = "import itertools, time\nhours = itertools.cycle([3600.0, -3600.0])\nreal = time.time\n"
    jump += "time.time = lambda: real() + next(hours)\n"
    bootstrap, real = fork_server._BOOTSTRAP, time.time
    fork_server._BOOTSTRAP = jump + bootstrap
    try:
        exec(jump, {})
        async with SandboxPool(SandboxLimits(cpu_time_s=0.5)) as pool:
            good = Good(pool)
            await good.open(num_good)
            await good.turn()
            slow = await (await pool.open()).run("while True: pass")
            lost = await good.lost()
    finally:
        fork_server._BOOTSTRAP, time.time = bootstrap, real
    figure = f"{lost} of {num_good} sessions lost; a limit of 0.5 s ended a cell after {slow.cpu_time_s:.2f} s"
    return Fault("wall clock jumps", figure, lost == 0 and slow.status is CellStatus.TIMEOUT)


HOSTILE = (
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = []\nwhile True: x.append(bytearray(2**22))",
    "while True: print('x' * 1000)",
    "import os\nos.kill(-1, 9)",
    "i = 0\nwhile True:\n    open(str(i), 'w').write('x' * 4096)\n    i += 1",
    "import os\nos.write(3, b'x' * 99)\nwhile True: pass",
)


async def hostile_neighbours(num_hostile: int, num_good: int, num_turns: int) -> Fault:
    """Many hostile sessions beside good ones, all through one pool."""
    async with SandboxPool(SandboxLimits(cpu_time_s=0.2, wall_time_s=5.0, memory_bytes=128 * MIB)) as pool:
        good = Good(pool)
        await good.open(num_good)
        bad = [await pool.open() for _ in range(num_hostile)]

        async def attack(number: int, session: SandboxSession) -> int:
            result = await session.run(HOSTILE[number % len(HOSTILE)])
            return result.status is CellStatus.INFRA_ERROR

        attacks = asyncio.gather(*(attack(number, session) for number, session in enumerate(bad)))
        longest = max([await good.turn() for _ in range(num_turns)])
        broken = sum(await attacks)
        lost = await good.lost()
        figure = f"{lost} of {num_good} sessions lost over {num_turns} turns; longest wait {longest:.1f} s in the queue"
        return Fault(f"{num_hostile} hostile sessions", figure, lost == 0 and broken == 0)


async def live_sessions(count: int) -> Fault:
    """Many sessions at once: memory of each, and whether all states are right."""
    async with SandboxPool(max_sessions=count) as pool:
        assert pool._server is not None
        before = _memory_bytes(pool._server.process.pid)
        good = Good(pool)
        await good.open(count)
        for _ in range(2):
            await good.turn()
        each_mb = (_memory_bytes(pool._server.process.pid) - before) / count / 1e6
        lost = await good.lost()
        return Fault(
            f"{count} live sessions", f"{each_mb:.1f} MB each (PSS), {lost} wrong states", lost == 0 and each_mb <= 6
        )


async def overshoot() -> Fault:
    """How late a cell is ended: of its CPU time, and of its wall time."""
    async with SandboxPool(SandboxLimits(cpu_time_s=0.5, wall_time_s=1.0)) as pool:
        session = await pool.open()
        late = []
        for _ in range(3):
            late.append((await session.run("while True: pass")).cpu_time_s - 0.5)
            late.append((await session.run("import time\ntime.sleep(9)")).wall_time_s - 1.0)
        return Fault("time-out overshoot", f"at most {max(late) * 1e3:.0f} ms over the limit", max(late) <= 0.3)


TRAINER = """
import asyncio
from gtpo.sandbox import SandboxPool
async def main():
    pool = SandboxPool(max_concurrent=8)
    await pool.start()
    sessions = [await pool.open() for _ in range(8)]
    print(pool._server.process.pid, flush=True)
    bomb = "import os\\nwhile True:\\n    try: os.fork()\\n    except OSError: pass"
    await asyncio.gather(*(session.run(bomb) for session in sessions))
asyncio.run(main())
"""


def survivors_of_sigkill() -> Fault:
    """The trainer is killed while fork bombs run; what is left a second later."""
    with subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        launcher = int(trainer.stdout.readline())
        time.sleep(0.3)
        family = _family(launcher)
        trainer.kill()
    time.sleep(1.0)
    left = [pid for pid in family if _alive(pid)]
    return Fault("trainer killed by SIGKILL", f"{len(left)} of {len(family)} processes left after 1 s", not left)


async def survivors_of_close() -> Fault:
    """What a closed pool leaves."""
    async with SandboxPool() as pool:
        good = Good(pool)
        await good.open(16)
        await good.turn()
        assert pool._server is not None
        family, scratch = _family(pool._server.process.pid), pool._server.scratch
    left = [pid for pid in family if _alive(pid)]
    clean = not left and not os.path.exists(scratch)
    return Fault("pool closed", f"{len(left)} of {len(family)} processes left", clean)


async def soak(num_calls: int) -> Fault:
    """Calls of all kinds, some of them failing; what has grown since the first hundredth."""
    codes = [
        "n += 1",
        "x = [0] * 10_000",
        "open('f', 'w').write('x' * 1000)",
        "import os\nos._exit(1)",
        "1/0",
        "import os\nif os.fork() == 0: os._exit(0)",
        "import threading\nthreading.Thread(target=int).start()",
    ]
    async with SandboxPool() as pool:
        sessions: list[SandboxSession] = []

        async def some(first: int, last: int) -> None:
            for number in range(first, last):
                if number % 50 == 0:
                    await asyncio.gather(*(session.close() for session in sessions))
                    sessions[:] = [await pool.open("n = 0") for _ in range(NUM_CALLERS)]
                await asyncio.gather(
                    *(session.run(codes[(number + i) % len(codes)]) for i, session in enumerate(sessions)),
                    pool.run("print(1+1)"),
                )

        num_rounds = num_calls // (NUM_CALLERS + 1)
        warm = max(num_rounds // 100, 1) // 50 * 50 + 1
        await some(0, warm)
        before = _footprint(pool)
        await some(warm, num_rounds // 50 * 50 + 1)
        grown = {name: value - before[name] for name, value in _footprint(pool).items()}
    figure = ", ".join(f"{name} {value:+d}" for name, value in grown.items())
    allowed = {
        "kB of trainer": 20_000,
        "kB of zygote": 1000,
        "descriptors": 0,
        "processes": 4,
        "mounts": 0,
        "cgroups": 0,
    }
    return Fault(f"soak of {num_calls} calls", figure, all(grown[name] <= most for name, most in allowed.items()))


def _footprint(pool: SandboxPool) -> dict[str, int]:
    assert pool._server is not None
    zygote = sorted(_family(pool._server.process.pid))[1]
    return {
        "kB of trainer": _resident_kb(os.getpid()),
        "kB of zygote": _resident_kb(zygote),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": sum(_alive(pid) for pid in _family(pool._server.process.pid)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": sum(int(line.split()[2]) for line in Path("/proc/cgroups").read_text().splitlines()[1:]),
    }


def _resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def _family(root: int) -> list[int]:
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _memory_bytes(root: int) -> int:
    total = 0
    for pid in _family(root):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    return total


async def faults(*, smoke: bool, soak_calls: int) -> list[Fault]:
    num_good = 4 if smoke else 50
    fill = "with open('f', 'wb') as f:\n    while True: f.write(b'x' * 2**16)"
    threads = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()"
    found = [await killed(victim, num_good) for victim in ("launcher", "zygote", "keeper")]
    found.append(await hostile_cell("disk full", fill, num_good))
    found.append(await hostile_cell("process limit reached", threads, num_good))
    found.append(await jumping_clock(num_good))
    found.append(await hostile_neighbours(6 if smoke else 200, num_good, 2 if smoke else 20))
    found.append(await live_sessions(8 if smoke else 512))
    found.append(await overshoot())
    found.append(await survivors_of_close())
    found.append(survivors_of_sigkill())
    if soak_calls:
        found.append(await soak(soak_calls))
    return found


def gates(rows: list[Row]) -> list[Fault]:
    """What was aimed at, of the table of calls."""
    at = {(row.name, row.cell): row for row in rows}

    def latency(name: str, most_ms: float) -> Fault:
        figure = at[name, "print"].p50_ms
        return Fault(f"{name}, print: p50", f"{figure} ms, at most {most_ms}", figure is not None and figure <= most_ms)

    def rate(name: str, least: float) -> Fault:
        figure = at[name, "print"].per_s
        return Fault(f"{name}, print: calls/s", f"{figure}, at least {least}", figure is not None and figure >= least)

    def faster(cell: str, least: float) -> Fault:
        ours, theirs = at["snapshot", cell].per_s, at["bwrap", cell].per_s
        ratio = ours / theirs if ours and theirs else None
        figure = "bwrap is absent" if ratio is None else f"{ratio:.1f} x bwrap + python, at least {least}"
        return Fault(f"snapshot, {cell}: calls/s", figure, ratio is not None and ratio >= least)

    return [
        latency("in_place", 0.6),
        latency("snapshot", 5.0),
        latency("stateless", 9.0),
        rate("snapshot", 400),
        rate("stateless", 300),
        faster("print", 10),
        faster("numpy_sympy", 40),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that it runs")
    parser.add_argument("--soak", type=int, default=0, metavar="CALLS", help="also a soak of so many calls")
    parser.add_argument(
        "--results", type=Path, help="where to write (default: benchmarks/results; with --smoke nowhere)"
    )
    options = parser.parse_args(arguments)
    rows = []
    for context, note, num_callers in OTHERS:
        for cell in CELLS:
            slow = context in (cold, bwrap)
            num_calls = 1 if options.smoke else (100 if cell == "print" else 20) if slow else 300
            rows.append(measure_other(context, note, num_callers, cell, num_calls))
            _show(asdict(rows[-1]))
    rows += asyncio.run(measure_ours(5 if options.smoke else 400))
    for row in rows[len(OTHERS) * len(CELLS) :]:
        _show(asdict(row))
    found = gates(rows) + asyncio.run(faults(smoke=options.smoke, soak_calls=options.soak))
    print()
    for fault in found:
        print(f"{'PASS' if fault.passed else 'FAIL'}  {fault.name:<32} {fault.figure}")
    folder = options.results or (None if options.smoke else RESULTS)
    if folder is not None:
        machine = f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}"
        about = {"machine": machine, "cpus": os.cpu_count(), "uid": os.getuid(), "smoke": options.smoke}
        folder.mkdir(exist_ok=True)
        (folder / "bench-sandbox.json").write_text(json.dumps([asdict(row) | about for row in rows], indent=1) + "\n")
        text = json.dumps([asdict(fault) | about for fault in found], indent=1)
        (folder / "bench-sandbox-faults.json").write_text(text + "\n")
    return 0 if options.smoke or all(fault.passed for fault in found) else 1


def _show(row: dict[str, Any]) -> None:
    figures = "".join(f"{row[key] if row[key] is not None else '-':>10}" for key in ("p50_ms", "p99_ms", "per_s"))
    print(f"{row['name']:<12} {row['cell']:<12} {figures}   {row['note']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
