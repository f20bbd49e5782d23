"""What a cell has written: the head and the tail of it, and how much."""

from __future__ import annotations

import codecs
import re

# The addresses in default reprs change from run to run. Pointers have 9 to 12 digits on 64 bits.
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{9,16}\b")


class Output:
    """Keeps at most `limit` bytes: the first three quarters of that and the last quarter, in constant memory.

    `digest` stands for all of them where that is asked for.

    >>> output = Output(8)
    >>> output.add(b"abcdef"), output.add(b"ghijkl"), output.num_bytes
    (None, None, 12)
    >>> output.text()
    'abcdef\\n[4 of 12 bytes left out]\\nkl'
    """

    def __init__(self, limit: int, *, with_digest: bool = False) -> None:
        self._limit = limit
        self._lines = LineDigest() if with_digest else None
        self._head_size = limit - limit // 4
        self._head = b""
        self._tail = b""
        self.num_bytes = 0

    def add(self, data: bytes) -> None:
        """Take what was written next."""
        self.num_bytes += len(data)
        if self._lines is not None:
            self._lines.add(data)
        room = self._head_size - len(self._head)
        self._head += data[:room]
        if len(data) > room:
            self._tail = (self._tail + data[room:])[self._head_size - self._limit :]

    @property
    def truncated(self) -> bool:
        """Whether bytes were left out."""
        return self.num_bytes > self._limit

    @property
    def digest(self) -> str:
        """That of all lines; "" where none was asked for."""
        return "" if self._lines is None else self._lines.text()

    def text(self) -> str:
        """The output as text, other bytes escaped; where some were left out, a line says how many."""
        if not self.truncated:
            return without_addresses((self._head + self._tail).decode("utf-8", "backslashreplace"))
        # Of a character that the cut divides no part is shown.
        head = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode(self._head)
        whole = len(self._tail) if len(self._tail) < 4 else 0
        start = next((i for i, byte in enumerate(self._tail[:4]) if byte & 0xC0 != 0x80), whole)
        tail = self._tail[start:].decode("utf-8", "backslashreplace")
        left_out = self.num_bytes - len(head.encode()) - len(self._tail) + start
        return without_addresses(f"{head}\n[{left_out} of {self.num_bytes} bytes left out]\n{tail}")


class LineDigest:
    """A hash of lines, to which spaces at their ends and empty lines at the end make no difference.

    >>> spaced, plain = LineDigest(), LineDigest()
    >>> spaced.add(b"1 "), spaced.add(b" 2  \\n\\t"), spaced.add(b"3\\r\\n \\n"), plain.add(b"1  2\\n\\t3")
    (None, None, None, None)
    >>> spaced.text() == plain.text()
    True
    """

    # More than this of spaces and empty lines in a row is like nothing else.
    _MAX_SPACE_BYTES = 2**20

    def __init__(self) -> None:
        # Not at the top: its libraries would make every fork slower.
        import hashlib

        self._hash = hashlib.sha256()
        # It may be at an end.
        self._space = b""

    def add(self, data: bytes) -> None:
        """Take what comes next."""
        data = self._space + data
        kept = data.rstrip()
        self._space = data[len(kept) :]
        self._hash.update(b"\n".join(line.rstrip() for line in kept.split(b"\n")))
        if len(self._space) > self._MAX_SPACE_BYTES:
            self._hash.update(b"\n\n " + self._space[: self._MAX_SPACE_BYTES])
            self._space = b""

    def text(self) -> str:
        """The hash of what has come, in hexadecimal."""
        return self._hash.hexdigest()


def digest_of(text: str) -> str:
    """What a result has as its digest where `text` was its whole output."""
    lines = LineDigest()
    lines.add(text.encode("utf-8", "surrogatepass"))
    return lines.text()


def without_addresses(text: str) -> str:
    """`text` with the addresses of default reprs replaced.

    >>> without_addresses("<object object at 0x7f3a5c1b2d40>")
    '<object object at 0x0>'
    """
    return _ADDRESS.sub("at 0x0", text)
