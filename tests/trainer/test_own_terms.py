"""Reward terms and environments of the user's own, named by file in the configuration."""

import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from gtpo.assembly import make_own_terms
from gtpo.config import config_from_dict
from gtpo.credit import assign_credit
from gtpo.methods import CreditSum, RewardRule
from gtpo.metrics import measure_metrics, reward_term_metrics
from gtpo.reward_functions import RewardFault, RewardFunction
from gtpo.rewards import OwnTerms, turn_rewards
from gtpo.run_folder import read_rows
from gtpo.types import ToolStatus, Trajectory
from tests.trainer.conftest import make_trajectory, make_turn
from tests.trainer.test_trainer import make_trainer

SOURCE = """
def useful_call(trajectory, bonus=1.0):
    return [bonus if turn.results and turn.results[0].text == "yes" else 0.0 for turn in trajectory.turns]

def rank(group):
    order = sorted(group, key=lambda trajectory: len(trajectory.turns))
    return [[float(order.index(trajectory))] * len(trajectory.turns) for trajectory in group]

def other(rows):
    return []

constant = 3
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "own_rewards.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield path
    # files are imported once, and the next test has another one of this name
    sys.modules.pop("own_rewards", None)


def own(*rewards: dict[str, Any]) -> OwnTerms:
    return make_own_terms(config_from_dict({"rewards": list(rewards)}))


def test_terms_are_added_by_name_and_weight(source: Path) -> None:
    terms = own(
        {"function": f"{source}:useful_call", "weight": 0.2, "options": {"bonus": 2.0}},
        {"function": f"{source}:rank", "name": "place"},
        {"name": "progress", "weight": 10.0},
    )
    short = make_trajectory(make_turn(code="a", output="yes"), outcome=0.7)
    long = make_trajectory(make_turn(code="a"), make_turn(), sample=1)
    long.turns[0].rewards = {"progress": 0.5}
    first, second = turn_rewards([short, long], RewardRule(similarity_alpha=0.0), terms)
    assert first.terms["useful_call"] == [0.4] and first.terms["place"] == [0.0] and first.terms["progress"] == [0.0]
    assert second.terms["useful_call"] == [0.0, 0.0] and second.terms["progress"] == [5.0, 0.0]
    assert first.rewards == pytest.approx([1.1]) and second.rewards == pytest.approx([6.0, 1.0])


def test_a_term_of_an_episode_counts_once_by_default() -> None:
    trajectory = make_trajectory(make_turn(code="a"))
    trajectory.turns[0].rewards = {"progress": 0.5}
    assert turn_rewards([trajectory], RewardRule())[0].rewards == [0.5]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"function": "{source}:nothing"}, r"rewards\.0: function '.*' must name something in .*'nothing'"),
        ({"function": "{source}:constant"}, r"rewards\.0: function '.*' must name a function, found 3"),
        ({"function": "{source}:other"}, "must take `trajectory` or `group` as its first parameter, got rows"),
        ({"function": "nowhere.py:f"}, r"rewards\.0: function 'nowhere.py:f' cannot be imported: .*no file"),
        ({"function": "f"}, 'function must be "package.module:name" or "file.py:name", got \'f\''),
        ({"function": "{source}:rank", "options": {"size": 1}}, "options of function .* unexpected keyword .*size"),
        (
            {"function": "{source}:rank", "name": "format"},
            r"rewards\.0 must have a name of its own, got 'format', .* a term of \[reward\]",
        ),
        ({"function": "{source}:rank", "weigth": 1.0}, r"unknown config key 'rewards\.0\.weigth'; did you mean"),
        ({"function": "{source}:rank", "weight": float("nan")}, r"rewards\.0\.weight must be a finite number, got nan"),
        ({"weight": 2.0}, r"rewards\.0 must have a function, or the name"),
        ({"name": "progress", "options": {"a": 1}}, r"rewards\.0: options need a function"),
    ],
)
def test_what_is_wrong_is_said_at_the_start(source: Path, reward: dict[str, Any], message: str) -> None:
    if "function" in reward:
        reward = {**reward, "function": reward["function"].format(source=source)}
    with pytest.raises(ValueError, match=message):
        own(reward)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not for you")


def given(value: Any) -> Callable[[Any], Any]:
    def function(trajectory: Trajectory) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    return function


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must give a finite float for each of 1 turns, got None"),
        ([], r"must give a finite float for each of 1 turns, got \[\]"),
        ([float("nan")], r"must give a finite float for each of 1 turns, got \[nan\]"),
        (["1"], "must give a finite float for each of 1 turns"),
        (KeyError("price"), r"raised KeyError: 'price' \(.*test_own_terms\.py, line \d+\)$"),
        (Unspeakable(), r"raised Unspeakable \(.*test_own_terms\.py, line \d+\)$"),
        (SystemExit(0), "raised SystemExit: 0"),
        ([10**400], "must give a finite float for each of 1 turns, got"),
        (Unspeakable, "must give a finite float for each of 1 turns, got"),
        ([Fraction(10**400)], "must give a finite float for each of 1 turns"),
    ],
)
def test_a_faulty_function_ends_the_run_by_name(value: Any, message: str) -> None:
    terms = OwnTerms([RewardFunction("mine", given(value), "trajectory")])
    with pytest.raises(RewardFault, match=f"^reward 'mine', task 't': {message}"):
        turn_rewards([make_trajectory(make_turn())], RewardRule(), terms)


def test_numbers_that_cannot_be_shown_end_the_run_by_name() -> None:
    terms = OwnTerms([RewardFunction("mine", given(10**5000), "trajectory")])
    with pytest.raises(RewardFault, match="got a int whose repr raises ValueError"):
        turn_rewards([make_trajectory(make_turn())], RewardRule(), terms)


def test_a_weight_that_makes_a_term_infinite_ends_the_run_by_name() -> None:
    terms = OwnTerms([RewardFunction("mine", given([1e300]), "trajectory", weight=1e300)])
    with pytest.raises(RewardFault, match=r"must give a finite float for each of 1 turns, got \[1e\+300\]"):
        turn_rewards([make_trajectory(make_turn())], RewardRule(), terms)


def test_a_weight_for_a_term_that_nobody_gives_is_warned_of_and_the_term_is_there() -> None:
    terms = OwnTerms(weights={"progres": 2.0})
    trajectory = make_trajectory(make_turn())
    trajectory.turns[0].rewards = {"progress": 1.0}
    assert terms.not_given([trajectory]) == "no turn gave the reward term progres; given were: progress"
    assert terms.of([trajectory]) == [{"progres": [0.0], "progress": [1.0]}]
    assert OwnTerms(weights={"progress": 2.0}).not_given([trajectory]) == ""


def test_a_group_function_gives_a_list_a_trajectory() -> None:
    terms = OwnTerms([RewardFunction("mine", lambda group: [[1.0]], "group")])
    with pytest.raises(RewardFault, match="must give a list for each of 2 trajectories"):
        turn_rewards([make_trajectory(make_turn())] * 2, RewardRule(), terms)


def test_correlations_of_a_term() -> None:
    def calls(trajectory: Trajectory) -> Sequence[float]:
        return [float(bool(turn.calls)) for turn in trajectory.turns]

    group = [
        make_trajectory(make_turn(code="a"), make_turn(code="b"), make_turn()),
        make_trajectory(make_turn(), outcome=1.0, sample=1),
        make_trajectory(make_turn(code="a"), make_turn(), outcome=0.5, sample=2),
    ]
    group[2].measures = {"steps": 4.0}
    rule = RewardRule(similarity_alpha=0.0, format_penalty=0.0)
    rewards = [turn_rewards(group, rule, OwnTerms([RewardFunction("calls", calls, "trajectory")]))]
    found = reward_term_metrics(assign_credit([group], rewards, CreditSum()))
    assert found["reward_term/calls/mean"] == 0.5 and found["reward_term/calls/std"] == 0.5
    # sums 2, 0, 1 against outcomes 0, 1, 0.5
    assert found["reward_term/calls/success_correlation"] == pytest.approx(-1.0)
    assert found["reward_term/outcome/success_correlation"] == pytest.approx(1.0)
    assert found["reward_term/similarity/success_correlation"] == 0.0
    assert -1 <= found["reward_term/calls/advantage_correlation"] <= 1
    assert measure_metrics(group) == {"measure/steps": 4.0}


LEDGER = """
import random
from gtpo import Answer, Call, CodeEnvironment, GeneratedEnvironment, Grade, Task

class Ledger(GeneratedEnvironment, CodeEnvironment):
    name = "ledger"
    system_prompt = "Call tools in python. Then answer."
    explain_protocol = False

    def __init__(self, top=9):
        self.top = top

    def draw(self, rng, position):
        number = rng.randrange(self.top)
        return f"print {number}", str(number), {"number": number, "nonce": rng.random()}

    def grade(self, task, answer):
        return float(answer == task.answer)

    def oracle(self, task, rng):
        output = yield Call(f"print({task.data['number']})")
        yield Answer(output.strip())
"""


def test_a_run_of_an_environment_and_a_reward_of_ones_own(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "ledger_of_a_test.py"
    path.write_text(LEDGER)
    with make_trainer(
        tmp_path,
        *("--environments", f'[{{name = "{path}:Ledger", options = {{top = 5}}}}]'),
        *("--rewards", f'[{{function = "{source}:useful_call", weight = 0.2}}]'),
    ) as trainer:
        trainer.train()
        folder = trainer.run.path
    turns, rows = read_rows(folder / "turns.jsonl"), read_rows(folder / "metrics.jsonl")
    assert all(set(turn["reward_terms"]) >= {"outcome", "format", "useful_call"} for turn in turns)
    steps = [row for row in rows if row["phase"] == "train"]
    assert steps and all("reward_term/useful_call/success_correlation" in row for row in steps)


def test_the_functions_of_the_guide() -> None:
    guide = Path(__file__).parents[2] / "docs" / "adding_a_reward.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    group = [
        make_trajectory(make_turn(code="a"), make_turn(code="b", status=ToolStatus.ERROR), make_turn(), outcome=1.0),
        make_trajectory(make_turn(code="a"), make_turn(), outcome=1.0, sample=1),
        make_trajectory(make_turn(), sample=2),
    ]
    useful = RewardFunction("useful_call", scope["useful_call"], "trajectory", options={"penalty": 0.5})
    assert useful(group) == [[1.0, -0.5, 0.0], [1.0, 0.0], [0.0]]
    assert RewardFunction("shortest", scope["shortest"], "group")(group) == [[0.0] * 3, [0.0, 1.0], [0.0]]


def test_a_term_of_the_credit_may_be_about_a_reward_of_ones_own(source: Path) -> None:
    """As GDPO has it: each kind of reward is normalised by itself, and the large one does not drown the small one."""
    raw: dict[str, Any] = {
        "rewards": [{"function": f"{source}:useful_call"}, {"name": "progress", "weight": 100.0}],
        "credit": {"terms": [{"reward": name, "gamma": 1.0} for name in ("useful_call", "progress")]},
    }
    config = config_from_dict(raw)
    group = [make_trajectory(make_turn(code="a", output=text), sample=i) for i, text in enumerate(["yes", "no"] * 2)]
    for trajectory, progress in zip(group, (0.1, 0.1, 0.3, 0.3), strict=True):
        trajectory.turns[0].rewards = {"progress": progress}
    rewards = turn_rewards(group, config.reward, make_own_terms(config))
    ((one, two, three, four),) = assign_credit([group], [rewards], config.credit)
    found = [scored.credit.advantages[0] for scored in (one, two, three, four)]
    # half a unit from the mean, over the sample deviation of two and two
    each = 0.5 / statistics.stdev([0.0, 0.0, 1.0, 1.0])
    assert found == pytest.approx([0.0, -2 * each, 2 * each, 0.0], abs=1e-4)
    raw["credit"]["terms"][1]["reward"] = "progres"
    with pytest.raises(ValueError, match=r"credit\.terms\.1\.reward must be one of outcome, .*, useful_call, progress"):
        config_from_dict(raw)
    with pytest.raises(ValueError, match="must hold 'useful_call', which a term of the credit is about, got progress"):
        assign_credit([group], [turn_rewards(group, config.reward)], config.credit)
