"""Reasoning-gym tasks, in the real sandbox and graded by the library."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo.environments import Environment, ReasoningGymEnvironment, make_environment
from gtpo.types import Task, ToolResult, ToolStatus

RunCells = Callable[[Environment, Task, list[str]], list[ToolResult]]

DATASETS = ["chain_sum", "products", "lcm", "gcd", "base_conversion"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_oracle_solves_all_and_every_output_is_expected(play: Callable, dataset: str) -> None:
    environment = ReasoningGymEnvironment([dataset])
    episodes = play(environment, environment.tasks("eval", 25, seed=0))
    for episode in episodes:
        assert environment.grade(episode.task, episode.answer) == 1.0
        # one call a part, one to compute
        assert len(episode.codes) == len(episode.task.data["parts"]) + 1
        for code, result in zip(episode.codes, episode.results, strict=True):
            assert result.status is ToolStatus.OK
            assert environment.expected_output(episode.task, code, result.text) is True
            assert environment.expected_output(episode.task, code, result.text + "1") is False


@pytest.mark.parametrize("dataset", DATASETS)
def test_parts_are_short_and_not_in_the_prompt(dataset: str) -> None:
    for task in ReasoningGymEnvironment([dataset]).tasks("train", 50, seed=0):
        parts = task.data["parts"]
        assert len(parts) == task.prompt.count("read(") >= 2
        assert all(len(str(part)) <= (10 if dataset == "base_conversion" else 3) for part in parts)
        # the prompt depends on the family only
        assert task.prompt == ReasoningGymEnvironment([dataset]).tasks("train", 1, seed=1)[0].prompt


def test_datasets_take_turns() -> None:
    tasks = ReasoningGymEnvironment(["lcm", "products"]).tasks("train", 4, seed=0)
    assert [task.data["dataset"] for task in tasks] == ["lcm", "products", "lcm", "products"]


def test_signed_terms_add_up_to_the_answer() -> None:
    tasks = ReasoningGymEnvironment(["chain_sum"]).tasks("train", 100, seed=0)
    assert all(sum(task.data["parts"]) == int(task.answer) for task in tasks)
    assert any(int(task.answer) < 0 for task in tasks)


def task_of(parts: list[int], answer: str) -> Task:
    data = {"dataset": "lcm", "question": "", "parts": parts}
    return Task(id="t", environment="reasoning_gym", prompt="", answer=answer, data=data)


def test_read_gives_one_part_a_cell(run_cells: RunCells) -> None:
    task = task_of([12, 18], "36")
    codes = [
        "print(read(1))",
        "print(read(1), read(2))",
        "print(read(3))",
        "print(read(0))",
        "print(read('1'))",
        "a = read(1)",
        "print(lcm(a, read(2)))",
        "print(gcd(12,18))",
        "print(base('ff',16,2), base(0,10,7))",
    ]
    results = run_cells(ReasoningGymEnvironment(["lcm"]), task, codes)
    assert [(result.status, result.text) for result in results] == [
        (ToolStatus.OK, "12"),
        (ToolStatus.ERROR, "RuntimeError: one read a cell"),
        (ToolStatus.ERROR, "LookupError: no part 3"),
        (ToolStatus.ERROR, "LookupError: no part 0"),
        (ToolStatus.ERROR, "LookupError: no part 1"),
        (ToolStatus.OK, "(no output)"),
        (ToolStatus.OK, "36"),
        (ToolStatus.OK, "6"),
        (ToolStatus.OK, "11111111 0"),
    ]


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        ("print(read(2))", "18", True),
        (" print( read( 2 ) )\n", "18", True),
        ("print(read(2))", "12", False),
        ("print(read(3))", "LookupError: no part 3", False),
        ("print(lcm(12,18))", "36", True),
        ("print(lcm(12,19))", "228", False),
        ("print(lcm(a,read(2)))", "36", True),
        ("print(a,read(2))", "12 18", None),
        ("x = 1", "", None),
    ],
)
def test_expected_output(code: str, output: str, expected: bool | None) -> None:
    environment = ReasoningGymEnvironment(["lcm"])
    assert environment.expected_output(task_of([12, 18], "36"), code, output) is expected


def test_partial_marks_are_no_success() -> None:
    # the library gives partial marks to an answer that contains the right one
    assert ReasoningGymEnvironment(["lcm"]).grade(task_of([12, 18], "36"), "it is 36") == 0.0


@pytest.mark.parametrize("dataset", DATASETS)
@given(st.text(max_size=12))
@settings(max_examples=50)
def test_any_answer_is_graded(dataset: str, answer: str) -> None:
    environment = ReasoningGymEnvironment([dataset])
    (task,) = environment.tasks("train", 1, seed=0)
    assert environment.grade(task, answer) == 0.0


@pytest.mark.parametrize("datasets", [[], ["lcm", "sudoku"], "lcm"])
def test_bad_options(datasets: object) -> None:
    with pytest.raises(ValueError, match="datasets must be a list of names among chain_sum, products"):
        make_environment("reasoning_gym", datasets=datasets)
