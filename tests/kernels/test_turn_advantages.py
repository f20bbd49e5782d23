"""`turn_returns`, `turn_advantages` and `TurnCredit`, held against their definition and hand-worked numbers."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import CreditRule, TurnAdvantages, TurnCredit, turn_advantages, turn_returns
from gtpo_kernels.testing import assert_matches_reference
from tests.kernels.conftest import Case, assert_equal, assert_opcheck, cpu_only, examples, interpreted, strided
from tests.kernels.turn_cases import general_case, random_case, reversed_trajectories

FAMILY = "turn_advantages"
RULES = [
    (scope, population, ddof)
    for scope in ("group", "batch", "group_turn", "none")
    for population in ("turns", "trajectories")
    for ddof in (0, 1)
    if (scope, population) != ("group_turn", "trajectories")
]


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


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_the_turns_of_a_lone_trajectory_are_compared_with_one_another(scope: str, backend: str) -> None:
    # returns 0.9 and 1: two entries, so no singleton
    assert one_token_a_turn([[0.0, 1.0]], scope=scope, backend=backend) == [[-0.71, 0.71]]


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
