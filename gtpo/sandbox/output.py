"""What a cell has written: the head and the tail of it, and how much."""

from __future__ import annotations

import codecs
import re

# The addresses in default reprs change from run to run. Pointers have 9 to 12 digits on 64 bits.
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{9,16}\b")


class Output:
    """Keeps at most `limit` bytes: the first three quarters of that and the last quarter, in constant memory.

    >>> output = Output(8)
    >>> output.add(b"abcdef"), output.add(b"ghijkl"), output.num_bytes
    (None, None, 12)
    >>> output.text()
    'abcdef\\n[4 of 12 bytes left out]\\nkl'
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head_size = limit - limit // 4
        self._head = b""
        self._tail = b""
        self.num_bytes = 0

    def add(self, data: bytes) -> None:
        """Take what was written next."""
        self.num_bytes += len(data)
        room = self._head_size - len(self._head)
        self._head += data[:room]
        if len(data) > room:
            self._tail = (self._tail + data[room:])[self._head_size - self._limit :]

    @property
    def truncated(self) -> bool:
        """Whether bytes were left out."""
        return self.num_bytes > self._limit

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


def without_addresses(text: str) -> str:
    """`text` with the addresses of default reprs replaced.

    >>> without_addresses("<object object at 0x7f3a5c1b2d40>")
    '<object object at 0x0>'
    """
    return _ADDRESS.sub("at 0x0", text)
