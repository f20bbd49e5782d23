"""Tools of an MCP server, which runs beside the trainer and is trusted; the model's calls of it are not.

Source of the protocol: modelcontextprotocol.io. The package mcp speaks it; here its client lives on an event loop
of its own thread, so that it serves whatever loop a rollout runs in, and can be started before there is one.
"""

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtpo.tools.base import NO_OUTPUT, cut_text
from gtpo.tools.json_schema import SchemaCheck, call_schema
from gtpo.tools.source import ToolSource, optional_package
from gtpo.types import ToolResult, ToolStatus

# a server may import for a long time before it answers
_START_TIMEOUT_S = 60.0


class McpServer:
    """One server process, started here and again after it died. `call` serves any event loop.

    Raises OSError where the command cannot be run, ValueError where what it starts does not speak the protocol.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stderr: Path | None) -> None:
        self._mcp = optional_package("mcp", tool="mcp")
        self._command, self._env = list(command), dict(env)
        self._resources = contextlib.ExitStack()
        self._errors = self._resources.enter_context(open(stderr or os.devnull, "a"))  # noqa: SIM115
        portals = optional_package("anyio.from_thread", tool="mcp")
        self._portal = self._resources.enter_context(portals.start_blocking_portal())
        self._starting = asyncio.Lock()
        self._connection = contextlib.ExitStack()
        try:
            self._client = self._connect()
        except BaseException:
            self._resources.close()
            raise

    def _connect(self) -> Any:
        parameters = self._mcp.StdioServerParameters(command=self._command[0], args=self._command[1:], env=self._env)
        transport = self._mcp.stdio_client(parameters, errlog=self._errors)
        client = self._mcp.Client(transport, read_timeout_seconds=_START_TIMEOUT_S)
        try:
            return self._connection.enter_context(self._portal.wrap_async_context_manager(client))
        except (self._mcp.MCPError, ExceptionGroup) as error:
            raise ValueError(f"{self._command} does not answer as an MCP server: {_cause(error)}") from error

    def tools(self) -> list[Any]:
        """What the server offers, in its order."""
        found: list[Any] = []
        cursor = None
        while True:
            page = self._portal.call(functools.partial(self._client.list_tools, cursor=cursor))
            found += page.tools
            if not (cursor := page.next_cursor):
                return found

    async def ready(self) -> None:
        """Start the server again where it died. Raises ConnectionError where that fails."""
        async with self._starting:
            if self._client is None:
                await asyncio.to_thread(self._disconnect)
                try:
                    self._client = await asyncio.to_thread(self._connect)
                except (ValueError, OSError) as error:
                    raise ConnectionError(str(error)) from error

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """The server's result. Raises ConnectionError where it died, until it is `ready` again."""
        client = self._client
        if client is None:
            raise ConnectionError("the MCP server ended")
        try:
            return await asyncio.wrap_future(self._portal.start_task_soon(client.call_tool, name, dict(arguments)))
        except self._mcp.MCPError as error:
            if error.code != self._mcp.types.CONNECTION_CLOSED:
                raise ValueError(error.message) from None
            if self._client is client:
                self._client = None
            raise ConnectionError("the MCP server ended") from None

    def _disconnect(self) -> None:
        # the connection is broken: what its end has to say is known
        with contextlib.suppress(Exception):
            self._connection.close()

    def stop(self) -> None:
        """End the server and the thread of the client; blocks until both are gone."""
        self._disconnect()
        self._resources.close()

    async def close(self) -> None:
        """`stop`, beside the event loop."""
        await asyncio.to_thread(self.stop)


class McpTool:
    """One tool of a server. Arguments are checked here, so that a bad call costs no request."""

    def __init__(self, server: McpServer, name: str, offered: Any, *, max_chars: int, timeout_s: float) -> None:
        self.name = name
        self.schema = call_schema(name, offered.description or "", offered.input_schema)
        self._check = SchemaCheck(name, offered.input_schema)
        self._server = server
        self._remote_name = offered.name
        self._max_chars = max_chars
        self._timeout_s = timeout_s

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            parsed = self._check.parse(arguments)
        except ValueError as fault:
            return ToolResult(ToolStatus.ERROR, str(fault))
        started = time.perf_counter()
        try:
            await self._server.ready()
            async with asyncio.timeout(self._timeout_s):
                result = await self._server.call(self._remote_name, parsed)
            status = ToolStatus.ERROR if result.is_error else ToolStatus.OK
            text = self._text_of(result)
        except TimeoutError:
            status, text = ToolStatus.TIMEOUT, f"TimeoutError: {self.name} took longer than {self._timeout_s:g} seconds"
        except ConnectionError as error:
            status, text = ToolStatus.INFRA_ERROR, f"{self.name}: {error}"
        except ValueError as error:
            status, text = ToolStatus.ERROR, f"{self.name}: {error}"
        return ToolResult(status, text, seconds=time.perf_counter() - started)

    def _text_of(self, result: Any) -> str:
        parts = [part.text if part.type == "text" else f"[{part.type}, which is not text]" for part in result.content]
        if not parts and result.structured_content is not None:
            parts = [json.dumps(result.structured_content, ensure_ascii=False)]
        return cut_text("\n".join(parts), self._max_chars) or NO_OUTPUT


def mcp_source(
    name: str,
    *,
    command: tuple[str, ...],
    only: tuple[str, ...] | None = None,
    env: dict[str, str] | None = None,
    stderr: Path | None = None,
    max_chars: int = 4000,
    timeout_s: float = 20.0,
) -> ToolSource:
    """Tools of kind "mcp": those of the server that `command` starts, called "NAME_TOOL". All trajectories share it.

    only: the server's names of those to offer; left out: all. env: variables that the server gets beside PATH, HOME and
    the like. stderr: a file that its stderr is appended to; left out: nothing is kept. max_chars: of a result, the rest
    is cut off. timeout_s: of a call.
    """
    if not command:
        raise ValueError("command must name a program, got none")
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, got {max_chars}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    server = McpServer(command, env=env or {}, stderr=stderr)
    try:
        offered = {tool.name: tool for tool in server.tools()}
        if unknown := [tool for tool in only or () if tool not in offered]:
            raise ValueError(f"only must name tools of the server ({', '.join(offered)}), got {', '.join(unknown)}")
        tools = [
            McpTool(server, f"{name}_{tool}", offered[tool], max_chars=max_chars, timeout_s=timeout_s)
            for tool in (offered if only is None else only)
        ]
        if not tools:
            raise ValueError("the server must offer a tool, got none")
    except BaseException:
        server.stop()
        raise
    return ToolSource([tool.schema for tool in tools], lambda _: tools, close=server.close)


def _cause(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
