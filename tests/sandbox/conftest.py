"""One started pool per tier, driven from plain synchronous tests."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gtpo.sandbox import CellResult, SandboxLimits, SandboxPool, SandboxUnavailable, fork_server
from gtpo.sandbox.code_tools import CodeTools

T = TypeVar("T")
LIMITS = SandboxLimits(cpu_time_s=0.3, wall_time_s=5.0, memory_bytes=256 * 2**20, file_bytes=2**20, max_processes=8)


class Cage:
    """A pool and the event loop that it lives in."""

    def __init__(self, runner: asyncio.Runner, started: SandboxPool) -> None:
        self.runner, self.pool = runner, started

    def do(self, awaitable: Awaitable[T]) -> T:
        async def wait() -> T:
            return await awaitable

        return self.runner.run(wait())

    def cells(self, *cells: str, setup: str = "") -> list[CellResult]:
        """The results of `cells`, run one after the other in a session of their own."""

        async def run_all() -> list[CellResult]:
            session = await self.pool.open(setup)
            try:
                return [await session.run(cell) for cell in cells]
            finally:
                await session.close()

        return self.runner.run(run_all())


class Place:
    """A tool by which a cell, calling `here()`, says how far it is; it goes on when `leave` is set."""

    def __init__(self) -> None:
        self.reached, self.leave = asyncio.Event(), asyncio.Event()
        self.tools = CodeTools({"here": ()}, self._call)

    async def _call(self, *_: object) -> tuple[bool, str]:
        self.reached.set()
        await self.leave.wait()
        return True, ""


@contextlib.asynccontextmanager
async def soon() -> AsyncIterator[None]:
    """What would hang fails instead."""
    async with asyncio.timeout(60):
        yield


TIERS = {"bubblewrap": "namespaces", "namespaces": "namespaces", "none": "landlock"}


def only_jail(patch: pytest.MonkeyPatch, jail: str) -> None:
    """Make all but one way to build the outer jail fail, as they do where namespaces are forbidden."""
    launch = fork_server.launch

    async def launch_or_refuse(limits: SandboxLimits, profile: str, *, jail: str, **options: Any) -> Any:
        if jail != wanted:
            raise SandboxUnavailable("unshare(0x6c000000): Operation not permitted")
        return await launch(limits, profile, jail=jail, **options)

    wanted = jail
    patch.setattr(fork_server, "launch", launch_or_refuse)


def without_namespaces(patch: pytest.MonkeyPatch) -> None:
    """Make the fork server fail as it does where namespaces are forbidden."""
    only_jail(patch, "none")


@pytest.fixture(scope="session", params=["namespaces", "landlock"])
def cage(request: pytest.FixtureRequest) -> Iterator[Cage]:
    """A pool at each of the two tiers that isolate; this machine must reach the tier."""
    with asyncio.Runner() as runner:
        started = SandboxPool(LIMITS, min_tier=request.param, max_concurrent=4)
        with pytest.MonkeyPatch.context() as patch:
            if request.param == "landlock":
                without_namespaces(patch)
            runner.run(started.start())
        yield Cage(runner, started)
        runner.run(started.close())


def process_states(root: int) -> dict[int, str]:
    """Process id -> state letter, of `root` and all its descendants."""
    parents: dict[int, int] = {}
    states: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            states[int(entry.name)], parents[int(entry.name)] = fields[0], int(fields[1])
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return {pid: states[pid] for pid in family if pid in states}


def children(pid: int) -> list[int]:
    """Its child processes, in the order in which it has started them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true before the machine could be called hung."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
