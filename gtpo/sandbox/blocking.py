"""The sandbox for code without an event loop: the same pool and sessions, whose calls return when they are done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, TypeVar

from gtpo.loop_thread import LoopCall
from gtpo.sandbox.code_tools import CodeTools
from gtpo.sandbox.contract import CellResult, SandboxReport
from gtpo.sandbox.pool import SandboxPool
from gtpo.sandbox.session import SandboxSession

T = TypeVar("T")


class BlockingSandboxPool:
    """`pool`, not started, driven by an event loop in a thread of its own. Any thread may call it, between `start` and
    `close` or inside `with`.

    >>> with BlockingSandboxPool(SandboxPool(min_tier="landlock")) as pool, pool.open("x = 40") as session:
    ...     session.run("x += 2\\nprint(x)").stdout
    '42\\n'
    """

    def __init__(self, pool: SandboxPool) -> None:
        self._pool = pool
        # Held while a call is handed to the loop, so that none is handed to a loop that ends.
        self._door = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """See `SandboxPool.start`."""
        with self._door:
            if self._loop is not None:
                raise RuntimeError("the sandbox pool is already started")
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._live, args=(self._loop,), name="gtpo-sandbox", daemon=True)
            self._thread.start()
        try:
            self._wait(self._pool.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `SandboxPool.close`. Calls of other threads that still run get a RuntimeError."""
        with self._door:
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._end(), loop).result()
            self._thread.join()

    async def _end(self) -> None:
        try:
            await self._pool.close()
        finally:
            # Those whose call was ended are still to be told.
            callers = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*callers, return_exceptions=True)
            asyncio.get_running_loop().stop()

    @staticmethod
    def _live(loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    def __enter__(self) -> BlockingSandboxPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        call = LoopCall(work)
        try:
            with self._door:
                if self._loop is None:
                    work.close()
                    raise RuntimeError("the sandbox pool is not started or closed")
                future = asyncio.run_coroutine_threadsafe(call.run(), self._loop)
            return future.result()
        except BaseException:
            # Ctrl-C, at whatever moment: nobody waits for it any more.
            call.give_up()
            raise

    @property
    def report(self) -> SandboxReport:
        """What the self test at start found."""
        return self._pool.report

    def metrics(self) -> dict[str, float]:
        """See `SandboxPool.metrics`."""
        return self._pool.metrics()

    def open(self, setup_code: str = "") -> BlockingSession:
        """See `SandboxPool.open`."""
        return BlockingSession(self, self._wait(self._pool.open(setup_code)))

    def run(
        self, code: str, *, stdin: str = "", files: Mapping[str, bytes] | None = None, with_stderr: bool = True
    ) -> CellResult:
        """See `SandboxPool.run`."""
        return self._wait(self._pool.run(code, stdin=stdin, files=files, with_stderr=with_stderr))


class BlockingSession:
    """A session of a `BlockingSandboxPool`; closed at the end of a `with`."""

    def __init__(self, pool: BlockingSandboxPool, session: SandboxSession) -> None:
        self._pool = pool
        self._session = session

    def __enter__(self) -> BlockingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, code: str, *, stdin: str = "", rollback: bool = True, tools: CodeTools | None = None) -> CellResult:
        """See `SandboxSession.run`. `tools.call` runs in the pool's thread: what blocks belongs into a thread."""
        return self._pool._wait(self._session.run(code, stdin=stdin, rollback=rollback, tools=tools))

    def put(self, name: str, data: bytes) -> None:
        """See `SandboxSession.put`."""
        self._pool._wait(self._session.put(name, data))

    def get(self, name: str, *, max_bytes: int = 16 * 2**20) -> bytes:
        """See `SandboxSession.get`."""
        return self._pool._wait(self._session.get(name, max_bytes=max_bytes))

    def reset(self) -> None:
        """See `SandboxSession.reset`."""
        self._pool._wait(self._session.reset())

    def close(self) -> None:
        """See `SandboxSession.close`."""
        if self._pool._loop is not None:
            self._pool._wait(self._session.close())
