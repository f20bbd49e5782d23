"""Deletes what hostile code has left: trees deeper than any recursion, directories that their owner may not enter."""

from __future__ import annotations

import contextlib
import os


def empty_directory(path: str) -> None:
    """Delete everything below `path`, whose content nobody changes meanwhile. OSError where something cannot be.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.makedirs(folder + 100 * "/d")
    ...     empty_directory(folder)
    ...     os.listdir(folder)
    []
    """
    # A name that nothing in there has: the code could not know it.
    moved, number = f"{path}/{os.urandom(8).hex()}", 0
    while directories := _delete_files(path):
        for directory in directories:
            _open_up(directory)
            # What it holds moves up, so that no path gets longer than two names.
            for inner in _delete_files(directory):
                number += 1
                _open_up(inner)
                os.rename(inner, f"{moved}-{number}")
            os.rmdir(directory)


def remove_tree(path: str) -> None:
    """Delete the directory `path` with everything below it, as far as that can be done."""
    try:
        empty_directory(path)
        os.rmdir(path)
    except OSError:
        return


def _open_up(directory: str) -> None:
    """Let its owner enter it. Who may enter any, as a keeper of root's does, need not own it."""
    with contextlib.suppress(PermissionError):
        os.chmod(directory, 0o700)


def _delete_files(path: str) -> list[str]:
    """Delete the files in `path`; the directories in it."""
    directories = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.path)
            else:
                os.unlink(entry.path)
    return directories
