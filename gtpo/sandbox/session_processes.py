"""The processes of one session, children of its keeper: stopped, counted, killed and reaped.

Where a session may have processes, the interpreter clones itself before a cell. The clone is a child of the keeper,
stopped at once; when the cell ends well it is killed, otherwise everything else is killed and it goes on in the
interpreter's place, with the variables from before the cell. The keeper is then the first process of a pid namespace,
so that "every process but me" is its session.

A cell can wake the clone by a signal. From then on it is no snapshot but a process like others: counted, and killed
with them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time

from gtpo.sandbox.descendants import Descendant, ProcessTree
from gtpo.sandbox.session_cgroup import SessionCgroup

# What the end of the snapshot before may cost is not the cell's. /proc counts in steps of this, too.
_NOT_COUNTED_S = 0.01
# How often a clone has slept at most that has been stopped once: to wait for a request, and stopped.
_MAX_SLEEPS = 2
# What it has used by then: a tenth of this.
_MAX_CLONE_CPU_S = 0.003


class SessionProcesses:
    """The interpreter `pid` and all that it starts. Without `proc_fd`, a descriptor of /proc, it can start nothing.

    With a cgroup, CPU time is that of all processes, to the moment and whoever reaps them; without, the processes are
    looked at one by one.
    """

    def __init__(self, pid: int, proc_fd: int | None, cgroup: SessionCgroup | None = None) -> None:
        # "Every process but me" must not be more than the session.
        assert proc_fd is None or os.getpid() == 1
        self._tree = None if proc_fd is None else ProcessTree(proc_fd)
        self._cgroup = cgroup
        self.snapshot: int | None = None
        # Snapshots that are not needed any more, by their descriptors.
        self._dying: dict[int, int] = {}
        self._adopt(pid)
        self.start_clocks()

    def _adopt(self, pid: int) -> None:
        """Make `pid`, a child, the interpreter."""
        self._pid = pid
        self.pidfd = os.pidfd_open(pid)

    def start_clocks(self) -> None:
        """Count CPU time from here."""
        self._cpu_start = self._cpu_time_s()
        self._orphans_start = _reaped_cpu_s()
        self._group_start = self._group_cpu_s()
        # CPU seconds of the cell, and of the processes that it started, as of the last look.
        self.seen_cpu_s = self._children_cpu_s = 0.0
        self._waited_start: float | None = None

    def cell_cpu_s(self, *, to_the_moment: bool = False) -> float:
        """CPU seconds since the clocks were started, of the interpreter's children as of the last look.

        Or `to_the_moment` where there is a cgroup. Without, a snapshot that runs is counted to the moment.
        """
        if to_the_moment:
            self._children_cpu_s = max(self._children_cpu_s, self._beside(self._own_cpu_s()) or 0.0)
        self.seen_cpu_s = self._own_cpu_s() + self._children_cpu_s + self._snapshot_cpu_s()
        return self.seen_cpu_s

    def _own_cpu_s(self) -> float:
        return max(self._cpu_time_s() - self._cpu_start, 0.0)

    def _snapshot_cpu_s(self) -> float:
        """CPU seconds of the snapshot, where no cgroup counts them; but for those that it takes to stop."""
        if self.snapshot is None or self._group_start is not None:
            return 0.0
        used_s = _cpu_time_s(self.snapshot)
        return used_s if used_s > _NOT_COUNTED_S else 0.0

    def _group_cpu_s(self) -> float | None:
        return None if self._cgroup is None else self._cgroup.cpu_time_s()

    def _beside(self, own_cpu_s: float) -> float | None:
        """CPU seconds of all but the interpreter by the cgroup; None without."""
        group_cpu_s = self._group_cpu_s()
        if group_cpu_s is None or self._group_start is None:
            return None
        beside = group_cpu_s - self._group_start - own_cpu_s
        return beside if beside > _NOT_COUNTED_S else 0.0

    def _cpu_time_s(self) -> float:
        return _cpu_time_s(self._pid)

    def look(self) -> int:
        """Look at the CPU time of all but the snapshot; their memory in bytes, shared pages once for each."""
        assert self._tree is not None
        self.reap_orphans()
        processes = self._tree.descendants()
        if any(p.namespace_pid == self.snapshot and _has_run(p) for p in processes):
            self.snapshot = None
        processes = [p for p in processes if p.namespace_pid != self.snapshot]
        beside = self._beside(self._own_cpu_s())
        if beside is None:
            beside = self._beside_one_by_one(self._tree, processes)
        self._children_cpu_s = max(self._children_cpu_s, beside)
        return sum(process.memory_bytes for process in processes)

    def _beside_one_by_one(self, tree: ProcessTree, processes: list[Descendant]) -> float:
        """CPU seconds of all but the interpreter: of `processes`, and of those that somebody has waited for."""
        cpu_s = _reaped_cpu_s() - self._orphans_start
        for process in processes:
            cpu = tree.cpu_time_s(process)
            if process.namespace_pid == self._pid:
                waited = cpu - self._cpu_time_s()
                if self._waited_start is None:
                    self._waited_start = waited
                cpu = waited - self._waited_start
            cpu_s += cpu
        return cpu_s

    def memory_bytes(self) -> int:
        """The memory that all but the snapshot have, shared pages counted once. Takes milliseconds for each process."""
        assert self._tree is not None
        processes = [p for p in self._tree.descendants() if p.namespace_pid != self.snapshot]
        return sum(map(self._tree.memory_share_bytes, processes))

    def hold_snapshot(self, pid: int) -> None:
        """Stop the interpreter's clone `pid`. ValueError when it is none: only a child of the keeper can be one."""
        if pid == self._pid:
            raise ValueError("not a clone of the interpreter")
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(pid, signal.SIGSTOP)
        except (OSError, OverflowError):
            raise ValueError("not a clone of the interpreter") from None
        self.snapshot = pid

    def adopt_snapshot(self) -> bool:
        """Make the snapshot, if it is still there, the interpreter in place of the one that ended."""
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is None or not self._is_held(snapshot):
            return False
        self._adopt(snapshot)
        return True

    def _is_held(self, snapshot: int) -> bool:
        """Whether the snapshot waits, stopped, as it was cloned.

        A cell may have killed it, which takes effect a moment later, sent it signals that would end another cell, or
        have woken it. An earlier cell may have passed off something else as the clone, such as a process whose first
        thread has ended and which never stops.
        """
        while self._tree is not None:
            found = [p for p in self._tree.descendants() if p.namespace_pid == snapshot]
            if not found or not found[0].alive or found[0].num_threads != 1:
                return False
            if found[0].stopped:
                return not _has_run(found[0]) and not self._tree.has_waiting_signals(found[0])
            # It has not come to that yet on a busy machine.
            time.sleep(0.0005)
        return False

    @property
    def pid(self) -> int:
        """The interpreter's."""
        return self._pid

    def resume(self) -> None:
        """Let the interpreter run again."""
        os.kill(self._pid, signal.SIGCONT)

    def settle(self) -> tuple[str, int]:
        """After a cell that ended well: stop the interpreter, kill the rest; what became of the state, its memory."""
        if self._tree is None:
            # Nothing of the session runs between cells.
            os.kill(self._pid, signal.SIGSTOP)
            return "kept", 0
        os.kill(-1, signal.SIGSTOP)
        # Waiting for its death here would cost a millisecond of every cell.
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is not None:
            self._dying[os.pidfd_open(snapshot)] = snapshot
            _kill(snapshot)
        dying, dead = set(self._dying.values()), set[int]()
        while True:
            state, peak_bytes, leftovers, known = "lost", 0, 0, dead
            dead = set()
            for process in self._tree.descendants():
                if process.namespace_pid == self._pid:
                    state, peak_bytes = "kept" if process.alive else "lost", process.peak_bytes
                elif process.namespace_pid in dying:
                    continue
                elif process.alive:
                    _kill(process.namespace_pid)
                    leftovers += 1
                else:
                    dead.add(process.namespace_pid)
            # The children of one that died while it was looked for may have been missed: they have another parent.
            if not leftovers and dead <= known:
                return state, peak_bytes
            # They must be dead before the next cell, which could look for them.
            time.sleep(0.0005)

    def end_interpreter(self) -> tuple[int, float, int]:
        """Kill everything but the snapshot; wait status, CPU seconds of the cell, and most memory it ever had."""
        if self._tree is None:
            # It may have ended, or not have come to its setsid.
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(self._pid, signal.SIGKILL)
        elif self.snapshot is None:
            _kill(-1)
        else:
            # Stopped first, so that they fork no more.
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGSTOP)
            for process in self._tree.descendants():
                if process.namespace_pid != self.snapshot:
                    _kill(process.namespace_pid)
        _, wait_status, usage = os.wait4(self._pid, 0)
        if self._tree is not None:
            self._end_leftovers(self._tree)
        # Of the interpreter and the children that it waited for; of all of them.
        waited_cpu_s = usage.ru_utime + usage.ru_stime - self._cpu_start
        beside_cpu_s = (self._beside(waited_cpu_s) or 0.0) + self._snapshot_cpu_s()
        cpu_time_s = max(waited_cpu_s + beside_cpu_s, self.seen_cpu_s)
        os.close(self.pidfd)
        return wait_status, cpu_time_s, usage.ru_maxrss * 1024

    def _end_leftovers(self, tree: ProcessTree) -> None:
        """Kill and reap what a dead interpreter has left, but for the snapshot."""
        # More than one round: a process that was being forked when the others were listed is found in the next.
        while leftovers := [p for p in tree.descendants() if p.namespace_pid != self.snapshot]:
            for process in leftovers:
                _kill(process.namespace_pid)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.namespace_pid, os.WNOHANG)
            time.sleep(0.0005)

    def reap_snapshots(self, *, until_readable: int) -> None:
        """Until there is something to read on that descriptor: take the exit status of old snapshots."""
        while self._dying:
            ready, _, _ = select.select([until_readable, *self._dying], [], [])
            for pidfd in self._dying.keys() & set(ready):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self._dying.pop(pidfd), os.WNOHANG)
                os.close(pidfd)
            if until_readable in ready:
                return

    def reap_orphans(self) -> None:
        """Take the exit status of dead children other than the interpreter and its snapshot."""
        while self._tree is not None:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None or dead.si_pid in (self._pid, self.snapshot):
                return
            os.waitpid(dead.si_pid, 0)


def _kill(pid: int) -> None:
    # 0 names the process group, which the keepers of all sessions have in common.
    assert pid != 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _has_run(snapshot: Descendant) -> bool:
    """Whether the snapshot did more than to stop: the kernel counts how often a process sleeps and how long it runs.

    One that was woken and has slept no more often than that can have run no code but the interpreter's own: its signals
    are blocked.
    """
    return snapshot.num_sleeps > _MAX_SLEEPS or _cpu_time_s(snapshot.namespace_pid) > _MAX_CLONE_CPU_S


def _cpu_time_s(pid: int) -> float:
    """CPU seconds of a process."""
    try:
        # Its clock: the kernel's encoding of the inverted pid and CPUCLOCK_SCHED.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        # Dead, not yet reaped: its end is seen on its descriptor.
        return 0.0


def _reaped_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
