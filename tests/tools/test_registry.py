"""The tools that a configuration names: kinds, tables of options, faults before any work."""

import asyncio
import json
from pathlib import Path

import pytest

from gtpo.config import config_from_dict
from gtpo.tools import TOOL_KINDS, FunctionTool, ToolSet, ToolSource, shared
from gtpo.types import ToolCall, ToolResult, ToolStatus
from tests.trainer.conftest import play_all, tiny_policy


def shout(text: str) -> str:
    """Say it louder.

    Args:
        text: What to say.
    """
    return text.upper()


def shout_source(name: str, *, mark: str = "!", times: int = 1) -> ToolSource:
    def louder(text: str) -> str:
        """Say it louder.

        Args:
            text: What to say.
        """
        return text.upper() + mark * times

    return shared(FunctionTool(louder, name=name))


def call(tools: ToolSet, name: str, **arguments: object) -> ToolResult:
    (result,) = asyncio.run(tools.toolbox(None).execute([ToolCall(name, arguments)]))
    return result


def test_a_registered_kind_is_offered_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOL_KINDS, "shout", shout_source)
    assert [schema["function"]["name"] for schema in ToolSet(["shout", "python"]).schemas] == ["shout", "python"]
    text = json.dumps({"name": "shout", "arguments": {"text": "four"}})
    (trajectory,) = play_all(
        tiny_policy(), [[f"<tool_call>{text}</tool_call>", "answer: 4"]], call_format="json", tools=("shout",)
    )
    assert trajectory.turns[0].results[0].text == "FOUR!" and trajectory.outcome == 1.0


def test_a_table_names_a_kind_and_gives_it_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOL_KINDS, "shout", shout_source)
    tables = {"loud": {"kind": "shout"}, "louder": {"kind": "shout", "times": 3, "max_calls": 1}}
    config = config_from_dict({"rollout": {"tools": ["loud", "louder"], "call_format": "json"}, "tools": tables})
    tools = ToolSet(config.rollout.tools, config.tools)
    assert tools.names == ["loud", "louder"]
    assert [call(tools, name, text="a").text for name in tools.names] == ["A!", "A!!!"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "shout", "time": 2}, "tools.t: unexpected option 'time', known are mark, times, max_calls, "),
        ({"kind": "shout", "times": "2"}, "tools.t: option 'times': input should be a valid integer, got '2'"),
        ({"kind": "shout", "max_calls": 0}, "tools.t: max_calls must be at least 1, got 0"),
        ({"kind": "shout", "retries": -1}, "tools.t: retries must be at least 0, got -1"),
        ({"kind": "yell"}, "tools.t.kind must be among python, calculator, search, .*; got 'yell'"),
        ({"kind": "python"}, 'tools.t: a tool of kind "python" must be called "python"'),
        ({}, "rollout.tools must be among python, .* or have a table \\[tools.t\\] with \"kind\" among them; got 't'"),
        ({"kind": "search"}, "tools.t: missing option 'corpus'"),
        ({"kind": "search", "corpus": "/nowhere/at.jsonl"}, "tools.t: .*No such file.*'/nowhere/at.jsonl'"),
        ({"kind": "function", "function": "json"}, 'function must be "package.module:name" or "file.py:name"'),
        ({"kind": "function", "function": "json.nowhere:f"}, "'json.nowhere:f' cannot be imported: .*No module"),
        ({"kind": "function", "function": "json:nothing"}, "must name something in json, which has no 'nothing'"),
        ({"kind": "function", "function": "json:dumps"}, "tools.t: fn must "),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, object], message: str
) -> None:
    monkeypatch.setitem(TOOL_KINDS, "shout", shout_source)
    with pytest.raises(ValueError, match=message):
        ToolSet(["calculator", "t"], {"t": table})


def test_a_table_that_is_not_offered_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tools\.sql is not offered: rollout\.tools must hold 'sql', got \['python'\]"
    ):
        ToolSet(["python"], {"sql": {"database": "a.db"}})


def test_tools_of_one_name_are_refused_and_what_was_built_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def twin_source(name: str) -> ToolSource:
        async def close() -> None:
            closed.append(name)

        return shared(FunctionTool(shout, name="twin"), close=close)

    monkeypatch.setitem(TOOL_KINDS, "a", twin_source)
    monkeypatch.setitem(TOOL_KINDS, "b", twin_source)
    with pytest.raises(ValueError, match="tools must have different names, got twin twice"):
        ToolSet(["a", "b"])
    assert closed == ["a", "b"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"tools\.search: search needs the package bm25s, .* 'gtpo\[tools\]'"):
        ToolSet(["search"], {"search": {"corpus": str(tmp_path)}})


def test_a_cell_is_not_run_twice_by_the_tool() -> None:
    with pytest.raises(ValueError, match=r"tools\.python: retries must be 0, since the sandbox itself tries"):
        ToolSet(["python"], {"python": {"retries": 1}})


def test_only_python_needs_a_session() -> None:
    python = ToolSet(["python"])
    assert (python.needs_session, ToolSet(["calculator"]).needs_session) == (True, False)
    with pytest.raises(ValueError, match='"python" needs a session in a sandbox, got none'):
        python.toolbox(None)


def test_a_function_of_a_module_or_a_file_is_a_tool(tmp_path: Path) -> None:
    path = tmp_path / "louder.py"
    path.write_text(
        "def whisper(text: str) -> str:\n"
        '    """Say it softly.\n\n    Args:\n        text: What to say.\n    """\n'
        "    return text.lower()\n"
    )
    tables = {
        "shout": {"kind": "function", "function": "tests.tools.test_registry:shout"},
        "soft": {"kind": "function", "function": f"{path}:whisper", "timeout_s": 2},
    }
    tools = ToolSet(list(tables), tables)
    assert tools.schemas[1]["function"]["description"] == "Say it softly."
    assert call(tools, "shout", text="Four").text == "FOUR"
    assert call(tools, "soft", text="Four").text == "four"
    assert call(tools, "soft", txt="Four").status is ToolStatus.ERROR
