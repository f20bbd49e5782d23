"""A memory cgroup for all processes of a pool, where the kernel lets us make one: version 2, else version 1."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_PREFIX = "gtpo-sandbox-"


class MemoryCgroup:
    """A cgroup whose processes have at most `limit_bytes` of memory together; then the kernel kills one of them."""

    def __init__(self, limit_bytes: int) -> None:
        """OSError where no cgroup with a limit can be made; the message says what was tried."""
        tried = []
        for parent, limit_file in _places():
            _sweep(parent)
            path = parent / f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
            try:
                path.mkdir()
            except OSError as failure:
                tried.append(str(failure))
                continue
            try:
                # Not there where the parent does not hand the controller on.
                fd = os.open(path / limit_file, os.O_WRONLY)
                with open(fd, "w") as file:
                    file.write(str(limit_bytes))
            except OSError as failure:
                tried.append(str(failure))
                path.rmdir()
                continue
            # Else the excess goes to swap.
            for swap_file, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", limit_bytes)):
                with contextlib.suppress(OSError):
                    os.stat(path / swap_file)
                    (path / swap_file).write_text(str(value))
            self.path = path
            return
        raise OSError("; ".join(tried) or "no memory controller is mounted")

    def add_family(self, pid: int) -> None:
        """Move a process in, with its descendants; what they start from now on is in, too."""
        family = [pid]
        for member in family:
            (self.path / "cgroup.procs").write_text(str(member))
            family += map(int, Path(f"/proc/{member}/task/{member}/children").read_text().split())

    def remove(self) -> None:
        """Remove it after its processes have ended."""
        # The kernel lets go of dead processes a little later than their parents do.
        for _ in range(100):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.005)


def _places() -> list[tuple[Path, str]]:
    """Where a cgroup could be made, the likeliest first, and the name of its limit."""
    own = dict(
        (controllers, path)
        for _, controllers, path in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    )
    places = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, filesystem = line.partition(" - ")
        root, mount_point = (part.replace("\\040", " ") for part in fields.split()[3:5])
        kind, _, options = filesystem.split(" ", 2)
        if kind == "cgroup2":
            path, limit_file = own.get("", "/"), "memory.max"
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in own.items() if "memory" in names.split(",")), "/")
            limit_file = "memory.limit_in_bytes"
        else:
            continue
        here = Path(mount_point, os.path.relpath(path, root) if path.startswith(root) else ".")
        # A cgroup of version 2 that has processes hands no controllers on, but its parents may.
        above = [parent for parent in here.parents if parent.is_relative_to(mount_point)]
        places += [(parent, limit_file) for parent in (here, *above)]
    return places


def _sweep(parent: Path) -> None:
    """Remove what pools left whose trainer was killed; one with processes stays."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                path.rmdir()
