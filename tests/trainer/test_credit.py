"""Advantages of whole groups, and what the masks leave of a trajectory."""

import re
import tomllib

import pytest

from gtpo.config import config_from_dict
from gtpo.credit import Credit, assign_credit, to_sequence
from gtpo.methods import METHODS, CreditSum, Method, Term
from gtpo.rewards import turn_rewards
from gtpo.types import StopReason, Trajectory
from tests.adapters.conftest import ROOT, run_python_blocks
from tests.trainer.conftest import make_trajectory, make_turn


def test_the_code_of_the_page_runs() -> None:
    scope = run_python_blocks(ROOT / "docs" / "credit.md")
    assert scope["credit"].advantages.count_nonzero() == 4


def test_the_tables_of_the_page_are_a_configuration() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "credit.md").read_text(), re.DOTALL)
    config = config_from_dict(tomllib.loads(block))
    assert config.reward.format_faults == ("invalid_call",) and config.loss.clip_high == 0.28
    assert [term.gamma for term in config.credit.terms] == [1.0, 1.0]


def credit_of(groups: list[list[Trajectory]], method: Method) -> list[list[Credit]]:
    scored = assign_credit(groups, [turn_rewards(group, method.reward) for group in groups], method.credit)
    return [[of_trajectory.credit for of_trajectory in group] for group in scored]


def calls(num_turns: int, outcome: float) -> Trajectory:
    return make_trajectory(*[make_turn(code="a") for _ in range(num_turns)], outcome=outcome)


def test_pooled_statistics_of_an_all_correct_group() -> None:
    ((short, long),) = credit_of([[calls(2, 1.0), calls(8, 1.0)]], METHODS["gtpo"])
    assert short.advantages == pytest.approx([0.73, 1.26], abs=0.01)
    assert (long.advantages[0], long.advantages[-1]) == pytest.approx((-1.47, 1.26), abs=0.01)


def test_grpo_broadcasts_one_advantage() -> None:
    ((right, wrong),) = credit_of([[calls(3, 1.0), calls(1, 0.0)]], METHODS["grpo"])
    assert right.advantages == pytest.approx([0.5**0.5] * 3, abs=1e-5)
    assert wrong.advantages == pytest.approx([-(0.5**0.5)], abs=1e-5)


def test_groups_do_not_mix_but_under_batch_scope() -> None:
    groups = [[calls(1, 1.0), calls(1, 1.0)], [calls(1, 0.0), calls(1, 0.0)]]
    apart = credit_of(groups, Method())
    assert [credit.advantages for group in apart for credit in group] == [[0.0]] * 4
    pooled = credit_of(groups, Method(credit=CreditSum((Term(scope="batch"),))))
    assert pooled[0][0].advantages[0] > 0.8 and pooled[1][0].advantages[0] < -0.8


@pytest.mark.parametrize("kind", ["truncated", "void"])
def test_masked_trajectories_keep_their_place_in_the_statistics(kind: str) -> None:
    masked = make_trajectory(make_turn(code="a"), make_turn(), answer=None)
    if kind == "truncated":
        masked.stop, masked.answer = StopReason.TRUNCATED, "1"
    ((with_it, own),) = credit_of([[calls(2, 1.0), masked]], METHODS["gtpo"])
    assert with_it.advantages[1] > 0 > own.advantages[0]
    off = to_sequence(masked, own, mask_truncated=False, mask_void_turns=False)
    on = to_sequence(masked, own, mask_truncated=kind == "truncated", mask_void_turns=kind == "void")
    assert sum(off.loss_mask) == 4 and sum(on.loss_mask) == 0
    assert on.advantages == off.advantages and on.token_ids == off.token_ids
