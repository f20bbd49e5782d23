"""The seccomp filter of a session: what `syscall_rules.py` lists is allowed, all other system calls fail with EPERM."""

from __future__ import annotations

import ctypes
import os

from gtpo.sandbox.syscall_programs import PROGRAMS


def program(machine: str, *, processes: bool) -> bytes:
    """The BPF program for `machine` as an array of struct sock_filter; ValueError for an unknown machine.

    `processes` also allows processes, threads and signals.

    >>> len(program("x86_64", processes=False)) % 8
    0
    """
    if (machine, processes) not in PROGRAMS:
        raise ValueError(f"machine must be one of {sorted({name for name, _ in PROGRAMS})}, got {machine!r}")
    return bytes.fromhex(PROGRAMS[machine, processes])


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(*, processes: bool) -> None:
    """Put the filter on this process for good; it must have set no_new_privs. OSError or ValueError when it cannot."""
    instructions = program(os.uname().machine, processes=processes)
    header = _SockFprog(len(instructions) // 8, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_seccomp, filter_mode = 22, 2
    if libc.prctl(pr_set_seccomp, filter_mode, ctypes.byref(header), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl(PR_SET_SECCOMP): {os.strerror(ctypes.get_errno())}")
