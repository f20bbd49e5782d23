"""The interpreter's end of its control channel: its main thread shares it with threads of the code that call tools."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import contextlib
import os
import select
import signal
from collections.abc import Callable
from typing import Any

from gtpo.sandbox import frames

# As long as most requests. More would have more pages of the heap written to.
_READ_BYTES = 4096
# Signals that come by themselves, from timers and children, and for which code has handlers. As plain integers: each
# member of an enumeration lies on another page, which every turn would copy.
_SENT = tuple(
    map(
        int,
        (
            *(signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
            *(signal.SIGUSR1, signal.SIGUSR2),
        ),
    )
)


class ToolError(Exception):
    """Raised in a cell by a tool that it called; the message is what the model would have read."""

    __module__ = "__main__"


class Channel:
    """Requests in, answers and calls of tools out, one frame at a time, whichever threads do it.

    A thread can call a tool and find its cell ended before the answer. So who waits for a frame keeps a request that
    comes instead for the main thread, and calls go out only while a cell runs.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._received = b""
        self._request: dict[str, Any] | None = None
        self._cell: int | None = None
        self._tools: dict[str, list[str]] = {}
        self._calls_left = self._max_calls = 0
        # The cell whose call has had no answer yet.
        self._unanswered: int | None = None
        # What is let through again when a cell begins.
        self._mask: set[Any] | None = None
        # The main thread has it but while a cell runs.
        self._running = _thread.allocate_lock()
        self._running.acquire()
        self.forget()

    def forget(self) -> None:
        """Make anew, in a clone, the locks that may be held by threads which it has not."""
        self._calling, self._reading = _thread.allocate_lock(), _thread.allocate_lock()

    def receive(self) -> dict[str, Any]:
        """The next request; EOFError where there is none any more."""
        with self._reading:
            while self._request is None:
                message = self._read(self._receive_more)
                # Else the answer to a call of a cell that did not wait for it.
                if "op" in message:
                    self._request = message
            request, self._request = self._request, None
            self._cell = request["cell"]
        self._tools = request.get("tools") or {}
        self._calls_left = self._max_calls = request.get("max_calls", 0)
        return request

    def begin(self) -> None:
        """A cell runs from now on: it may call tools, and its handlers of signals are called."""
        self._running.release()
        if self._mask is not None:
            mask, self._mask = self._mask, None
            # What a handler raises that an earlier cell has waited for is not this one's.
            with contextlib.suppress(BaseException):
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def end(self) -> None:
        """From now on neither is so, but what is being said is said to its end."""
        # Without the names that signal.getsignal looks up.
        if any(map(callable, map(_signal.getsignal, _SENT))):
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT)
        self._running.acquire()

    def write(self, data: bytes) -> None:
        """Send frames."""
        while data:
            data = data[os.write(self._fd, data) :]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What the trainer's tool says. ToolError where it fails, TypeError or ValueError where it cannot be asked."""
        if fault := frames.fault_of(arguments):
            raise ValueError(f"{name}(): the arguments must have {fault}")
        with self._calling:
            if self._unanswered == self._cell is not None:
                # A handler of a signal has ended the wait for it.
                self._await_answer(self._unanswered)
            with self._running:
                cell = self._cell
                frame = _frame_of(name, {"cell": cell, "call": {"name": name, "arguments": arguments}})
                if name not in self._tools:
                    raise ToolError(f"{name}() cannot be called from this cell")
                if not self._calls_left:
                    raise ToolError(f"no call is left, all {self._max_calls} of this cell are used")
                _undisturbed(self._send_call, frame)
            answer = self._await_answer(cell)
        if not answer["ok"]:
            raise ToolError(answer["text"])
        text: str = answer["text"]
        return text

    def _send_call(self, frame: bytes) -> None:
        self.write(frame)
        self._calls_left -= 1
        self._unanswered = self._cell

    def _await_answer(self, cell: int | None) -> dict[str, Any]:
        with self._reading:
            if self._request is None and self._cell == cell:
                message = self._read(self._wait_for_more)
                if "op" not in message:
                    self._unanswered = None
                    return message
                self._request = message
        raise ToolError("the cell that called the tool has ended")

    def _read(self, receive_more: Callable[[], None]) -> dict[str, Any]:
        """The next frame."""
        while True:
            header = self._received[: frames.HEADER.size]
            if len(header) == frames.HEADER.size:
                end = frames.HEADER.size + frames.body_length(header)
                if len(self._received) >= end:
                    body, self._received = self._received[frames.HEADER.size : end], self._received[end:]
                    return frames.decode(body)
            receive_more()

    def _wait_for_more(self) -> None:
        """While a cell runs: a handler of a signal may end the wait, and nothing that has come is lost."""
        select.select([self._fd], [], [])
        _undisturbed(self._receive_more)

    def _receive_more(self) -> None:
        data = os.read(self._fd, _READ_BYTES)
        if not data:
            raise EOFError("the keeper is gone")
        self._received += data


def _undisturbed(step: Callable[..., None], *arguments: Any) -> None:
    """Do `step`, which does not take long, and let the handlers of signals wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        step(*arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _frame_of(name: str, message: dict[str, Any]) -> bytes:
    try:
        return frames.encode(message)
    except TypeError as fault:
        raise TypeError(f"{name}(): the arguments must be JSON: {fault}") from None
    except ValueError as fault:
        raise ValueError(f"{name}(): the arguments cannot be passed on: {fault}") from None


def tool(channel: Channel, name: str, parameters: list[str]) -> Callable[..., str]:
    """A function that asks the trainer to call the tool `name` and returns what it says."""

    def tool(*values: Any, **arguments: Any) -> str:
        if len(values) > len(parameters):
            raise TypeError(f"{name}() takes {len(parameters)} arguments ({', '.join(parameters)}), got {len(values)}")
        by_position = dict(zip(parameters, values, strict=False))
        if twice := by_position.keys() & arguments.keys():
            raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
        return channel.call(name, by_position | arguments)

    tool.__name__ = tool.__qualname__ = name
    tool.__module__ = "builtins"
    return tool
