"""Snapshots that a cell wakes or kills: what is said of its session, what is counted, what its neighbours notice."""

import asyncio
from dataclasses import replace

import pytest

from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SandboxPool, SessionState, abuse, cgroup
from gtpo.sandbox import session as session_module
from gtpo.sandbox.abuse.attempts import ATTEMPTS, snapshots
from tests.sandbox.conftest import LIMITS, only_jail, without_namespaces

CHANGE, CHANGED = next(
    (attempt.plant, attempt.code)
    for attempt in snapshots.ATTEMPTS
    if attempt.name == "woken_snapshot_changes_a_variable"
)
WAKE_OFTEN = "for _ in range(20): wake(woken); time.sleep(0.01)\n"
# Ends the snapshot, where there is one, and then the interpreter.
CRASH = "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\nos._exit(1)"


class NoCgroup:
    """What the kernel gives where no cgroup can be made."""

    def __init__(self, *_: object) -> None:
        raise OSError("no memory controller is mounted")


@pytest.fixture(params=["bubblewrap", "namespaces"])
def jail(request, monkeypatch):
    only_jail(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("attempt", [a for a in ATTEMPTS if a.kind == "snapshots"], ids=lambda attempt: attempt.name)
def test_an_attempt_is_contained_where_only_the_keeper_counts(jail, monkeypatch, attempt):
    """Without a cgroup, whose limits of memory and account of CPU time would stand in for its looks."""
    monkeypatch.setattr(cgroup, "PoolCgroup", NoCgroup)
    # To touch so much memory takes more than those have.
    holds_memory = attempt.name == "woken_snapshot_holds_memory"
    limits = replace(abuse.LIMITS, cpu_time_s=5.0) if holds_memory else abuse.LIMITS

    async def run() -> abuse.Verdict:
        with abuse.prepared_host() as host:
            async with SandboxPool(limits) as pool:
                assert "cgroup" in pool.report.missing
                neighbour = await pool.open()
                await neighbour.run("kept = 'kept'")
                return await abuse.run_one(pool.open, attempt, host, neighbour)

    verdict = asyncio.run(run())
    assert verdict.faults == ()
    if attempt.name in ("woken_snapshot_burns_cpu", "woken_snapshot_forks_what_burns_cpu"):
        assert verdict.result.status is CellStatus.TIMEOUT
        assert verdict.result.cpu_time_s >= abuse.LIMITS.cpu_time_s
    if holds_memory:
        assert verdict.result.status is CellStatus.OUT_OF_MEMORY


def test_what_a_woken_snapshot_used_is_its_cells(jail, monkeypatch):
    """Also when it has stopped again, and nobody has looked."""
    monkeypatch.setattr(cgroup, "PoolCgroup", NoCgroup)
    plant = f"""
import os, time
{snapshots.TAMPER}
def burn(*_):
    while not os.path.exists('failing'): time.sleep(0.001)
    while time.process_time() < 0.1: pass
    open('done', 'w').close()
    return [1], [], []
tamper(_select=burn)
"""
    wait = "while not os.path.exists('done'): wake(woken); time.sleep(0.01)\nos.remove('done')\nos.remove('failing')"

    async def run() -> list[CellResult]:
        async with SandboxPool(SandboxLimits(cpu_time_s=1.0)) as pool, await pool.open() as session:
            await session.run(plant)
            wake = f"{snapshots._WAKE}{wait}"
            return [await session.run(wake), await session.run(f"{wake}\nos._exit(1)")]

    ended, crashed = asyncio.run(run())
    assert (ended.status, crashed.status) == (CellStatus.OK, CellStatus.CRASH), (ended, crashed)
    # All of it, or what it was at the last look.
    assert min(ended.cpu_time_s, crashed.cpu_time_s) >= 0.03
    assert ended.state is SessionState.KEPT


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_snapshot_that_was_woken_is_none(jail, repeatable):
    """The session is built up anew, or lost, and the result says which."""
    first = "y = 1" if repeatable else "import os\nprint(os.urandom(8))\ny = 1"

    async def run() -> tuple[CellResult, CellResult]:
        async with SandboxPool(LIMITS) as pool, await pool.open() as session:
            await session.run(first)
            await session.run(CHANGE)
            crashed = await session.run(f"{snapshots._WAKE}{WAKE_OFTEN}{CHANGED}")
            return crashed, await session.run("print(globals().get('x'), globals().get('y'))")

    crashed, after = asyncio.run(run())
    assert crashed.status is CellStatus.CRASH
    assert crashed.state is (SessionState.ROLLED_BACK if repeatable else SessionState.LOST)
    assert (crashed.rebuilt, after.stdout) == ((True, "kept 1\n") if repeatable else (False, "None None\n"))


def test_a_snapshot_that_was_left_alone_is_kept(jail):
    """Under a cell that lasts and under one that ends at once, with threads and without."""
    cells = [
        "x = 'kept'",
        "import os, time\ntime.sleep(0.2)\nos._exit(1)",
        "import os\nos._exit(1)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "import os\nos._exit(1)",
        "while True: pass",
        "print(x)",
    ]

    async def run() -> list[CellResult]:
        async with SandboxPool(LIMITS) as pool, await pool.open() as session:
            return [await session.run(cell) for cell in cells]

    results = asyncio.run(run())
    assert results[-1].stdout == "kept\n"
    assert not any(result.rebuilt for result in results)


@pytest.fixture(params=["namespaces", "landlock"])
def tier(request, monkeypatch):
    if request.param == "landlock":
        without_namespaces(monkeypatch)
    return request.param


BURN = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"


def test_a_session_that_is_built_up_anew_lets_others_run_and_says_what_it_took(tier):
    async def run() -> tuple[list[CellResult], list[int], float]:
        counts = []
        async with (
            SandboxPool(SandboxLimits(), min_tier=tier, max_concurrent=1) as pool,
            await pool.open() as session,
            await pool.open() as neighbour,
        ):
            for _ in range(6):
                assert (await session.run(BURN)).rebuild_cpu_time_s == 0.0
            crashes = []
            for _ in range(2):
                crash = asyncio.ensure_future(session.run(CRASH))
                counts.append(0)
                while not crash.done():
                    await neighbour.run("pass")
                    counts[-1] += 1
                crashes.append(await crash)
            return crashes, counts, pool.metrics()["sandbox/rebuild_cpu_time_s"]

    crashes, counts, in_all = asyncio.run(run())
    for crash in crashes:
        assert (crash.state, crash.rebuilt) == (SessionState.ROLLED_BACK, True)
        assert crash.rebuild_cpu_time_s >= 0.6 and crash.cpu_time_s < 0.6
    assert in_all == sum(crash.rebuild_cpu_time_s for crash in crashes)
    # Before the first cell that is run again, and after each of them.
    assert min(counts) >= 6


def test_all_replays_of_a_session_together_are_bounded(tier, monkeypatch):
    monkeypatch.setattr(session_module, "_MAX_REPLAY_CPU_S", 0.5)

    async def run() -> list[CellResult]:
        async with SandboxPool(SandboxLimits(), min_tier=tier) as pool, await pool.open() as session:
            await session.run(BURN)
            await session.run(BURN)
            crashes = [await session.run(CRASH) for _ in range(3)]
            await session.reset()
            await session.run("x = 1")
            return [*crashes, await session.run(CRASH)]

    first, second, third, anew = asyncio.run(run())
    assert (first.state, first.rebuilt) == (SessionState.ROLLED_BACK, True)
    assert (second.state, third.state) == (SessionState.LOST, SessionState.ROLLED_BACK) or (
        second.rebuild_cpu_time_s < 0.5 and third.state is SessionState.LOST
    )
    assert sum(crash.rebuild_cpu_time_s for crash in (first, second, third)) < 0.6
    assert (anew.state, anew.rebuilt) == (SessionState.ROLLED_BACK, True)
