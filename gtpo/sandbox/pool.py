"""The asyncio side: starts the fork server, opens sessions, runs cells. Works inside one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from gtpo.sandbox import frames, selftest
from gtpo.sandbox.contract import CellResult, CellStatus, SandboxLimits, SandboxReport, SandboxTier, SandboxUnavailable

# Stand-ins for the two packages, so that the fork server imports its own modules and not the trainer's.
_BOOTSTRAP = """
import sys, types
for name, path in (("gtpo", sys.argv[1]), ("gtpo.sandbox", sys.argv[2])):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
from gtpo.sandbox import zygote
zygote.main(sys.argv[3])
"""
# Not -I: it would ignore PYTHONHASHSEED. With an environment of our own, -P -s -S isolate as much.
_FLAGS = ("-P", "-s", "-S", "-B")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PATH": "/usr/bin:/bin"}
# An interpreter of a cluster's module system may find its own libraries only by it. Cells do not see it.
_PASSED_ON = ("LD_LIBRARY_PATH",)


@dataclass
class _ForkServer:
    process: subprocess.Popen[bytes]
    control: socket.socket
    scratch: str

    async def stop(self) -> None:
        self.control.close()
        try:
            await asyncio.to_thread(self.process.wait, 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        # The launcher removes it, unless it was killed.
        shutil.rmtree(self.scratch, ignore_errors=True)


async def _launch(limits: SandboxLimits, *, namespaces: bool) -> _ForkServer:
    """Start a fork server by a clean exec; SandboxUnavailable with the step that failed."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    scratch = tempfile.mkdtemp(prefix="gtpo-sandbox-")
    package = os.path.dirname(os.path.abspath(__file__))
    config = {"control_fd": theirs.fileno(), "scratch": scratch, "namespaces": namespaces, "limits": asdict(limits)}
    with tempfile.TemporaryFile() as log:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *_FLAGS, "-c", _BOOTSTRAP, os.path.dirname(package), package, json.dumps(config)],
                env=_ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        server = _ForkServer(process, ours, scratch)
        try:
            hello = await loop.sock_recv(ours, frames.MAX_FRAME_BYTES)
        except ConnectionError:
            hello = b""
        except BaseException:
            await server.stop()
            raise
        answer = json.loads(hello) if hello else {"failed": "the fork server died at its start"}
        if "failed" not in answer:
            return server
        await server.stop()
        log.seek(0)
        last_words = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxUnavailable(": ".join(filter(None, (answer["failed"], last_words))))


class SandboxPool:
    """Runs untrusted Python in isolated, stateful sessions; `docs/sandbox.md` says what is covered and what is not.

    `min_tier` ("none", "rlimits", "landlock" or "namespaces") is the least isolation to accept; below it `start()`
    raises SandboxUnavailable.  `max_concurrent` bounds the cells that run at once (default: the CPUs); waiting for a
    turn counts for neither time limit.  Everything must happen inside one event loop (`asyncio.Runner` keeps one).
    """

    def __init__(
        self, limits: SandboxLimits | None = None, *, min_tier: str = "landlock", max_concurrent: int | None = None
    ) -> None:
        if max_concurrent is not None and max_concurrent < 1:
            raise ValueError(f"max_concurrent must be at least 1, got {max_concurrent}")
        self.limits = limits or SandboxLimits()
        self._min_tier = SandboxTier.parse(min_tier)
        self._slots = asyncio.Semaphore(max_concurrent or os.cpu_count() or 1)
        self._starting = asyncio.Lock()
        self._server: _ForkServer | None = None
        self._namespaces = True
        self._report: SandboxReport | None = None
        self._sessions: set[SandboxSession] = set()

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

    async def __aenter__(self) -> SandboxPool:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the fork server and test its protections; SandboxUnavailable when they are below `min_tier`."""
        if self._report is not None:
            raise RuntimeError("the sandbox pool is already started")
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable(f"running model-written code needs Linux, this is {sys.platform}")
        try:
            try:
                self._report = await self._launch_and_probe(namespaces=True, missing={})
            except SandboxUnavailable as failure:
                await self.close()
                self._report = await self._launch_and_probe(namespaces=False, missing={"namespaces": str(failure)})
            if self._report.tier < self._min_tier:
                raise SandboxUnavailable(selftest.refusal(self._report, self._min_tier))
        except BaseException:
            await self.close()
            raise

    async def _launch_and_probe(self, *, namespaces: bool, missing: dict[str, str]) -> SandboxReport:
        self._namespaces = namespaces
        self._server = await _launch(self.limits, namespaces=namespaces)
        return await selftest.probe(self, missing)

    async def close(self) -> None:
        """Close every session and end the fork server; nothing is left running. Closing twice is harmless."""
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        self._report = None
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop()

    async def open(self, setup_code: str = "") -> SandboxSession:
        """A new session whose variables are those that `setup_code` (trusted) leaves.

        Raises RuntimeError when the setup code fails and SandboxUnavailable when no session can be started.
        """
        session = SandboxSession(self, setup_code)
        async with self._slots:
            await session._start()
        self._sessions.add(session)
        return session

    async def _spawn(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Have the fork server start a session's keeper; starts a new server when it died."""
        async with self._starting:
            if self._server is None:
                raise RuntimeError("the sandbox pool is not started")
            for attempt in range(2):
                ours, theirs = socket.socketpair()
                with theirs:
                    try:
                        await _send_descriptor(self._server.control, theirs.fileno())
                        return await asyncio.open_unix_connection(sock=ours)
                    except ConnectionError as failure:
                        ours.close()
                        if attempt:
                            raise SandboxUnavailable(f"the fork server died twice: {failure}") from failure
                    except BaseException:
                        ours.close()
                        raise
                await self._server.stop()
                self._server = await _launch(self.limits, namespaces=self._namespaces)
        raise AssertionError("unreachable")


async def _send_descriptor(control: socket.socket, descriptor: int) -> None:
    while True:
        try:
            socket.send_fds(control, [b"spawn"], [descriptor])
            return
        except BlockingIOError:
            # The fork server is behind by a whole socket buffer of requests.
            await asyncio.sleep(0.005)


class SandboxSession:
    """One interpreter with its variables; made by `SandboxPool.open`."""

    def __init__(self, pool: SandboxPool, setup_code: str) -> None:
        self._pool = pool
        self._setup_code = setup_code
        self._turn = asyncio.Lock()
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._num_cells = 0
        self._closed = False
        self.layers: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}

    async def _start(self) -> None:
        """Start the process and run the setup code as cell 0."""
        request = frames.encode({"code": self._setup_code, "cell": 0})
        self._stream = await self._pool._spawn()
        try:
            answer = await self._exchange(request)
        except (EOFError, ConnectionError) as failure:
            await self._drop()
            raise SandboxUnavailable(f"the session died at its start: {failure}") from failure
        if answer["status"] != CellStatus.OK.value:
            await self._drop()
            infra = answer["status"] == CellStatus.INFRA_ERROR.value
            raise SandboxUnavailable(answer["error"]) if infra else RuntimeError(f"setup_code: {answer['error']}")
        self.layers, self.missing = tuple(answer["layers"]), answer["missing"]
        report = self._pool._report
        if report is not None and self.layers != report.layers:
            await self._drop()
            raise SandboxUnavailable(f"the session has the layers {self.layers}, the self test had {report.layers}")

    async def run(self, code: str) -> CellResult:
        """Run `code` as the next cell. Never raises for what the code does.

        After a TIMEOUT, CRASH or INFRA_ERROR the next call starts a fresh process with the setup code.
        """
        if self._closed:
            raise RuntimeError("the sandbox session is closed")
        async with self._turn, self._pool._slots:
            self._num_cells += 1
            try:
                request = frames.encode({"code": code, "cell": self._num_cells})
            except ValueError as failure:
                return CellResult(CellStatus.ERROR, error=f"SyntaxError: cell too long: {failure}")
            try:
                if self._stream is None:
                    await self._start()
                answer = await self._exchange(request)
            except (EOFError, OSError, RuntimeError) as failure:
                await self._drop()
                return CellResult(CellStatus.INFRA_ERROR, error=f"sandbox failure: {failure}", state_lost=True)
        status = CellStatus(answer["status"])
        lost = status not in (CellStatus.OK, CellStatus.ERROR)
        if lost:
            await self._drop()
        return CellResult(
            status=status,
            stdout=answer["stdout"],
            error=answer["error"],
            error_line=answer["error_line"],
            cpu_time_s=answer["cpu_time_s"],
            wall_time_s=answer["wall_time_s"],
            output_truncated=answer["output_truncated"],
            state_lost=lost,
        )

    async def close(self) -> None:
        """End the session's processes and wait until they are gone. Closing twice is harmless."""
        self._closed = True
        self._pool._sessions.discard(self)
        await self._drop()

    async def _exchange(self, request: bytes) -> dict[str, Any]:
        assert self._stream is not None
        reader, writer = self._stream
        try:
            writer.write(request)
            await writer.drain()
            length = frames.body_length(await reader.readexactly(frames.HEADER.size))
            return frames.decode(await reader.readexactly(length))
        except asyncio.CancelledError:
            # The answer to this cell may still come: the stream cannot be used again.
            await self._drop()
            raise

    async def _drop(self) -> None:
        """Close the stream and wait for the keeper's end: it closes its side after its interpreter is dead."""
        if self._stream is None:
            return
        (reader, writer), self._stream = self._stream, None
        try:
            writer.write_eof()
            while await reader.read(65536):
                pass
        except OSError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
