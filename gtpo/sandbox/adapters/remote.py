"""What all sandboxes behind a network have in common: slots, the clock, lost state, output that is cut."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType

from gtpo.sandbox.contract import CellResult, CellStatus, SandboxLimits, SandboxUnavailable, SessionState
from gtpo.sandbox.output import Output


class RemoteTimeout(Exception):
    """The cell's wall time ran out."""


class RemoteFault(Exception):
    """The service failed, or cannot be reached: never the code's fault."""


@dataclass(frozen=True)
class RemoteCell:
    """What a cell wrote, and what it raised as "Type: message"; empty where it ran to its end."""

    output: str
    error: str = ""


class RemoteSession(ABC):
    """One interpreter behind a service, in the shape of `SandboxSession`.

    A subclass starts it, runs cells in it and ends it. `after_failure` is what becomes of the variables
    where a cell timed out or the service failed.
    """

    after_failure = SessionState.LOST

    def __init__(self, sandbox: RemoteSandbox, setup_code: str) -> None:
        self._sandbox = sandbox
        self._setup_code = setup_code
        self._turn = asyncio.Lock()
        self._started = False
        self._closed = False
        self._num_cells = 0

    @abstractmethod
    async def _start(self) -> None:
        """A fresh interpreter. Raises RemoteFault."""

    @abstractmethod
    async def _execute(self, code: str, *, timeout_s: float) -> RemoteCell:
        """Run one cell. Raises RemoteTimeout and RemoteFault; the interpreter is given up then."""

    @abstractmethod
    async def _stop(self) -> None:
        """Give the interpreter up, also one that is half started or none. Never raises."""

    async def run(self, code: str) -> CellResult:
        """Run `code` as the next cell, on whose first line `__cell__` is set. Never raises for what the code does.

        Only wall time is known of a remote cell. After a TIMEOUT or INFRA_ERROR the next cell starts from the setup
        code, unless the state of the result says otherwise.
        """
        limits = self._sandbox.limits
        async with self._turn, self._sandbox.slots:
            if self._closed:
                raise RuntimeError("the sandbox session is closed")
            self._num_cells += 1
            started = time.monotonic()
            try:
                await self._ensure_started()
                cell = await self._execute(f"__cell__ = {self._num_cells}\n{code}", timeout_s=limits.wall_time_s)
            except (RemoteTimeout, RemoteFault, RuntimeError) as failure:
                await self._abandon()
                if self._closed:
                    raise RuntimeError("the sandbox session was closed during the call") from None
                late = isinstance(failure, RemoteTimeout)
                return CellResult(
                    CellStatus.TIMEOUT if late else CellStatus.INFRA_ERROR,
                    error=f"wall time limit of {limits.wall_time_s:g} s exceeded" if late else f"sandbox: {failure}",
                    wall_time_s=time.monotonic() - started,
                    state=self.after_failure,
                )
            except BaseException:
                # the answer to this cell may still come: it must not be taken for that to the next
                await self._abandon()
                raise
        output = Output(limits.output_bytes)
        output.add(cell.output.encode("utf-8", "backslashreplace"))
        return CellResult(
            CellStatus.ERROR if cell.error else CellStatus.OK,
            stdout=output.text(),
            error=cell.error,
            wall_time_s=time.monotonic() - started,
            num_output_bytes=output.num_bytes,
            output_truncated=output.truncated,
        )

    async def _ensure_started(self) -> None:
        """Start the interpreter and run the setup code. Raises RuntimeError where that fails, and RemoteFault."""
        if self._started:
            return
        await self._start()
        if self._closed:
            raise RuntimeError("the sandbox session is closed")
        self._started = True
        if self._setup_code:
            try:
                cell = await self._execute(self._setup_code, timeout_s=self._sandbox.limits.wall_time_s)
            except RemoteTimeout:
                raise RuntimeError("setup_code: it took longer than a cell may take") from None
            if cell.error:
                raise RuntimeError(f"setup_code: {cell.error}")

    async def close(self) -> None:
        """Give the interpreter up. Closing twice is harmless."""
        self._closed = True
        await self._abandon()

    async def _abandon(self) -> None:
        self._started = False
        await self._stop()


class RemoteSandbox(ABC):
    """A service that runs code, in the shape of `SandboxPool`. `max_concurrent` bounds the cells that run at once."""

    def __init__(self, limits: SandboxLimits | None = None, *, max_concurrent: int = 16) -> None:
        if max_concurrent < 1:
            raise ValueError(f"max_concurrent must be at least 1, got {max_concurrent}")
        self.limits = limits or SandboxLimits()
        self.slots = asyncio.Semaphore(max_concurrent)

    @abstractmethod
    def _session(self, setup_code: str) -> RemoteSession: ...

    async def open(self, setup_code: str = "") -> RemoteSession:
        """A new session. Raises RuntimeError when the setup code fails and SandboxUnavailable when none can start."""
        session = self._session(setup_code)
        async with self.slots:
            try:
                await session._ensure_started()
            except BaseException as failure:
                await session.close()
                if isinstance(failure, RemoteFault):
                    raise SandboxUnavailable(str(failure)) from failure
                raise
        return session

    async def start(self) -> None:
        """Run one cell. Raises SandboxUnavailable where that does not work."""
        session = await self.open()
        try:
            result = await session.run("print(6 * 7)")
        finally:
            await session.close()
        if (result.status, result.stdout.strip()) != (CellStatus.OK, "42"):
            raise SandboxUnavailable(f"print(6 * 7) gave {result.status.value}: {result.stdout or result.error}")

    async def close(self) -> None:  # noqa: B027
        """Give back what the sandbox holds beside its sessions."""

    async def __aenter__(self) -> RemoteSandbox:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def error_of_traceback(traceback: str) -> str:
    """The last line of a traceback that is not empty: "Type: message".

    >>> error_of_traceback("Traceback (most recent call last):\\n  File ...\\nValueError: no\\n")
    'ValueError: no'
    """
    lines = [line for line in traceback.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
