"""An event loop in a thread of its own: blocking code can wait for coroutines even where a loop runs already."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LoopCall(Generic[T]):
    """`work` on its way to the loop of another thread: can be given up before, while and after it is done.

    Ctrl-C strikes between any two instructions: also behind the one that hands the work over, before there is a future
    to cancel. So the call itself, which is made first, is what gets given up.
    """

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._given_up = False

    async def run(self) -> T:
        """To be handed to the loop: what the work gives."""
        self._task = asyncio.current_task()
        if self._given_up:
            self._work.close()
            raise asyncio.CancelledError
        return await self._work

    def give_up(self) -> None:
        """From any thread: cancels the work, and does not wait for its end."""
        self._given_up = True
        if self._task is not None and not self._task.done():
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    async def end(self) -> None:
        """To be handed to the loop behind `run`: cancels the work and waits until it has ended."""
        self._given_up = True
        if self._task is None:
            # never handed over, for the loop takes what it is handed in that order
            self._work.close()
        else:
            self._task.cancel()
            await asyncio.wait([self._task])


class LoopThread:
    """Runs coroutines for callers that block, in a notebook (whose own loop is running) as in a script.

    >>> with LoopThread() as loop:
    ...     loop.run(asyncio.sleep(0, "slept"))
    'slept'
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="gtpo-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns or raises. An interrupt, whenever it comes, cancels it and waits for its end."""
        call = LoopCall(coroutine)
        try:
            return asyncio.run_coroutine_threadsafe(call.run(), self._loop).result()
        except BaseException:
            asyncio.run_coroutine_threadsafe(call.end(), self._loop).result()
            raise

    def close(self) -> None:
        """Ends the loop and its thread. Closing twice is harmless."""
        if self._loop.is_closed():
            return
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "LoopThread":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
