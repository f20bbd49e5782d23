"""Memory cgroups of a pool, where the kernel lets us make them: version 2, else version 1.

    pool         all of it; bounded where `total_memory_bytes` is
    |- server    launcher, zygote, keepers, where it is; else they stay where the trainer is
    `- 0, 1 ...  a session each: its interpreter and what that starts; another's when they have ended

With version 1, CPU time is counted in a tree of the same form beside it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from gtpo.sandbox.contract import SandboxLimits
from gtpo.sandbox.directory_lock import lock_directory
from gtpo.sandbox.session_cgroup import FILES, JOIN, RESET

_PREFIX = "gtpo-sandbox-"
_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
# Stacks and tables of the kernel for one process; tables of pages come on top.
_KERNEL_BYTES_PER_PROCESS = 2**20
_PAGES_PER_TABLE = 512


def session_bytes(limits: SandboxLimits, library_bytes: int, *, processes: bool) -> int:
    """The limit of a session's cgroup: above what its keeper allows, so that it ends only what the keeper is late for.

    The keeper does not count the snapshot, which keeps the pages that the cell changes, nor files and the kernel's own
    memory, which the kernel counts.
    """
    held = limits.memory_bytes + library_bytes
    # As RLIMIT_NPROC.
    num_processes = 3 + limits.max_processes if processes else 1
    of_kernel = num_processes * (_KERNEL_BYTES_PER_PROCESS + held // _PAGES_PER_TABLE)
    return held * (2 if processes else 1) + limits.file_bytes + of_kernel


@dataclass(frozen=True)
class _Hierarchy:
    """A mounted tree of cgroups, and where in it one could be made, the likeliest first."""

    version: int
    controllers: tuple[str, ...]
    parents: tuple[Path, ...]


class PoolCgroup:
    """The cgroups of a pool and its sessions; with `limit_bytes`, they have no more memory together."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        """OSError where no cgroup with a limit can be made; the message says what was tried."""
        self._locks: list[int] = []
        self._paths: list[Path] = []
        # Numbers of sessions' cgroups, with the trainer's socket to the session.
        self._lent: list[tuple[int, socket.socket]] = []
        self._free: collections.deque[int] = collections.deque()
        self._num_made = 0
        self._ready: tuple[int, list[tuple[str, int]]] | None = None
        self._session_bytes: int | None = None
        tried = []
        hierarchies = _hierarchies()
        memory = [h for h in hierarchies if h.version == 2 or "memory" in h.controllers]
        for self._version, parent in [(h.version, parent) for h in memory for parent in h.parents]:
            try:
                self._make(parent, limit_bytes)
            except OSError as failure:
                self.remove()
                tried.append(str(failure))
                continue
            if self._version == 1:
                self._count_cpu_time(hierarchies)
            return
        raise OSError("; ".join(tried) or "no memory controller is mounted")

    def _make(self, parent: Path, limit_bytes: int | None) -> None:
        self._make_tree(parent)
        (path,) = self._paths
        if self._version == 2:
            _write(path / "cgroup.subtree_control", "+memory")
        if limit_bytes is not None:
            self._bound(path, limit_bytes)
        # Not there where the parent does not hand the controller on.
        os.stat(path / _LIMIT[self._version])

    def _make_tree(self, parent: Path) -> None:
        _sweep(parent)
        path = parent / f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
        path.mkdir()
        self._paths.append(path)
        lock = lock_directory(str(path))
        if lock is None:
            raise OSError(f"{path}: cannot be locked")
        self._locks.append(lock)

    def _count_cpu_time(self, hierarchies: list[_Hierarchy]) -> None:
        for hierarchy in hierarchies:
            if "cpuacct" in hierarchy.controllers and "memory" not in hierarchy.controllers:
                with contextlib.suppress(OSError):
                    self._make_tree(hierarchy.parents[0])

    def _bound(self, path: Path, limit_bytes: int) -> None:
        _write(path / _LIMIT[self._version], str(limit_bytes))
        # Else the excess goes to swap.
        for swap_file, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", limit_bytes)):
            with contextlib.suppress(FileNotFoundError):
                _write(path / swap_file, str(value))

    @property
    def path(self) -> Path:
        """That of the pool, whose memory is counted there."""
        return self._paths[0]

    def add_server(self, pid: int) -> None:
        """Move the fork server in: a process with its descendants, and so what they start from now on."""
        (self.path / "server").mkdir()
        family = [pid]
        for member in family:
            _write(self.path / "server" / "cgroup.procs", str(member))
            family += map(int, Path(f"/proc/{member}/task/{member}/children").read_text().split())

    def bound_sessions(self, limit_bytes: int) -> None:
        """From now on cgroups can be lent, of that size."""
        self._session_bytes = limit_bytes
        self.prepare()

    def lend(self, session: socket.socket) -> list[tuple[str, int]]:
        """Descriptors of a cgroup without processes, by their names: a session's until `session` is closed."""
        self.prepare()
        assert self._ready is not None
        (number, files), self._ready = self._ready, None
        self._lent.append((number, session))
        return files

    def prepare(self) -> None:
        """Have one ready. OSError where none can be made."""
        if self._ready is not None:
            return
        self._free.extend(number for number, session in self._lent if session.fileno() < 0)
        self._lent = [(number, session) for number, session in self._lent if session.fileno() >= 0]
        if self._free and self._is_empty(self._free[0]):
            number = self._free.popleft()
        else:
            # Those that are free are still ending.
            self._free.rotate(-1)
            number = self._make_one()
        self._ready = number, self._open(number)

    def _make_one(self) -> int:
        number, self._num_made = self._num_made, self._num_made + 1
        for path in self._paths:
            (path / str(number)).mkdir()
        assert self._session_bytes is not None
        self._bound(self.path / str(number), self._session_bytes)
        return number

    def _is_empty(self, number: int) -> bool:
        return not any((path / str(number) / "cgroup.procs").read_text() for path in self._paths)

    def _open(self, number: int) -> list[tuple[str, int]]:
        files: list[tuple[str, int]] = []
        try:
            for path in self._paths:
                for name in (JOIN[self._version], *FILES[self._version]):
                    flags = os.O_CLOEXEC | (os.O_RDWR if name in (*JOIN.values(), *RESET) else os.O_RDONLY)
                    with contextlib.suppress(FileNotFoundError):
                        files.append((name, os.open(path / str(number) / name, flags)))
        except BaseException:
            for _, fd in files:
                os.close(fd)
            raise
        return files

    def remove(self) -> None:
        """Remove them after their processes have ended."""
        if self._ready is not None:
            (_, files), self._ready = self._ready, None
            for _, fd in files:
                os.close(fd)
        for path in self._paths:
            _remove(path)
        for lock in self._locks:
            os.close(lock)
        self._paths, self._locks = [], []


def _write(path: Path, text: str) -> None:
    # Not made where it is not there.
    with open(os.open(path, os.O_WRONLY | os.O_CLOEXEC), "w") as file:
        file.write(text)


def _remove(path: Path) -> None:
    """Remove a cgroup and those in it, whose processes are ending."""
    left = [*path.glob("*/"), path]
    # The kernel lets go of dead processes a little later than their parents do.
    for _ in range(100):
        left = [one for one in left if not _is_removed(one)]
        if not left:
            return
        time.sleep(0.005)


def _is_removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _hierarchies(proc: Path = Path("/proc/self")) -> list[_Hierarchy]:
    """The trees of cgroups that are mounted."""
    lines = (line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines())
    own: dict[tuple[str, ...], str] = {tuple(controllers.split(",")): path for _, controllers, path in lines}
    no_controllers: tuple[str, ...] = ("",)
    found = []
    for line in (proc / "mountinfo").read_text().splitlines():
        fields, _, filesystem = line.partition(" - ")
        root, mount_point = (part.replace("\\040", " ") for part in fields.split()[3:5])
        kind, _, options = filesystem.split(" ", 2)
        if kind == "cgroup2":
            controllers = no_controllers
        elif kind == "cgroup":
            controllers = next((names for names in own if set(names) <= set(options.split(","))), no_controllers)
        else:
            continue
        path = own.get(controllers, "/")
        here = Path(mount_point, os.path.relpath(path, root) if path.startswith(root) else ".")
        # A cgroup of version 2 that has processes hands no controllers on, but its parents may.
        above = [parent for parent in here.parents if parent.is_relative_to(mount_point)]
        found.append(_Hierarchy(2 if kind == "cgroup2" else 1, controllers, (here, *above)))
    return found


def _sweep(parent: Path) -> None:
    """Remove what pools left whose trainer was killed, here or in a cgroup beside it, such as that of another job."""
    with contextlib.suppress(OSError):
        for path in (*parent.glob(f"{_PREFIX}*"), *parent.parent.glob(f"*/{_PREFIX}*")):
            lock = lock_directory(str(path))
            if lock is None:
                continue
            # One with processes stays.
            with contextlib.suppress(OSError):
                for inner in path.glob("*/"):
                    inner.rmdir()
                path.rmdir()
            os.close(lock)
