"""Turn rewards: every rule of the method, worked by hand."""

import sys

import pytest

from gtpo.methods import METHODS, RewardRule
from gtpo.rewards import ngram_similarity, similarity_credits, turn_rewards
from gtpo.types import ToolStatus
from tests.trainer.conftest import make_trajectory, make_turn

GTPO, DENSE, GRPO = (METHODS[name].reward for name in ("gtpo", "gtpo_dense", "grpo"))
INVALID = ToolStatus.MALFORMED


def test_the_outcome_is_paid_on_the_last_turn() -> None:
    (rewards,) = turn_rewards([make_trajectory(make_turn(code="a"), make_turn(), outcome=1.0)], GTPO)
    assert rewards.rewards == [0.0, 1.0]


def test_format_faults_cost_once_a_turn() -> None:
    invalid = make_turn(code="a", status=INVALID)
    invalid.results *= 2
    no_call = make_trajectory(make_turn(), outcome=1.0)
    rewards = turn_rewards(
        [make_trajectory(invalid, make_turn(code="b"), invalid), no_call], RewardRule(similarity_alpha=0)
    )
    assert [entry.rewards for entry in rewards] == [[-0.1, 0.0, -0.1], [0.9]]


def test_execution_takes_the_worse_of_two_faults_and_pays_once() -> None:
    turns = [
        make_turn(code="a", status=ToolStatus.ERROR),
        make_turn(code="b", as_expected=True),
        make_turn(code="c", as_expected=True),
        make_turn(code="d", as_expected=False),
        make_turn(code="e"),
        make_turn(code="f", status=INVALID),
    ]
    (rewards,) = turn_rewards([make_trajectory(*turns)], DENSE)
    assert rewards.rewards == [-0.05, 0.05, 0.0, -0.05, 0.0, -0.1]
    assert turn_rewards([make_trajectory(*turns)], GTPO)[0].terms["execution"] == [0.0] * 6


def test_failures_earn_by_similarity_to_successes() -> None:
    same = make_trajectory(make_turn(code="print(1)"))
    silent = make_trajectory(make_turn())
    successes = [make_trajectory(make_turn(code=code), outcome=1.0) for code in ("print(1)", "x")]
    other = ngram_similarity(["print(1)"], ["x"])
    credits = similarity_credits([same, silent, *successes], alpha=0.5, similarity=ngram_similarity)
    assert credits == pytest.approx([0.25 * (1 + other), 0.0, 0.0, 0.0])
    assert similarity_credits([same, silent], alpha=0.5, similarity=ngram_similarity) == [0.0, 0.0]


def test_grpo_pays_a_clean_right_trajectory_only() -> None:
    clean = make_trajectory(make_turn(code="a"), make_turn(), outcome=1.0)
    faulty = make_trajectory(make_turn(code="a", status=INVALID), make_turn(), outcome=1.0)
    wrong = make_trajectory(make_turn(code="a"), make_turn(), outcome=0.0)
    assert [entry.rewards for entry in turn_rewards([clean, faulty, wrong], GRPO)] == [[0, 1], [0, 0], [0, 0]]


def test_graded_outcomes_count_as_they_are_in_every_method() -> None:
    for name, method in METHODS.items():
        graded, faulty = (
            make_trajectory(make_turn(code="a"), make_turn(code="b", status=status), make_turn(), outcome=0.7)
            for status in (ToolStatus.OK, INVALID)
        )
        found = turn_rewards([graded, faulty], method.reward)
        assert found[0].rewards == [0.0, 0.0, 0.7], name
        expected = 0.0 if method.reward.outcome_needs_format else 0.7
        assert found[1].rewards == [0.0, -method.reward.format_penalty, expected], name


def test_what_is_a_format_fault_is_a_switch() -> None:
    invalid, silent = make_turn(code="a", status=INVALID), make_turn()
    group = [
        make_trajectory(silent, outcome=1.0),
        make_trajectory(make_turn(code="a"), invalid, make_turn(), outcome=1.0),
    ]
    for faults, expected in (
        (("invalid_call", "no_first_call"), [[True], [False, True, False]]),
        (("invalid_call",), [[False], [False, True, False]]),
        (("no_first_call",), [[True], [False] * 3]),
        ((), [[False], [False] * 3]),
    ):
        paid = turn_rewards(group, RewardRule(format_faults=faults, format_penalty=0.25))
        strict = RewardRule(format_faults=faults, format_penalty=0.0, outcome_needs_format=True, similarity_alpha=0.0)
        clean = turn_rewards(group, strict)
        assert [entry.faults for entry in paid] == [entry.faults for entry in clean] == expected
        for entry, of_clean, wrong in zip(paid, clean, expected, strict=True):
            assert entry.terms["format"] == [-0.25 * fault for fault in wrong]
            assert of_clean.rewards == [*[0.0] * (len(wrong) - 1), float(not any(wrong))]


def test_no_term_stands_in_for_an_outcome_that_a_fault_cost() -> None:
    rule = RewardRule(format_penalty=0.0, outcome_needs_format=True)
    success = make_trajectory(make_turn(code="print(1)"), outcome=1.0)
    for outcome in (0.0, 0.7):
        faulty = make_trajectory(make_turn(code="print(1)"), make_turn(code="b", status=INVALID), outcome=outcome)
        assert turn_rewards([success, faulty], rule)[1].rewards == [0.0, 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_rewards_are_the_sum_of_their_named_terms(name: str) -> None:
    group = [
        make_trajectory(make_turn(), make_turn(code="f", status=INVALID, as_expected=True), make_turn(), outcome=0.4),
        make_trajectory(
            make_turn(code="a", as_expected=True), make_turn(code="b", status=ToolStatus.ERROR), outcome=1.0
        ),
        make_trajectory(make_turn(code="a", status=INVALID, as_expected=False), make_turn(code="b")),
    ]
    for entry in turn_rewards(group, METHODS[name].reward):
        assert list(entry.terms) == ["outcome", "similarity", "format", "execution"]
        assert entry.rewards == pytest.approx([sum(parts) for parts in zip(*entry.terms.values(), strict=True)])
        assert all(len(values) == len(entry.rewards) == len(entry.faults) for values in entry.terms.values())


def test_similarity_ignores_layout_only() -> None:
    assert ngram_similarity(["x=1 # one"], ["x = 1"]) == 1.0
    assert 0 < ngram_similarity(["f(1)"], ["f(2)"]) < 1
    assert ngram_similarity([], ["print(1)"]) == ngram_similarity(["# note"], ["print(1)"]) == 0.0
    assert ngram_similarity(["a b ("], ["a b ("]) == 1.0


def test_a_cell_that_does_not_parse_leaves_the_others_as_they_are() -> None:
    success = ["x = f(1)", "print( x )"]
    assert ngram_similarity(["x=f(1)", "print(x)"], success) == 1.0
    # the broken cell costs what it adds: the tokens of the others still count, whatever their layout
    assert 0.8 < ngram_similarity(["x=f(1)", "print(", "print(x)"], success) < 1
    assert ngram_similarity(["print("], success) == 0.0


HUGE = ["0x" + "f" * 3600, "0b" + "1" * 15_000, "0o" + "7" * 5000, "-0x" + "f" * 3600, "1" * 4300, "9" * 5000]


@pytest.mark.parametrize("literal", HUGE)
@pytest.mark.parametrize("digits", [0, 640, 4300])
def test_no_literal_is_too_long_to_compare(literal: str, digits: int) -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(digits)
    try:
        # 0 is no limit, 640 the least that Python takes
        failed = make_trajectory(make_turn(code=f"n = {literal}\nprint(n % 7)"))
        success = make_trajectory(make_turn(code="n = 0xff\nprint(n % 7)"), outcome=1.0)
        first, _ = turn_rewards([failed, success], GTPO)
        assert 0 < first.terms["similarity"][-1] < GTPO.similarity_alpha
        assert ngram_similarity(failed.cells, failed.cells) == pytest.approx(1.0)
    finally:
        sys.set_int_max_str_digits(before)


def test_numbers_count_by_their_value_and_kind() -> None:
    assert ngram_similarity(["f(16)"], ["f(0x10)"]) == 1.0
    for other in ("f(16.0)", "f('16')", "f(17)", "f(16j)", "f('0x10')"):
        assert ngram_similarity(["f(16)"], [other]) < 1.0
    assert ngram_similarity(["f(1)"], ["f(True)"]) < 1.0


def test_a_parser_s_warning_about_a_cell_is_not_heard() -> None:
    # as an error it would make the cell one that does not parse
    assert ngram_similarity(["print('\\d' + x)"], ["print( '\\d'+x )"]) == 1.0


def test_only_the_whole_outcome_is_a_success() -> None:
    partial = make_trajectory(make_turn(code="print(1)"), outcome=0.9)
    failure = make_trajectory(make_turn(code="print(1)"))
    assert not partial.is_success
    # nobody succeeded, so nobody is an example; the partial outcome is paid as it is
    assert [entry.rewards for entry in turn_rewards([partial, failure], GTPO)] == [[0.9], [0.0]]
    success = make_trajectory(make_turn(code="print(1)"), outcome=1.0)
    low = make_trajectory(make_turn(code="print(1)"), outcome=0.2)
    found = turn_rewards([partial, low, failure, success], GTPO)
    # only an outcome of 0 is replaced
    assert [entry.rewards for entry in found] == [[0.9], [0.2], [0.5], [1.0]]
    assert [entry.terms["similarity"] for entry in found] == [[0.0], [0.0], [0.5], [0.0]]


def test_a_trajectory_without_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least one turn, got none"):
        turn_rewards([make_trajectory()], GTPO)
