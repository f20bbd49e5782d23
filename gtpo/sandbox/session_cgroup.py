"""The cgroup of one session as its processes know it: by descriptors, since the jail has no cgroup file system."""

from __future__ import annotations

import os
from collections.abc import Iterable

JOIN = "cgroup.procs"
"""The file by which a process comes in, of which there may be two: for memory and for CPU time."""
FILES = {
    1: (
        "memory.oom_control",
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.memsw.max_usage_in_bytes",
        "cpuacct.usage",
    ),
    2: ("memory.events", "cpu.stat"),
}
"""What else is needed of a cgroup, by the version of cgroups; it need not have all."""
RESET = ("memory.max_usage_in_bytes", "memory.memsw.max_usage_in_bytes")
"""Those that are written, too."""
# So near to its limit a cgroup has no more to give.
_FULL_BYTES = 2**20


class SessionCgroup:
    """Bounds the memory and counts the CPU time of the processes in it.

    files: names and descriptors, of each JOIN and of those of FILES that there are.
    """

    def __init__(self, files: Iterable[tuple[str, int]]) -> None:
        files = list(files)
        self._joins = [fd for name, fd in files if name == JOIN]
        self._files = dict(files)
        self._events = "memory.events" if "memory.events" in self._files else "memory.oom_control"
        # It may have been another session's.
        self._num_killed = self._num_times_full = 0
        self.was_killed()
        self.was_full()

    def add(self, pid: int) -> None:
        """Move a process in, which has not started others: what it starts is in, too. Nobody comes in after it."""
        while self._joins:
            fd = self._joins.pop()
            os.write(fd, str(pid).encode())
            os.close(fd)

    def was_killed(self) -> bool:
        """Whether the kernel has killed processes for want of memory, of this cgroup or around it, since last asked."""
        before, self._num_killed = self._num_killed, self._number(self._events, "oom_kill")
        return self._num_killed > before

    def was_full(self) -> bool:
        """Whether its own limit was reached since last asked."""
        if self._events == "memory.events":
            before, self._num_times_full = self._num_times_full, self._number(self._events, "oom")
            return self._num_times_full > before
        # Together with what is swapped out, where the kernel counts that: it has the same limit. The count of failures
        # is not kept by all kernels.
        peak = next(name for name in reversed(RESET) if name in self._files)
        if self._number(peak) + _FULL_BYTES < self._number("memory.limit_in_bytes"):
            return False
        os.pwrite(self._files[peak], b"0", 0)
        return True

    def cpu_time_s(self) -> float | None:
        """CPU seconds of all that were ever in it, whether somebody waited for them or not; None where not counted."""
        if "cpu.stat" in self._files:
            return self._number("cpu.stat", "usage_usec") / 1e6
        return self._number("cpuacct.usage") / 1e9 if "cpuacct.usage" in self._files else None

    def _number(self, file: str, field: str = "") -> int:
        text = os.pread(self._files[file], 4096, 0).decode("ascii")
        lines = (line.rpartition(" ") for line in text.splitlines())
        return next(int(value) for name, _, value in lines if name == field)
