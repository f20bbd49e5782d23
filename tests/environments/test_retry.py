"""The retry family, in the real sandbox."""

import random
import re
from collections.abc import Callable

import pytest

from gtpo.environments import Answer, Call, Demonstration, Environment, RetryEnvironment, make_environment
from gtpo.types import Task, ToolResult, ToolStatus

RunCells = Callable[[Environment, Task, list[str]], list[ToolResult]]

TASK = Task(
    id="t",
    environment="retry",
    prompt="get pen, cup",
    answer="42 17",
    data={
        "items": ["pen", "cup"],
        "places": ["box_c", "box_a"],
        "values": [42, 17],
        "getters": ["box_a", "box_b", "box_c", "box_d"],
    },
)


def read_the_error(task: Task, rng: random.Random) -> Demonstration:
    """Tries one getter, then the one that the error names."""
    for item in task.data["items"]:
        getter = rng.choice(task.data["getters"])
        output = yield Call(f"print({getter}('{item}'))")
        if named := re.fullmatch(rf"LookupError: {item} is in (\w+)", output):
            output = yield Call(f"print({named[1]}('{item}'))")
    yield Answer(output)


def test_reading_the_error_solves_all_within_six_turns(play: Callable) -> None:
    environment = RetryEnvironment()
    episodes = play(environment, environment.tasks("eval", 60, seed=0), read_the_error)
    assert [environment.grade(episode.task, episode.answer) for episode in episodes] == [1.0] * 60
    assert max(len(episode.codes) for episode in episodes) == 4


def test_blind_oracle_solves_a_part_within_six_turns_and_all_without_limit(play: Callable) -> None:
    environment = RetryEnvironment()
    tasks = environment.tasks("train", 80, seed=0)
    limited = [environment.grade(episode.task, episode.answer) for episode in play(environment, tasks)]
    # two items take at most five calls in 10 of the 16 cases
    assert 0.45 < sum(limited) / len(limited) < 0.8
    unlimited = play(environment, tasks, max_turns=9)
    assert all(environment.grade(episode.task, episode.answer) == 1.0 for episode in unlimited)


def test_oracle_is_blind_to_the_message(play: Callable) -> None:
    environment = RetryEnvironment()
    episodes = play(environment, environment.tasks("train", 80, seed=3), max_turns=9)
    follows = []
    for episode in episodes:
        for result, next_code in zip(episode.results, episode.codes[1:], strict=False):
            if named := re.search(r"is in (\w+)", result.text):
                follows.append(next_code.startswith(f"print({named[1]}("))
    # it goes on to the named getter as often as to the others: 1/3, 1/2 or 1 in the order of the tries, 0.5 on average
    assert 0.35 < sum(follows) / len(follows) < 0.65


def test_getters_answer_fail_and_allow_one_call_a_cell(run_cells: RunCells) -> None:
    codes = [
        "print(box_c('pen'))",
        "print(box_a('pen'))",
        "print(box_a('pan'))",
        "print(box_a('cup'), box_c('pen'))",
        "try:\n    box_b('cup')\nexcept LookupError:\n    print(box_a('cup'))",
        "print(box_a('cup'))",
        "print(box_c('pen'))",
        "print(box_e('cup'))",
    ]
    results = run_cells(RetryEnvironment(), TASK, codes)
    assert [(result.status, result.text) for result in results] == [
        (ToolStatus.OK, "42"),
        (ToolStatus.ERROR, "LookupError: pen is in box_c"),
        (ToolStatus.ERROR, "LookupError: no item pan"),
        (ToolStatus.ERROR, "RuntimeError: one box call a cell"),
        (ToolStatus.ERROR, "RuntimeError: one box call a cell"),
        (ToolStatus.OK, "42 17"),
        (ToolStatus.OK, "42 17"),
        (ToolStatus.ERROR, results[-1].text),
    ]
    assert results[-1].text.startswith("NameError: name 'box_e' is not defined")


def test_no_global_holds_the_values(run_cells: RunCells) -> None:
    code = "print(sorted(name for name in globals() if not name.startswith('__')))"
    (result,) = run_cells(RetryEnvironment(), TASK, [code])
    assert result.text == "['box_a', 'box_b', 'box_c', 'box_d']"


@pytest.mark.parametrize("answer", ["17 42", "42", "42 17 42", "4217", "42, 17", "42 18", "pen cup"])
def test_wrong_answers(answer: str) -> None:
    assert RetryEnvironment().grade(TASK, answer) == 0.0


@pytest.mark.parametrize(
    ("output", "expected"),
    [("42", True), ("42 17", True), ("42 43", False), ("LookupError: pen is in box_c", False), ("", None)],
)
def test_expected_output(output: str, expected: bool | None) -> None:
    assert RetryEnvironment().expected_output(TASK, "print(box_a('cup'))", output) is expected


def test_options_shape_the_tasks() -> None:
    task = make_environment("retry", num_items=3, num_getters=2).tasks("train", 1, seed=0)[0]
    assert len(task.data["items"]) == len(set(task.data["items"])) == len(task.answer.split()) == 3
    assert task.data["getters"] == ["box_a", "box_b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, "num_items must be from 1 to 20, got 0"),
        ({"num_items": 21}, "num_items must be from 1 to 20, got 21"),
        ({"num_getters": 1}, "num_getters must be from 2 to 26, got 1"),
        ({"num_getters": 27}, "num_getters must be from 2 to 26, got 27"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_environment("retry", **options)


def test_num_digits_sets_the_range_of_values() -> None:
    for digits in (1, 3):
        for task in RetryEnvironment(num_digits=digits).tasks("train", 20, seed=0):
            assert all(len(str(value)) == digits for value in task.data["values"])
    with pytest.raises(ValueError, match=r"num_digits must be from 1 to 4, with a value for each of 12 items, got 1"):
        RetryEnvironment(num_items=12, num_digits=1)
