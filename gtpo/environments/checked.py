"""What an environment gives is looked at: a fault of its code names the environment, the task and the line."""

import random
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gtpo.config_values import broken_text
from gtpo.environments.base import Answer, Call, Demonstration, Environment, Say, Split, Use
from gtpo.types import RunFault, Task

T = TypeVar("T")


class EnvironmentFault(RunFault):
    """An environment's code raised, or returned what its contract does not allow. One line."""


def checked_tasks(environment: Environment, split: Split, num: int, seed: int) -> list[Task]:
    """`environment.tasks(...)`. Its ValueErrors pass, which say that it has none."""
    where = f"environment {environment.name!r}, tasks({split!r}, {num}, {seed})"
    found = _called(lambda: environment.tasks(split, num, seed), where)
    if not isinstance(found, Sequence) or len(found) != num:
        got = f"{len(found)} entries" if isinstance(found, Sequence) else repr(found)
        raise EnvironmentFault(f"{where} must return a list of {num} tasks, got {cut(got)}")
    seen = set()
    for number, task in enumerate(found):
        _check_task(task, f"{where}, entry {number}")
        if task.id in seen:
            raise EnvironmentFault(f"{where}, entry {number}: ids must be unique, got {task.id!r} twice")
        seen.add(task.id)
    return list(found)


def checked_oracle(environment: Environment, task: Task, rng: random.Random) -> Demonstration:
    """The turns of `environment.oracle(task, rng)`. Its ValueErrors pass, which say that it has none."""
    where = place(task, "oracle")
    demonstration = _called(lambda: environment.oracle(task, rng), where)
    if not all(hasattr(demonstration, name) for name in ("send", "__next__")):
        raise EnvironmentFault(f"{where} must return a generator, got {cut(repr(demonstration))}")
    return _checked_steps(demonstration, where)


def described(error: BaseException) -> str:
    """The error, and where in the environment's code it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{cut(said)} ({last.filename}, line {last.lineno})"


def place(task: Task, method: str) -> str:
    """Where something went wrong, for messages."""
    return f"environment {task.environment!r}, task {task.id!r}: {method}"


def cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


def check_text(value: Any, where: str) -> None:
    """Raises EnvironmentFault unless `value` is a text that a tokenizer and a file take."""
    if not isinstance(value, str):
        raise EnvironmentFault(f"{where} must be a text, got {cut(repr(value))}")
    if flaw := broken_text(value):
        raise EnvironmentFault(f"{where} must be a text of whole characters, got {flaw}")


def _called(call: Callable[[], T], where: str) -> T:
    try:
        return call()
    except ValueError:
        raise
    except Exception as error:
        raise EnvironmentFault(f"{where} raised {described(error)}") from error


def _checked_steps(demonstration: Demonstration, where: str) -> Demonstration:
    """The same turns. It must not end before its episode."""
    observation: str | None = None
    while True:
        try:
            step = next(demonstration) if observation is None else demonstration.send(observation)
        except StopIteration:
            raise EnvironmentFault(f"{where} must end with an Answer or with its episode, and not before") from None
        except Exception as error:
            raise EnvironmentFault(f"{where} raised {described(error)}") from error
        if not isinstance(step, Call | Use | Say | Answer):
            raise EnvironmentFault(f"{where} must yield Call, Use, Say or Answer, got {cut(repr(step))}")
        check_text(step.code if isinstance(step, Call) else step.name if isinstance(step, Use) else step.text, where)
        observation = yield step


def _check_task(task: Any, where: str) -> None:
    if not isinstance(task, Task):
        raise EnvironmentFault(f"{where} must be a Task, got {cut(repr(task))}")
    for name in ("id", "environment", "prompt", "answer"):
        check_text(getattr(task, name), f"{where}, {name}")
