"""The seccomp filter of a session: an allow list. Every other system call fails with EPERM.

A cell computes, prints and uses files, so the list has no socket, exec, mount, key, tracing, owner or mode changing
call. Processes, threads and signals are a second list, for sessions whose number of processes is bounded and which
can signal nobody but themselves.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# "name number-on-x86_64 number-on-aarch64"; "-" where the architecture has no such call.
_ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, fsync 74 82,
fdatasync 75 83, ftruncate 77 46, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -,
pipe2 293 59, open 2 -, openat 257 56, access 21 -, faccessat 269 48, faccessat2 439 439, stat 4 -, lstat 6 -,
fstat 5 80, newfstatat 262 79, statx 332 291, readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49,
fchdir 81 50, getdents64 217 61, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -,
renameat 264 38, renameat2 316 276, umask 95 166, select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73,
nanosleep 35 101, clock_nanosleep 230 115, pause 34 -, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226,
madvise 28 233, brk 12 214, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
sigaltstack 131 132, alarm 37 -, getitimer 36 102, setitimer 38 103, restart_syscall 219 128, getpid 39 172,
getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163, getrandom 318 278, uname 63 160,
sysinfo 99 179, sched_getaffinity 204 123, sched_yield 24 124, getcpu 309 168, futex 202 98, exit 60 93,
exit_group 231 94
"""
# Only with `processes`. Without the two that every new thread makes (rseq, set_robust_list) the C library gives up.
_ALLOWED_WITH_PROCESSES = """
wait4 61 260, waitid 247 95, kill 62 129, tgkill 234 131, set_robust_list 273 99, rseq 334 293, link 86 -,
linkat 265 37
"""
# Flags of clone that are refused: new namespaces, ptrace, pidfd, vfork (whose parent waits uninterruptibly), clone_io.
_CLONE = (56, 220)
_CLONE_REFUSED = 0x7E02_0000 | 0x2000 | 0x80_0000 | 0x1000 | 0x4000 | 0x8000_0000
# Calls that are harmless for some values of one argument only: (numbers, argument, values).
# ioctl: TCGETS, TIOCGWINSZ, FIOCLEX. fcntl: no F_SETOWN, which sends signals. prlimit64: the process itself.
# prctl: PR_SET_NAME.
_ALLOWED_FOR = (
    ((16, 29), 1, (0x5401, 0x5413, 0x5451)),
    ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
    ((302, 261), 0, (0,)),
    ((157, 167), 0, (15,)),
)
# And for all values but some. rt_sigaction: not SIGCHLD, since the CPU time of children that the kernel reaps itself,
# because their parent ignores that signal, is in nobody's account.
_ALLOWED_BUT_FOR = (((13, 134), 0, (17,)),)
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def allowed_calls(*, processes: bool) -> dict[str, dict[str, int]]:
    """The calls that pass whatever their arguments: machine -> name -> number.

    >>> allowed_calls(processes=False)["aarch64"]["read"]
    63
    """
    table: dict[str, dict[str, int]] = {"x86_64": {}, "aarch64": {}}
    for entry in (_ALLOWED + ("," + _ALLOWED_WITH_PROCESSES if processes else "")).split(","):
        name, *numbers = entry.split()
        for machine, number in zip(table, numbers, strict=True):
            if number != "-":
                table[machine][name] = int(number)
    return table


def build(machine: str, *, processes: bool) -> bytes:
    """The BPF program for `machine` as an array of struct sock_filter; ValueError for an unknown machine.

    `processes` also allows processes, threads and signals.

    >>> len(build("x86_64", processes=False)) % 8
    0
    """
    if machine not in _AUDIT_ARCH:
        raise ValueError(f"machine must be one of {sorted(_AUDIT_ARCH)}, got {machine!r}")
    column = sorted(_AUDIT_ARCH, reverse=True).index(machine)
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)

    def allow_if_equal(value: int) -> list[tuple[int, int, int, int]]:
        return [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]

    # struct seccomp_data: the number at 0, the architecture at 4, the low half of argument i at 16 + 8 * i.
    program = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for number in allowed_calls(processes=processes)[machine].values():
        program += allow_if_equal(number)
    if processes:
        check_flags = [(_LOAD, 0, 0, 16), (_JUMP_ANY_BIT, 0, 1, _CLONE_REFUSED), refuse, (_RETURN, 0, 0, _ALLOW)]
        program += [(_JUMP_EQUAL, 0, len(check_flags), _CLONE[column]), *check_flags]
    for numbers, argument, values in _ALLOWED_FOR:
        block = [(_LOAD, 0, 0, 16 + 8 * argument)]
        for value in values:
            block += allow_if_equal(value)
        block.append(refuse)
        program += [(_JUMP_EQUAL, 0, len(block), numbers[column]), *block]
    for numbers, argument, values in _ALLOWED_BUT_FOR:
        block = [(_LOAD, 0, 0, 16 + 8 * argument)]
        for value in values:
            block += [(_JUMP_EQUAL, 0, 1, value), refuse]
        block.append((_RETURN, 0, 0, _ALLOW))
        program += [(_JUMP_EQUAL, 0, len(block), numbers[column]), *block]
    # The flags of clone3 lie behind a pointer; with ENOSYS the C library falls back to clone, whose flags can be read.
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS), refuse]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(*, processes: bool) -> None:
    """Put the filter on this process for good; it must have set no_new_privs. OSError or ValueError when it cannot."""
    program = build(os.uname().machine, processes=processes)
    header = _SockFprog(len(program) // 8, program)
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_seccomp, filter_mode = 22, 2
    if libc.prctl(pr_set_seccomp, filter_mode, ctypes.byref(header), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl(PR_SET_SECCOMP): {os.strerror(ctypes.get_errno())}")
