"""Why a cell ended without an answer of its own, as the keeper sees it from outside."""

from __future__ import annotations

import os
import signal


class InterpreterGone(Exception):
    """The interpreter ended or broke the protocol; the message says which."""


class OutOfMemory(Exception):
    """The session had more memory than it may have."""


class KilledForOthers(Exception):
    """The kernel was short of memory and took a process of the session, which had no more than it may have."""


STATUS_OF_END: dict[type[Exception], str] = {
    InterpreterGone: "crash",
    TimeoutError: "timeout",
    OutOfMemory: "out_of_memory",
    KilledForOthers: "infra_error",
}


def describe_exit(wait_status: int) -> str:
    """How the interpreter ended, of its status as `os.wait` gives it."""
    if os.WIFEXITED(wait_status):
        return f"the interpreter exited with status {os.WEXITSTATUS(wait_status)}"
    number = os.WTERMSIG(wait_status)
    # Most of the real-time signals have no name.
    named = number in set(signal.Signals)
    return f"the interpreter was killed by {signal.Signals(number).name if named else f'signal {number}'}"
