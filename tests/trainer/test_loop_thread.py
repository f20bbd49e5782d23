"""Ctrl-C at the moments when work is handed to a loop in another thread: nothing of the work goes on behind it."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from gtpo.loop_thread import LoopThread


class Work:
    """Sleeps for a minute; its end takes a few turns of the loop, as that of an episode does."""

    def __init__(self) -> None:
        self.state = "not begun"

    async def __call__(self) -> None:
        self.state = "begun"
        try:
            await asyncio.sleep(60)
        finally:
            for _ in range(5):
                await asyncio.sleep(0.001)
            self.state = "ended"


class Interrupted:
    """`asyncio.run_coroutine_threadsafe`, whose first call Ctrl-C interrupts: before, behind or long behind it hands
    over the work."""

    def __init__(self, moment: str) -> None:
        self._moment = moment
        self._hand_over = asyncio.run_coroutine_threadsafe
        self._calls = 0

    def __call__(self, work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
        self._calls += 1
        if self._calls > 1:
            return self._hand_over(work, loop)
        if self._moment == "before":
            work.close()
            raise KeyboardInterrupt
        future = self._hand_over(work, loop)
        if self._moment == "long behind":
            self._hand_over(asyncio.sleep(0.05), loop).result()
        if self._moment != "while waiting":
            raise KeyboardInterrupt
        future.result = _interrupted  # type: ignore[method-assign,assignment]
        return future


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before", "behind", "long behind", "while waiting"])
def test_ctrl_c_ends_the_work_whenever_it_comes(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    with LoopThread() as loop:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(asyncio, "run_coroutine_threadsafe", Interrupted(moment))
            loop.run(work())
        # the first steps of work that was handed over may be over when it is given up
        assert work.state in ("not begun", "ended")
        assert work.state == "ended" or moment != "long behind"
        assert loop.run(asyncio.sleep(0, "goes on")) == "goes on"


def test_what_the_work_raises_comes_out_as_it_was() -> None:
    async def fail() -> None:
        raise ValueError("wrong")

    with LoopThread() as loop, pytest.raises(ValueError, match=r"^wrong$"):
        loop.run(fail())


def test_work_that_cancels_itself_is_cancelled_for_the_caller_too() -> None:
    async def cancel() -> None:
        raise asyncio.CancelledError

    with LoopThread() as loop, pytest.raises(CancelledError):
        loop.run(cancel())
