"""An environment's own code at fault: one line that names the environment, the task and the place."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gtpo.environments import Answer, Call, CodeEnvironment, Demonstration, EnvironmentFault, EpisodeHost, Mixture
from gtpo.sandbox import SandboxPool
from gtpo.tools import RunTools, ToolSet
from gtpo.types import Task, ToolCall, Trajectory, Turn

TASK = Task(id="sum-1", environment="sum", prompt="2 + 2?", answer="4")


class Scripted(CodeEnvironment):
    """Gives back, or raises, what it is told to."""

    name = "sum"
    system_prompt = "Answer."

    def __init__(self, **given: Any) -> None:
        self.given = given

    def _give(self, method: str, default: Any) -> Any:
        value = self.given.get(method, default)
        if isinstance(value, Exception):
            raise value
        return value

    def tasks(self, split: str, num: int, seed: int) -> Any:
        return self._give("tasks", [TASK] * num)

    def grade(self, task: Task, answer: str | None) -> Any:
        return self._give("grade", 1)

    def program_cases(self, task: Task) -> Any:
        return self._give("program_cases", ())

    def setup_code(self, task: Task) -> Any:
        return self._give("setup_code", "")

    def expected_output(self, task: Task, code: str, output: str) -> Any:
        return self._give("expected_output", None)

    def oracle(self, task: Task, rng: random.Random) -> Any:
        steps = self._give("oracle", [Answer("4")])
        return steps if not isinstance(steps, list) else self._demonstrate(steps)

    def _demonstrate(self, steps: Sequence[Any]) -> Demonstration:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            yield step


def hosted(environment: Scripted, turn: Turn | None = None) -> None:
    """Opens its episode, lets it answer `turn`, if any, and grade it."""
    tools = ToolSet(["python"])

    async def run() -> None:
        pool = SandboxPool(min_tier="landlock")
        host = EpisodeHost(lambda task: environment, RunTools(tools, pool))
        async with pool, host.open(TASK, sample=0) as episode:
            if turn is not None:
                await episode.step(turn)
            await episode.grade(Trajectory(TASK, 0, [1], [Turn([2], [0.0], "answer: 4")], answer="4"))

    asyncio.run(run())


CELL = Turn([2], [0.0], "print(1)", calls=[ToolCall("python", {"code": "print(1)"})])

ASK: dict[str, Callable[[Scripted], Any]] = {
    "grade": hosted,
    "program_cases": hosted,
    "setup_code": lambda environment: hosted(environment, CELL),
    "expected_output": lambda environment: hosted(environment, CELL),
    "oracle": lambda environment: play(Mixture([environment], [1.0]).oracle(TASK, random.Random(0))),
}
# the call of the episode in which it is asked for
CALLS = {"program_cases": "(open|grade)", "setup_code": "step", "expected_output": "step"}


def play(demonstration: Demonstration) -> list[Any]:
    steps = [next(demonstration)]
    while not isinstance(steps[-1], Answer):
        steps.append(demonstration.send("seen"))
    return steps


WRONG: dict[str, list[Any]] = {
    "grade": [None, float("nan"), float("inf"), 1.5, -0.1, "1", [1.0], 1j],
    "program_cases": [None, 5, ["print(1)"], [None]],
    "setup_code": [None, 5, b"x = 1", "\ud83d"],
    "expected_output": [1, "yes", 0.0],
    "oracle": [None, "answer", [], ["answer: 4"], [Call("a"), None], [Call(5)], [Answer(4)], [Answer("\ud83d")]],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("method", WRONG)
def test_what_the_contract_does_not_allow_is_a_fault(method: str) -> None:
    for value in WRONG[method]:
        call = CALLS.get(method, method)
        with pytest.raises(
            EnvironmentFault, match=rf"^environment 'sum', task 'sum-1': {call} (must|raised) "
        ) as fault:
            ASK[method](Scripted(**{method: value}))
        assert "\n" not in str(fault.value)


@pytest.mark.parametrize("method", WRONG)
@pytest.mark.parametrize("error", [KeyError("size"), RuntimeError("two\nlines"), ZeroDivisionError(), StopIteration()])
def test_what_an_environment_raises_is_a_fault_with_its_place(method: str, error: Exception) -> None:
    call = CALLS.get(method, method)
    with pytest.raises(EnvironmentFault, match=rf"^environment 'sum', task 'sum-1': {call} raised ") as fault:
        ASK[method](Scripted(**{method: error}))
    text = str(fault.value)
    assert "\n" not in text and type(error).__name__ in text
    # Python itself turns a StopIteration that leaves a coroutine into a RuntimeError of its own
    assert "test_faults.py, line " in text or isinstance(error, StopIteration)


def test_a_demonstration_that_raises_in_its_middle_is_a_fault() -> None:
    with pytest.raises(EnvironmentFault, match=r"task 'sum-1': oracle raised KeyError: 'a' \(.*test_faults\.py, line "):
        ASK["oracle"](Scripted(oracle=[Call("x"), KeyError("a")]))


def test_an_environment_without_demonstrations_says_so_itself() -> None:
    with pytest.raises(ValueError, match="has none"):
        ASK["oracle"](Scripted(oracle=ValueError("has none")))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "must return a list of 2 tasks, got None"),
        ([], "must return a list of 2 tasks, got 0 entries"),
        ([TASK], "must return a list of 2 tasks, got 1 entries"),
        ([TASK, "task"], "entry 1 must be a Task, got 'task'"),
        ([TASK, TASK], "entry 1: ids must be unique, got 'sum-1' twice"),
        ([TASK, Task("b", "sum", None, "4")], "entry 1, prompt must be a text, got None"),  # type: ignore[arg-type]
        ([TASK, Task("b", "sum", "\ud83d", "4")], "entry 1, prompt must be a text of whole characters, got half"),
        ([TASK, Task("b", "sum", "2?", 4)], "entry 1, answer must be a text, got 4"),  # type: ignore[arg-type]
        (KeyError("x"), r"raised KeyError: 'x' \(.*test_faults\.py, line "),
    ],
)
def test_tasks_that_are_none_are_a_fault(tasks: Any, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=rf"^environment 'sum', tasks\('train', 2, 0\).*{message}"):
        Mixture([Scripted(tasks=tasks)], [1.0]).tasks("train", 2, 0)


def test_what_is_right_passes_as_it_is() -> None:
    environment = Scripted(tasks=[TASK], expected_output=True, oracle=[Call("a"), Answer("4")])
    assert Mixture([environment], [1.0]).tasks("train", 1, 0) == [TASK]
    hosted(environment, CELL)
    assert ASK["oracle"](environment) == [Call("a"), Answer("4")]
