"""Quotas, slots, retries, and what they leave in the metrics."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from gtpo.metrics import tool_metrics
from gtpo.tools import CallGate, CallLimits, FunctionTool, Toolbox, ToolSet, ToolTimeout, ToolUnavailable
from gtpo.types import ToolCall, ToolResult, ToolStatus
from tests.trainer.conftest import make_trajectory, make_turn


class Scripted:
    """A tool whose calls end as listed, one after another."""

    name = "scripted"
    schema: Mapping[str, Any] = {}

    def __init__(self, *results: ToolResult) -> None:
        self.results = list(results)

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        return self.results.pop(0)


FAULT = ToolResult(ToolStatus.INFRA_ERROR, "down", seconds=1.0)
GOOD = ToolResult(ToolStatus.OK, "up", seconds=0.5)
SLOW = ToolResult(ToolStatus.TIMEOUT, "slow")


def test_each_trajectory_has_its_own_quota() -> None:
    tools = ToolSet(["calculator"], {"calculator": {"max_calls": 2}})
    calls = [ToolCall("calculator", {"expression": text}) for text in ("1", "1 /", "3")]

    async def run() -> list[list[ToolResult]]:
        return [await tools.toolbox(None).execute(calls) for _ in range(2)]

    for results in asyncio.run(run()):
        # a call with a fault counts like any other
        assert [result.status for result in results] == [ToolStatus.OK, ToolStatus.ERROR, ToolStatus.OVER_QUOTA]
        assert results[2].text == "calculator: no call is left, all 2 of this task are used. Go on without it."
        assert not results[2].is_invalid_call


@pytest.mark.parametrize(
    ("retries", "results", "status", "num_retries", "seconds"),
    [
        (0, [FAULT, GOOD], ToolStatus.INFRA_ERROR, 0, 1.0),
        (2, [FAULT, GOOD], ToolStatus.OK, 1, 1.5),
        (2, [FAULT, FAULT, FAULT, GOOD], ToolStatus.INFRA_ERROR, 2, 3.0),
        # the model's own faults are its to see
        (2, [SLOW, GOOD], ToolStatus.TIMEOUT, 0, 0.0),
    ],
)
def test_only_faults_of_the_infrastructure_are_tried_again(
    retries: int, results: list[ToolResult], status: ToolStatus, num_retries: int, seconds: float
) -> None:
    gate = CallGate(CallLimits(retries=retries, retry_wait_s=0.0, max_calls=1))
    result = asyncio.run(gate.call(Scripted(*results), {}))
    assert (result.status, result.num_retries, result.seconds) == (status, num_retries, seconds)


def test_slots_are_shared_by_all_trajectories_and_waiting_is_told_apart() -> None:
    running, most = 0, 0
    both = asyncio.Event()

    async def work() -> str:
        """Work."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            both.set()
        # three calls, two slots: the third comes when one of these has left
        await both.wait()
        running -= 1
        return "done"

    async def run() -> list[list[ToolResult]]:
        slots = asyncio.Semaphore(2)
        tool = FunctionTool(work)
        boxes = [Toolbox([tool], {"work": CallGate(CallLimits(max_concurrent=2), slots)}) for _ in range(3)]
        return await asyncio.gather(*(box.execute([ToolCall("work", {})]) for box in boxes))

    results = [result for (result,) in asyncio.run(run())]
    assert most == 2 and [result.text for result in results] == ["done"] * 3
    assert all(result.queue_seconds >= 0 for result in results)


def test_a_function_says_how_its_call_ended() -> None:
    def ends(how: str) -> str:
        """End.

        Args:
            how: In which way.
        """
        raise {"late": ToolTimeout, "down": ToolUnavailable, "wrong": KeyError}[how](f"it is {how}")

    async def run() -> list[ToolResult]:
        return await Toolbox([FunctionTool(ends)]).execute(
            [ToolCall("ends", {"how": h}) for h in ("late", "down", "wrong")]
        )

    assert [(result.status, result.text) for result in asyncio.run(run())] == [
        (ToolStatus.TIMEOUT, "it is late"),
        (ToolStatus.INFRA_ERROR, "it is down"),
        (ToolStatus.ERROR, "KeyError: 'it is wrong'"),
    ]


def test_metrics_of_each_tool() -> None:
    turn = make_turn(code="a")
    turn.calls = [ToolCall(name, {}) for name in ("search", "search", "search", "sql", "shell", "search")]
    turn.results = [
        ToolResult(ToolStatus.OK, "", seconds=1.0, queue_seconds=0.5),
        ToolResult(ToolStatus.TIMEOUT, "", seconds=3.0),
        ToolResult(ToolStatus.OVER_QUOTA, ""),
        ToolResult(ToolStatus.OK, "", seconds=0.25, num_retries=2),
        ToolResult(ToolStatus.UNKNOWN_TOOL, ""),
        ToolResult(ToolStatus.MALFORMED, ""),
    ]
    metrics = tool_metrics([make_trajectory(turn), make_trajectory(make_turn())], ["search", "sql", "python"])
    names = ("calls", "failures", "timeouts", "retries", "latency_mean_s", "latency_max_s", "queue_mean_s")
    assert {name: [metrics.pop(f"tools/{name}/{key}") for key in names] for name in ("search", "sql", "python")} == {
        "search": [3.0, 2.0, 1.0, 0.0, pytest.approx(4 / 3), 3.0, pytest.approx(0.5 / 3)],
        "sql": [1.0, 0.0, 0.0, 2.0, 0.25, 0.25, 0.0],
        "python": [0.0] * 7,
    }
    seen = Counter(result.status for result in turn.results)
    assert metrics == {f"tools/status/{status.value}": float(seen[status]) for status in ToolStatus}
