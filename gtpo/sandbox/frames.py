"""Length-prefixed JSON: a 4-byte big-endian length, then UTF-8 that also carries lone surrogates."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

# One frame must fit in the default send buffer of a Unix socket (208 KiB), because the keeper never waits for
# an interpreter that does not read.
MAX_FRAME_BYTES = 128 * 1024
# Bytes of a file in one message: in base 64 they fit into a frame.
MAX_PIECE_BYTES = 64 * 1024
# Of lists and objects in what a cell passes to a tool, and of numbers in it: Python reads no more than 4300 digits.
MAX_LEVELS, _MAX_BITS = 64, 14_000
HEADER = struct.Struct(">I")
# Bound here, so that a cell that replaces json.dumps in its interpreter does not break its own answers.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_from_json = json.JSONDecoder().raw_decode


def encode(message: dict[str, Any]) -> bytes:
    """`message` as one frame; ValueError when it is longer than MAX_FRAME_BYTES.

    >>> encode({"a": 1})
    b'\\x00\\x00\\x00\\x07{"a":1}'
    """
    return enclose(_to_json(message).encode("utf-8", "surrogatepass"))


def enclose(body: bytes) -> bytes:
    """The JSON `body` as one frame; ValueError when it is longer than MAX_FRAME_BYTES."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame must have at most {MAX_FRAME_BYTES} bytes, got {len(body)}")
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    """The message of a frame without its header; ValueError for anything but a JSON object."""
    try:
        text = body.decode("utf-8", "surrogatepass")
        message, end = _from_json(text)
    except RecursionError:
        raise ValueError("frame nested too deeply") from None
    if end != len(text):
        raise ValueError(f"a frame must hold one JSON object, got {len(text) - end} more characters")
    if not isinstance(message, dict):
        raise ValueError(f"a frame must hold a JSON object, got {type(message).__name__}")
    return message


def body_length(header: bytes) -> int:
    """The length that `header` announces; ValueError when it is more than MAX_FRAME_BYTES."""
    length: int = HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame must have at most {MAX_FRAME_BYTES} bytes, got {length}")
    return length


def read_frame(receive: Callable[[int], bytes]) -> dict[str, Any]:
    """The next message from a blocking `receive(num_bytes)`; EOFError at the end of the stream."""
    return decode(_exactly(receive, body_length(_exactly(receive, HEADER.size))))


def fault_of(arguments: object, levels: int = MAX_LEVELS) -> str | None:
    """What arguments of a tool must have, since they have it not: the trainer could not decode them. Else None.

    >>> fault_of({"a": [1]}, 2), fault_of({"a": [[]]}, 2)
    (None, 'at most 64 levels')
    >>> fault_of({"a": 10**5000})
    'integers of at most 14000 bits'
    """
    if isinstance(arguments, int) and arguments.bit_length() > _MAX_BITS:
        return f"integers of at most {_MAX_BITS} bits"
    if not isinstance(arguments, list | tuple | dict):
        return None
    if not levels:
        return f"at most {MAX_LEVELS} levels"
    inner = arguments.values() if isinstance(arguments, dict) else arguments
    return next(filter(None, (fault_of(item, levels - 1) for item in inner)), None)


def _exactly(receive: Callable[[int], bytes], count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = receive(count - len(data))
        if not piece:
            raise EOFError("the other end closed the stream")
        data += piece
    return data
