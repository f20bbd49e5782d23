"""FunctionTool: results, exceptions, time-outs."""

import asyncio
import dataclasses
import datetime
import threading

import pydantic
import pytest

from gtpo.tools import FunctionTool
from gtpo.types import ToolResult, ToolStatus


def divide(a: int, b: int) -> float:
    """Divide.

    Args:
        a: Dividend.
        b: Divisor.
    """
    return a / b


async def divide_async(a: int, b: int) -> float:
    """Divide.

    Args:
        a: Dividend.
        b: Divisor.
    """
    await asyncio.sleep(0)
    return a / b


def nothing() -> None:
    """Return nothing."""


def leave() -> None:
    """Try to end the program."""
    raise SystemExit(3)


def late_stream() -> str:
    """Fail with a time-out of its own."""
    raise TimeoutError("the stream is late")


def stop() -> str:
    """Raise what a future cannot carry, without a message."""
    raise StopIteration


def call(tool: FunctionTool, **arguments: object) -> ToolResult:
    return asyncio.run(tool.call(arguments))


@pytest.mark.parametrize("fn", [divide, divide_async])
def test_value_error_and_exception(fn: object) -> None:
    tool = FunctionTool(fn)  # type: ignore[arg-type]
    good = call(tool, a=3, b=2)
    assert (good.status, good.text) == (ToolStatus.OK, "1.5")
    assert good.seconds > 0
    bad = call(tool, a=3, b=0)
    assert (bad.status, bad.text) == (ToolStatus.ERROR, "ZeroDivisionError: division by zero")
    unfit = call(tool, a="3", b=0)
    assert unfit.status is ToolStatus.ERROR
    assert unfit.text == f"{tool.name}: argument 'a': input should be a valid integer, got '3'"


@pytest.mark.parametrize(
    ("fn", "status", "text"),
    [
        (nothing, ToolStatus.OK, "(no output)"),
        (leave, ToolStatus.ERROR, "SystemExit: 3"),
        (late_stream, ToolStatus.ERROR, "TimeoutError: the stream is late"),
        (stop, ToolStatus.ERROR, "StopIteration"),
    ],
)
def test_outcomes_without_arguments(fn: object, status: ToolStatus, text: str) -> None:
    result = call(FunctionTool(fn))  # type: ignore[arg-type]
    assert (result.status, result.text) == (status, text)


def test_sync_timeout_does_not_hold_up_the_loop() -> None:
    released, ended = threading.Event(), threading.Event()

    def hang() -> str:
        """Wait for the test."""
        released.wait()
        ended.set()
        return "late"

    # asyncio.run returns while the function still waits
    result = call(FunctionTool(hang, timeout_s=0.02))
    assert not ended.is_set()
    assert (result.status, result.text) == (ToolStatus.TIMEOUT, "TimeoutError: hang took longer than 0.02 seconds")
    released.set()
    assert ended.wait(timeout=20)


def test_async_timeout_cancels_the_function() -> None:
    cancelled = []

    async def hang() -> str:
        """Wait for ever."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "never"

    result = call(FunctionTool(hang, timeout_s=0.02))
    assert result.status is ToolStatus.TIMEOUT
    assert cancelled == [True]


def test_hanging_calls_do_not_starve_others() -> None:
    released = threading.Event()

    def wait_or_go(hang: bool) -> str:
        """Wait for the test, or not.

        Args:
            hang: Whether to wait.
        """
        if hang:
            released.wait()
        return "done"

    async def run() -> list[ToolResult]:
        hanging = FunctionTool(wait_or_go, timeout_s=0.02)
        await asyncio.gather(*(hanging.call({"hang": True}) for _ in range(64)))
        return [await FunctionTool(wait_or_go).call({"hang": False})]

    try:
        (result,) = asyncio.run(run())
        assert (result.status, result.text) == (ToolStatus.OK, "done")
    finally:
        released.set()


def test_caller_can_cancel() -> None:
    started = threading.Event()
    released = threading.Event()

    def hang() -> str:
        """Wait for the test."""
        started.set()
        released.wait()
        return "late"

    async def run() -> None:
        task = asyncio.create_task(FunctionTool(hang).call({}))
        await asyncio.to_thread(started.wait)
        task.cancel()
        await task

    try:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
    finally:
        released.set()


@dataclasses.dataclass
class Place:
    name: str
    at: tuple[float, float]


class Town(pydantic.BaseModel):
    name: str


class Unspeakable(Exception):
    """Its own text fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


SELF: list[object] = []
SELF.append(SELF)
DEEP: list[object] = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, None, True], "b": "é"}, '{"a": [1, null, true], "b": "é"}'),
        ([{"a": 1}], '[{"a": 1}]'),
        ((1, "x"), '[1, "x"]'),
        ({1: float("nan"), "t": datetime.date(2026, 1, 2)}, '{"1": NaN, "t": "2026-01-02"}'),
        (Place("Ulm", (48.4, 10.0)), '{"name": "Ulm", "at": [48.4, 10.0]}'),
        (Town(name="Ulm"), '{"name": "Ulm"}'),
        ({"town": Town(name="Ulm"), "odd": 1j}, '{"town": {"name": "Ulm"}, "odd": "1j"}'),
        ({}, "{}"),
        ([], "[]"),
        (0, "0"),
        (False, "False"),
        ("", "(no output)"),
        ("{'a': 1}", "{'a': 1}"),
        (SELF, "[[...]]"),
        (10**4000, str(10**4000)[:100] + "\n[cut after 100 of 4001 characters]"),
        ("x" * 10_000_000, "x" * 100 + "\n[cut after 100 of 10000000 characters]"),
        ({"a": "x" * 200}, '{"a": "' + "x" * 93 + "\n[cut after 100 of 209 characters]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_model_reads_of_a_value(value: object, text: str) -> None:
    def give() -> object:
        """Give it."""
        return value

    async def give_later() -> object:
        """Give it."""
        return value

    for fn in (give, give_later):
        result = call(FunctionTool(fn, max_chars=100))
        assert (result.status, result.text) == (ToolStatus.OK, text)


@pytest.mark.parametrize(
    ("value", "start"),
    [
        (DEEP, "RecursionError"),
        (10**5000, "ValueError: Exceeds the limit"),
        (Unspeakable(), "Unspeakable"),
        (ValueError("x" * 1_000_000), "ValueError: " + "x" * 88 + "\n[cut after 100 of 1000012 characters]"),
    ],
    ids=["deep", "huge", "unspeakable", "long"],
)
def test_values_without_a_text_are_errors(value: object, start: str) -> None:
    def give() -> object:
        """Give it, or raise it."""
        if isinstance(value, Exception):
            raise value
        return value

    async def give_later() -> object:
        """Give it, or raise it."""
        return give()

    for fn in (give, give_later):
        result = call(FunctionTool(fn, max_chars=100))
        assert result.status is ToolStatus.ERROR and result.text.startswith(start)


def test_max_chars_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_chars must be at least 1, got 0"):
        FunctionTool(divide, max_chars=0)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_bad_timeout(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        FunctionTool(divide, timeout_s=timeout_s)
