"""The tools of one trajectory."""

from collections.abc import Mapping, Sequence
from typing import Any

from gtpo.tools.base import Tool
from gtpo.types import ToolCall, ToolResult, ToolStatus


class Toolbox:
    """Looks tools up by name and runs calls; a call that no tool can take gets a result, never an exception.

    Raises ValueError for two tools of one name.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        names = [tool.name for tool in tools]
        if len(set(names)) != len(names):
            raise ValueError(f"tools must have different names, got {', '.join(names)}")
        self._tools = {tool.name: tool for tool in tools}

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """The JSON schemas of all tools, in their order."""
        return [tool.schema for tool in self._tools.values()]

    async def execute(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """One result a call. The calls of a turn run one after another, since they share the session's variables."""
        return [await self._execute_one(call) for call in calls]

    async def _execute_one(self, call: ToolCall) -> ToolResult:
        if call.error is not None:
            return ToolResult(ToolStatus.MALFORMED, call.error)
        if call.name not in self._tools:
            known = ", ".join(self._tools) or "none"
            return ToolResult(ToolStatus.UNKNOWN_TOOL, f"Unknown tool '{call.name}'. Known tools: {known}.")
        return await self._tools[call.name].call(call.arguments)
