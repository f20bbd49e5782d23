"""Toolbox: order, faults of calls, concurrency between trajectories."""

import asyncio
import threading

import pytest

from gtpo.tools import FunctionTool, Toolbox, calculator
from gtpo.types import ToolCall, ToolResult, ToolStatus

CALCULATE = ToolCall("calculator", {"expression": "1 + 1"})


def test_schemas_keep_the_order_of_the_tools() -> None:
    def other() -> str:
        """Do something else."""
        return ""

    toolbox = Toolbox([FunctionTool(other), FunctionTool(calculator)])
    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["other", "calculator"]


def test_faulty_calls_become_results_beside_good_ones() -> None:
    malformed = ToolCall("calculator", {}, error="expected JSON, got 'x'")
    unknown = ToolCall("calculate", {"expression": "1"})
    unfit = ToolCall("calculator", {"expresion": "1"})
    failing = ToolCall("calculator", {"expression": "1 / 0"})
    results = asyncio.run(Toolbox([FunctionTool(calculator)]).execute([malformed, unknown, unfit, failing, CALCULATE]))
    assert [(result.status, result.text) for result in results] == [
        (ToolStatus.MALFORMED, "expected JSON, got 'x'"),
        (ToolStatus.UNKNOWN_TOOL, "Unknown tool 'calculate'. Known tools: calculator."),
        (
            ToolStatus.ERROR,
            "calculator: missing argument 'expression'; unexpected argument 'expresion', known are expression",
        ),
        (ToolStatus.ERROR, "ZeroDivisionError: division by zero"),
        (ToolStatus.OK, "2"),
    ]
    assert [result.is_invalid_call for result in results] == [True, True, False, False, False]


def test_calls_of_one_turn_run_one_after_another() -> None:
    log: list[str] = []

    async def step(name: str) -> None:
        """Log.

        Args:
            name: What to log.
        """
        log.append(f"{name} starts")
        await asyncio.sleep(0)
        log.append(f"{name} ends")

    calls = [ToolCall("step", {"name": name}) for name in ("a", "b")]
    asyncio.run(Toolbox([FunctionTool(step)]).execute(calls))
    assert log == ["a starts", "a ends", "b starts", "b ends"]


def test_trajectories_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2)

    def meet() -> str:
        """Wait for the other trajectory."""
        meeting.wait(timeout=20)
        return "met"

    async def run() -> list[list[ToolResult]]:
        toolboxes = [Toolbox([FunctionTool(meet, timeout_s=30)]) for _ in range(2)]
        return await asyncio.gather(*(toolbox.execute([ToolCall("meet", {})]) for toolbox in toolboxes))

    assert [results[0].text for results in asyncio.run(run())] == ["met", "met"]


def test_without_tools_every_name_is_unknown() -> None:
    (result,) = asyncio.run(Toolbox([]).execute([CALCULATE]))
    assert (result.status, result.text) == (
        ToolStatus.UNKNOWN_TOOL,
        "Unknown tool 'calculator'. Known tools: none.",
    )


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="tools must have different names, got calculator, calculator"):
        Toolbox([FunctionTool(calculator), FunctionTool(calculator)])
