"""The rewards of papers in examples/: worked by hand, refused where data lacks, trained with as the guide shows."""

import doctest
import importlib.util
import itertools
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gtpo.assembly import make_own_terms
from gtpo.config import config_from_dict
from gtpo.methods import METHODS
from gtpo.reward_functions import RewardFault, load_reward_function
from gtpo.rewards import OwnTerms, turn_rewards
from gtpo.run_folder import read_rows
from gtpo.trainer import Trainer
from gtpo.types import Task, ToolCall, ToolResult, ToolStatus, Trajectory, Turn
from tests.trainer.test_trainer import TINY_RUN

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "paper_rewards.py"
GUIDE = (ROOT / "docs" / "paper_rewards.md").read_text()
SNIPPETS = {
    tomllib.loads(text)["method"]: tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
}


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_rewards_of_a_test", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turn(*calls: ToolCall, results: list[ToolResult] | None = None, answer: str | None = None) -> Turn:
    found = [ToolResult(ToolStatus.OK, "fine")] * len(calls) if results is None else results
    return Turn([5], [-1.0], "text", calls=list(calls), results=found, answer=answer)


def played(*turns: Turn, outcome: float = 0.0, truth: str = "Goethe", **data: Any) -> Trajectory:
    task = Task("t", "library", "Who wrote Faust?", truth, data=data)
    return Trajectory(task, 0, [1], list(turns), answer=turns[-1].answer, outcome=outcome)


def searched(*results: tuple[ToolStatus, str]) -> Turn:
    return turn(*[ToolCall("search", {})] * len(results), results=[ToolResult(*result) for result in results])


def expected(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


OK, ERROR, UNKNOWN = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.UNKNOWN_TOOL


def test_mt_grpo_pays_execution_and_the_answer_in_the_result(papers: ModuleType) -> None:
    trajectory = played(
        searched((OK, "Faust, by GOETHE"), (ERROR, "no page")),  # 0.2 / 2 + 0.5
        searched((OK, "Schiller")),  # 0.2
        searched((ERROR, "no page of Goethe")),  # an error may repeat the call
        turn(answer="Goethe"),
    )
    assert papers.mt_grpo_turn(trajectory) == pytest.approx([0.6, 0.2, 0.0, 0.0])
    assert papers.mt_grpo_turn(trajectory, execution=1.0, presence=2.0) == pytest.approx([2.5, 1.0, 0.0, 0.0])


def test_mt_grpo_form_is_of_turns_that_call(papers: ModuleType) -> None:
    trajectory = played(searched((ERROR, "")), searched((OK, ""), (UNKNOWN, "")), turn(answer="x"))
    assert papers.mt_grpo_turn(trajectory, form=0.25) == pytest.approx([0.25, 0.1, 0.0])
    # what was cut off before its tools ran has no result
    assert papers.mt_grpo_turn(played(turn(ToolCall("search", {}), results=[]))) == [0.0]


@pytest.mark.parametrize(
    ("truth", "text", "is_part", "is_word"),
    [
        ("4", "14", True, False),
        ("4", "x = 4.", True, True),
        ("a.c", "abc", False, False),
        ("C++", "in C++ now", True, True),
        ("", "text", False, False),
        ("  ", "a  b", False, False),
    ],
)
def test_mt_grpo_answers_may_be_asked_for_as_words(
    papers: ModuleType, truth: str, text: str, is_part: bool, is_word: bool
) -> None:
    trajectory = played(searched((OK, text)), truth=truth)
    assert papers.mt_grpo_turn(trajectory, execution=0.0) == [0.5 * is_part]
    assert papers.mt_grpo_turn(trajectory, execution=0.0, whole_words=True) == [0.5 * is_word]


def test_mt_grpo_takes_accepted_answers_of_the_task(papers: ModuleType) -> None:
    trajectory = played(searched((OK, "J. W. v. Goethe")), truth="-", aliases=["Johann", "v. goethe"])
    assert papers.mt_grpo_turn(trajectory) == [0.2]
    assert papers.mt_grpo_turn(trajectory, answers="aliases") == [0.7]


@pytest.mark.parametrize(
    ("arguments", "wanted", "similarity"),
    [
        ({"x": 1, "y": 2}, {"x": 1, "y": 2}, 1.0),
        ({"x": 1, "y": 3}, {"x": 1, "y": 2}, 3 / 4),  # (1 + 1 + 1) / 4
        ({"x": 1, "z": 2}, {"x": 1, "y": 2}, 7 / 12),  # (1 + 1/3 + 1) / 4
        ({"z": 1}, {"x": 1}, 1 / 3),  # the name alone
        ({}, {}, 1.0),
        ({}, {"x": 1}, 1 / 3),
        ({"x": 1}, {}, 1 / 2),
        ({"x": True}, {"x": 1}, 2 / 3),
        ({"x": 1.0}, {"x": 1}, 1.0),
        ({"x": [1, {"a": None}]}, {"x": [1, {"a": None}]}, 1.0),
        ({"x": "1"}, {"x": 1}, 2 / 3),
    ],
)
def test_similarity_of_calls(
    papers: ModuleType, arguments: dict[str, Any], wanted: dict[str, Any], similarity: float
) -> None:
    assert papers.call_similarity(ToolCall("f", arguments), "f", wanted) == pytest.approx(similarity)
    for other in (ToolCall("F", arguments), ToolCall("f", arguments, error="unreadable")):
        assert papers.call_similarity(other, "f", wanted) == 0.0


def test_calls_whose_form_writes_text_are_compared_as_text(papers: ModuleType) -> None:
    call = ToolCall("f", {"x": "1", "y": "true", "z": "a"}, is_text=True)
    assert papers.call_similarity(call, "f", {"x": 1, "y": True, "z": "a"}) == 1.0


def test_matchtir_pays_the_mean_of_a_turn(papers: ModuleType) -> None:
    calls = [expected("search", query="Faust"), expected("open", page="Goethe")]
    trajectory = played(
        turn(ToolCall("open", {"page": "Faust"}), ToolCall("search", {"query": "Faust"})),  # (2/3 + 1) / 2
        turn(ToolCall("search", {"query": "Faust"})),  # a repeat: its partner is taken
        turn(ToolCall("search", {}, error="unreadable")),
        turn(answer="Goethe"),
        outcome=1.0,
        expected_calls=calls,
    )
    assert papers.matchtir(trajectory) == pytest.approx([5 / 6, 0.0, 0.0, 0.0])
    assert papers.matchtir(trajectory, unmatched=-0.5) == pytest.approx([5 / 6, -0.5, -0.5, 0.0])
    other = played(turn(ToolCall("open", {"page": "Goethe"})), solution=calls)
    assert papers.matchtir(other, calls="solution") == [1.0]
    assert papers.matchtir(played(turn(ToolCall("open", {})), turn(), expected_calls=[])) == [0.0, 0.0]


def test_matchtir_assigns_for_the_greatest_sum(papers: ModuleType) -> None:
    # first call 4/4 and 3/4, second 3/4 and 2/4: straight 1.5, crossed 1.5, and the earlier one gets more
    wanted = [expected("f", x=1, y=1), expected("f", x=1, y=2)]
    first, second = ToolCall("f", {"x": 1, "y": 1}), ToolCall("f", {"x": 3, "y": 1})
    assert papers.matchtir(played(turn(first), turn(second), expected_calls=wanted)) == [1.0, 0.5]
    # 1.6 crossed; the best pair first would give 1 and nothing
    assert papers.best_assignment([[1.0, 0.8], [0.8, 0.0]]) == [1, 0]


@pytest.mark.parametrize(
    ("answer", "truth", "f1"),
    [
        ("The Goethe!", "goethe", 2 / 3),  # two words of which one is right
        ("J.W. Goethe", "J. W. Goethe", 1.0),
        ("Schiller", "Goethe", 0.0),
        (None, "Goethe", 0.0),
        ("...", "Goethe", 0.0),
    ],
)
def test_matchtir_answers_take_the_place_of_the_outcome(
    papers: ModuleType, answer: str | None, truth: str, f1: float
) -> None:
    trajectory = played(turn(), turn(answer=answer), outcome=0.5, truth=truth, expected_calls=[])
    assert papers.matchtir(trajectory) == [0.0, 0.0]
    assert papers.matchtir(trajectory, answer_f1=True) == pytest.approx([0.0, f1 - 0.5])
    term = load_reward_function(f"{FILE}:matchtir", options={"answer_f1": True})
    (rewards,) = turn_rewards([trajectory], METHODS["mt_grpo"].reward, OwnTerms([term]))
    assert rewards.terms["outcome"][-1] + rewards.terms["matchtir"][-1] == pytest.approx(f1)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4), (5, 5), (6, 3), (3, 6)])
def test_the_assignment_is_the_best_of_all(papers: ModuleType, shape: tuple[int, int]) -> None:
    rng = random.Random(0)
    rows, columns = shape
    for levels in (2, 4, 1000):  # few levels: many ties and zeros
        for _ in range(20):
            scores = [[rng.randrange(levels) / levels for _ in range(columns)] for _ in range(rows)]
            found = papers.best_assignment(scores)
            taken = [column for column in found if column is not None]
            assert len(found) == rows and len(set(taken)) == len(taken)
            earned = [0.0 if column is None else scores[row][column] for row, column in enumerate(found)]
            assert all(value > 0 or column is None for value, column in zip(earned, found, strict=True))
            # a place behind the columns is no partner
            every = [
                [scores[row][place] if place < columns else 0.0 for row, place in enumerate(choice)]
                for choice in itertools.permutations(range(max(rows, columns)), rows)
            ]
            best = max(map(sum, every))
            assert sum(earned) == pytest.approx(best)
            # of equal sums the one that gives most to the first row, then to the second, ...
            weighed = [sum(value * -row for row, value in enumerate(v)) for v in every if sum(v) > best - 1e-9]
            assert sum(value * -row for row, value in enumerate(earned)) == pytest.approx(max(weighed))


def test_no_calls_have_no_partners(papers: ModuleType) -> None:
    assert papers.best_assignment([]) == [] and papers.best_assignment([[], []]) == [None, None]


def test_many_calls_are_no_fault(papers: ModuleType) -> None:
    call = ToolCall("f", {"x": 1})
    rewards = papers.matchtir(played(*[turn(call)] * 300, expected_calls=[expected("f", x=1)] * 2))
    assert rewards == [1.0, 1.0, *[0.0] * 298]


def test_gigpo_pays_success_and_takes_off_invalid_actions(papers: ModuleType) -> None:
    turns = [searched((OK, ""), (UNKNOWN, ""), (UNKNOWN, "")), searched((ERROR, "")), turn(), turn(answer="Goethe")]
    solved, half, failed = (played(*turns, outcome=outcome) for outcome in (1.0, 0.5, 0.0))
    assert papers.gigpo(solved) == pytest.approx([-0.1, 0.0, -0.1, 9.0])
    assert papers.gigpo(half) == pytest.approx([-0.1, 0.0, -0.1, -0.5])
    assert papers.gigpo(failed, success=1.0, invalid=0.01) == pytest.approx([-0.01, 0.0, -0.01, 0.0])
    assert papers.gigpo(failed, void_is_invalid=False) == pytest.approx([-0.1, 0.0, 0.0, 0.0])
    config = config_from_dict(merged("gigpo"))
    terms = OwnTerms([load_reward_function(f"{FILE}:gigpo")])
    sums = [found.rewards for found in turn_rewards([solved, half, failed], config.reward, terms)]
    assert sums == [pytest.approx([-0.1, 0.0, -0.1, last]) for last in (10.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("function", "options", "data", "message"),
    [
        ("matchtir", {}, {"a": 1}, "task.data must hold the expected calls under 'expected_calls', got 'a'"),
        ("matchtir", {"calls": "c"}, {}, "task.data must hold the expected calls under 'c', got nothing"),
        ("matchtir", {}, {"expected_calls": "f"}, r"task.data\['expected_calls'\] must be a list of expected calls"),
        ("matchtir", {}, {"expected_calls": [{"name": "f"}]}, r"\['expected_calls'\]\[0\] must be .*\"arguments\""),
        ("matchtir", {}, {"expected_calls": ["f"]}, r"\['expected_calls'\]\[0\] must be .*got 'f'"),
        ("mt_grpo_turn", {"answers": "b"}, {"a": 1}, "task.data must hold the accepted answers under 'b', got 'a'"),
        ("mt_grpo_turn", {"answers": "a"}, {"a": [1]}, r"task.data\['a'\] must be a list of texts, got \[1\]"),
    ],
)
def test_a_task_without_what_a_reward_needs_is_refused_by_name(
    function: str, options: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    term = load_reward_function(f"{FILE}:{function}", options=options)
    with pytest.raises(RewardFault, match=f"^reward '{function}', task 't': raised ValueError: .*{message}"):
        term([played(turn(ToolCall("f", {})), **data)])


def test_the_examples_of_the_file_hold_and_it_runs(papers: ModuleType) -> None:
    assert doctest.testmod(papers).attempted >= 5 and doctest.testmod(papers).failed == 0
    shown = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, check=True).stdout
    assert shown in GUIDE and "matchtir" in shown


def merged(method: str, **further: Any) -> dict[str, Any]:
    """A tiny run with what the guide shows for `method`."""
    return {**tomllib.loads(TINY_RUN), **SNIPPETS[method], **further}


def test_the_guide_has_a_configuration_for_each() -> None:
    assert sorted(SNIPPETS) == ["gigpo", "matchtir", "mt_grpo"]


@pytest.mark.parametrize("method", sorted(SNIPPETS))
def test_configurations_of_the_guide_load(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = config_from_dict(merged(method))
    assert config.credit == METHODS[method].credit and len(make_own_terms(config).functions) == 1


SEVENS = """
from gtpo import Answer, Call, CodeEnvironment, GeneratedEnvironment

class Sevens(GeneratedEnvironment, CodeEnvironment):
    name = "sevens"
    system_prompt = "Call tools in python. Then answer."
    explain_protocol = False

    def draw(self, rng, position):
        call = {"name": "python", "arguments": {"code": "7"}}
        return "cell 7", "7", {"expected_calls": [call], "nonce": rng.random()}

    def grade(self, task, answer):
        return float(answer == task.answer)

    def oracle(self, task, rng):
        yield Call("7")
        yield Answer("7")
"""


@pytest.mark.parametrize("method", sorted(SNIPPETS))
def test_a_run_as_the_guide_shows(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # files are imported once, under their stem
    path = tmp_path / f"sevens_for_{method}.py"
    path.write_text(SEVENS)
    environments = [{"name": f"{path}:Sevens"}]
    # a warm-up after which nearly every first turn calls
    warm_up = {**tomllib.loads(TINY_RUN)["sft"], "steps": 60}
    changes = {"output_dir": str(tmp_path / "run"), "environments": environments, "sft": warm_up, "train": {"steps": 1}}
    config = config_from_dict(merged(method, **changes))
    with Trainer(config) as trainer:
        trainer.train()
        folder = trainer.run.path
    name = config.rewards[0].function.rpartition(":")[2]
    turns, rows = read_rows(folder / "turns.jsonl"), read_rows(folder / "metrics.jsonl")
    assert turns and any(turn["reward_terms"][name] != 0 for turn in turns)
    assert all(turn["reward_terms"]["format"] == turn["reward_terms"]["execution"] == 0 for turn in turns)
    (step,) = [row for row in rows if row["phase"] == "train"]
    assert f"reward_term/{name}/mean" in step
