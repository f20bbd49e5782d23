"""`turn_returns`, `turn_advantages` and `TurnCredit`, held against their definition and hand-worked numbers."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import (
    CreditRule,
    CreditTerm,
    TurnAdvantages,
    TurnCredit,
    combined_advantages,
    turn_advantages,
    turn_returns,
)
from gtpo_kernels.testing import assert_matches_reference
from tests.kernels.conftest import Case, assert_equal, assert_opcheck, cpu_only, examples, interpreted, strided

FAMILY = "turn_advantages"
RULES = [
    (scope, population, ddof)
    for scope in ("group", "batch", "group_turn", "none")
    for population in ("turns", "trajectories")
    for ddof in (0, 1)
    if (scope, population) != ("group_turn", "trajectories")
]


def random_case(
    seed: int, *, max_turns: int = 5, dtype: torch.dtype = torch.float32, ids: torch.dtype = torch.int64
) -> Case:
    """Up to 8 trajectories in up to 3 groups; some have no turn, some turns no token, some tokens no turn."""
    generator = random.Random(seed)
    lengths = [generator.randint(0, max_turns) for _ in range(generator.randint(0, 8))]
    num_turns = sum(lengths)
    rewards = [generator.choice([0.0, 1.0, -0.1, generator.gauss(0.0, 1.0)]) for _ in range(num_turns)]
    turn_ids = [generator.randint(-1, num_turns - 1) for _ in range(generator.randint(0, 3 * num_turns))]
    return {
        "turn_rewards": torch.tensor(rewards, dtype=dtype),
        "cu_turns": torch.tensor([0, *lengths]).cumsum(0).to(ids),
        "group_ids": torch.tensor([generator.choice([-4, 0, 7]) for _ in lengths], dtype=ids),
        "turn_ids": torch.tensor(turn_ids, dtype=ids),
    }


def one_token_a_turn(
    rewards: list[list[float]], *, dtype: torch.dtype = torch.float64, **options: Any
) -> list[list[float]]:
    """Advantages by trajectory of one group whose every turn has one token, rounded to 2 digits as in the documents."""
    lengths = [len(trajectory) for trajectory in rewards]
    credit = turn_advantages(
        torch.tensor([reward for trajectory in rewards for reward in trajectory], dtype=dtype),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(rewards), dtype=torch.long),
        torch.arange(sum(lengths)),
        **options,
    )
    assert torch.equal(credit.advantages, credit.turn_advantages)
    return [[round(a, 2) for a in part.tolist()] for part in credit.advantages.split(lengths)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("scope", "population", "ddof"), RULES)
def test_equals_the_reference(scope: str, population: str, ddof: int, dtype: torch.dtype, kernel: str) -> None:
    ids = (torch.int32, torch.int64)
    cases = [random_case(seed, dtype=dtype, ids=ids[seed % 2]) for seed in range(examples(kernel, 12))]
    for gamma in (0.9,) if interpreted(kernel) else (0.0, 0.9, 1.0):
        rule: Case = {"gamma": gamma, "scope": scope, "population": population, "ddof": ddof}
        if dtype != torch.float64:
            assert_matches_reference(turn_advantages, cases, backend=kernel, **rule)
            continue
        # the statistics are in float64 whatever the input, so the budget has no coarser arithmetic to measure
        for case in cases:
            actual = turn_advantages(**case, **rule, backend=kernel)
            torch.testing.assert_close(actual, turn_advantages(**case, **rule, backend="reference"))
            returns = turn_returns(case["turn_rewards"], case["cu_turns"], gamma=gamma, backend=kernel)
            assert_equal([returns], [actual.returns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returns_equal_the_reference(dtype: torch.dtype, kernel: str) -> None:
    cases = [random_case(seed, dtype=dtype, max_turns=40) for seed in range(12)]
    rewards = [{name: case[name] for name in ("turn_rewards", "cu_turns")} for case in cases]
    assert_matches_reference(turn_returns, rewards, backend=kernel, gamma=0.97)


QUANTITIES = ("turn_return", "trajectory_return", "outcome", "turn_reward")
GENERAL_RULES = [
    CreditRule(quantity, gamma, order, scope, population, centre, scale, ddof, 0.01, singleton)  # type: ignore[arg-type]
    for number, (quantity, scope, population, centre, scale) in enumerate(
        itertools.product(
            QUANTITIES,
            ("group", "batch", "group_turn", "group_anchor", "none"),
            ("turns", "trajectories", "tokens"),
            ("mean", "leave_one_out", "none"),
            ("std", "none"),
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
    and (population != "trajectories" or scope not in ("group_turn", "group_anchor"))
]


def general_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """`random_case` with outcomes and anchor ids."""
    case = random_case(seed, dtype=dtype, ids=(torch.int32, torch.int64)[seed % 2])
    generator = random.Random(seed + 1000)
    num_turns, ids = len(case["turn_rewards"]), case["group_ids"].dtype
    outcomes = [generator.choice([0.0, 1.0, generator.random()]) for _ in case["group_ids"]]
    anchors = [generator.choice([-(10**9), 0, 5]) for _ in range(num_turns)]
    return {**case, "outcomes": torch.tensor(outcomes, dtype=dtype), "anchor_ids": torch.tensor(anchors, dtype=ids)}


def test_every_rule_equals_the_reference(kernel: str) -> None:
    cases = [general_case(seed, torch.float64) for seed in range(3 if interpreted(kernel) else 6)]
    for number, rule in enumerate(GENERAL_RULES):
        # an interpreted kernel is given every seventh rule, so each value of each field
        if interpreted(kernel) and number % 7:
            continue
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
    fields: dict[str, Any] = {"eps": 0.0, "singleton": "zero"}
    torch.testing.assert_close(turn_level(scaled, **fields), factor * turn_level(case, **fields), atol=1e-9, rtol=1e-9)
    # a constant added to what is normalised is taken out by a centre
    if rule.centre != "none" and rule.order == "discount_first":
        shifted = {**case, "turn_rewards": case["turn_rewards"] + shift, "outcomes": case["outcomes"] + shift}
        undiscounted: dict[str, Any] = {"gamma": 0.0, "singleton": "zero"}
        torch.testing.assert_close(turn_level(shifted, **undiscounted), turn_level(case, **undiscounted))


def test_returns_by_hand(backend: str) -> None:
    rewards, cu_turns = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 4.0]), torch.tensor([0, 3, 3, 4, 6])
    returns = turn_returns(rewards, cu_turns, gamma=0.5, backend=backend)
    assert returns.tolist() == [1.5, 1.0, 2.0, -1.0, 2.5, 4.0]


def test_a_discount_is_per_turn_not_per_token(backend: str) -> None:
    # 1,000 tokens a turn: a discount per token would leave nothing of the last reward at the first turn
    turn_ids = torch.arange(3).repeat_interleave(1000)
    rewards, cu_turns = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 3])
    credit = turn_advantages(rewards, cu_turns, torch.tensor([0]), turn_ids, gamma=0.9, scope="none", backend=backend)
    assert credit.returns.tolist() == pytest.approx([0.81, 0.9, 1.0])
    assert torch.equal(credit.advantages, credit.returns.repeat_interleave(1000))


def test_an_all_correct_group_of_unequal_lengths(backend: str) -> None:
    short, long = one_token_a_turn([[0.0, 1.0], [0.0] * 7 + [1.0]], gamma=0.9, backend=backend)
    assert short == [0.73, 1.26]
    assert (long[0], long[-1]) == (-1.47, 1.26)
    assert long == sorted(long)


def test_a_format_slip_in_an_all_failed_group(backend: str) -> None:
    slipped, clean = one_token_a_turn([[0.0, 0.0, 0.0, -0.1], [0.0] * 4], gamma=0.9, backend=backend)
    assert (slipped[0], slipped[-1]) == (-0.64, -1.22)
    assert clean == [0.92] * 4
    slipped, *others = one_token_a_turn([[-0.1, 0.0, 0.0, 0.0], *[[0.0] * 4] * 7], gamma=0.9, backend=backend)
    assert slipped == [-5.48, 0.18, 0.18, 0.18]
    assert others == [[0.18] * 4] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rewards_have_no_advantage_at_all(dtype: torch.dtype, backend: str) -> None:
    # in float32 the mean of seven 0.9 is not 0.9, and dividing by eps would make -0.056 of it
    for scope in ("group", "batch", "group_turn"):
        assert one_token_a_turn([[0.9]] * 7, dtype=dtype, scope=scope, backend=backend) == [[0.0]] * 7


@pytest.mark.parametrize("scope", ["group", "batch", "group_turn"])
def test_a_singleton_has_no_advantage(scope: str, backend: str) -> None:
    assert one_token_a_turn([[0.7]], scope=scope, backend=backend) == [[0.0]]
    if scope != "group_turn":
        alone = one_token_a_turn([[0.0, 1.0]], scope=scope, population="trajectories", backend=backend)
        assert alone == [[0.0, 0.0]]


def test_turns_without_tokens_leave_the_statistics(backend: str) -> None:
    rewards, cu_turns, groups = torch.tensor([0.0, 8.0, 0.0, 2.0]), torch.tensor([0, 2, 4]), torch.tensor([0, 0])
    turn_ids = torch.tensor([-1, 0, 0, -1, 2, -1, 3])  # turn 1 was never sampled
    credit = turn_advantages(rewards, cu_turns, groups, turn_ids, gamma=0.5, eps=0.0, backend=backend)
    assert credit.returns.tolist() == [4.0, 8.0, 1.0, 2.0]
    population = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)
    expected = ((population - population.mean()) / population.std()).float()
    assert credit.turn_advantages[1] == 0
    torch.testing.assert_close(credit.turn_advantages[[0, 2, 3]], expected)
    torch.testing.assert_close(credit.advantages, expected[[0, 0, 0, 0, 1, 0, 2]].masked_fill(turn_ids < 0, 0.0))


@pytest.mark.parametrize("seed", range(8))
def test_terminal_reward_per_trajectory_is_grpo(seed: int, backend: str) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 6) for _ in range(generator.randint(2, 9))]
    groups = [generator.choice([2, 5]) for _ in lengths]
    outcomes = [float(generator.randint(0, 1)) for _ in lengths]
    rewards = [r for n, outcome in zip(lengths, outcomes, strict=True) for r in [0.0] * (n - 1) + [outcome]]
    turn_ids = torch.arange(len(rewards)).repeat_interleave(2)
    credit = turn_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(groups),
        turn_ids,
        gamma=1.0,
        population="trajectories",
        backend=backend,
    )
    expected: list[float] = []
    for i, length in enumerate(lengths):
        peers = [outcome for outcome, group in zip(outcomes, groups, strict=True) if group == groups[i]]
        mean = sum(peers) / len(peers)
        std = (sum((x - mean) ** 2 for x in peers) / max(1, len(peers) - 1)) ** 0.5
        expected += [(outcomes[i] - mean) / (std + 1e-6)] * (2 * length)
    assert credit.advantages.tolist() == pytest.approx(expected, abs=1e-9)


def test_pooled_turns_are_grpo_where_all_lengths_are_equal_and_ddof_is_0(backend: str) -> None:
    rewards = [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    pooled, per_trajectory = (
        one_token_a_turn(rewards, gamma=1.0, ddof=0, population=population, backend=backend)
        for population in ("turns", "trajectories")
    )
    assert pooled == per_trajectory == [[0.71] * 3, [-1.41] * 3, [0.71] * 3]


def test_laws(backend: str) -> None:
    @settings(max_examples=examples(backend, 60))
    @given(
        seed=st.integers(0, 2**31),
        rule=st.sampled_from(RULES),
        gamma=st.floats(0.0, 1.0),
        shift=st.floats(-3.0, 3.0),
    )
    def laws(seed: int, rule: tuple[str, str, int], gamma: float, shift: float) -> None:
        check_laws(seed, rule, gamma, shift, backend)

    laws()


def check_laws(seed: int, rule: tuple[str, str, int], gamma: float, shift: float, backend: str) -> None:
    scope, population, ddof = rule
    case = random_case(seed, dtype=torch.float64)
    options: Case = {"scope": scope, "population": population, "ddof": ddof, "gamma": gamma, "backend": backend}
    credit = turn_advantages(**case, **options)
    sampled = case["turn_ids"] >= 0
    assert torch.equal(credit.advantages[sampled], credit.turn_advantages[case["turn_ids"][sampled]])
    assert not credit.advantages[~sampled].any()
    without_tokens = torch.ones_like(case["turn_rewards"], dtype=torch.bool)
    without_tokens[case["turn_ids"][sampled]] = False
    assert not credit.turn_advantages[without_tokens].any()
    # the order of the tokens, and the names of the groups, change no bit
    renamed = {**case, "group_ids": 3 * case["group_ids"] + 11, "turn_ids": case["turn_ids"].flip(0)}
    other = turn_advantages(**renamed, **options)
    assert_equal([other.turn_advantages, other.advantages.flip(0)], [credit.turn_advantages, credit.advantages])
    # the order of the trajectories changes rounding only
    backwards, turn_order = reversed_trajectories(case)
    other = turn_advantages(**backwards, **options)
    torch.testing.assert_close(other.turn_advantages, credit.turn_advantages[turn_order], atol=1e-9, rtol=1e-9)
    if scope != "none":
        # what scales all rewards leaves them alone, eps aside
        scaled = turn_advantages(**{**case, "turn_rewards": 4 * case["turn_rewards"]}, **options, eps=0.0)
        plain = turn_advantages(**case, **options, eps=0.0)
        torch.testing.assert_close(scaled.turn_advantages, plain.turn_advantages, atol=1e-9, rtol=1e-9)
        # without a discount, a constant added to every reward is taken out by the mean
        undiscounted: Case = {**options, "gamma": 0.0}
        plain = turn_advantages(**case, **undiscounted)
        shifted = turn_advantages(**{**case, "turn_rewards": case["turn_rewards"] + shift}, **undiscounted)
        torch.testing.assert_close(shifted.turn_advantages, plain.turn_advantages)


def reversed_trajectories(case: Case) -> tuple[Case, Tensor]:
    """The same batch, last trajectory first, and the old index of every new turn."""
    lengths = case["cu_turns"].diff()
    turns = torch.arange(len(case["turn_rewards"])).split(lengths.tolist())
    order = torch.cat([torch.zeros(0, dtype=torch.long), *reversed(turns)])
    new_id = torch.cat([order.argsort(), torch.tensor([-1])])  # the index -1 finds -1
    return {
        "turn_rewards": case["turn_rewards"][order],
        "cu_turns": torch.cat([torch.zeros(1, dtype=torch.long), lengths.flip(0).cumsum(0)]),
        "group_ids": case["group_ids"].flip(0),
        "turn_ids": new_id[case["turn_ids"]],
    }, order


def test_empty_batches(backend: str) -> None:
    empty = torch.zeros(0)
    credit = turn_advantages(empty, torch.tensor([0]), empty.long(), torch.tensor([-1, -1]), backend=backend)
    assert credit.advantages.tolist() == [0.0, 0.0]
    assert credit.returns.shape == credit.turn_advantages.shape == (0,)
    unsampled = turn_advantages(
        torch.ones(2), torch.tensor([0, 2]), torch.tensor([0]), torch.zeros(0).long(), backend=backend
    )
    assert unsampled.turn_advantages.tolist() == [0.0, 0.0]
    assert unsampled.advantages.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_memory_of_their_own(dtype: torch.dtype, backend: str) -> None:
    rewards, cu_turns = torch.ones(1, dtype=dtype), torch.tensor([0, 1])
    credit = turn_advantages(rewards, cu_turns, torch.tensor([0]), torch.tensor([0]), scope="none", backend=backend)
    for result in (*credit, turn_returns(rewards, cu_turns, backend=backend)):
        result += 1
    assert rewards.item() == 1.0


def test_turn_credit_passes_every_field_on(backend: str) -> None:
    case = random_case(7)
    options: Case = {"gamma": 0.5, "scope": "batch", "population": "trajectories", "ddof": 0, "eps": 0.1}
    credit = TurnCredit(**case, **options)
    assert credit.advantages().any()
    expected = turn_advantages(**case, **options, backend=backend).advantages
    assert torch.equal(credit.advantages(backend=backend), expected)


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


def test_strided_inputs_and_repeats(kernel: str) -> None:
    case = random_case(3, dtype=torch.float64)
    wide = {name: strided(value) for name, value in case.items()}
    assert not wide["turn_rewards"].is_contiguous()
    plain = turn_advantages(**case, backend=kernel)
    for other in (wide, case):
        assert_equal(turn_advantages(**other, backend=kernel), plain)


def test_opcheck(kernel: str) -> None:
    case = random_case(5)
    ops = torch.ops.gtpo_kernels
    for rewards in (case["turn_rewards"], case["turn_rewards"].double()):
        rest = list(case.values())[1:]
        assert_opcheck(ops.turn_advantages, rewards, *rest, None, None, *CreditRule(), kernel)
        assert_opcheck(ops.turn_returns, rewards, case["cu_turns"], 0.9, kernel)
    case = general_case(5)
    rule = CreditRule("outcome", scope="group_anchor", population="tokens", centre="leave_one_out", singleton="keep")
    assert_opcheck(ops.turn_advantages, *case.values(), *rule, kernel)


def test_compiled_whole(kernel: str) -> None:
    case = random_case(5)

    def run(turn_rewards: Tensor) -> TurnAdvantages:
        return turn_advantages(**{**case, "turn_rewards": 2 * turn_rewards}, backend=kernel)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(case["turn_rewards"])
    assert_equal(compiled, run(case["turn_rewards"]))


@cpu_only
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"turn_rewards": torch.zeros(1, 2)}, r"turn_rewards must be \[K\], got shape \(1, 2\)"),
        ({"turn_rewards": torch.zeros(2).int()}, "turn_rewards must be float32, float64, bfloat16, float16, got int32"),
        ({"turn_rewards": torch.tensor([0.0, float("nan")])}, "turn_rewards must be finite, got NaN"),
        ({"turn_rewards": torch.tensor([0.0, float("inf")])}, "turn_rewards must be finite"),
        ({"turn_rewards": torch.zeros(2, requires_grad=True)}, "turn_rewards must not require grad"),
        ({"cu_turns": torch.zeros(0).long()}, r"cu_turns must be \[B\+1\], got shape \(0,\)"),
        ({"cu_turns": torch.tensor([0.0, 2.0])}, "cu_turns must be int32, int64, got float32"),
        ({"cu_turns": torch.tensor([0, 1])}, r"cu_turns must rise from 0 to K = 2 without decreasing, got \[0, 1\]"),
        ({"cu_turns": torch.tensor([1, 2])}, r"cu_turns must rise from 0 to K = 2 without decreasing, got \[1, 2\]"),
        ({"cu_turns": torch.tensor([0, 3, 2]), "group_ids": torch.zeros(2).long()}, "cu_turns must rise from 0"),
        ({"group_ids": torch.zeros(2).long()}, r"group_ids must be \[B\] = \[1\], got shape \(2,\)"),
        ({"turn_ids": torch.tensor([2])}, r"turn_ids must lie in \[-1, 2\)"),
        ({"turn_ids": torch.tensor([-2])}, r"turn_ids must lie in \[-1, 2\)"),
        ({"turn_ids": torch.zeros(1, 1).long()}, r"turn_ids must be \[N\], got shape \(1, 1\)"),
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        ({"scope": "task"}, "scope must be one of 'group', 'batch', 'group_turn', 'group_anchor', 'none', got 'task'"),
        ({"scope": "group_anchor"}, r"anchor_ids must be \[K\] for scope='group_anchor', got None"),
        ({"population": "words"}, "population must be one of 'turns', 'trajectories', 'tokens', got 'words'"),
        ({"scope": "group_turn", "population": "trajectories"}, "scope must be 'group', 'batch' or 'none' with"),
        ({"ddof": 2}, "ddof must be 0 or 1, got 2"),
        ({"eps": -1.0}, "eps must be 0 or more, got -1.0"),
        ({"backend": "numpy"}, "backend must be one of 'reference', 'torch', .*, got 'numpy'"),
    ],
)
def test_bad_arguments_are_named(bad: Case, message: str, backend: str) -> None:
    good = {
        "turn_rewards": torch.tensor([0.0, 1.0]),
        "cu_turns": torch.tensor([0, 2]),
        "group_ids": torch.tensor([0]),
        "turn_ids": torch.tensor([0, 1]),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        turn_advantages(**{**good, **bad})


@cpu_only
@pytest.mark.parametrize(
    ("rule", "bad", "message"),
    [
        ({"quantity": "reward"}, {}, "quantity must be one of 'turn_return', .*, got 'reward'"),
        ({"order": "normalise_first", "quantity": "outcome"}, {}, "quantity must be 'turn_return' with order="),
        ({"centre": "median"}, {}, "centre must be one of 'mean', 'leave_one_out', 'none', got 'median'"),
        ({"scale": "mad"}, {}, "scale must be one of 'std', 'none', got 'mad'"),
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
        ({}, {"terms": [CreditTerm(CreditRule(), torch.zeros(3))]}, r"weight must be \[K\] = \[2\], got shape \(3,\)"),
        ({}, {"terms": [CreditTerm(CreditRule(), 1.0, torch.ones(2))]}, "turns must be bool, got float32"),
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
