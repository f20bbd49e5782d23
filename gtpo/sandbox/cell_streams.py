"""The standard streams of cells: each cell finds them in place, whatever the one before did to them."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

_AT_THE_START = {name: f"__{name}__" for name in ("stdin", "stdout", "stderr")}


class CellStreams:
    """Puts stdin, stdout and stderr in place for each cell, and the files `output_fd` or `null_fd` behind them.

    input_path: the file that is to hold the standard input, empty now; None where there is none but those of a cell.

    A stream that the last cell has not closed is used again, since to make three takes a thirtieth of a turn.
    """

    def __init__(self, output_fd: int, null_fd: int, input_path: str | None = None) -> None:
        self._output_fd = output_fd
        self._null_fd = null_fd
        self._input_path = input_path
        self._has_input = False
        self._kept: dict[str, io.TextIOWrapper] = {}

    def renew(self, text: str | None, *, with_stderr: bool) -> None:
        """Have new output, and `text` on the standard input, or what was added to it. OSError where it has no room."""
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
            _install(name, None)
        os.dup2(place, fd)
        if name not in self._kept:
            raw = io.FileIO(fd, "w", closefd=False)
            self._kept[name] = _named(
                name,
                raw,
                io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True),
            )
        _install(name, self._kept[name])

    def add_input(self, data: bytes, *, first: bool) -> None:
        """Write a piece of what `renew` is to find as the standard input."""
        if first:
            self._open_input()
        while data:
            data = data[os.write(0, data) :]

    def _renew_input(self, text: str | None) -> None:
        """/dev/null for no text; else a file, or where it cannot be one and the text fits, a pipe."""
        stream = self._kept.pop("stdin", None)
        if text == "":
            if self._has_input and self._input_path is not None:
                os.close(os.open(self._input_path, os.O_WRONLY | os.O_TRUNC))
            os.dup2(self._null_fd, 0)
            self._has_input = False
        else:
            if text is not None:
                self._set_input(text.encode("utf-8", "surrogatepass"))
            else:
                os.lseek(0, 0, os.SEEK_SET)
            self._has_input = True
        # What was read ahead of other input is no part of this one.
        if self._has_input or stream is None or not _is_open(stream):
            raw = io.FileIO(0, closefd=False)
            stream = _named("stdin", raw, io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8"))
        _install("stdin", stream)
        if not self._has_input:
            self._kept["stdin"] = stream

    def _set_input(self, data: bytes) -> None:
        fits = len(data) <= select.PIPE_BUF
        if self._input_path is None and fits:
            _put_in_pipe(data)
            return
        try:
            self.add_input(data, first=True)
            os.lseek(0, 0, os.SEEK_SET)
        except OSError:
            # The session has no room for more files.
            if not fits:
                raise
            _put_in_pipe(data)

    def _open_input(self) -> None:
        """Have an empty file at 0."""
        if self._input_path is not None:
            fd = os.open(self._input_path, os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC)
            os.dup2(fd, 0)
            os.close(fd)
            return
        # Not at the top: it brings six libraries, whose mappings would make every fork slower.
        import tempfile

        with tempfile.TemporaryFile(dir=".") as file:
            os.dup2(file.fileno(), 0)


def _install(name: str, stream: io.TextIOWrapper | None) -> None:
    """Have `stream` as sys.NAME, and as what it is said to have been at the start."""
    streams = vars(sys)
    # What is written to is copied, where a clone has it, too.
    for place in (name, _AT_THE_START[name]):
        if stream is None or streams.get(place) is not stream:
            streams[place] = stream


def _put_in_pipe(data: bytes) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    os.dup2(read_end, 0)
    os.close(read_end)


def _named(name: str, raw: io.FileIO, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """`stream` with the attributes that Python gives its standard streams."""
    raw.name = f"<{name}>"
    stream.mode = "r" if name == "stdin" else "w"  # type: ignore[misc]
    return stream


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
