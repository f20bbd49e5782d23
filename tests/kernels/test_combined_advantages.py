"""`combined_advantages`: every field of a `CreditRule`, and sums of terms, against the definition and by hand."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import CreditRule, CreditTerm, TurnCredit, combined_advantages, turn_advantages
from tests.kernels.conftest import Case, assert_equal, cpu_only, emulated, examples, interpreted
from tests.kernels.turn_cases import general_case, random_case, reversed_trajectories

FAMILY = "turn_advantages"
QUANTITIES = ("turn_return", "trajectory_return", "outcome", "turn_reward")
GENERAL_RULES = [
    CreditRule(quantity, gamma, order, scope, population, centre, scale, ddof, 0.01, singleton)  # type: ignore[arg-type]
    for number, (quantity, scope, population, centre, scale) in enumerate(
        itertools.product(
            QUANTITIES,
            ("group", "batch", "group_turn", "group_anchor", "none"),
            ("turns", "trajectories", "tokens"),
            ("mean", "leave_one_out", "none"),
            ("std", "mean", "none"),
        )
    )
    for gamma, order, ddof, singleton in [
        (
            (0.9, 1.0, 0.5)[number % 3],
            "normalise_first" if quantity == "turn_return" and number % 2 else "discount_first",
            number % 2,
            ("zero", "keep")[number % 5 % 2],
        )
    ]
    if (scope == "none" or (centre, scale) != ("none", "none"))
    and (scale != "mean" or (centre, order, singleton) == ("mean", "discount_first", "zero"))
    and (population != "trajectories" or scope not in ("group_turn", "group_anchor"))
]


def with_every_pair_of_values(rules: list[CreditRule]) -> list[CreditRule]:
    """Some of the rules, in which two fields have every pair of values that they have in all of them."""
    seen: set[Any] = set()
    kept = []
    # of 200 orders the one that needs the fewest
    for rule in random.Random(143).sample(rules, len(rules)):
        pairs = set(itertools.combinations(rule._asdict().items(), 2))
        if not pairs <= seen:
            kept.append(rule)
            seen |= pairs
    return kept


def test_every_rule_equals_the_reference(kernel: str) -> None:
    is_slow = interpreted(kernel) or emulated(kernel)
    cases = [general_case(seed, torch.float64) for seed in range(3 if is_slow else 6)]
    for rule in with_every_pair_of_values(GENERAL_RULES) if is_slow else GENERAL_RULES:
        for case in cases:
            actual = combined_advantages(**case, terms=[CreditTerm(rule)], backend=kernel)
            expected = combined_advantages(**case, terms=[CreditTerm(rule)], backend="reference")
            torch.testing.assert_close(actual, expected, msg=lambda text, rule=rule: f"{rule}\n{text}")


def test_a_sum_of_terms_equals_the_reference(kernel: str) -> None:
    turns = max(len(general_case(seed)["turn_rewards"]) for seed in range(6))
    weights = torch.linspace(-1.0, 2.0, turns)
    for seed in range(6):
        case = general_case(seed)
        terms = [
            CreditTerm(CreditRule("trajectory_return", 1.0, population="trajectories"), 0.5),
            CreditTerm(CreditRule(scope="group_anchor"), weights[: len(case["turn_rewards"])]),
            CreditTerm(CreditRule("outcome", population="trajectories", centre="leave_one_out", scale="none")),
        ]
        for then in (None, CreditRule("turn_reward", scope="batch", population="tokens")):
            options: Case = {"terms": terms, "then": then}
            actual = combined_advantages(**case, **options, backend=kernel)
            torch.testing.assert_close(actual, combined_advantages(**case, **options, backend="reference"))


def test_terms_are_added_with_their_weights(backend: str) -> None:
    case = general_case(4, torch.float64)
    rules = [CreditRule("outcome", population="trajectories"), CreditRule(scope="group_anchor", centre="leave_one_out")]
    alone = [combined_advantages(**case, terms=[CreditTerm(rule)], backend=backend) for rule in rules]
    weight = torch.linspace(0.0, 3.0, len(case["turn_rewards"]), dtype=torch.float64)
    terms = [CreditTerm(rules[0], -2.0), CreditTerm(rules[1], weight)]
    both = combined_advantages(**case, terms=terms, backend=backend)
    expected = -2.0 * alone[0].turn_advantages + weight * alone[1].turn_advantages
    assert expected.any()
    torch.testing.assert_close(both.turn_advantages, expected)
    sampled = case["turn_ids"] >= 0
    assert torch.equal(both.advantages[sampled], both.turn_advantages[case["turn_ids"].long()[sampled]])
    assert torch.equal(both.returns, alone[0].returns)


def test_turns_that_a_term_is_not_about_leave_its_statistics(backend: str) -> None:
    case = general_case(4, torch.float64)
    about = torch.arange(len(case["turn_rewards"])) % 3 > 0
    rule = CreditRule("turn_reward", scope="batch")
    credit = combined_advantages(**case, terms=[CreditTerm(rule, 2.0, about)], backend=backend)
    turn_ids = case["turn_ids"].long()
    masked = torch.where((turn_ids >= 0) & about[turn_ids], turn_ids, -1)
    alone = combined_advantages(**{**case, "turn_ids": masked}, terms=[CreditTerm(rule)], backend=backend)
    assert alone.turn_advantages.any() and not credit.turn_advantages[~about].any()
    torch.testing.assert_close(credit.turn_advantages, 2.0 * alone.turn_advantages)
    assert_equal([credit.advantages], [torch.cat([credit.turn_advantages, torch.zeros(1)])[turn_ids]])


def test_turns_that_a_term_is_not_about_may_count_as_zero(backend: str) -> None:
    case = general_case(4, torch.float64)
    about = torch.arange(len(case["turn_rewards"])) % 3 > 0
    rule = CreditRule("turn_reward", scope="batch")
    credit = combined_advantages(**case, terms=[CreditTerm(rule, 0.1, about, "zero")], backend=backend)
    zeros = {**case, "turn_rewards": case["turn_rewards"] * about}
    alone = combined_advantages(**zeros, terms=[CreditTerm(rule)], backend=backend).turn_advantages
    assert alone[~about].any()
    torch.testing.assert_close(credit.turn_advantages, 0.1 * alone * about)


@cpu_only
@pytest.mark.parametrize("bad", [-2, 3, 7])
@pytest.mark.parametrize("others", ["leave", "zero"])
def test_a_turn_id_out_of_range_is_refused_where_a_term_names_turns(bad: int, others: Any, backend: str) -> None:
    # Python would read -2 as the last turn, whether the term is about it or not
    batch = (torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 3]), torch.tensor([0]))
    for turns in itertools.product((True, False), repeat=3):
        term = CreditTerm(CreditRule(), turns=torch.tensor(turns), others=others)
        with pytest.raises(ValueError, match=r"turn_ids must lie in \[-1, 3\), got a value outside"):
            combined_advantages(*batch, torch.tensor([0, bad, 1]), [term], backend=backend)


@pytest.mark.parametrize("others", ["leave", "zero"])
def test_the_weight_of_turns_that_a_term_is_not_about_is_never_read(others: Any, backend: str) -> None:
    batch = (torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 3]), torch.tensor([0]), torch.arange(3))
    turns, weight = torch.tensor([True, False, True]), torch.tensor([1.0, 5.0, 2.0])
    clean, poisoned = (
        combined_advantages(*batch, [CreditTerm(CreditRule(), w, turns, others)], backend=backend)
        for w in (weight, torch.where(turns, weight, float("nan")))
    )
    assert_equal(clean, poisoned)
    assert clean.turn_advantages[1] == 0


def test_one_term_is_turn_advantages(backend: str) -> None:
    case = random_case(6)
    for options in ({}, {"gamma": 0.5, "scope": "batch", "population": "tokens", "ddof": 0, "eps": 0.1}):
        terms = [CreditTerm(CreditRule(**options))]  # type: ignore[arg-type]
        assert_equal(
            combined_advantages(**case, terms=terms, backend=backend),
            turn_advantages(**case, **options, backend=backend),
        )


def by_hand(backend: str, *fields: Any, **options: Any) -> list[float]:
    """Turns of 3 trajectories, in groups 0, 0, 1: rewards (1, 2), (4), (8); tokens 1, 2, 1, 1."""
    batch = {"outcomes": torch.tensor([3.0, 5.0, 7.0]), "anchor_ids": torch.tensor([0, 1, 1, 0])}
    credit = combined_advantages(
        torch.tensor([1.0, 2.0, 4.0, 8.0]),
        torch.tensor([0, 2, 3, 4]),
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 1, 2, 3]),
        [CreditTerm(CreditRule(*fields, **{"eps": 0.0, **options}))],
        **batch,
        backend=backend,
    )
    return [round(x, 4) for x in credit.turn_advantages.tolist()]


def test_every_field_by_hand(backend: str) -> None:
    plain = {"scope": "none"}
    assert by_hand(backend, "turn_return", 0.5, **plain) == [2.0, 2.0, 4.0, 8.0]
    assert by_hand(backend, "trajectory_return", 1.0, **plain) == [3.0, 3.0, 4.0, 8.0]
    assert by_hand(backend, "outcome", 0.5, **plain) == [3.0, 3.0, 5.0, 7.0]
    assert by_hand(backend, "turn_reward", 0.5, **plain) == [1.0, 2.0, 4.0, 8.0]
    centred = {"scale": "none"}
    # group 0: rewards 1, 2, 4; group 1 is alone
    assert by_hand(backend, "turn_reward", **centred) == [-1.3333, -0.3333, 1.6667, 0.0]
    assert by_hand(backend, "turn_reward", **centred, singleton="keep") == [-1.3333, -0.3333, 1.6667, 8.0]
    assert by_hand(backend, "turn_reward", **centred, population="tokens") == [-1.25, -0.25, 1.75, 0.0]
    loo = {**centred, "centre": "leave_one_out"}
    assert by_hand(backend, "turn_reward", **loo) == [-2.0, -0.5, 2.5, 0.0]
    assert by_hand(backend, "turn_reward", **loo, population="tokens") == [-1.6667, -0.5, 2.3333, 0.0]
    # one entry a trajectory: the return of its first turn, 3 and 4
    assert by_hand(backend, "turn_return", 1.0, **loo, population="trajectories") == [-1.0, -2.0, 1.0, 0.0]
    assert by_hand(backend, "turn_reward", **centred, scope="group_turn") == [-1.5, 0.0, 1.5, 0.0]
    assert by_hand(backend, "turn_reward", **centred, scope="group_anchor") == [0.0, -1.0, 1.0, 0.0]
    assert by_hand(backend, "turn_reward", **centred, scope="batch") == [-2.75, -1.75, 0.25, 4.25]
    assert by_hand(backend, "turn_reward", scope="batch", centre="none", ddof=0) == [0.373, 0.746, 1.492, 2.984]
    # rewards normalised in the group, -4/3, -1/3, 5/3, and then discounted
    assert by_hand(backend, "turn_return", 0.5, "normalise_first", **centred) == [-1.5, -0.3333, 1.6667, 0.0]


def test_a_turn_without_tokens_passes_its_normalised_reward_on(backend: str) -> None:
    # two trajectories; the last turn of the first was never sampled, and its reward of 5 is no part of mean 2
    credit = combined_advantages(
        torch.tensor([1.0, 5.0, 3.0]),
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 0]),
        torch.tensor([0, 2]),
        [CreditTerm(CreditRule("turn_return", 0.5, "normalise_first", scale="none"))],
        backend=backend,
    )
    assert credit.turn_advantages.tolist() == [-1.0 + 0.5 * 3.0, 0.0, 1.0]


def test_leave_one_out_is_the_mean_scaled_up(backend: str) -> None:
    for seed in range(6):
        case = general_case(seed, torch.float64)
        rule = CreditRule("outcome", population="trajectories", scale="none")
        centred = combined_advantages(**case, terms=[CreditTerm(rule)], backend=backend).turn_advantages
        rule = rule._replace(centre="leave_one_out")
        others = combined_advantages(**case, terms=[CreditTerm(rule)], backend=backend).turn_advantages
        has_tokens = torch.bincount(case["turn_ids"].long() + 1, minlength=len(case["turn_rewards"]) + 1)[1:] > 0
        for group in case["group_ids"].unique():
            members = (case["group_ids"] == group).repeat_interleave(case["cu_turns"].diff())
            trajectory = torch.arange(len(case["group_ids"])).repeat_interleave(case["cu_turns"].diff())
            size = len(trajectory[members & has_tokens].unique())
            if size > 1:
                torch.testing.assert_close(others[members], centred[members] * size / (size - 1))


def test_laws_of_every_rule(backend: str) -> None:
    @settings(max_examples=examples(backend, 60))
    @given(seed=st.integers(0, 2**31), rule=st.sampled_from(GENERAL_RULES), shift=st.floats(-3.0, 3.0))
    def laws(seed: int, rule: CreditRule, shift: float) -> None:
        check_general_laws(general_case(seed, torch.float64), rule, shift, backend)

    laws()


def check_general_laws(case: Case, rule: CreditRule, shift: float, backend: str) -> None:
    def turn_level(case: Case, **fields: Any) -> Tensor:
        terms = [CreditTerm(rule._replace(**fields))]
        return combined_advantages(**case, terms=terms, backend=backend).turn_advantages

    # the order of the trajectories changes rounding only
    order = torch.arange(len(case["turn_rewards"])).split(case["cu_turns"].diff().tolist())
    turns = torch.cat([torch.zeros(0, dtype=torch.long), *reversed(order)])
    plain = {name: value for name, value in case.items() if name not in ("outcomes", "anchor_ids")}
    backwards = {
        **reversed_trajectories(
            {name: value.to(torch.long) if value.dtype == torch.int32 else value for name, value in plain.items()}
        )[0],
        "outcomes": case["outcomes"].flip(0),
        "anchor_ids": case["anchor_ids"][turns],
    }
    torch.testing.assert_close(turn_level(backwards), turn_level(case)[turns], atol=1e-9, rtol=1e-9)
    if rule.scope == "none":
        return
    # what scales all rewards scales the advantages where nothing is divided, and else leaves them alone, eps aside
    scaled = {**case, "turn_rewards": 4 * case["turn_rewards"], "outcomes": 4 * case["outcomes"]}
    factor = 4.0 if rule.scale == "none" else 1.0
    if rule.scale == "mean":
        return
    fields: dict[str, Any] = {"eps": 0.0, "singleton": "zero"}
    torch.testing.assert_close(turn_level(scaled, **fields), factor * turn_level(case, **fields), atol=1e-9, rtol=1e-9)
    # a constant added to what is normalised is taken out by a centre
    if rule.centre != "none" and rule.order == "discount_first":
        shifted = {**case, "turn_rewards": case["turn_rewards"] + shift, "outcomes": case["outcomes"] + shift}
        undiscounted: dict[str, Any] = {"gamma": 0.0, "singleton": "zero"}
        torch.testing.assert_close(turn_level(shifted, **undiscounted), turn_level(case, **undiscounted))


def test_over_the_mean_by_hand(backend: str) -> None:
    """Outcomes 1, 0, 0, 0 and 0, 0: 1 / (1/4) - 1 = 3, -1, and 0 where nothing was right; then one of 0.5, 1, 0."""
    rule = CreditRule("trajectory_return", 1.0, population="trajectories", scale="mean", eps=0.0)
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 0, 0.5, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    batch = (rewards, torch.arange(10), groups, torch.arange(9))
    found = combined_advantages(*batch, [CreditTerm(rule)], backend=backend)
    assert found.turn_advantages.tolist() == pytest.approx([3.0, -1, -1, -1, 0, 0, 0, 1, -1])
    # below 0 there is no share of a mean
    negative = combined_advantages(-rewards, *batch[1:], [CreditTerm(rule)], backend=backend)
    assert not negative.turn_advantages.any()


def test_terms_may_have_rewards_and_states_of_their_own(backend: str) -> None:
    case = general_case(5, torch.float64)
    first, second = case["turn_rewards"], case["turn_rewards"].flip(0).contiguous()
    states = case["anchor_ids"].flip(0).contiguous()
    by_state, by_group = CreditRule(scope="group_anchor", eps=0.1), CreditRule(eps=0.1)
    terms = [CreditTerm(by_group), CreditTerm(by_state, 0.5, rewards=second, anchor_ids=states)]
    found = combined_advantages(**case, terms=terms, backend=backend)
    of_second = {**case, "turn_rewards": second, "anchor_ids": states}
    alone = [
        combined_advantages(**each, terms=[CreditTerm(rule)], backend=backend).turn_advantages
        for each, rule in ((case, by_group), (of_second, by_state))
    ]
    torch.testing.assert_close(found.turn_advantages, alone[0] + 0.5 * alone[1])
    assert torch.equal(
        combined_advantages(**case, terms=[CreditTerm(by_group, rewards=first)], backend=backend).advantages,
        combined_advantages(**case, terms=[CreditTerm(by_group)], backend=backend).advantages,
    )


def test_an_average_counts_the_terms_that_say_something(backend: str) -> None:
    """Two trajectories of two turns: the states of the first turns are one, those of the second differ."""
    batch = (torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 2, 4]), torch.tensor([0, 0]), torch.arange(4))
    terms = [
        CreditTerm(CreditRule(gamma=1.0, scope=scope, scale="none"), weight)  # type: ignore[arg-type]
        for scope, weight in (("group_anchor", 3.0), ("group_turn", 1.0))
    ]
    anchors = torch.tensor([0, 1, 0, 2])
    found = combined_advantages(*batch, terms, average=True, anchor_ids=anchors, backend=backend)
    assert found.turn_advantages.tolist() == [0.5, 0.5, -0.5, -0.5]
    summed = combined_advantages(*batch, terms, anchor_ids=anchors, backend=backend)
    assert summed.turn_advantages.tolist() == [2.0, 0.5, -2.0, -0.5]
    nothing = combined_advantages(torch.zeros(4), *batch[1:], terms, average=True, anchor_ids=anchors, backend=backend)
    assert not nothing.turn_advantages.any()


def test_turn_credit_of_terms(backend: str) -> None:
    case = general_case(7)
    batch = [case.pop(name) for name in ("turn_rewards", "cu_turns", "group_ids", "turn_ids")]
    terms = (CreditTerm(CreditRule("outcome")), CreditTerm(CreditRule(scope="group_anchor"), 0.5))
    then = CreditRule("turn_reward", scope="batch", population="tokens")
    credit = TurnCredit(*batch, terms=terms, then=then, **case)
    assert credit.advantages().any()
    expected = combined_advantages(*batch, terms, then=then, **case, backend=backend).advantages
    assert torch.equal(credit.advantages(backend=backend), expected)
    with pytest.raises(ValueError, match="gamma, scope must be left out where terms are given"):
        credit._replace(gamma=0.5, scope="batch").advantages(backend=backend)
    with pytest.raises(ValueError, match="terms must be given with then, outcomes, anchor_ids, got none"):
        credit._replace(terms=()).advantages(backend=backend)


@cpu_only
@pytest.mark.parametrize(
    ("rule", "bad", "message"),
    [
        ({"quantity": "reward"}, {}, "quantity must be one of 'turn_return', .*, got 'reward'"),
        ({"order": "normalise_first", "quantity": "outcome"}, {}, "quantity must be 'turn_return' with order="),
        ({"centre": "median"}, {}, "centre must be one of 'mean', 'leave_one_out', 'none', got 'median'"),
        ({"scale": "mad"}, {}, "scale must be one of 'std', 'mean', 'none', got 'mad'"),
        (
            {"scale": "mean", "centre": "none"},
            {},
            "scale='mean' must stand with centre='mean', .*, got 'none', 'zero' and",
        ),
        ({"scale": "mean", "singleton": "keep"}, {}, "scale='mean' must stand with .*, got 'mean', 'keep' and"),
        ({"singleton": "drop"}, {}, "singleton must be one of 'zero', 'keep', got 'drop'"),
        ({"centre": "none", "scale": "none"}, {}, "scope must be 'none' where neither centre nor scale is taken"),
        ({"scope": "group_anchor", "population": "trajectories"}, {}, "scope must be 'group', 'batch' or 'none' with"),
        (
            {"scope": "group_anchor"},
            {"anchor_ids": None},
            r"anchor_ids must be \[K\] for scope='group_anchor', got None",
        ),
        (
            {"scope": "group_anchor"},
            {"anchor_ids": torch.zeros(3).long()},
            r"anchor_ids must be \[K\] = \[2\], got shape",
        ),
        ({"quantity": "outcome"}, {"outcomes": None}, r"outcomes must be \[B\] for quantity='outcome', got None"),
        ({"quantity": "outcome"}, {"outcomes": torch.zeros(2)}, r"outcomes must be \[B\] = \[1\], got shape \(2,\)"),
        (
            {"quantity": "outcome"},
            {"outcomes": torch.zeros(1).double()},
            "outcomes must be float32 as turn_rewards are",
        ),
        ({"quantity": "outcome"}, {"outcomes": torch.tensor([float("nan")])}, "outcomes must be finite"),
        ({"quantity": "outcome"}, {"outcomes": torch.zeros(1, requires_grad=True)}, "outcomes must not require grad"),
        ({}, {"terms": []}, "terms must hold at least one CreditTerm, got none"),
        ({}, {"terms": [CreditTerm(CreditRule(), float("nan"))]}, "weight must be finite, got nan"),
        ({}, {"terms": [CreditTerm(CreditRule(), torch.zeros(3))]}, r"weight must be \[K\] = \[2\], got shape \(3,\)"),
        (
            {},
            {"terms": [CreditTerm(CreditRule(), rewards=torch.zeros(3))]},
            r"rewards must be \[K\] = \[2\], got shape",
        ),
        (
            {},
            {"terms": [CreditTerm(CreditRule(scope="group_anchor"), anchor_ids=torch.zeros(3).long())]},
            r"anchor_ids must be \[K\] = \[2\], got shape",
        ),
        ({}, {"terms": [CreditTerm(CreditRule(), 1.0, torch.ones(2))]}, "turns must be bool, got float32"),
        ({}, {"terms": [CreditTerm(CreditRule(), others="drop")]}, "others must be one of 'leave', 'zero', got 'drop'"),  # type: ignore[arg-type]
        ({"gamma": 1.5}, {}, r"gamma must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_terms_are_named(rule: Case, bad: Case, message: str, backend: str) -> None:
    good: Case = {
        "turn_rewards": torch.tensor([0.0, 1.0]),
        "cu_turns": torch.tensor([0, 2]),
        "group_ids": torch.tensor([0]),
        "turn_ids": torch.tensor([0, 1]),
        "outcomes": torch.tensor([1.0]),
        "anchor_ids": torch.tensor([0, 0]),
        "terms": [CreditTerm(CreditRule(**rule))],
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        combined_advantages(**{**good, **bad})
