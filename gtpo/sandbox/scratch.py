"""Directories for fork servers that cannot have one of their own, and the end of those whose trainer was killed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from gtpo.sandbox import removal
from gtpo.sandbox.directory_lock import lock_directory

_PREFIX = "gtpo-sandbox-"


def make_scratch() -> tuple[str, int]:
    """A new directory, and the descriptor of a lock on it: as long as that is open, no other call deletes it."""
    _sweep(Path(tempfile.gettempdir()))
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX)
        lock = lock_directory(path)
        if lock is not None:
            return path, lock


def _sweep(parent: Path) -> None:
    """Delete what was left by trainers that were killed together with their launcher."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and (lock := lock_directory(str(path))) is not None:
                removal.remove_tree(str(path))
                os.close(lock)
