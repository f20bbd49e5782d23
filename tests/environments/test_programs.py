"""Programs are judged by what they print in processes of their own; what they should print is not there."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from gtpo.environments import ProgramCase, passes
from gtpo.policy import Policy
from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SandboxPool, SandboxUnavailable
from gtpo.types import StopReason, Task
from tests.trainer.conftest import SumEnvironment, play_all

LIMITS = SandboxLimits(cpu_time_s=0.5, wall_time_s=20.0)
SECRET = "4217734"
DOUBLE = [ProgramCase(stdin=f"{number}\n", output=f"{2 * number}") for number in (1, 21, -3)]
CALLS = [ProgramCase(call="double('a')", output="aa\n"), ProgramCase(call="double(2)", output="4")]


@pytest.fixture(scope="module")
def policy() -> Policy:
    from tests.trainer.conftest import tiny_policy

    return tiny_policy()


def judge(*judged: tuple[str, Sequence[ProgramCase]], limits: SandboxLimits = LIMITS) -> list[bool]:
    async def run() -> list[bool]:
        async with SandboxPool(limits, min_tier="landlock") as pool:
            return [await passes(pool, program, cases) for program, cases in judged]

    return asyncio.run(run())


def test_verdicts() -> None:
    right = [
        ("print(2 * int(input()))", DOUBLE),
        (
            "import sys\nif __name__ == '__main__':\n    print(2 * int(sys.stdin.read()), ' \\n')\n    sys.exit()",
            DOUBLE,
        ),
        ("def double(x): return x + x", CALLS),
        (
            "import sys, os\nos.write(2, b'x' * 10_000)\nprint('so far', file=sys.stderr)\nprint(2 * int(input()))",
            DOUBLE,
        ),
        ("print(2 * int(input()), flush=True)\nimport os\nos._exit(0)", DOUBLE),
        ("print(2 * int(input()))\nexit()", DOUBLE),
        ("import atexit\natexit.register(print, 2 * int(input()))\nquit()", DOUBLE),
        ("print(2 * int(open('/dev/stdin').read()))\nimport sys\nprint(*sys.argv)", DOUBLE),
        ("import warnings\nwarnings.warn('old')\ndef double(x): return x + x", CALLS),
    ]
    wrong = [
        ("print(2)", DOUBLE),
        ("print(2 * int(input()), 'or so')", DOUBLE),
        ("print(2 * int(input()))\nexit(1)", DOUBLE),
        ("print(2 * int(input()))\n1 / 0", DOUBLE),
        ("print(2 * int(input()), flush=True)\nwhile True: pass", DOUBLE),
        ("print(2 * int(input()), flush=True)\nimport os\nos._exit(3)", DOUBLE),
        ("print(2 * int(input()))\nimport sys\nsys.exit('no')", DOUBLE),
        ("print(2 * int(input()), ' ' * 5000)", DOUBLE),
        ("def double(x): return 2 * x + 0", CALLS),
        ("def double(x): return x + x\nexit()", CALLS),
        ("print(", DOUBLE),
        ("#" + "x" * 200_000, DOUBLE),
    ]
    assert judge(*right, *wrong) == [True] * len(right) + [False] * len(wrong)


def test_a_program_finds_neither_the_expected_output_nor_what_another_run_left(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    run = SandboxPool.run

    async def listen(pool: SandboxPool, code: str, **options: Any) -> CellResult:
        result = await run(pool, code, **options)
        printed.append(result.stdout)
        return result

    monkeypatch.setattr(SandboxPool, "run", listen)
    search = f"""
import gc, os, sys
digits = {SECRET[:4]!r} + str({int(SECRET[4:])})
found = os.path.exists("word") or "word" in sys.modules
def look(place):
    try:
        return digits in open(place, "rb").read().decode("latin-1")
    except OSError:
        return False
found |= any(look("/proc/self/" + name) for name in ("environ", "cmdline"))
found |= any(digits in repr(thing) for thing in gc.get_objects() if isinstance(thing, (list, tuple)))
frame = sys._getframe()
while frame:
    values = [value for value in frame.f_locals.values() if isinstance(value, str) and value is not digits]
    found |= any(digits in value for value in values)
    frame = frame.f_back
open("word", "w").write("left")
sys.modules["word"] = sys
print("found" if found else "nothing")
"""
    assert judge((search, [ProgramCase(output="nothing"), ProgramCase(output=SECRET)])) == [False]
    assert printed == ["nothing\n"] * 2


# answers in the name of the interpreter, on its channel to the keeper
FORGED_ANSWER = """
import json, os, struct
for cell in range(9):
    data = json.dumps({"cell": cell, "status": "ok", "error": "", "line": None, "value": None}).encode()
    os.write(60, struct.pack(">I", len(data)) + data)
"""


def test_a_verdict_cannot_be_forged() -> None:
    forgers = [
        FORGED_ANSWER,
        "import builtins\nbuiltins.print = lambda *_: None\nbuiltins.exec = lambda *_: None",
        "class Same(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\nprint(Same('x'))",
        "print('True')\nraise SystemExit(0)",
    ]
    assert judge(*((forger, [ProgramCase(output=SECRET)]) for forger in forgers)) == [False] * len(forgers)


def test_a_fault_of_the_sandbox_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(*_: object, **__: object) -> CellResult:
        return CellResult(CellStatus.INFRA_ERROR, error="the keeper is gone")

    monkeypatch.setattr(SandboxPool, "run", lost)
    with pytest.raises(SandboxUnavailable, match="the keeper is gone"):
        asyncio.run(passes(SandboxPool(LIMITS), "print(1)", DOUBLE))


def test_bad_cases_are_the_callers_fault() -> None:
    pool = SandboxPool(LIMITS)
    with pytest.raises(ValueError, match="cases must hold at least one case, got none"):
        asyncio.run(passes(pool, "print(1)", []))


def test_outputs_and_inputs_of_any_length() -> None:
    numbers = "\n".join(str(number) for number in range(60_000))
    echo = "import sys\nfor line in sys.stdin: print(int(line), '  ')\nprint('\\n' * 9)"
    cases = [ProgramCase(stdin=numbers, output=numbers + "\n")]
    assert len(numbers) > 2**18
    right = [(echo, cases), ("print('x' * 4095)", [ProgramCase(output="x" * 4095)])]
    right += [("print('x' * 4096)", [ProgramCase(output="x" * 4096)])]
    wrong = [
        ("import sys\nprint(sys.stdin.read().replace('\\n41234\\n', '\\n41235\\n'))", cases),
        ("import sys\nprint(sys.stdin.read()[:-1])", cases),
        ("import sys\nprint(' ' + sys.stdin.read())", cases),
        ("import sys\nprint(sys.stdin.read(), 1)", cases),
        (f"{echo}\nexit(1)", cases),
        ("print('x' * 4095)", [ProgramCase(output="x" * 4096)]),
        ("print('x' * 4095, 'y')", [ProgramCase(output="x" * 4095)]),
        ("print('\\n' * 2**21 + 'x' * 5000)", [ProgramCase(output="\n" * 2**21 + "y" * 5000)]),
    ]
    # 60,000 lines take 0.3 CPU-s here, and more on a slower machine
    limits = SandboxLimits(cpu_time_s=10.0, wall_time_s=60.0)
    assert judge(*right, *wrong, limits=limits) == [True] * len(right) + [False] * len(wrong)


class DoubleEnvironment(SumEnvironment):
    """Asks for a program."""

    def program_cases(self, task: Task) -> Sequence[ProgramCase]:
        return DOUBLE


def test_a_rollout_runs_the_program_that_the_last_turn_ends_with(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = DoubleEnvironment()
    scripts = [["So:\n```\nprint(2 * int(input()))\n```\n"], ["So:\n```\nprint(2)\n```\n"], ["answer: 4"]]
    played = play_all(policy, scripts, environment=environment, call_format="json")
    assert [(one.stop, one.outcome) for one in played] == [(StopReason.FINISHED, float(n == 0)) for n in range(3)]

    async def lost(*_: object, **__: object) -> CellResult:
        return CellResult(CellStatus.INFRA_ERROR, error="the keeper is gone")

    monkeypatch.setattr(SandboxPool, "run", lost)
    assert [one.stop for one in play_all(policy, scripts, environment=environment, call_format="json")] == [
        StopReason.LOST,
        StopReason.LOST,
        StopReason.FINISHED,
    ]
