"""Code in the sandbox calls the other tools: values, faults, quotas, clocks, rollback, and hostile code."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from gtpo.assembly import make_sandbox
from gtpo.config import config_from_dict
from gtpo.metrics import tool_metrics
from gtpo.sandbox import SandboxLimits, SandboxPool
from gtpo.tools import TOOL_KINDS, FunctionTool, ToolSet, ToolSource, ToolUnavailable, shared
from gtpo.types import ToolCall, ToolResult, ToolStatus
from tests.trainer.conftest import make_trajectory, make_turn

LIMITS = SandboxLimits(cpu_time_s=1.0, wall_time_s=5.0)
called: list[str] = []
SLOW = {"slow": 0.3, "slower": 2.5}


async def look(word: str, times: int = 1) -> str:
    """Look a word up.

    Args:
        word: Which.
        times: How often to say it.
    """
    called.append(word)
    if word in SLOW:
        await asyncio.sleep(SLOW[word])
    if word == "down":
        raise ToolUnavailable("the library is closed")
    if word == "none":
        raise KeyError(word)
    return f"<{word}>" * times


def look_source(name: str) -> ToolSource:
    return shared(FunctionTool(look, name=name, max_chars=10**5))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    called.clear()
    monkeypatch.setitem(TOOL_KINDS, "look", look_source)


def run_cells(
    codes: Sequence[str],
    *,
    limits: SandboxLimits = LIMITS,
    python: dict[str, object] | None = None,
    disturb: Callable[[SandboxPool], None] = lambda pool: None,
    **tables: dict[str, object],
) -> list[ToolResult]:
    async def run() -> list[ToolResult]:
        tools = ToolSet(["python", "look"], {"python": {"code_mode": True} | (python or {}), **tables})
        async with SandboxPool(limits, min_tier="landlock") as pool:
            session = await pool.open()
            toolbox = tools.toolbox(session)
            results = []
            for code in codes:
                results += await toolbox.execute([ToolCall("python", {"code": code})])
                disturb(pool)
            await session.close()
            return results

    return asyncio.run(run())


def test_tools_are_functions_in_the_code() -> None:
    results = run_cells(["text = look('a', 2)\nprint(text, type(text).__name__)", "print(look(times=1, word=text))"])
    assert [(result.status, result.text) for result in results] == [
        (ToolStatus.OK, "<a><a> str"),
        (ToolStatus.OK, "<<a><a>>"),
    ]
    assert [[(name, inner.status) for name, inner in result.calls] for result in results] == [
        [("look", ToolStatus.OK)]
    ] * 2
    turn = make_turn(code="a")
    turn.results = [results[0]]
    counted = tool_metrics([make_trajectory(turn)], ["python", "look"])
    assert (counted["tools/python/calls"], counted["tools/look/calls"]) == (1, 1)


def test_the_model_reads_what_code_can_call() -> None:
    tools = ToolSet(["python", "look"], {"python": {"code_mode": True}})
    description = tools.schemas[0]["function"]["description"]
    assert description.endswith("The code can call these tools as functions, which return text: look(word, times).")
    assert "look" not in ToolSet(["python", "look"]).schemas[0]["function"]["description"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("look('none')", "ToolError: KeyError: 'none'"),
        ("look(3)", "ToolError: look: argument 'word': input should be a valid string, got 3"),
        ("look()", "ToolError: look: missing argument 'word'"),
        ("look('a', 1, 2)", "TypeError: look() takes 2 arguments (word, times), got 3"),
        ("look('a', word='b')", "TypeError: look() got multiple values for argument 'word'"),
        (
            "look(print)",
            "TypeError: look(): the arguments must be JSON: Object of type builtin",
        ),
        ("look('x' * 10**6)", "ValueError: look(): the arguments cannot be passed on: a frame must have at most"),
        (
            "try:\n    look('none')\nexcept ToolError as error:\n    raise ValueError(str(error))",
            "ValueError: KeyError: 'none'",
        ),
    ],
)
def test_faults_are_raised_in_the_code_which_goes_on(code: str, text: str) -> None:
    failed, after = run_cells([code, "print(look('b'))"])
    assert failed.status is ToolStatus.ERROR and failed.text.startswith(text)
    assert after.text == "<b>"


def test_variables_with_the_name_of_a_tool_are_kept() -> None:
    results = run_cells(["print(look('a'))", "look = 5", "print(look)", "del look\nprint(look('b'))"])
    assert [result.text for result in results] == ["<a>", "(no output)", "5", "<b>"]


def test_a_long_answer_says_that_it_is_cut() -> None:
    (result,) = run_cells(["text = look('a', 10**4)\nprint(text[:16384] == ('<a>' * 10**4)[:16384], text[16384:])"])
    assert result.text == "True \n[cut after 16384 characters]"


@pytest.mark.parametrize("name", ["my-look", "class", "print", "ToolError"])
def test_a_tool_that_code_could_not_call_is_refused(name: str) -> None:
    tables = {"python": {"code_mode": True}, name: {"kind": "look"}}
    with pytest.raises(ValueError, match=rf"tools\.python\.code_mode: a tool.*, got '{name}'"):
        ToolSet(["python", name], tables)
    assert ToolSet(["python", name], tables | {"python": {}}).names == ["python", name]


def test_a_tool_that_is_down_loses_the_trajectory_whatever_the_code_does() -> None:
    (result,) = run_cells(["try:\n    look('down')\nexcept Exception:\n    print('never mind')"])
    assert (result.status, result.text) == (ToolStatus.INFRA_ERROR, "the library is closed")


def test_calls_of_a_cell_and_of_a_trajectory_are_bounded() -> None:
    code = "for i in range(4):\n    try:\n        look(str(i))\n    except ToolError as error:\n        print(i, error)"
    by_cell = run_cells([code] * 2, python={"max_code_calls": 3})
    assert [result.text for result in by_cell] == ["3 no call is left, all 3 of this cell are used"] * 2
    by_task = run_cells([code] * 2, look={"max_calls": 5})
    assert [result.text.count("look: no call is left, all 5") for result in by_task] == [0, 3]
    assert len(called) == 6 + 5


def test_the_time_of_a_tool_is_not_the_cells() -> None:
    (result,) = run_cells(["print(look('slower'))"], limits=SandboxLimits(cpu_time_s=1.0, wall_time_s=2.0))
    assert (result.status, result.text) == (ToolStatus.OK, "<slower>")


def test_a_cell_that_ends_badly_is_rolled_back_and_reads_no_old_answer() -> None:
    results = run_cells(
        [
            "x = 1",
            # the answer comes while nobody reads it
            "import threading\nthreading.Thread(target=look, args=('slow',)).start()\nx = 2\nwhile True: pass",
            "print(x, look('c'))",
            "x = look('d')\nimport os\nos._exit(1)",
            "print(x, look('e'))",
        ],
        limits=SandboxLimits(cpu_time_s=0.2, wall_time_s=5.0),
    )
    assert [result.status for result in results] == [
        ToolStatus.OK,
        ToolStatus.TIMEOUT,
        ToolStatus.OK,
        ToolStatus.CRASH,
        ToolStatus.OK,
    ]
    assert (results[2].text, results[4].text) == ("1 <c>", "1 <e>")


def test_a_cell_that_is_run_again_after_a_fault_calls_no_tool_twice() -> None:
    def kill(pool: SandboxPool) -> None:
        for session in pool._sessions:
            assert session._stream is not None
            session._stream[1].transport.abort()  # type: ignore[attr-defined]

    first, second = run_cells(["text = look('a')", "print(text, look('b'))"], disturb=kill)
    assert (first.status, second.text) == (ToolStatus.OK, "<a> <b>")
    assert called == ["a", "b"]


# code that writes frames of its own to the control channel
FORGER = """
import os, json, struct, time
def send(message):
    data = json.dumps(message).encode()
    os.write(60, struct.pack(">I", len(data)) + data)
"""


@pytest.mark.parametrize(
    "message",
    [
        "{'cell': CELL, 'call': {'name': 'python', 'arguments': {'code': '1'}}}",
        "{'cell': CELL, 'call': {'name': ['look'], 'arguments': {}}}",
        "{'cell': CELL, 'call': {'name': 'look', 'arguments': [1]}}",
        "{'cell': CELL, 'call': None}",
        "{'cell': CELL + 1, 'call': {'name': 'look', 'arguments': {'word': 'a'}}}",
        "{'cell': CELL, 'call': {'name': 'look', 'arguments': {'word': 'slow'}}}); send({'cell': CELL, 'call': "
        "{'name': 'look', 'arguments': {'word': 'a'}}}",
    ],
)
def test_forged_calls_cost_only_the_cell(message: str) -> None:
    forged = FORGER + f"CELL = 2\nsend({message})\ntime.sleep(9)"
    _, bad, after = run_cells(["x = 1", forged, "print(x, look('b'))"])
    assert bad.status is ToolStatus.CRASH and "control channel" in bad.text
    assert after.text == "1 <b>"


def test_without_code_mode_code_calls_nothing() -> None:
    plain, forged = run_cells(
        [
            "try: look\nexcept NameError: print('none')",
            FORGER + "send({'cell': 2, 'call': {'name': 'look', 'arguments': {}}})",
        ],
        python={"code_mode": False},
    )
    assert plain.text == "none" and forged.status is ToolStatus.CRASH and not called


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"tools\.python: max_code_calls must be at least 1, got 0"):
        ToolSet(["python"], {"python": {"max_code_calls": 0}})
    config = config_from_dict({"sandbox": {"adapter": "gtpo.sandbox.adapters.e2b:from_environment"}})
    with pytest.raises(ValueError, match=r"tools\.python\.code_mode needs the sandbox of gtpo"):
        make_sandbox(config, ToolSet(["python", "look"], {"python": {"code_mode": True}}))
