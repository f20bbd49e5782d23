"""What of its wall time a cell is charged for: not the CPUs that others have, nor tools, but neither without end."""

import asyncio
import os
import subprocess
import sys

import pytest

from gtpo.sandbox import CellStatus, SandboxLimits, SandboxPool, fork_server
from gtpo.sandbox.code_tools import CodeTools
from gtpo.sandbox.descendants import ProcessTree
from gtpo.sandbox.wall_clock import WallClock
from tests.sandbox.conftest import children, eventually, is_alive, only_jail, soon


class Clock(WallClock):
    """Of a cell that started at 0 and has a second; `run_delay_s` is what the interpreter has waited for a CPU."""

    def __init__(self, run_delay_s: float, *, run_delay_start: float | None = 0.0) -> None:
        super().__init__(SandboxLimits(wall_time_s=1.0, tool_time_s=2.0), lambda: self.run_delay_s, now=0.0)
        self.run_delay_s = run_delay_start
        if run_delay_start is not None:
            self.watch_run_delay()
        self.run_delay_s = run_delay_s


@pytest.mark.parametrize(
    ("run_delay_s", "run_delay_start", "end"),
    [
        (0.0, 0.0, 1.0),
        (0.5, 0.0, 1.5),
        # before it was first asked, maybe in another cell
        (7.5, 7.0, 1.5),
        (7.5, None, 1.0),
        # no more than `max_wall_time_s`
        (99.0, 0.0, 10.0),
    ],
)
def test_waiting_for_a_cpu_is_not_the_cells_up_to_a_bound(run_delay_s, run_delay_start, end):
    clock = Clock(run_delay_s, run_delay_start=run_delay_start)
    if end > 1.0:
        clock.extend(1.0)
    assert clock.left_s(1.0) == end - 1.0
    with pytest.raises(TimeoutError, match="wall time limit of 1 s exceeded"):
        clock.extend(end)


def test_a_starving_cell_is_not_looked_at_all_the_time():
    clock = Clock(0.0)
    for now in (1.0, 2.0, 3.0):
        clock.run_delay_s = now - 0.999
        clock.extend(now)
        assert clock.left_s(now) == pytest.approx(0.05)


def test_tools_have_a_clock_of_their_own():
    clock = Clock(0.0)
    clock.begin_call(4.0)
    clock.end_call(4.5)
    assert clock.start == 0.5
    clock.begin_call(5.0)
    assert clock.left_s(6.0) == 0.5
    clock.extend(6.0)
    with pytest.raises(TimeoutError, match="time limit of 2 s for tools exceeded"):
        clock.extend(6.5)


@pytest.mark.parametrize("jail", ["namespaces", "none"])
def test_a_cell_that_waits_for_a_cpu_goes_on(monkeypatch, jail):
    """Its interpreter is told to have waited for nine tenths of the time."""
    hook = """
import time
from gtpo.sandbox import contract, descendants
descendants.ProcessTree.run_delay_s = lambda self, pid: 0.9 * time.monotonic()
contract.SandboxLimits.max_wall_time_s = property(lambda self: 60.0)
from gtpo.sandbox import zygote"""
    bootstrap = fork_server._BOOTSTRAP.replace("from gtpo.sandbox import zygote", hook)
    monkeypatch.setattr(fork_server, "_BOOTSTRAP", bootstrap)
    only_jail(monkeypatch, jail)

    async def run():
        async with SandboxPool(SandboxLimits(cpu_time_s=5.0, wall_time_s=0.2), min_tier="landlock") as pool:
            return await pool.run("import time\ntime.sleep(0.5)")

    assert asyncio.run(run()).status is CellStatus.OK


def test_the_kernel_says_how_long_a_process_waited_for_a_cpu():
    """Two processes that never sleep, on one CPU: each waits for the other."""
    cpu = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    busy = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(2)]
    try:
        assert all(eventually(lambda pid=one.pid: ProcessTree(proc_fd).run_delay_s(pid) > 0.02) for one in busy)
        # no process has this id, which is above what the kernel gives
        assert ProcessTree(proc_fd).run_delay_s(2**22 + 1) == 0.0
    finally:
        for one in busy:
            one.kill()
            one.wait()
        os.close(proc_fd)


def test_a_cell_cannot_hide_for_ever_behind_calls_of_tools():
    code = """
import threading, time
threading.Thread(target=look).start()
time.sleep(60)
"""

    async def run():
        async with soon(), SandboxPool(SandboxLimits(tool_time_s=0.3, wall_time_s=60.0)) as pool:
            session = await pool.open("x = 1")
            (zygote,) = children(pool._server.process.pid)
            keeper = max(pid for pid in children(zygote) if is_alive(pid))
            (interpreter,) = children(keeper)

            async def call(*_):
                while is_alive(interpreter):
                    await asyncio.sleep(0.01)
                return True, "late"

            hidden = await session.run(code, tools=CodeTools({"look": ()}, call))
            return hidden, (await session.run("print(x)")).stdout

    hidden, after = asyncio.run(run())
    assert (hidden.status, hidden.error) == (CellStatus.TIMEOUT, "time limit of 0.3 s for tools exceeded")
    assert after == "1\n"


def test_the_time_of_calls_adds_up():
    async def run():
        async with soon(), SandboxPool(SandboxLimits(tool_time_s=0.3, wall_time_s=60.0)) as pool:
            session = await pool.open()

            async def call(*_):
                await asyncio.sleep(0.02)
                return True, "soon"

            return await session.run("while True: look()", tools=CodeTools({"look": ()}, call))

    assert asyncio.run(run()).error == "time limit of 0.3 s for tools exceeded"
