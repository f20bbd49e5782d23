"""Success, pass@k and counts."""

import pytest

from gtpo.evaluation import evaluate_groups, pass_at_k
from gtpo.types import StopReason, ToolStatus
from tests.trainer.conftest import make_trajectory, make_turn


def test_means_over_trajectories_and_tasks() -> None:
    right = make_trajectory(make_turn(code="a"), make_turn(), outcome=1.0)
    wrong = make_trajectory(make_turn(code="a", status=ToolStatus.MALFORMED), outcome=0.5)
    lost = make_trajectory(make_turn(), outcome=1.0, stop=StopReason.LOST)
    result = evaluate_groups([[right, wrong], [wrong, lost]])
    assert (result.num_tasks, result.samples, result.lost) == (2, 2, 1)
    assert (result.success, result.pass_at_k) == pytest.approx((1 / 3, 0.5))
    assert (result.turns, result.calls, result.invalid_calls) == pytest.approx((4 / 3, 1.0, 2 / 3))


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="not lost, got none"):
        evaluate_groups([[make_trajectory(make_turn(), stop=StopReason.LOST)]])
