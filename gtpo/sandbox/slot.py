"""The permission to run a cell, of which a pool has as many as cells may run at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Slot:
    """One of `slots`, held within `async with` but for when it is given back; `waited` is told how long it took to get.

    >>> async def use(slots):
    ...     async with Slot(slots, lambda seconds: None) as slot:
    ...         held = slots.locked()
    ...         slot.give_back()
    ...         return held, slots.locked()
    >>> asyncio.run(use(asyncio.Semaphore(1)))
    (True, False)
    """

    def __init__(self, slots: asyncio.Semaphore, waited: Callable[[float], None]) -> None:
        self._slots = slots
        self._waited = waited
        self._held = False

    async def __aenter__(self) -> Slot:
        await self.take()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.give_back()

    async def take(self) -> None:
        """Wait for one."""
        asked = time.monotonic()
        await self._slots.acquire()
        self._held = True
        self._waited(time.monotonic() - asked)

    def give_back(self) -> None:
        """Let another have it. Without one, nothing happens."""
        if self._held:
            self._held = False
            self._slots.release()
