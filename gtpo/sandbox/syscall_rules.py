"""The system calls of a session, by name, and the programs that libseccomp makes of them (`make sandbox-filter`).

A cell computes, prints and uses files, so the list has no socket, exec, mount, key, tracing, owner or mode changing
call. Processes, threads and signals are a second list, for sessions whose number of processes is bounded and which
can signal nobody but themselves. Whatever is not allowed fails with EPERM; a call by the numbers of another
architecture kills.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MACHINES = ("x86_64", "aarch64")
ALLOWED = """
read write readv writev pread64 pwrite64 lseek fsync fdatasync ftruncate close close_range dup dup2 dup3 pipe pipe2 open
openat access faccessat faccessat2 stat lstat fstat newfstatat statx readlink readlinkat getcwd chdir fchdir getdents64
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 umask select pselect6 poll ppoll nanosleep
pause munmap mremap mprotect brk rt_sigprocmask rt_sigreturn rt_sigpending sigaltstack alarm
getitimer setitimer restart_syscall getpid getppid gettid getuid geteuid getgid getegid getgroups getpgrp
gettimeofday time times getrusage getrlimit getrandom uname sched_yield getcpu exit exit_group
"""
# Without the two that every new thread makes (rseq, set_robust_list) the C library gives up.
# Arrays of multiprocessing ask with statfs how large their directory is.
# Semaphores of multiprocessing are futexes of files.
ALLOWED_WITH_PROCESSES = "wait4 waitid kill tgkill set_robust_list rseq link linkat statfs fstatfs futex"
# What tells of any process that it names by its number: a session has processes where it has numbers of its own.
# Elsewhere it may ask for itself only, and for no clock of a process or thread, whose numbers are negative.
ABOUT_PROCESSES = ("getpgid", "getsid", "sched_getaffinity")
CLOCKS = ("clock_gettime", "clock_getres", "clock_nanosleep")
_NEGATIVE = 0x8000_0000
# Flags of clone that are refused: new namespaces, ptrace, pidfd, vfork (whose parent waits uninterruptibly), clone_io.
CLONE_REFUSED = 0x7E02_0000 | 0x2000 | 0x80_0000 | 0x1000 | 0x4000 | 0x8000_0000
# Calls that are harmless for some values of one argument only: name, argument, values.
# ioctl: TCGETS, TIOCGWINSZ, FIOCLEX. fcntl: no F_SETOWN, which sends signals, and
# no F_SETFL, whose flags the calls of a jail, which share descriptors, could read. prlimit64: the process itself.
# prctl: PR_SET_NAME. madvise: nothing that changes pages which others have (MADV_MERGEABLE, _COLD, _PAGEOUT).
ALLOWED_FOR = (
    ("ioctl", 1, (0x5401, 0x5413, 0x5451)),
    ("fcntl", 1, (0, 1, 2, 3, 5, 1030)),
    ("prlimit64", 0, (0,)),
    ("prctl", 0, (15,)),
    ("madvise", 2, (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19)),
)
# Record locks (F_SETLK, F_SETLKW), which SQLite needs. Where a session has but one process, no lock of its own can
# stand in its way: all are granted, and none is made, which other sessions could find on a file that they share.
LOCKS = ("fcntl", 1, (6, 7))
# With one process, too: no futex but of its own memory. Those of a file are of all processes that have mapped it.
_FUTEX_PRIVATE_FLAG = 128
# For what has none of these bits in one argument. mmap: no anonymous memory that is shared, which lasts as long as a
# page of it is mapped by one process, and counts as nobody's; no huge pages, which are the host's.
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x1, 0x20, 0x4_0000
ALLOWED_WITHOUT = (
    ("mmap", 3, _MAP_SHARED | _MAP_HUGETLB),
    ("mmap", 3, _MAP_ANONYMOUS | _MAP_HUGETLB),
)
# And for all values below 128 but one. rt_sigaction: not SIGCHLD, since the CPU time of children that the kernel reaps
# itself, because their parent ignores that signal, is in nobody's account.
ALLOWED_BUT_FOR = (("rt_sigaction", 0, 17),)

_HEADER = '''"""Made from syscall_rules.py by `make sandbox-filter`; not to be edited."""

MADE_BY = "libseccomp {version}"
# (machine, processes) -> struct sock_filter[] in hexadecimal, 16 digits an instruction.
PROGRAMS = {{
'''


def generate(machine: str, *, processes: bool) -> bytes:
    """The BPF program for `machine`, an array of struct sock_filter, by libseccomp (the package pyseccomp)."""
    import pyseccomp as libseccomp

    arch = {"x86_64": libseccomp.Arch.X86_64, "aarch64": libseccomp.Arch.AARCH64}[machine]
    rules = libseccomp.SyscallFilter(libseccomp.ERRNO(errno.EPERM))
    rules.set_attr(libseccomp.Attr.ACT_BADARCH, libseccomp.KILL_PROCESS)
    binary_tree = 2
    rules.set_attr(libseccomp.Attr.CTL_OPTIMIZE, binary_tree)
    if arch != libseccomp.system_arch():
        rules.add_arch(arch)
        rules.remove_arch(libseccomp.system_arch())

    def masked(argument: int, mask: int, value: int) -> Any:
        return libseccomp.Arg(argument, libseccomp.MASKED_EQ, mask, value)

    for name in (*ALLOWED.split(), *(ALLOWED_WITH_PROCESSES.split() if processes else ())):
        rules.add_rule(libseccomp.ALLOW, name)
    if processes:
        rules.add_rule(libseccomp.ALLOW, "clone", masked(0, CLONE_REFUSED, 0))
        for name in (*ABOUT_PROCESSES, *CLOCKS):
            rules.add_rule(libseccomp.ALLOW, name)
    else:
        for name in ABOUT_PROCESSES:
            rules.add_rule(libseccomp.ALLOW, name, masked(0, 0xFFFF_FFFF, 0))
        for name in CLOCKS:
            rules.add_rule(libseccomp.ALLOW, name, masked(0, _NEGATIVE, 0))
        rules.add_rule(libseccomp.ALLOW, "futex", masked(1, _FUTEX_PRIVATE_FLAG, _FUTEX_PRIVATE_FLAG))
    granted = libseccomp.ERRNO(0)
    for action, (name, argument, values) in (
        *((libseccomp.ALLOW, rule) for rule in ALLOWED_FOR),
        (libseccomp.ALLOW if processes else granted, LOCKS),
    ):
        for value in values:
            # the kernel looks at the low half only
            rules.add_rule(action, name, masked(argument, 0xFFFF_FFFF, value))
    for name, argument, bits in ALLOWED_WITHOUT:
        rules.add_rule(libseccomp.ALLOW, name, masked(argument, bits, 0))
    for name, argument, refused in ALLOWED_BUT_FOR:
        # libseccomp can ask for another number only of both halves; another number has another bit
        for bit in range(7):
            rules.add_rule(libseccomp.ALLOW, name, masked(argument, 1 << bit, ~refused & 1 << bit))
    # The flags of clone3 lie behind a pointer; with ENOSYS the C library falls back to clone, whose flags can be read.
    rules.add_rule(libseccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def library_version() -> str:
    """That of libseccomp, whose versions may order the same checks differently."""
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"))
    library.seccomp_version.restype = ctypes.POINTER(ctypes.c_uint * 3)
    return ".".join(map(str, library.seccomp_version().contents))


def source() -> str:
    """The text of syscall_programs.py."""
    lines: list[str] = []
    for machine in MACHINES:
        for processes in (False, True):
            digits = generate(machine, processes=processes).hex()
            lines += [f'    ("{machine}", {processes}): (', *_quoted(digits), "    ),"]
    return "\n".join([_HEADER.format(version=library_version()) + lines[0], *lines[1:], "}", ""])


def _quoted(digits: str) -> Iterable[str]:
    per_line = 6 * 16
    for start in range(0, len(digits), per_line):
        yield f'        "{digits[start : start + per_line]}"'


if __name__ == "__main__":
    Path(__file__).with_name("syscall_programs.py").write_text(source())
