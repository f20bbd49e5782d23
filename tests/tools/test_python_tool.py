"""The python tool: what the model reads of each way that a cell can end."""

import asyncio
from collections.abc import Sequence

import pytest

from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SandboxPool, SessionState
from gtpo.tools import FunctionTool, PythonTool, Toolbox, calculator, python_schema
from gtpo.tools.python import observation_of
from gtpo.types import ToolCall, ToolResult, ToolStatus

LOST = "The interpreter was restarted: all variables are lost."
ROLLED_BACK = "All variables are as they were before this call."


def run_cells(codes: Sequence[str], setup_code: str = "", limits: SandboxLimits | None = None) -> list[ToolResult]:
    async def run() -> list[ToolResult]:
        async with SandboxPool(limits, min_tier="landlock") as pool:
            toolbox = Toolbox([PythonTool(await pool.open(setup_code)), FunctionTool(calculator)])
            return await toolbox.execute([ToolCall("python", {"code": code}) for code in codes])

    return asyncio.run(run())


def test_schema() -> None:
    function = python_schema()["function"]
    assert function["name"] == PythonTool.name == "python"
    assert function["parameters"]["required"] == ["code"]
    assert function["parameters"]["properties"]["code"]["type"] == "string"


def test_cells_share_variables_and_the_setup_code() -> None:
    results = run_cells(["x = double(3)", "print(x)\nprint(x + 1)"], setup_code="def double(n):\n    return 2 * n")
    assert [(result.status, result.text) for result in results] == [
        (ToolStatus.OK, "(no output)"),
        (ToolStatus.OK, "6\n7"),
    ]
    assert all(result.seconds > 0 for result in results)


def test_an_error_follows_the_output_and_keeps_the_variables() -> None:
    results = run_cells(["x = 5\nprint('before')\n1 / 0", "print(x)", "x ="])
    assert [(result.status, result.text) for result in results[:2]] == [
        (ToolStatus.ERROR, "before\nZeroDivisionError: division by zero"),
        (ToolStatus.OK, "5"),
    ]
    assert results[2].status is ToolStatus.ERROR
    assert results[2].text.startswith("SyntaxError: invalid syntax")


def test_timeout_and_crash_say_that_the_variables_are_as_before() -> None:
    codes = ["x = 1\nwhile True: pass", "print('x' in globals(), base)", "import os; os._exit(3)", "print(base)"]
    results = run_cells(codes, setup_code="base = 7", limits=SandboxLimits(cpu_time_s=0.2))
    assert [result.status for result in results] == [
        ToolStatus.TIMEOUT,
        ToolStatus.OK,
        ToolStatus.CRASH,
        ToolStatus.OK,
    ]
    for result in (results[0], results[2]):
        explanation, _, last = result.text.rpartition("\n")
        assert explanation and last == ROLLED_BACK
    assert [results[1].text, results[3].text] == ["False 7", "7"]


def test_long_output_is_marked_as_cut() -> None:
    (result,) = run_cells(["print('x' * 5000)"], limits=SandboxLimits(output_bytes=1000))
    assert result.status is ToolStatus.OK
    assert result.text == "x" * 750 + "\n[4001 of 5001 bytes left out]\n" + "x" * 249


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "python: missing argument 'code'"),
        ({"code": 3}, "python: argument 'code': input should be a valid string, got 3"),
        ({"code": "1", "language": "c"}, "python: unexpected argument 'language', known are code"),
    ],
)
def test_bad_arguments_run_nothing(arguments: dict[str, object], message: str) -> None:
    async def run() -> list[ToolResult]:
        async with SandboxPool(min_tier="landlock") as pool:
            toolbox = Toolbox([PythonTool(await pool.open())])
            calls = [ToolCall("python", arguments), ToolCall("python", {"code": "print(__cell__)"})]
            return await toolbox.execute(calls)

    bad, good = asyncio.run(run())
    assert (bad.status, bad.text) == (ToolStatus.ERROR, message)
    assert good.text == "1"


class OneResult:
    """A session whose cells all end in the same way."""

    def __init__(self, result: CellResult) -> None:
        self.result = result

    async def run(self, code: str) -> CellResult:
        return self.result


@pytest.mark.parametrize("status", CellStatus)
def test_every_cell_status_is_a_tool_status(status: CellStatus) -> None:
    session = OneResult(CellResult(status, error="sandbox failure: fork", wall_time_s=0.25, state=SessionState.LOST))
    result = asyncio.run(PythonTool(session).call({"code": ""}))  # type: ignore[arg-type]
    assert result == ToolResult(ToolStatus(status.value), f"sandbox failure: fork\n{LOST}", seconds=0.25)


def test_observation_keeps_the_order_of_events() -> None:
    cell = CellResult(CellStatus.CRASH, stdout=" a\n\n", error="killed by signal 9\n", state=SessionState.LOST)
    assert observation_of(cell) == f" a\nkilled by signal 9\n{LOST}"
    assert observation_of(CellResult(CellStatus.OK, stdout="\n \n")) == "(no output)"
