"""What a tool is, and how its work can end."""

from collections.abc import Mapping
from typing import Any, Protocol

from gtpo.types import ToolResult

# what the model reads where a call gave nothing back: an empty observation looks like a fault of the template
NO_OUTPUT = "(no output)"


def cut_text(text: str, max_chars: int) -> str:
    """`text`, or as much of it as the model is to read, and what was left out.

    >>> cut_text("abcdef", 4)
    'abcd\\n[cut after 4 of 6 characters]'
    """
    return text if len(text) <= max_chars else f"{text[:max_chars]}\n[cut after {max_chars} of {len(text)} characters]"


class ToolTimeout(Exception):
    """Raised by a tool's function whose own deadline ran out: the model reads the message, with status TIMEOUT."""


class ToolUnavailable(Exception):
    """Raised by a tool's function that could not do its work through no fault of the call: a server is down.

    The call is tried again as often as `retries` says; after that its trajectory is lost, and never punished for it.
    """


class Tool(Protocol):
    """Something that the model may call by name.

    schema: the JSON schema of the call, as chat templates take it ({"type": "function", "function": {...}}).
    `call` returns a result for whatever the model passes; it raises only for our own mistakes.
    """

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> Mapping[str, Any]: ...

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult: ...
