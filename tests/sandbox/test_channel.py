"""Calls of tools over the interpreter's control channel, whoever makes them and whatever becomes of their cell."""

import asyncio
import gc
import json
from collections.abc import Mapping
from typing import Any

import pytest

from gtpo.sandbox import CellResult, CellStatus, SandboxPool, SandboxSession, SessionState
from gtpo.sandbox.code_tools import CodeTools
from gtpo.sandbox.layout import CONTROL_FD
from tests.sandbox.conftest import Cage, soon

CALL = "print(echo('later'))"
WITH_THREADS = pytest.mark.parametrize("cage", ["namespaces"], indirect=True)


class Echo:
    """Tools that say what they are told: `echo` at once, `slow` when the test, or another call, lets them."""

    def __init__(self, max_calls: int = 100) -> None:
        self.free = asyncio.Event()
        self.called: list[str] = []
        self.tools = CodeTools({"echo": ("text",), "slow": ("text",), "free": ()}, self._call, max_calls)

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> tuple[bool, str]:
        self.called.append(name)
        if name == "free":
            self.free.set()
        if name == "slow":
            await self.free.wait()
        return True, str(arguments.get("text", ""))


async def run_cells(
    pool: SandboxPool, *cells: str, echo: Echo, free: bool = True, without: tuple[int, ...] = ()
) -> list[CellResult]:
    """The cells, one after the other, all with the tools but those of the numbers `without`."""
    if free:
        echo.free.set()
    async with soon(), await pool.open() as session:
        return [
            await session.run(code, tools=None if number in without else echo.tools)
            for number, code in enumerate(cells)
        ]


def texts(results: list[CellResult]) -> list[str]:
    return [result.stdout or result.error for result in results]


IN_A_THREAD = """
import threading, time
failed = []
def work():
    try:
        {work}
    except BaseException as error:
        failed.append(type(error).__name__)
thread = threading.Thread(target=work, daemon=True)
thread.start()
"""


@WITH_THREADS
@pytest.mark.parametrize("between", [[], ["x = 1"], ["import os\nos._exit(1)"], ["1 / 0", "thread.join()"]])
def test_a_cell_may_end_before_a_call_of_its_thread_is_answered(cage: Cage, between: list[str]) -> None:
    """And later ones call tools as before, also after a rollback, which leaves the thread behind."""
    first = IN_A_THREAD.format(work="slow('early')") + "time.sleep(0.05)\nprint('end')"

    async def run() -> list[CellResult]:
        echo = Echo()
        asyncio.get_running_loop().call_later(0.2, echo.free.set)
        return await run_cells(cage.pool, first, *between, CALL, CALL, echo=echo, free=False)

    results = cage.do(run())
    assert texts([results[0], *results[-2:]]) == ["end\n", "later\n", "later\n"]
    assert all(result.status is CellStatus.OK for result in results[-2:])


@WITH_THREADS
def test_threads_go_on_calling_while_cells_come_and_go(cage: Cage) -> None:
    first = """
import threading, time
done, failed = [], []
def work():
    held = echo
    while True:
        try: held('t'), echo('t'), done.append(1)
        except ToolError: pass
        except BaseException as error: return failed.append(error)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.02)
"""
    cells = [first, *["print(echo('a'), echo('b'))"] * 12, "print(failed, len(done) > 3)"]
    results = cage.do(run_cells(cage.pool, *cells, echo=Echo(max_calls=10**6)))
    assert [result.status for result in results] == [CellStatus.OK] * len(cells)
    assert texts(results[1:-1]) == ["a b\n"] * 12
    assert results[-1].stdout == "[] True\n"


@WITH_THREADS
def test_a_thread_whose_cell_has_ended_is_told_so(cage: Cage) -> None:
    cells = [IN_A_THREAD.format(work="slow('x')") + "time.sleep(0.05)", "thread.join()\nprint(failed)"]

    async def run() -> list[CellResult]:
        echo = Echo()
        asyncio.get_running_loop().call_later(0.2, echo.free.set)
        return await run_cells(cage.pool, *cells, echo=echo, free=False, without=(1,))

    # the answer comes while no cell runs, or just before
    assert texts(cage.do(run()))[1] in ("['ToolError']\n", "[]\n")


def test_a_tool_that_was_lent_to_an_earlier_cell_is_an_error(cage: Cage) -> None:
    results = cage.do(run_cells(cage.pool, "held = echo", "held('x')", "print(held('x'))", echo=Echo(), without=(1,)))
    assert results[1].error == "ToolError: echo() cannot be called from this cell"
    assert results[2].stdout == "x\n"


def test_a_call_that_a_signal_has_interrupted_is_not_mistaken_for_the_next(cage: Cage) -> None:
    code = """
import signal
def wake(*_): raise ValueError('too long')
signal.signal(signal.SIGALRM, wake)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try: print(slow('first'))
except ValueError as error: print(error)
print(echo('second'), echo('third'))
"""

    async def run() -> list[CellResult]:
        echo = Echo()
        asyncio.get_running_loop().call_later(0.3, echo.free.set)
        return await run_cells(cage.pool, code, CALL, echo=echo, free=False)

    assert texts(cage.do(run())) == ["too long\nsecond third\n", "later\n"]


def test_an_alarm_of_an_earlier_cell_ends_no_later_one(cage: Cage) -> None:
    alarm = "import signal, time\n" + "signal.signal(signal.SIGALRM, lambda *_: 1 / 0)\n"
    alarm += "signal.setitimer(signal.ITIMER_REAL, 0.02)"
    first, _ = cage.cells(alarm, "x = 1")
    assert first.status is CellStatus.OK

    async def run() -> CellResult:
        async with await cage.pool.open() as session:
            await session.run(alarm)
            await asyncio.sleep(0.1)
            return await session.run("print('here')")

    result = cage.do(run())
    assert (result.stdout, result.state) == ("here\n", SessionState.KEPT)


@pytest.mark.parametrize(
    "nested",
    [
        "a = 1\nfor _ in range(70): a = [a]",
        "a = 1\nfor _ in range(70): a = {'a': a}",
        "a = 1\nfor _ in range(70): a = (a,)",
        "a = []\na.append(a)",
        "a = {}\na['a'] = [a]",
    ],
)
def test_arguments_that_nest_too_deep_are_an_error_of_the_code(cage: Cage, nested: str) -> None:
    results = cage.do(run_cells(cage.pool, f"{nested}\necho(a)", CALL, echo=Echo()))
    assert results[0].error == "ValueError: echo(): the arguments must have at most 64 levels"
    assert results[1].stdout == "later\n"


@pytest.mark.parametrize(
    "code", ["a = 1\nfor _ in range(63): a = [a]\nprint(echo(a)[:3])", "print(echo(()), echo({}), echo(None))"]
)
def test_other_arguments_reach_the_tool(cage: Cage, code: str) -> None:
    (result,) = cage.do(run_cells(cage.pool, code, echo=Echo()))
    assert result.status is CellStatus.OK, result


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("echo({1, 2})", "TypeError: echo(): the arguments must be JSON: Object of type set"),
        ("echo(b'x')", "TypeError: echo(): the arguments must be JSON: Object of type bytes"),
        ("echo({(1, 2): 3})", "TypeError: echo(): the arguments must be JSON: keys must be str"),
        ("echo(10**5000)", "ValueError: echo(): the arguments must have integers of at most 14000 bits"),
        ("import sys\nsys.set_int_max_str_digits(0)\necho([10**5000])", "ValueError: echo(): the arguments must have"),
        ("echo('x' * 200_000)", "ValueError: echo(): the arguments cannot be passed on: a frame must have at most"),
        ("echo(*'ab')", "TypeError: echo() takes 1 arguments (text), got 2"),
    ],
)
def test_arguments_that_cannot_be_passed_on_are_an_error_of_the_code(cage: Cage, code: str, error: str) -> None:
    results = cage.do(run_cells(cage.pool, code, CALL, echo=Echo()))
    assert results[0].error.startswith(error), results[0]
    assert results[1].stdout == "later\n"


FLOOD = """
told = set()
for i in range({calls}):
    try: echo(str(i) + 'x' * 120_000)
    except ToolError as error: told.add(str(error))
print(told)
"""


def test_calls_beyond_the_bound_reach_nobody_and_are_not_kept(cage: Cage) -> None:
    async def run() -> tuple[list[str], int, int, str]:
        echo = Echo(max_calls=5)
        async with soon(), await cage.pool.open() as session:
            said = [(await session.run(FLOOD.format(calls=60), tools=echo.tools)).stdout for _ in range(3)]
            return said, len(echo.called), held_bytes(session), (await session.run(CALL, tools=echo.tools)).stdout

    said, num_calls, num_bytes, after = cage.do(run())
    assert said == ["{'no call is left, all 5 of this cell are used'}\n"] * 3
    assert (num_calls, after) == (16 - 1, "later\n")
    # of fifteen answers of 16 KiB
    assert num_bytes < 2**19


def held_bytes(session: SandboxSession) -> int:
    """The texts that a session keeps for a replay, with all that they are part of."""
    seen, waiting, total = set[int](), [session._history, session._calls], 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        total += len(thing) if isinstance(thing, str | bytes) else 0
        if isinstance(thing, str | bytes | list | dict | tuple) or type(thing).__module__ == "gtpo.sandbox.code_tools":
            waiting += [item for item in gc.get_referents(thing) if not callable(item)]
    return total


def test_a_cell_that_calls_in_spite_of_the_bound_has_crashed(cage: Cage) -> None:
    call = {"cell": 1, "call": {"name": "echo", "arguments": {}}}
    code = f"""
import os
body = {json.dumps(call).encode()!r}
while True:
    os.write({CONTROL_FD}, len(body).to_bytes(4, "big") + body)
    os.read({CONTROL_FD}, 9999)
"""
    echo = Echo(max_calls=3)
    results = cage.do(run_cells(cage.pool, code, CALL, echo=echo))
    assert results[0].error == "the cell wrote to the interpreter's control channel"
    assert (echo.called, results[1].stdout) == (["echo"] * 4, "later\n")
