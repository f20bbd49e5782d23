"""The permission to run a cell, of which a pool has as many as cells may run at once."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable

# How many cells may wait, for each that may run, without holding a slot.
_WAITING_PER_SLOT = 15


class Slots:
    """`num` slots, given in the order of asking. Cells that wait lend theirs, which bounds them, too.

    >>> async def use(slots):
    ...     await slots.acquire()
    ...     lent = slots.lend()
    ...     await slots.acquire()
    ...     slots.take_back()
    ...     free = not slots.locked()
    ...     slots.release()
    ...     return lent, free, slots.locked()
    >>> asyncio.run(use(Slots(1)))
    (True, False, True)
    """

    def __init__(self, num: int) -> None:
        self._num_free = num
        self._num_to_lend = num * _WAITING_PER_SLOT
        self._turns: collections.deque[asyncio.Future[None]] = collections.deque()

    def locked(self) -> bool:
        return self._num_free <= 0

    async def acquire(self) -> None:
        """Wait for a slot that is free."""
        if not self.locked():
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # It came at the same moment.
                self.release()
            raise

    def release(self) -> None:
        self._num_free += 1
        while self._turns and not self.locked():
            turn = self._turns.popleft()
            if not turn.done():
                self._num_free -= 1
                turn.set_result(None)

    def lend(self) -> bool:
        """Let others have a slot that its cell does not need; False where as many as may be are lent."""
        if not self._num_to_lend:
            return False
        self._num_to_lend -= 1
        self.release()
        return True

    def take_back(self) -> None:
        """Its cell runs again, so it has it at once: until others end, more than `num` cells run."""
        self._num_to_lend += 1
        self._num_free -= 1


class Slot:
    """One of `slots`, held within `async with` but for when it is given back; `waited` is told how long it took to get.

    >>> async def use(slots):
    ...     async with Slot(slots, lambda seconds: None) as slot:
    ...         held = slots.locked()
    ...         slot.give_back()
    ...         return held, slots.locked()
    >>> asyncio.run(use(Slots(1)))
    (True, False)
    """

    def __init__(self, slots: Slots, waited: Callable[[float], None]) -> None:
        self._slots = slots
        self._waited = waited
        self._held = self._lent = False

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
        self.wants(True)
        if self._held:
            self._held = False
            self._slots.release()

    def wants(self, a_cpu: bool) -> None:
        """The cell wants a CPU, or waits and lends its slot. Without one, nothing happens."""
        if self._lent and a_cpu:
            self._lent, self._held = False, True
            self._slots.take_back()
        elif self._held and not a_cpu and self._slots.lend():
            self._lent, self._held = True, False
