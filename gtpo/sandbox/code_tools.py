"""Tools that code in a session can call as functions: the calls leave through the keeper, the trainer does the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtpo.sandbox import frames

# of an answer: a character may take four bytes, and a JSON escape takes six
_MAX_ANSWER_CHARS = frames.MAX_FRAME_BYTES // 8


@dataclass(frozen=True)
class CodeTools:
    """parameters: for each tool the names of its parameters, in the order in which code may pass them.

    call: does the work; whether it went well, and the text that the code gets or is raised there as a ToolError.
    max_calls: of one cell; the interpreter refuses more, and a cell that makes more in spite of it has crashed.
    """

    parameters: Mapping[str, Sequence[str]]
    call: Callable[[str, Mapping[str, Any]], Awaitable[tuple[bool, str]]]
    max_calls: int = 100


class ToolCalls:
    """The calls of one cell. Where the cell is run again after a fault of the sandbox, what was answered before is
    answered so again, and the tool is not called twice. Of a call no more is kept than tells it from others."""

    def __init__(self, tools: CodeTools | None) -> None:
        self._tools = tools
        self._answered: list[tuple[bytes, dict[str, Any]]] = []
        self._position = 0
        self.num_bytes = 0

    def rewind(self) -> None:
        """The cell starts."""
        self._position = 0

    async def answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What the cell is told."""
        if self._tools is None:
            raise RuntimeError("a cell without tools called one")
        known = hashlib.sha256(json.dumps(call, sort_keys=True).encode()).digest()
        if self._position == len(self._answered) or self._answered[self._position][0] != known:
            del self._answered[self._position :]
            ok, text = await self._tools.call(call["name"], call["arguments"])
            if len(text) > _MAX_ANSWER_CHARS:
                text = f"{text[:_MAX_ANSWER_CHARS]}\n[cut after {_MAX_ANSWER_CHARS} characters]"
            answer = {"ok": ok, "text": text}
            self._answered.append((known, answer))
            self.num_bytes += len(known) + len(text)
        self._position += 1
        return self._answered[self._position - 1][1]
