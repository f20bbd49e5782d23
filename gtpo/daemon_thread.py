"""A thread for work that may block, so that the event loop never does."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonThread:
    """Does one piece of work after another, all in the same thread, which starts with the first.

    Not an executor: the event loop and the interpreter wait for an executor's threads before they end, and work that
    hangs would hang them too. This thread is a daemon; who stops waiting leaves it to end by itself.

    >>> async def main():
    ...     with DaemonThread() as thread:
    ...         return await thread.run(lambda: 6 * 7)
    >>> asyncio.run(main())
    42
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work()` returns or raises. BaseExceptions too: SystemExit would end the thread without an outcome."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def deliver(settle: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():
                settle(outcome)

        def target() -> None:
            try:
                settle, outcome = future.set_result, work()
            except BaseException as error:
                # a future takes no StopIteration, which would end the coroutine that waits
                fault = RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error
                settle, outcome = future.set_exception, fault  # type: ignore[assignment]
            # after a time-out nobody waits, and the loop may be closed
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deliver, settle, outcome)

        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._work.put(target)
        return await future

    def end(self) -> None:
        """Lets the thread end after what it was given."""
        self._work.put(None)

    def __enter__(self) -> "DaemonThread":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
