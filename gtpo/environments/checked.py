"""An environment whose every answer is looked at: a fault of its code names the environment, the task and the line."""

import numbers
import random
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gtpo.config_values import broken_text
from gtpo.environments.base import Answer, Call, Demonstration, Environment, Split
from gtpo.environments.programs import ProgramCase
from gtpo.types import RunFault, Task

T = TypeVar("T")


class EnvironmentFault(RunFault):
    """An environment's code raised, or returned what its contract does not allow. One line."""


class CheckedEnvironment(Environment):
    """`environment`, but for its faults: each is an `EnvironmentFault`. ValueErrors of `tasks` and `oracle` pass, which
    say by them that they have none."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.name = environment.name
        self.system_prompt = environment.system_prompt
        self.explain_protocol = environment.explain_protocol
        if not isinstance(self.system_prompt, str):
            raise EnvironmentFault(
                f"environment {self.name!r}: system_prompt must be a text, got {self.system_prompt!r}"
            )

    def tasks(self, split: Split, num: int, seed: int) -> list[Task]:
        where = f"environment {self.name!r}, tasks({split!r}, {num}, {seed})"
        found = _called(lambda: self.environment.tasks(split, num, seed), where, passes=(ValueError,))
        if not isinstance(found, Sequence) or len(found) != num:
            got = f"{len(found)} entries" if isinstance(found, Sequence) else repr(found)
            raise EnvironmentFault(f"{where} must return a list of {num} tasks, got {_cut(got)}")
        seen = set()
        for number, task in enumerate(found):
            _check_task(task, f"{where}, entry {number}")
            if task.id in seen:
                raise EnvironmentFault(f"{where}, entry {number}: ids must be unique, got {task.id!r} twice")
            seen.add(task.id)
        return list(found)

    def grade(self, task: Task, answer: str | None) -> float:
        where = _of(task, "grade")
        outcome = _called(lambda: self.environment.grade(task, answer), where)
        # written so that NaN is refused too
        if not isinstance(outcome, numbers.Real) or not 0 <= outcome <= 1:
            raise EnvironmentFault(f"{where} must return a number in [0, 1], got {_cut(repr(outcome))}")
        return float(outcome)

    def program_cases(self, task: Task) -> Sequence[ProgramCase]:
        where = _of(task, "program_cases")
        cases = _called(lambda: self.environment.program_cases(task), where)
        if not isinstance(cases, Sequence) or not all(isinstance(case, ProgramCase) for case in cases):
            raise EnvironmentFault(f"{where} must return a list of ProgramCase, got {_cut(repr(cases))}")
        return cases

    def setup_code(self, task: Task) -> str:
        where = _of(task, "setup_code")
        return _text(_called(lambda: self.environment.setup_code(task), where), where)

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        where = _of(task, "oracle")
        demonstration = _called(lambda: self.environment.oracle(task, rng), where, passes=(ValueError,))
        if not all(hasattr(demonstration, name) for name in ("send", "__next__")):
            raise EnvironmentFault(f"{where} must return a generator, got {_cut(repr(demonstration))}")
        return _checked_steps(demonstration, where)

    def expected_output(self, task: Task, code: str, output: str) -> bool | None:
        where = _of(task, "expected_output")
        verdict = _called(lambda: self.environment.expected_output(task, code, output), where)
        if verdict is not None and not isinstance(verdict, bool):
            raise EnvironmentFault(f"{where} must return True, False or None, got {_cut(repr(verdict))}")
        return verdict


def _called(call: Callable[[], T], where: str, *, passes: tuple[type[Exception], ...] = ()) -> T:
    try:
        return call()
    except passes:
        raise
    except Exception as error:
        raise EnvironmentFault(f"{where} raised {_described(error)}") from error


def _described(error: Exception) -> str:
    """The error, and where in the environment's code it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{_cut(said)} ({last.filename}, line {last.lineno})"


def _checked_steps(demonstration: Demonstration, where: str) -> Demonstration:
    """The same turns. The last one is an Answer, and behind it a demonstration ends."""
    observation: str | None = None
    while True:
        try:
            step = next(demonstration) if observation is None else demonstration.send(observation)
        except StopIteration:
            raise EnvironmentFault(f"{where} must end with an Answer, got none") from None
        except Exception as error:
            raise EnvironmentFault(f"{where} raised {_described(error)}") from error
        if not isinstance(step, Call | Answer):
            raise EnvironmentFault(f"{where} must yield Call or Answer, got {_cut(repr(step))}")
        _text(step.code if isinstance(step, Call) else step.text, where)
        observation = yield step


def _check_task(task: Any, where: str) -> None:
    if not isinstance(task, Task):
        raise EnvironmentFault(f"{where} must be a Task, got {_cut(repr(task))}")
    for name in ("id", "environment", "prompt", "answer"):
        _text(getattr(task, name), f"{where}, {name}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise EnvironmentFault(f"{where} must be a text, got {_cut(repr(value))}")
    if flaw := broken_text(value):
        raise EnvironmentFault(f"{where} must be a text of whole characters, got {flaw}")
    return value


def _of(task: Task, method: str) -> str:
    return f"environment {task.environment!r}, task {task.id!r}: {method}"


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
