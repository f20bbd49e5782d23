"""Tools of an MCP server that runs as a process of its own."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gtpo.tools import ToolSet
from gtpo.types import ToolCall, ToolResult, ToolStatus

COMMAND = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def table(**options: Any) -> dict[str, Any]:
    return {"kind": "mcp", "command": COMMAND, **options}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolSet]:
    """One server for all tests: starting it takes a second."""
    stderr = tmp_path_factory.mktemp("mcp") / "stderr.txt"
    options = {"env": {"GREETING": "hello"}, "stderr": str(stderr), "max_chars": 50, "timeout_s": 60.0, "retries": 1}
    built = ToolSet(["m"], {"m": table(**options)})
    yield built
    asyncio.run(built.close())
    assert "dying" in stderr.read_text()


def run_calls(tools: ToolSet, *calls: ToolCall) -> list[ToolResult]:
    return asyncio.run(tools.toolbox(None).execute(calls))


def test_the_servers_tools_are_offered_under_the_tables_name(tools: ToolSet) -> None:
    assert tools.names == ["m_add", "m_count", "m_fail", "m_die", "m_hang", "m_flood"]
    function = tools.schemas[0]["function"]
    assert function["description"] == "Add two numbers."
    assert function["parameters"]["required"] == ["first"]


def test_calls(tools: ToolSet) -> None:
    results = run_calls(
        tools,
        ToolCall("m_add", {"first": 2, "second": 3}),
        ToolCall("m_count", {}),
        ToolCall("m_fail", {}),
        ToolCall("m_flood", {"length": 60}),
        ToolCall("m_flood", {"length": 0}),
    )
    assert [(result.status, result.text) for result in results] == [
        (ToolStatus.OK, "5"),
        (ToolStatus.OK, "call 1 with hello"),
        (ToolStatus.ERROR, "Error executing tool fail"),
        (ToolStatus.OK, "x" * 50 + "\n[cut after 50 of 60 characters]"),
        (ToolStatus.OK, "(no output)"),
    ]
    assert all(result.seconds > 0 for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "m_add: missing argument 'first'"),
        ({"first": "2"}, "m_add: argument 'first': '2' is not of type 'integer'"),
    ],
)
def test_bad_arguments_are_not_sent(tools: ToolSet, arguments: dict[str, Any], message: str) -> None:
    (result,) = run_calls(tools, ToolCall("m_add", arguments))
    assert (result.status, result.text) == (ToolStatus.ERROR, message)


def test_a_server_that_ends_is_started_again(tools: ToolSet) -> None:
    died, counted = run_calls(tools, ToolCall("m_die", {}), ToolCall("m_count", {}))
    # the second attempt reached a new process, and ended that too
    assert (died.status, died.num_retries, died.text) == (ToolStatus.INFRA_ERROR, 1, "m_die: the MCP server ended")
    assert (counted.status, counted.text) == (ToolStatus.OK, "call 1 with hello")


def test_a_call_that_hangs_times_out_beside_others(tools: ToolSet, monkeypatch: pytest.MonkeyPatch) -> None:
    toolbox = tools.toolbox(None)
    monkeypatch.setattr(toolbox._tools["m_hang"], "_timeout_s", 0.1)

    async def run() -> list[list[ToolResult]]:
        calls = [ToolCall("m_hang", {}), ToolCall("m_add", {"first": 1})]
        return await asyncio.gather(*(tools.toolbox(None).execute([call]) for call in calls))

    ((hung,), (added,)) = asyncio.run(run())
    assert (hung.status, hung.text) == (ToolStatus.TIMEOUT, "TimeoutError: m_hang took longer than 0.1 seconds")
    assert (added.status, added.text) == (ToolStatus.OK, "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": []}, "command must name a program, got none"),
        ({"command": ["/nowhere/at/all"]}, "No such file or directory"),
        ({"command": [sys.executable, "-c", "print('hello')"]}, "does not answer as an MCP server"),
        ({"only": ["add", "subtract"]}, r"only must name tools of the server \(add, .*\), got subtract"),
        ({"max_chars": 0}, "max_chars must be at least 1, got 0"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"tools.m: .*{message}"):
        ToolSet(["m"], {"m": table(**options)})
