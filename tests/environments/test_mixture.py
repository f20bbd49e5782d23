"""Mixture: proportions, order, dispatch."""

import random
from pathlib import Path

import pytest

from gtpo.environments import (
    JsonlEnvironment,
    Mixture,
    ReasoningGymEnvironment,
    RetryEnvironment,
    make_environment,
)
from gtpo.tools import RunTools, ToolSet
from gtpo.types import Task


def mixture(*weights: float) -> Mixture:
    return Mixture([RetryEnvironment(), ReasoningGymEnvironment(["lcm"])], weights)


def test_order_follows_the_weights() -> None:
    names = [task.environment for task in mixture(3, 1).tasks("train", 8, seed=0)]
    assert names == ["retry", "retry", "reasoning_gym", "retry"] * 2


@pytest.mark.parametrize("num", [1, 7, 100])
def test_counts_are_within_one_of_the_shares(num: int) -> None:
    names = [task.environment for task in mixture(0.7, 0.3).tasks("eval", num, seed=0)]
    assert abs(names.count("retry") - 0.7 * num) < 1


def test_tasks_are_those_of_the_members() -> None:
    tasks = mixture(1, 1).tasks("eval", 6, seed=4)
    assert tasks[0::2] == RetryEnvironment().tasks("eval", 3, seed=4)
    assert tasks[1::2] == ReasoningGymEnvironment(["lcm"]).tasks("eval", 3, seed=4)


def test_each_task_is_served_by_its_own_environment() -> None:
    environment = mixture(1, 1)
    tasks = environment.tasks("train", 10, seed=0)
    for task in tasks:
        member = environment.of(task)
        assert member.name == task.environment
        assert next(environment.oracle(task, random.Random(1))) == next(member.oracle(task, random.Random(1)))


def test_unknown_task() -> None:
    task = Task(id="t", environment="webshop", prompt="", answer="")
    with pytest.raises(ValueError, match=r"task\.environment must be one of retry, reasoning_gym, got 'webshop'"):
        mixture(1, 1).open(task, sample=0, tools=RunTools(ToolSet(["python"])))


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1, 1]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        mixture(*weights)


def test_members_that_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one environment"):
        Mixture([], [])
    with pytest.raises(ValueError, match="different names, got retry, retry"):
        Mixture([RetryEnvironment(), RetryEnvironment(num_items=3)], [1, 1])
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    both = Mixture([RetryEnvironment(), JsonlEnvironment(str(path), system_prompt="Be brief.")], [1, 1])
    tools = RunTools(ToolSet(["python"]))
    systems = [both.open(task, sample=0, tools=tools).messages[0].content for task in both.tasks("train", 2, seed=0)]
    assert systems == [RetryEnvironment.system_prompt, "Be brief."]


def test_two_files_mix_under_two_names(tmp_path: Path) -> None:
    path, more = tmp_path / "tasks.jsonl", tmp_path / "more.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    more.write_text('{"prompt": "e", "answer": "f"}\n{"prompt": "g", "answer": "h"}\n')
    members = [make_environment("jsonl", path=str(path)), make_environment("jsonl", path=str(more), name="more")]
    tasks = Mixture(members, [1, 1]).tasks("train", 2, seed=0)
    assert [task.environment for task in tasks] == ["jsonl", "more"]
    assert tasks[0].prompt in "ac" and tasks[1].prompt in "eg"
    assert Mixture(members, [1, 1]).of(tasks[1]) is members[1]
