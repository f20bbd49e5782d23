"""What holds for every environment."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gtpo.environments import ENVIRONMENTS, CodeEnvironment, Environment, Mixture, make_environment
from gtpo.environments.base import GeneratedEnvironment
from gtpo.tools import NO_OUTPUT
from gtpo.types import Task

ALL_DATASETS = ["chain_sum", "products", "lcm", "gcd", "base_conversion"]
DEMO = ["retry", "reasoning_gym"]
SINGLE = [*DEMO, "jsonl"]
ALL = [*SINGLE, "mixture"]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Any]:
    def build(name: str) -> Any:
        if name == "mixture":
            return Mixture([make_environment("retry"), build("reasoning_gym")], weights=[2, 1])
        if name == "reasoning_gym":
            return make_environment(name, datasets=ALL_DATASETS)
        if name == "jsonl":
            path = tmp_path / "tasks.jsonl"
            path.write_text("".join(json.dumps({"question": f"{n} + {n}", "answer": 2 * n}) + "\n" for n in range(300)))
            return make_environment(name, path=str(path))
        return make_environment(name)

    return build


def content(task: Task) -> str:
    return json.dumps([task.prompt, dict(task.data)], sort_keys=True)


@pytest.mark.parametrize("name", ALL)
def test_tasks_are_a_function_of_split_num_and_seed(make: Callable[[str], Environment], name: str) -> None:
    environment, again = make(name), make(name)
    tasks = environment.tasks("train", 40, seed=5)
    assert tasks == again.tasks("train", 40, seed=5)
    assert tasks[:15] == environment.tasks("train", 15, seed=5)
    assert [content(task) for task in tasks] != [content(task) for task in environment.tasks("train", 40, seed=6)]
    assert len({task.id for task in tasks}) == 40
    assert environment.tasks("eval", 0, seed=5) == []


@pytest.mark.parametrize("name", ALL)
def test_splits_are_disjoint_whatever_the_seed(make: Callable[[str], Environment], name: str) -> None:
    environment = make(name)
    train = {content(task) for seed in range(3) for task in environment.tasks("train", 500, seed)}
    held_out = {content(task) for seed in range(3) for task in environment.tasks("eval", 60, seed)}
    assert not train & held_out


def test_splits_are_disjoint_where_contents_repeat() -> None:
    # 20 items x 2 getters x 90 values: 4,000 draws meet most contents
    environment = make_environment("retry", num_items=1, num_getters=2)
    train = {content(task) for task in environment.tasks("train", 4000, seed=0)}
    held_out = {content(task) for task in environment.tasks("eval", 500, seed=1)}
    assert len(train) > 1800
    assert not train & held_out


@pytest.mark.parametrize("name", SINGLE)
def test_tasks_survive_json(make: Callable[[str], CodeEnvironment], name: str) -> None:
    environment = make(name)
    for task in environment.tasks("eval", 12, seed=0):
        copy = Task(**json.loads(json.dumps(asdict(task))))
        assert copy == task
        assert environment.setup_code(copy) == environment.setup_code(task)
        assert environment.grade(copy, task.answer) == 1.0


@pytest.mark.parametrize("name", SINGLE)
def test_grade(make: Callable[[str], CodeEnvironment], name: str) -> None:
    environment = make(name)
    for task in environment.tasks("train", 25, seed=1):
        assert environment.grade(task, task.answer) == 1.0
        assert environment.grade(task, f" {task.answer}\n") == 1.0
        for wrong in (None, "", " ", "0", "nan", "1e99999999", "()", task.answer + "7", "[" + task.answer, "\x00"):
            assert environment.grade(task, wrong) == 0.0, wrong


@pytest.mark.parametrize("name", DEMO)
def test_demo_tasks_are_short_and_plain(make: Callable[[str], CodeEnvironment], name: str) -> None:
    environment = make(name)
    assert len(environment.system_prompt) <= 60
    for task in environment.tasks("train", 60, seed=2):
        assert len(task.prompt) < 40
        assert task.prompt.isascii() and task.prompt == task.prompt.lower()
        assert task.environment in ENVIRONMENTS


@pytest.mark.parametrize("name", SINGLE)
def test_no_output_is_not_judged(make: Callable[[str], CodeEnvironment], name: str) -> None:
    environment = make(name)
    task = environment.tasks("train", 1, seed=0)[0]
    assert environment.expected_output(task, "x = 1", NO_OUTPUT) is None


@pytest.mark.parametrize("name", ALL)
def test_bad_requests(make: Callable[[str], Environment], name: str) -> None:
    environment = make(name)
    with pytest.raises(ValueError, match="split must be one of train, eval, got 'test'"):
        environment.tasks("test", 1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num must be at least 0, got -1"):
        environment.tasks("eval", -1, seed=0)


def test_registry_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match=r"must be one of jsonl, reasoning_gym, retry, or .* your own; got 'webshop'"):
        make_environment("webshop")
    with pytest.raises(ValueError, match="'retry' must be among num_items, num_getters, num_digits, got items, size"):
        make_environment("retry", size=3, items=2)
    with pytest.raises(ValueError, match=r"'jsonl' needs the options path, got \['eval_path'\]"):
        make_environment("jsonl", eval_path="x")


class OneTask(GeneratedEnvironment, CodeEnvironment):
    """An environment with a single content."""

    name = "one"
    system_prompt = ""

    def draw(self, rng: random.Random, position: int) -> tuple[str, str, dict[str, object]]:
        return "1 + 1", "2", {}

    def grade(self, task: Task, answer: str | None) -> float:
        return float(answer == task.answer)


def test_too_few_contents_for_a_split() -> None:
    environment = OneTask()
    assert len(environment.tasks("train", 3, seed=0)) == 3
    with pytest.raises(ValueError, match="enough different tasks for 1 of split 'eval', got 0"):
        environment.tasks("eval", 1, seed=0)


def test_held_out_tasks_are_all_different() -> None:
    # 20 items x 2 getters x 9 values: 360 contents, a fifth of them held out
    environment = make_environment("retry", num_items=1, num_getters=2, num_digits=1)
    tasks = environment.tasks("eval", 60, seed=0)
    assert len({content(task) for task in tasks}) == len({task.id for task in tasks}) == 60
    assert environment.tasks("eval", 30, seed=0) == tasks[:30]
    with pytest.raises(
        ValueError, match=r"different tasks for 200 of split 'eval', got \d\d: .* lower tasks\.num_eval"
    ):
        environment.tasks("eval", 200, seed=0)
    assert len(environment.tasks("train", 600, seed=0)) == 600


def test_defaults_of_the_base() -> None:
    environment = OneTask()
    task = environment.tasks("train", 1, seed=0)[0]
    assert environment.setup_code(task) == ""
    assert environment.expected_output(task, "print(2)", "2") is None
    with pytest.raises(ValueError, match="'one' has no scripted demonstrations"):
        environment.oracle(task, random.Random(0))
