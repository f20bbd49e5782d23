"""Directories for fork servers that cannot have one of their own, and the end of those whose trainer was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from gtpo.sandbox import removal

_PREFIX = "gtpo-sandbox-"


def make_scratch() -> tuple[str, int]:
    """A new directory, and the descriptor of a lock on it: as long as that is open, no other call deletes it."""
    _sweep(Path(tempfile.gettempdir()))
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX)
        lock = _lock(path)
        if lock is not None:
            return path, lock


def _lock(path: str) -> int | None:
    """The locked `path`; None where another has locked it or deleted it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _sweep(parent: Path) -> None:
    """Delete what was left by trainers that were killed together with their launcher."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and (lock := _lock(str(path))) is not None:
                removal.remove_tree(str(path))
                os.close(lock)
