"""The standard streams of cells: each cell finds them in place, whatever the one before did to them."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any


class CellStreams:
    """Puts stdin, stdout and stderr in place for each cell, and the files `output_fd` or `null_fd` behind them.

    A stream that the last cell has not closed is used again, since to make three takes a thirtieth of a turn.
    """

    def __init__(self, output_fd: int, null_fd: int) -> None:
        self._output_fd = output_fd
        self._null_fd = null_fd
        self._kept: dict[str, io.TextIOWrapper] = {}

    def renew(self, text: str, *, with_stderr: bool) -> None:
        """Have `text` on the standard input, and new output. OSError where there is no room for the text."""
        self._renew_output(1, "stdout", self._output_fd)
        self._renew_output(2, "stderr", self._output_fd if with_stderr else self._null_fd)
        self._renew_input(text)

    def forget(self) -> None:
        """Make all of them anew for the next cell: of a clone, where a thread that it has not may hold their locks."""
        self._kept.clear()

    def flush(self) -> None:
        """Write out what the cell has printed, also where it put something else in place."""
        for name in ("stdout", "stderr"):
            stream, kept = getattr(sys, name, None), self._kept.get(name)
            if stream is not kept:
                _flush(stream)
            if not _flush(kept):
                self._kept.pop(name, None)

    def _renew_output(self, fd: int, name: str, place: int) -> None:
        """Line buffered, so that a killed cell leaves its lines."""
        if name not in self._kept:
            # What it could not write it tries to write at its end: before the file is back.
            setattr(sys, name, None)
        os.dup2(place, fd)
        if name not in self._kept:
            raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
            self._kept[name] = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
        setattr(sys, name, self._kept[name])

    def _renew_input(self, text: str) -> None:
        """A pipe, an unlinked file where that is too small, /dev/null for an empty text."""
        data = text.encode("utf-8", "surrogatepass")
        stream = self._kept.pop("stdin", None)
        if not data:
            os.dup2(self._null_fd, 0)
        elif len(data) <= select.PIPE_BUF:
            read_end, write_end = os.pipe()
            os.write(write_end, data)
            os.close(write_end)
            os.dup2(read_end, 0)
            os.close(read_end)
        else:
            # Not at the top: it brings six libraries, whose mappings would make every fork slower.
            import tempfile

            with tempfile.TemporaryFile(dir=".") as file:
                file.write(data)
                file.seek(0)
                os.dup2(file.fileno(), 0)
        # What was read ahead of other input is no part of this one.
        if data or stream is None or not _is_open(stream):
            stream = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
        sys.stdin = stream
        if not data:
            self._kept["stdin"] = stream


def _is_open(stream: io.TextIOWrapper) -> bool:
    try:
        return not stream.closed
    except ValueError:
        # Its buffer was detached.
        return False


def _flush(stream: Any) -> bool:
    """Whether it could be done: the stream may be closed, or none at all. Its text is lost then."""
    try:
        stream.flush()
    except Exception:
        return False
    return True
