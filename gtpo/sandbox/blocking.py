"""The sandbox for code without an event loop: the same pool and sessions, whose calls return when they are done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, TypeVar

from gtpo.sandbox.contract import CellResult, SandboxReport
from gtpo.sandbox.pool import SandboxPool
from gtpo.sandbox.session import SandboxSession

T = TypeVar("T")


class BlockingSandboxPool:
    """`pool`, not started, driven by an event loop in a thread of its own. Any thread may call it.

    >>> with BlockingSandboxPool(SandboxPool(min_tier="landlock")) as pool, pool.open("x = 40") as session:
    ...     session.run("x += 2\\nprint(x)").stdout
    '42\\n'
    """

    def __init__(self, pool: SandboxPool) -> None:
        self._pool = pool
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gtpo-sandbox", daemon=True)

    def __enter__(self) -> BlockingSandboxPool:
        self._thread.start()
        try:
            self._wait(self._pool.start())
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait(self._pool.close())
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

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

    def run(self, code: str, *, stdin: str = "", files: Mapping[str, bytes] | None = None) -> CellResult:
        """See `SandboxPool.run`."""
        return self._wait(self._pool.run(code, stdin=stdin, files=files))


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

    def run(self, code: str, *, stdin: str = "", rollback: bool = True) -> CellResult:
        """See `SandboxSession.run`."""
        return self._pool._wait(self._session.run(code, stdin=stdin, rollback=rollback))

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
        self._pool._wait(self._session.close())
