"""How an interpreter clones itself, so that its clone stays as it is until it takes the interpreter's place."""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal

from gtpo.sandbox.layout import CLONES_FD, CONTROL_FD

CLONE_BYTES = 4
"""What the process id of a clone takes on its pipe."""
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_SYS_SIGPROCMASK = {"x86_64": 14, "aarch64": 135}
_CLONE_PARENT, _SIGCHLD = 0x8000, 17
_SIG_SETMASK, _SIGSET_BYTES = 2, 8
_kill, _select = os.kill, select.select


class Cloner:
    """Makes clones that are children of this process's parent, and says their numbers on the pipe for clones.

    Not by os.fork: a cell that waits for its children must not find the clone, and the handlers that run after a fork
    would change it (`random` is seeded anew).
    """

    def __init__(self) -> None:
        # The GIL is kept, so that no other thread of an earlier cell is inside the interpreter.
        syscall, machine = ctypes.PyDLL(None).syscall, os.uname().machine
        flags = ctypes.c_long(_CLONE_PARENT | _SIGCHLD)
        self._clone = functools.partial(syscall, ctypes.c_long(_SYS_CLONE[machine]), flags, 0, 0, 0, 0)
        # Not pthread_sigmask, which leaves out two signals of the C library.
        set_mask = functools.partial(syscall, ctypes.c_long(_SYS_SIGPROCMASK[machine]), ctypes.c_long(_SIG_SETMASK))
        every, before = ctypes.c_uint64(2**64 - 1), ctypes.c_uint64()
        size = ctypes.c_long(_SIGSET_BYTES)
        self._block = functools.partial(set_mask, ctypes.byref(every), ctypes.byref(before), size)
        self._unblock = functools.partial(set_mask, ctypes.byref(before), None, size)

    def clone(self) -> bool:
        """Whether this is the clone, which is to `wait`."""
        # A signal that wakes the clone has no handler run in it, which could be the code's.
        self._block()
        pid = self._clone()
        if pid == 0:
            return True
        if pid > 0:
            # The keeper does so, too, but later: until then the clone would write to pages.
            _kill(pid, signal.SIGSTOP)
        # Also where none could be made: what is said later, by the code, is not taken for a clone's.
        os.write(CLONES_FD, max(pid, 0).to_bytes(CLONE_BYTES))
        self._unblock()
        return False

    def wait(self) -> None:
        """Return, in a clone, when it is the interpreter and has a request."""
        _select([CONTROL_FD], [], [])
        self._unblock()


def decode_clone(data: bytes) -> int:
    """The process id that the interpreter has said, 0 where it could not be cloned; ValueError where it is not one."""
    if len(data) != CLONE_BYTES:
        raise ValueError(f"the process id of a clone must have {CLONE_BYTES} bytes, got {len(data)}")
    return int.from_bytes(data)
