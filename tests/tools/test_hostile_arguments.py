"""Whatever a model passes, every tool gives a result that the model can read: nothing raises, nothing is masked."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gtpo.sandbox import CellResult, CellStatus
from gtpo.tools import TOOL_KINDS, FunctionTool, PythonTool, Tool, Toolbox, ToolSet, shared
from gtpo.tools.mcp_client import McpServer, McpTool
from gtpo.types import ToolCall, ToolStatus
from tests.tools.test_http_api import Api


def echo(text: str, places: list[tuple[float, int]], how: Literal["up", "down"], more: dict[str, int | None]) -> str:
    """Say it all again.

    Args:
        text: A text.
        places: Some places.
        how: In which way.
        more: What else.
    """
    return f"{text} {places} {how} {more}"


class Session:
    """Runs nothing."""

    async def run(self, code: str) -> CellResult:
        return CellResult(CellStatus.OK, stdout=code.encode("utf-8", "backslashreplace").decode())

    async def close(self) -> None:
        """Holds nothing."""


class Server(McpServer):
    """Says what it was asked, without a process."""

    def __init__(self) -> None:
        """Starts nothing."""

    async def ready(self) -> None:
        """Always is."""

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        content = [SimpleNamespace(type="text", text=str(arguments))]
        return SimpleNamespace(is_error=False, content=content, structured_content=None)


SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}, "any": {}}, "required": ["text"]}
Call = Callable[[str, Mapping[str, Any]], Any]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "ulm.txt").write_text("The minster of Ulm.")
    with contextlib.closing(sqlite3.connect(folder / "a.db")) as connection:
        connection.execute("CREATE TABLE city (name TEXT)")
    names = ["calculator", "search", "sql", "web", "echo"]
    with (
        pytest.MonkeyPatch.context() as patch,
        ThreadingHTTPServer(("127.0.0.1", 0), Api) as server,
        asyncio.Runner() as runner,
    ):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        patch.setitem(TOOL_KINDS, "echo", lambda name: shared(FunctionTool(echo, name=name, timeout_s=60.0)))
        tools = ToolSet(names, tables(folder, f"http://127.0.0.1:{server.server_address[1]}/api"))
        offered = SimpleNamespace(name="say", description="Say.", input_schema=SCHEMA)
        others: list[Tool] = [
            PythonTool(Session()),
            McpTool(Server(), "mcp_say", offered, max_chars=100, timeout_s=60.0),
        ]
        toolbox = Toolbox([*tools.toolbox(None)._tools.values(), *others])
        yield lambda name, arguments: runner.run(toolbox.execute([ToolCall(name, arguments)]))[0]
        runner.run(tools.close())
        server.shutdown()


def tables(folder: Path, url: str) -> dict[str, dict[str, Any]]:
    parameters = {"text": {"type": "string"}, "any": {"required": False}}
    endpoints = {
        "path": {"path": "/{text}", "description": "It.", "parameters": parameters},
        "body": {"path": "/x", "description": "It.", "method": "POST", "parameters": parameters},
    }
    return {
        "search": {"corpus": str(folder / "corpus"), "timeout_s": 60.0},
        "sql": {"database": str(folder / "a.db"), "timeout_s": 60.0},
        "web": {"kind": "http_api", "base_url": url, "endpoints": endpoints, "timeout_s": 60.0},
    }


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


TEXTS = st.one_of(
    # half a surrogate pair can be written in JSON
    st.text(st.characters(), max_size=8),
    st.sampled_from(["", "\ud800", "\0", "..", "x" * 70_000, "(" * 5000, "SELECT '\ud800'", "minster", "9**9**9"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just(10**4000))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
# as deep as the parser of a call takes
DEEP = st.sampled_from([150, 900]).map(nested)
NAMES = st.sampled_from(["expression", "query", "text", "any", "places", "how", "more", "code"]) | TEXTS
ARGUMENTS = st.dictionaries(NAMES, VALUES | DEEP, max_size=4)
TOOLS = ["calculator", "search", "sql", "web_path", "web_body", "echo", "python", "mcp_say"]
PARAMETER = {"calculator": "expression", "search": "query", "sql": "query", "python": "code"}


@pytest.mark.parametrize("name", [*TOOLS, "none such \ud800"])
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=ARGUMENTS, value=TEXTS | VALUES | DEEP, alone=st.booleans())
def test_no_arguments_raise_or_are_called_a_fault_of_the_infrastructure(
    call: Call, name: str, arguments: dict[str, Any], value: Any, alone: bool
) -> None:
    passed = {PARAMETER.get(name, "text"): value} | ({} if alone else arguments)
    result = call(name, passed)
    assert result.status in (ToolStatus.OK, ToolStatus.ERROR, ToolStatus.UNKNOWN_TOOL)
    # as the tokenizer will do
    result.text.encode()
