"""What an interpreter may say to its keeper: messages that are anything else raise ValueError."""

from __future__ import annotations

import math
from typing import Any

from gtpo.sandbox import frames

_MAX_PIECE_CHARS = 4 * math.ceil(frames.MAX_PIECE_BYTES / 3)


def call_of(message: object) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call of a tool."""
    name, arguments = (message.get("name"), message.get("arguments")) if isinstance(message, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("not a call")
    if fault := frames.fault_of(arguments):
        raise ValueError(f"not {fault}")
    return name, arguments


def answer_of(message: dict[str, Any], op: str) -> dict[str, Any]:
    """The answer to a request of kind `op`: a status, an error, and maybe a line and a piece of a file."""
    if message.get("status") not in ("ok", "error"):
        raise ValueError("not one answer")
    line, value = message.get("line"), message.get("value")
    if not isinstance(message.get("error"), str) or not (line is None or type(line) is int):
        raise ValueError("not an answer")
    if not (value is None or (op == "get" and _is_piece(value))):
        raise ValueError("not an answer")
    return {"line": None, "value": None} | message


def _is_piece(value: object) -> bool:
    """Whether `value` may be bytes of a file in base 64, as many as go into a message."""
    return isinstance(value, str) and len(value) <= _MAX_PIECE_CHARS and value.isascii() and value.isprintable()
