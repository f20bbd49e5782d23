"""The cgroup of one session as its processes know it: by descriptors, since the jail has no cgroup file system."""

from __future__ import annotations

import os
from collections.abc import Iterable

JOIN = {1: "tasks", 2: "cgroup.procs"}
"""The file by which a thread or a process comes in, by the version of cgroups. With version 1 there may be two: for
memory and for CPU time. A process with a single thread comes in by either; by the first it waits for no other."""
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
"""What else is needed of a cgroup; it need not have all."""
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
        self._joins = [fd for name, fd in files if name in JOIN.values()]
        self._files = dict(files)
        # It may have been another session's.
        self._killed = b""
        self._num_times_full = 0
        self.was_killed()
        self.was_full()

    def join(self) -> None:
        """Move this process, which has a single thread, in: what it starts is in, too."""
        for fd in self._joins:
            os.write(fd, b"0")

    def lock(self) -> None:
        """Nobody comes in any more by this process or what it starts."""
        while self._joins:
            os.close(self._joins.pop())

    def was_killed(self) -> bool:
        """Whether the kernel has killed processes for want of memory, of this cgroup or around it, since last asked."""
        events = "memory.events" if "memory.events" in self._files else "memory.oom_control"
        before, self._killed = self._killed, self._field(events, b"oom_kill")
        return self._killed != before

    def was_full(self) -> bool:
        """Whether its own limit was reached since last asked."""
        if "memory.events" in self._files:
            before, self._num_times_full = self._num_times_full, int(self._field("memory.events", b"oom"))
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
            return int(self._field("cpu.stat", b"usage_usec")) / 1e6
        return self._number("cpuacct.usage") / 1e9 if "cpuacct.usage" in self._files else None

    def _number(self, file: str) -> int:
        return int(os.pread(self._files[file], 64, 0))

    def _field(self, file: str, name: bytes) -> bytes:
        """What stands behind `name` in a line of the file."""
        return os.pread(self._files[file], 4096, 0).partition(name + b" ")[2].partition(b"\n")[0]
