"""What a pool or a session is doing for its callers, so that `close` can end it and wait for its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Work:
    """The calls that run on `owner`, a noun for messages. Not open at first where `ready` is False.

    >>> work = Work("session")
    >>> asyncio.run(work.do(asyncio.sleep(0, "done")))
    'done'
    """

    def __init__(self, owner: str, *, ready: bool = True) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()
        self.open = ready

    async def do(self, call: Coroutine[Any, Any, T]) -> T:
        """What `call` gives; RuntimeError where the owner is closed, or is closed meanwhile, which cancels `call`."""
        if not self.open:
            call.close()
            raise RuntimeError(f"the sandbox {self._owner} is not started or closed")
        task = asyncio.ensure_future(call)
        self._tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self.open or (caller is not None and caller.cancelling()):
                raise
            raise RuntimeError(f"the sandbox {self._owner} was closed during the call") from None
        finally:
            self._tasks.discard(task)

    async def close(self) -> None:
        """Cancel every call and wait until all have ended."""
        self.open = False
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
