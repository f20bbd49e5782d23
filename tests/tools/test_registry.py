"""The tools that a configuration can name."""

import json

import pytest

from gtpo.rollout import offered_schemas
from gtpo.tools import TOOLS, FunctionTool, ToolFactory, named_tools
from tests.trainer.conftest import play_all, tiny_policy


def shout(text: str) -> str:
    """Say it louder.

    Args:
        text: What to say.
    """
    return text.upper()


def test_a_registered_tool_is_offered_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, "shout", ToolFactory(lambda: FunctionTool(shout).schema, lambda _: FunctionTool(shout)))
    assert [schema["function"]["name"] for schema in offered_schemas(["shout", "python"])] == ["shout", "python"]  # type: ignore[index]
    call = json.dumps({"name": "shout", "arguments": {"text": "four"}})
    (trajectory,) = play_all(
        tiny_policy(), [[f"<tool_call>{call}</tool_call>", "answer: 4"]], call_format="json", tools=("shout",)
    )
    assert trajectory.turns[0].results[0].text == "FOUR" and trajectory.outcome == 1.0


def test_only_python_needs_a_session() -> None:
    python, calculator = named_tools(["python", "calculator"])
    assert (python.needs_session, calculator.needs_session) == (True, False)
    assert calculator.make(None).name == "calculator"
    with pytest.raises(ValueError, match='"python" needs a session in a sandbox, got none'):
        python.make(None)
