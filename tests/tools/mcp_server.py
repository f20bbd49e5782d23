"""A small MCP server on stdin and stdout, for test_mcp.py."""

import asyncio
import os
import sys

from mcp.server import MCPServer

server = MCPServer("test", log_level="CRITICAL")
calls = 0


@server.tool()
def add(first: int, second: int = 1) -> int:
    """Add two numbers."""
    return first + second


@server.tool()
def count() -> str:
    """Count the calls of this process."""
    global calls
    calls += 1
    return f"call {calls} with {os.environ.get('GREETING', 'nothing')}"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no luck")


@server.tool()
def die() -> str:
    """End the process."""
    print("dying", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
async def hang() -> str:
    """Never answer."""
    await asyncio.Event().wait()
    return ""


@server.tool()
def flood(length: int) -> str:
    """Say a lot."""
    return "x" * length


if __name__ == "__main__":
    server.run("stdio")
