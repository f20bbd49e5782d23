"""A lock on a directory that says: its maker lives. The kernel lets go of it however the maker ends."""

from __future__ import annotations

import fcntl
import os


def lock_directory(path: str) -> int | None:
    """The descriptor that holds the lock on `path` while it is open; None where another has it or has deleted `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     held = lock_directory(folder)
    ...     lock_directory(folder) is None
    True
    >>> os.close(held)
    """
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
