"""The tools of one trajectory, and what it may ask of them."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtpo.tools.base import Tool
from gtpo.tools.typed import typed
from gtpo.types import ToolCall, ToolResult, ToolStatus

if TYPE_CHECKING:
    from gtpo.sandbox import Session


@dataclasses.dataclass(frozen=True)
class CallLimits:
    """What a trajectory may ask of a tool. All calls of the tools that one source brings are counted together.

    max_calls: calls of one trajectory; None: as many as it has turns for. max_concurrent: calls of all trajectories
    that run at once; None: no bound. retries: how often a call is tried again after a fault of the infrastructure; more
    than 0 only where a call may be made twice. retry_wait_s: seconds before the second attempt, doubled for each more.

    >>> CallLimits(max_calls=0)
    Traceback (most recent call last):
    ValueError: max_calls must be at least 1, got 0
    """

    max_calls: int | None = None
    max_concurrent: int | None = None
    retries: int = 0
    retry_wait_s: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("max_calls", 1), ("max_concurrent", 1), ("retries", 0), ("retry_wait_s", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


class CallGate:
    """Holds one trajectory to the limits of one source of tools. `slots` is shared by all trajectories."""

    def __init__(self, limits: CallLimits, slots: asyncio.Semaphore | None = None) -> None:
        self._limits = limits
        self._slots = slots
        self._num_calls = 0

    async def call(self, tool: Tool, arguments: Mapping[str, Any]) -> ToolResult:
        limits = self._limits
        if limits.max_calls is not None and self._num_calls >= limits.max_calls:
            text = f"{tool.name}: no call is left, all {limits.max_calls} of this task are used. Go on without it."
            return ToolResult(ToolStatus.OVER_QUOTA, text)
        self._num_calls += 1
        started, seconds = time.perf_counter(), 0.0
        for attempt in range(limits.retries + 1):
            if attempt:
                await asyncio.sleep(limits.retry_wait_s * 2 ** (attempt - 1))
            async with self._slots or contextlib.nullcontext():
                result = await tool.call(arguments)
            seconds += result.seconds
            if result.status is not ToolStatus.INFRA_ERROR:
                break
        waited = max(time.perf_counter() - started - seconds, 0.0)
        return dataclasses.replace(result, seconds=seconds, queue_seconds=waited, num_retries=attempt)


class Toolbox:
    """Looks tools up by name and runs calls; a call that no tool can take gets a result, never an exception.

    gates: the gate of a tool, by its name; a tool without one has no limits. session: what the tools run code in,
    closed with the toolbox. Raises ValueError for two tools of one name.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        gates: Mapping[str, CallGate] | None = None,
        *,
        session: "Session | None" = None,
    ) -> None:
        names = [tool.name for tool in tools]
        if len(set(names)) != len(names):
            raise ValueError(f"tools must have different names, got {', '.join(names)}")
        self._tools = {tool.name: tool for tool in tools}
        self._gates = {name: CallGate(CallLimits()) for name in names} | dict(gates or {})
        self._session = session

    def add(self, tool: Tool) -> None:
        """One more tool, without limits, from now on. Raises ValueError for a name that is taken."""
        if tool.name in self._tools:
            raise ValueError(f"tools must have different names, got {tool.name} twice")
        self._tools[tool.name] = tool
        self._gates[tool.name] = CallGate(CallLimits())

    async def close(self) -> None:
        """Ends the session. Closing twice is harmless."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """The JSON schemas of all tools, in their order."""
        return [tool.schema for tool in self._tools.values()]

    @property
    def by_name(self) -> dict[str, Mapping[str, Any]]:
        """The JSON schema of each tool, by its name."""
        return {name: tool.schema for name, tool in self._tools.items()}

    async def execute(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """One result a call. The calls of a turn run one after another, since they share the session's variables."""
        results = [await self._execute_one(call) for call in calls]
        return [dataclasses.replace(result, text=readable(result.text)) for result in results]

    async def _execute_one(self, call: ToolCall) -> ToolResult:
        if call.error is not None:
            return ToolResult(call.fault, call.error)
        if call.name not in self._tools:
            known = ", ".join(self._tools) or "none"
            return ToolResult(ToolStatus.UNKNOWN_TOOL, f"Unknown tool '{call.name}'. Known tools: {known}.")
        tool = self._tools[call.name]
        return await self._gates[call.name].call(tool, typed(call, tool.schema))


def readable(text: str) -> str:
    """`text` as a tokenizer takes it: half a surrogate pair, which JSON can carry, is written out."""
    return text.encode("utf-8", "backslashreplace").decode()
