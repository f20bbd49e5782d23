"""The processes below this one, seen through a descriptor of a /proc that the jail itself does not have."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# As bits. Those that wait are dropped by the kernel when the process is continued.
_STOP_SIGNALS = sum(1 << number - 1 for number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU))


@dataclass(frozen=True)
class Descendant:
    """A process: its id in the /proc that was read and in its own namespace, whether it has not ended, its threads."""

    pid: int
    namespace_pid: int
    alive: bool
    stopped: bool
    num_threads: int
    status: str

    @property
    def memory_bytes(self) -> int:
        """What it shares with no file. A process that is ending has no memory lines any more."""
        return _bytes(self.status, "RssAnon") + _bytes(self.status, "RssShmem")

    @property
    def num_sleeps(self) -> int:
        """How often its first thread gave up the CPU of itself: to wait, or because it was stopped."""
        return int(_field(self.status, "voluntary_ctxt_switches") or 0)

    @property
    def peak_bytes(self) -> int:
        """The most memory that it had, shared or not."""
        return _bytes(self.status, "VmHWM")


class ProcessTree:
    """The descendants of this process by `proc_fd`, a directory descriptor of /proc."""

    def __init__(self, proc_fd: int) -> None:
        self._proc_fd = proc_fd
        self._own_pid = int(os.readlink("self", dir_fd=proc_fd))

    def descendants(self) -> list[Descendant]:
        """Every descendant, children first. One that ends meanwhile may be missing, and so may what it starts.

        OSError where the kernel lists no children (CONFIG_PROC_CHILDREN).
        """
        found = []
        pids = self._children(self._own_pid, self._own_pid)
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                process = self._look(pid)
                found.append(process)
                for thread in [pid] if process.num_threads == 1 else self._threads(pid):
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        pids += self._children(pid, thread)
        return found

    def cpu_time_s(self, process: Descendant) -> float:
        """CPU seconds of `process` and of the children that it waited for, in steps of 10 ms."""
        try:
            ticks = self._read(f"{process.pid}/stat").rpartition(")")[2].split()[11:15]
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return sum(map(int, ticks)) / _TICKS_PER_S

    def run_delay_s(self, namespace_pid: int) -> float:
        """Seconds for which the first thread of that descendant waited for a CPU; 0 where the kernel does not count."""
        for process in self.descendants():
            if process.namespace_pid == namespace_pid:
                with contextlib.suppress(OSError):
                    return int(self._read(f"{process.pid}/schedstat").split()[1]) / 1e9
        return 0.0

    def memory_share_bytes(self, process: Descendant) -> int:
        """Of what `process` shares with no file, its share: a page that n processes have counts as 1/n of one.

        All of it where we may not look: that takes CAP_SYS_PTRACE.
        """
        try:
            rollup = self._read(f"{process.pid}/smaps_rollup")
        except PermissionError:
            return process.memory_bytes
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return _bytes(rollup, "Pss_Anon") + _bytes(rollup, "Pss_Shmem")

    def has_waiting_signals(self, process: Descendant) -> bool:
        """Whether `process`, which is stopped, will get a signal as soon as it runs."""
        status = self._read(f"{process.pid}/status")
        waiting = int(_field(status, "SigPnd") or "0", 16) | int(_field(status, "ShdPnd") or "0", 16)
        return waiting & ~_STOP_SIGNALS != 0

    def own_memory(self) -> tuple[int, int]:
        """Of this process: the size of its address space and what of its memory it shares with no file, in bytes."""
        size, resident, shared = (int(field) * _PAGE_BYTES for field in self._read("self/statm").split()[:3])
        return size, resident - shared

    def _look(self, pid: int) -> Descendant:
        status = self._read(f"{pid}/status")
        namespace_pid = int(_field(status, "NSpid").split()[-1])
        if namespace_pid == 0:
            # Its parent reaps it while it is read. As an id for kill, 0 would name the keepers of all sessions.
            raise ProcessLookupError(pid)
        state, num_threads = _field(status, "State")[0], int(_field(status, "Threads"))
        return Descendant(
            pid=pid,
            namespace_pid=namespace_pid,
            # The first thread can end before the others.
            alive=state not in "ZX" or num_threads != 1,
            stopped=state == "T",
            num_threads=num_threads,
            status=status,
        )

    def _threads(self, pid: int) -> list[int]:
        tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc_fd)
        try:
            return [int(thread) for thread in os.listdir(tasks)]
        finally:
            os.close(tasks)

    def _children(self, pid: int, thread: int) -> list[int]:
        return [int(child) for child in self._read(f"{pid}/task/{thread}/children").split()]

    def _read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc_fd)
        try:
            return os.read(fd, 65536).decode("ascii", "replace")
        finally:
            os.close(fd)


def _field(text: str, name: str) -> str:
    """What the line of that name says, but the first line's, which a process chooses: "" where there is none.

    The kernel escapes newlines, so no process can make a line.

    >>> _field("Name:\\tA\\nState:\\tS (sleeping)\\n", "State")
    'S (sleeping)'
    """
    _, found, rest = text.partition(f"\n{name}:")
    return rest.partition("\n")[0].strip() if found else ""


def _bytes(text: str, name: str) -> int:
    """The size of that name, which is given in kilobytes; 0 where there is none."""
    return int((_field(text, name) or "0").split()[0]) * 1024
