"""What a tool is."""

from collections.abc import Mapping
from typing import Any, Protocol

from gtpo.types import ToolResult

# what the model reads where a call gave nothing back: an empty observation looks like a fault of the template
NO_OUTPUT = "(no output)"


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
