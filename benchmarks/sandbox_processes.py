"""The processes of a sandbox and their memory, as /proc shows them."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path


def family_of(root: int) -> list[int]:
    """`root` and the processes below it."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def alive(pid: int) -> bool:
    """Whether it runs or could: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def resident_kb(pid: int) -> int:
    """Its resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def memory_bytes(root: int) -> int:
    """Memory of `root` and all below it, what is shared counted once (PSS)."""
    total = 0
    for pid in family_of(root):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    return total
