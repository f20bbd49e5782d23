"""The pool: starts the fork server, tests its protections, hands out sessions. Works inside one event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping
from types import TracebackType

from gtpo.sandbox import fork_server, selftest
from gtpo.sandbox.contract import (
    CellResult,
    CellStatus,
    SandboxLimits,
    SandboxReport,
    SandboxTier,
    SandboxUnavailable,
)
from gtpo.sandbox.profiles import check_profile
from gtpo.sandbox.session import SandboxSession, end_stream
from gtpo.sandbox.slot import Slot, Slots
from gtpo.sandbox.work import Work

_log = logging.getLogger(__name__)
_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class SandboxPool:
    """Runs untrusted Python in isolated, stateful sessions; `docs/sandbox.md` says what is covered and what is not.

    min_tier: "namespaces" or "landlock", the least isolation to accept; below it `start()` raises SandboxUnavailable.
    unsafe_no_isolation: accept none at all, for code that you would run by hand; says so loudly.
    profile: the libraries that cells can import ("plain", "math", "data").
    snapshots: clone the interpreter before each cell.  Without, a session whose cell failed is built up anew by running
        its earlier cells again, as it is where there can be no snapshots.
    max_concurrent: cells that run at once (default: the CPUs that we may use), not counting those that wait, such as
        in a sleep or for a tool, of which there may be 15 times as many; waiting for a turn counts for neither limit.
    max_sessions: sessions that are open at once; `open()` waits for one to be closed.
    num_prewarmed: processes that wait for `open()`.
    total_memory_bytes: of all sessions together, by a cgroup; SandboxUnavailable where none can be made.
    Everything must happen inside one event loop; `gtpo.sandbox.blocking` is for code that has none.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        min_tier: str = "namespaces",
        unsafe_no_isolation: bool = False,
        profile: str = "plain",
        snapshots: bool = True,
        max_concurrent: int | None = None,
        max_sessions: int = 1024,
        total_memory_bytes: int | None = None,
        num_prewarmed: int = 0,
    ) -> None:
        for name, value, least in (
            ("max_concurrent", max_concurrent, 1),
            ("max_sessions", max_sessions, 1),
            ("num_prewarmed", num_prewarmed, 0),
            ("total_memory_bytes", total_memory_bytes, 2**26),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.limits = limits or SandboxLimits()
        self.profile = check_profile(profile)
        self.snapshots = snapshots
        self._min_tier = SandboxTier.NONE if unsafe_no_isolation else SandboxTier.parse(min_tier)
        if self._min_tier < SandboxTier.LANDLOCK and not unsafe_no_isolation:
            raise ValueError(f"min_tier {min_tier!r} is no isolation: it takes unsafe_no_isolation=True")
        self._num_slots = max_concurrent or _num_cpus()
        self._max_sessions = max_sessions
        self._num_prewarmed = num_prewarmed
        self._total_memory_bytes = total_memory_bytes
        self._num_waiting = 0
        self._work = Work("pool", ready=False)
        self._server: fork_server.ForkServer | None = None
        self._restart: asyncio.Task[None] | None = None
        self._jail = fork_server.JAILS[0]
        self._report: SandboxReport | None = None
        self._sessions: set[SandboxSession] = set()
        self._idle: list[SandboxSession] = []
        self._warm: collections.deque[_Stream] = collections.deque()
        self._warming: asyncio.Task[None] | None = None
        self._statuses: collections.Counter[CellStatus] = collections.Counter()
        self._queue_time_s = self._cpu_time_s = self._wall_time_s = self._rebuild_cpu_time_s = 0.0
        self._num_faults = self._num_restarts = self._num_opened = 0

    @property
    def report(self) -> SandboxReport:
        """What the self test at start found."""
        if self._report is None:
            raise RuntimeError("the sandbox pool is not started")
        return self._report

    @property
    def tier(self) -> SandboxTier:
        """The isolation that the self test found."""
        return self.report.tier

    def metrics(self) -> dict[str, float]:
        """Counts and seconds since the start, and the tier as a number (0 none, 3 namespaces)."""
        return {
            "sandbox/tier": float(self.tier),
            "sandbox/sessions_opened": float(self._num_opened),
            "sandbox/sessions_open": float(len(self._sessions)),
            "sandbox/faults": float(self._num_faults),
            "sandbox/restarts": float(self._num_restarts),
            "sandbox/queue_time_s": self._queue_time_s,
            "sandbox/cpu_time_s": self._cpu_time_s,
            "sandbox/wall_time_s": self._wall_time_s,
            "sandbox/rebuild_cpu_time_s": self._rebuild_cpu_time_s,
        } | {f"sandbox/cells_{status.value}": float(self._statuses[status]) for status in CellStatus}

    async def __aenter__(self) -> SandboxPool:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the fork server and test its protections; SandboxUnavailable when they are below `min_tier`."""
        if self._work.open:
            raise RuntimeError("the sandbox pool is already started")
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable(f"running model-written code needs Linux, this is {sys.platform}")
        self._work.open = True
        # Of this event loop, which need not be that of the start before.
        self._slots = Slots(self._num_slots)
        self._places = asyncio.Semaphore(self._max_sessions)
        try:
            missing: dict[str, str] = {}
            for self._jail in fork_server.JAILS:
                try:
                    self._report = await self._launch_and_probe(missing)
                    break
                except SandboxUnavailable as failure:
                    if self._jail == fork_server.JAILS[-1]:
                        raise
                    await self._end()
                    missing[self._jail] = str(failure)
            assert self._report is not None
            if self._report.tier < self._min_tier:
                raise SandboxUnavailable(selftest.refusal(self._report, self._min_tier))
        except BaseException:
            await self.close()
            raise
        if self._report.tier < SandboxTier.LANDLOCK:
            _log.warning(selftest.BANNER, self._report.tier.name.lower())
        self._warm_up()

    async def _launch_and_probe(self, missing: dict[str, str]) -> SandboxReport:
        self._server = await self._launch()
        return await selftest.probe(self, missing | self._server.missing)

    async def _launch(self) -> fork_server.ForkServer:
        return await fork_server.launch(
            self.limits, self.profile, jail=self._jail, total_memory_bytes=self._total_memory_bytes
        )

    async def close(self) -> None:
        """Close every session and end the fork server; nothing is left running. Closing twice is harmless.

        What runs is cancelled, and its callers get a RuntimeError.
        """
        try:
            await self._work.close()
        finally:
            await self._end()

    async def _end(self) -> None:
        """Close every session and end the fork server."""
        warming, self._warming = self._warming, None
        if warming is not None:
            warming.cancel()
        warm, self._warm = self._warm, collections.deque()
        sessions = [session.close() for session in self._sessions]
        self._idle.clear()
        try:
            await asyncio.gather(
                *filter(None, [warming, self._restart]),
                *sessions,
                *(end_stream(*stream) for stream in warm),
                return_exceptions=True,
            )
        finally:
            self._report = None
            server, self._server = self._server, None
            if server is not None:
                await server.stop()

    async def open(self, setup_code: str = "") -> SandboxSession:
        """A new session whose variables are those that `setup_code` (trusted) leaves.

        Waits while `max_sessions` are open.  Raises RuntimeError when the setup code fails and SandboxUnavailable
        when no session can be started.
        """
        return await self._work.do(self._open(setup_code))

    async def _open(self, setup_code: str = "") -> SandboxSession:
        if self._places.locked() and self._idle:
            await self._idle.pop().close()
        self._num_waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        session = SandboxSession(self, setup_code)
        self._sessions.add(session)
        try:
            await session._open()
        except BaseException:
            await session.close()
            raise
        self._num_opened += 1
        return session

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        files: Mapping[str, bytes] | None = None,
        with_stderr: bool = True,
        with_digest: bool = False,
    ) -> CellResult:
        """Run `code` once, in a process that has run no other code, beside nothing but `files`.

        The jail is used again for later calls, without the process and the files.  Unless `with_stderr`, what it writes
        to stderr is thrown away.  `with_digest` has the result say what all of its output was, however long.
        """
        return await self._work.do(
            self._run(code, stdin, files or {}, with_stderr=with_stderr, with_digest=with_digest)
        )

    async def _run(
        self, code: str, stdin: str, files: Mapping[str, bytes], *, with_stderr: bool, with_digest: bool
    ) -> CellResult:
        session = self._idle.pop() if self._idle else await self._open()
        try:
            for name, data in files.items():
                await session.put(name, data)
            result = await session._run(
                code, stdin, rollback=True, discard=True, with_stderr=with_stderr, with_digest=with_digest
            )
            session._forget()
        except BaseException:
            await session.close()
            raise
        if len(self._idle) < self._num_slots and not self._num_waiting:
            self._idle.append(session)
        else:
            await session.close()
        return result

    def _slot(self) -> Slot:
        return Slot(self._slots, self._count_queue_time)

    def _count_queue_time(self, seconds: float) -> None:
        self._queue_time_s += seconds

    def _count(self, result: CellResult) -> None:
        self._statuses[result.status] += 1
        self._cpu_time_s += result.cpu_time_s
        self._wall_time_s += result.wall_time_s
        self._rebuild_cpu_time_s += result.rebuild_cpu_time_s

    def _release(self, session: SandboxSession) -> None:
        if session in self._sessions:
            self._sessions.remove(session)
            self._places.release()

    async def _spawn(self, *, in_reserve: bool) -> _Stream:
        """A stream to the keeper of a new session: one that waits `in_reserve`, or a new one."""
        stream = self._warm.popleft() if in_reserve and self._warm else await self._fork()
        self._warm_up()
        return stream

    def _warm_up(self) -> None:
        missing = self._work.open and self._report is not None and len(self._warm) < self._num_prewarmed
        if missing and (self._warming is None or self._warming.done()):
            self._warming = asyncio.ensure_future(self._fill())

    async def _fill(self) -> None:
        with contextlib.suppress(SandboxUnavailable):
            while len(self._warm) < self._num_prewarmed:
                self._warm.append(await self._fork())

    async def _fork(self) -> _Stream:
        """Have the fork server start a session's keeper; starts a new server when it died."""
        for attempt in range(2):
            if self._server is None:
                await self._replace(None)
            server = self._server
            assert server is not None
            try:
                ours, theirs = socket.socketpair()
            except OSError as failure:
                raise SandboxUnavailable(
                    f"no session can be started: {failure}. Each open session takes a descriptor: lower max_sessions, "
                    "or raise the limit (ulimit -n)"
                ) from failure
            with theirs:
                try:
                    await server.spawn(theirs, ours=ours)
                    return await asyncio.open_unix_connection(sock=ours)
                except ConnectionError as failure:
                    ours.close()
                    if attempt:
                        raise SandboxUnavailable(f"the fork server died twice: {failure}") from failure
                except BaseException:
                    ours.close()
                    raise
            await self._replace(server)
        raise AssertionError("unreachable")

    async def _replace(self, dead: fork_server.ForkServer | None) -> None:
        """Have a new fork server in the place of `dead`, or of none."""
        if self._restart is None and self._server is dead:
            self._restart = asyncio.ensure_future(self._start_again())
        if self._restart is not None:
            # One who stops waiting does not stop it for the others, nor leaves the pool without a server.
            await asyncio.shield(self._restart)

    async def _start_again(self) -> None:
        try:
            dead, self._server = self._server, None
            if dead is not None:
                await dead.stop()
            # The keepers that were ready died with it.
            while self._warm:
                await end_stream(*self._warm.popleft())
            self._num_restarts += 1
            self._server = await self._launch()
        finally:
            self._restart = None


def _num_cpus() -> int:
    """Those that this process may use: fewer than there are where it is bound to some."""
    return len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
