"""`turn_advantages` and `turn_returns` with backend="cpp", held against the reference."""

import importlib.util
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import BackendUnavailable, turn_advantages, turn_returns
from gtpo_kernels.backend import select_backend
from gtpo_kernels.testing import assert_within_budget

CPU = torch.device("cpu")
RULES = [
    (scope, population, ddof)
    for scope in ("group", "batch", "group_turn", "none")
    for population in ("turns", "trajectories")
    for ddof in (0, 1)
    if (scope, population) != ("group_turn", "trajectories")
]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def compiled_module() -> object:
    """The module that the backend runs; a broken install fails here by name."""
    from gtpo_kernels import _cpu

    return _cpu


def random_batch(seed: int, *, reward_dtype: torch.dtype, id_dtype: torch.dtype) -> Batch:
    """Up to 8 trajectories of 0 to 5 turns in up to 3 groups; some turns have no token, some tokens no turn."""
    generator = random.Random(seed)
    lengths = [generator.randint(0, 5) for _ in range(generator.randint(0, 8))]
    num_turns = sum(lengths)
    rewards = [generator.choice([0.0, 1.0, -0.1, generator.gauss(0.0, 1.0)]) for _ in range(num_turns)]
    turn_ids = [generator.randint(-1, num_turns - 1) for _ in range(generator.randint(0, 3 * num_turns))]
    return (
        torch.tensor(rewards, dtype=reward_dtype),
        torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=id_dtype),
        torch.tensor([generator.choice([-4, 0, 7]) for _ in lengths], dtype=id_dtype),
        torch.tensor(turn_ids, dtype=id_dtype),
    )


@pytest.mark.parametrize("reward_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("scope", "population", "ddof"), RULES)
def test_equals_the_reference(
    scope: str, population: str, ddof: int, reward_dtype: torch.dtype, id_dtype: torch.dtype
) -> None:
    for seed in range(12):
        rewards, *ids = random_batch(seed, reward_dtype=reward_dtype, id_dtype=id_dtype)
        for gamma in (0.0, 0.9, 1.0):
            rule = {"gamma": gamma, "scope": scope, "population": population, "ddof": ddof}
            actual = turn_advantages(rewards, *ids, **rule, backend="cpp")
            plain = turn_advantages(rewards, *ids, **rule, backend="reference")
            exact = turn_advantages(rewards.double(), *ids, **rule, backend="reference")
            for one_actual, one_plain, one_exact in zip(actual, plain, exact, strict=True):
                assert_within_budget(one_actual, one_plain, one_exact)
            returns = turn_returns(rewards, ids[0], gamma=gamma, backend="cpp")
            assert torch.equal(returns, actual.returns)


@given(
    seed=st.integers(0, 2**32 - 1),
    rule=st.sampled_from(RULES),
    gamma=st.floats(0.0, 1.0),
    shift=st.floats(-3.0, 3.0),
)
def test_properties(seed: int, rule: tuple[str, str, int], gamma: float, shift: float) -> None:
    scope, population, ddof = rule
    rewards, cu_turns, group_ids, turn_ids = random_batch(seed, reward_dtype=torch.float64, id_dtype=torch.int64)
    options = {"scope": scope, "population": population, "ddof": ddof, "backend": "cpp"}
    credit = turn_advantages(rewards, cu_turns, group_ids, turn_ids, gamma=gamma, **options)

    sampled = turn_ids >= 0
    assert torch.equal(credit.advantages[sampled], credit.turn_advantages[turn_ids[sampled]])
    assert (credit.advantages[~sampled] == 0).all()
    without_tokens = torch.ones_like(rewards, dtype=torch.bool)
    without_tokens[turn_ids[sampled]] = False
    assert (credit.turn_advantages[without_tokens] == 0).all()
    # renaming the groups changes no bit; nor does the order of the tokens
    renamed = turn_advantages(rewards, cu_turns, 3 * group_ids + 11, turn_ids.flip(0), gamma=gamma, **options)
    assert torch.equal(renamed.turn_advantages, credit.turn_advantages)
    assert torch.equal(renamed.advantages.flip(0), credit.advantages)
    # without a discount over turns, a constant added to every reward is taken out by the mean
    if scope != "none":
        plain = turn_advantages(rewards, cu_turns, group_ids, turn_ids, gamma=0.0, **options)
        shifted = turn_advantages(rewards + shift, cu_turns, group_ids, turn_ids, gamma=0.0, **options)
        torch.testing.assert_close(shifted.turn_advantages, plain.turn_advantages)


def test_an_all_correct_group_of_unequal_lengths() -> None:
    # 2 and 8 turns, reward 1 at the end, gamma 0.9: worked by hand
    rewards = torch.zeros(10)
    rewards[[1, 9]] = 1.0
    credit = turn_advantages(
        rewards, torch.tensor([0, 2, 10]), torch.tensor([5, 5]), torch.arange(10), gamma=0.9, backend="cpp"
    )
    rounded = [round(advantage, 2) for advantage in credit.turn_advantages.tolist()]
    assert rounded[:2] == [0.73, 1.26]
    assert (rounded[2], rounded[9]) == (-1.47, 1.26)


def test_terminal_reward_per_trajectory_is_grpo() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    cu_turns = torch.tensor([0, 2, 3, 6, 7])
    outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    grpo = (outcomes - outcomes.mean()) / (outcomes.std() + 1e-6)
    credit = turn_advantages(
        rewards, cu_turns, torch.zeros(4).int(), torch.arange(7), gamma=1.0, population="trajectories", backend="cpp"
    )
    expected = grpo.repeat_interleave(cu_turns.diff())
    assert torch.equal(credit.advantages, expected.float())


@pytest.mark.parametrize("num_trajectories", [1, 7])
@pytest.mark.parametrize("scope", ["group", "batch", "group_turn"])
def test_without_spread_advantages_are_exactly_zero(num_trajectories: int, scope: str) -> None:
    rewards = torch.full((num_trajectories,), 0.9)
    cu_turns = torch.arange(num_trajectories + 1)
    credit = turn_advantages(
        rewards, cu_turns, torch.zeros_like(cu_turns[1:]), cu_turns[:-1], scope=scope, backend="cpp"
    )
    assert torch.equal(credit.turn_advantages, torch.zeros(num_trajectories))
    assert torch.equal(credit.returns, rewards)


def test_turns_without_tokens_pass_rewards_back_but_leave_the_statistics() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0])
    credit = turn_advantages(
        rewards, torch.tensor([0, 2, 3]), torch.tensor([0, 0]), torch.tensor([0, 2]), gamma=0.5, eps=0.0, backend="cpp"
    )
    assert credit.returns.tolist() == [0.5, 1.0, 0.0]
    # statistics over 0.5 and 0.0 only
    assert credit.turn_advantages.tolist() == pytest.approx([0.5**0.5, 0.0, -(0.5**0.5)], rel=1e-6)


def test_empty_batch() -> None:
    empty = torch.zeros(0)
    credit = turn_advantages(empty, torch.tensor([0]), empty.long(), torch.tensor([-1, -1]), backend="cpp")
    assert credit.advantages.tolist() == [0.0, 0.0]
    assert credit.returns.shape == (0,)


def test_strided_inputs_give_the_values_of_contiguous_ones() -> None:
    rewards, cu_turns, group_ids, turn_ids = random_batch(3, reward_dtype=torch.float64, id_dtype=torch.int64)
    strided = [torch.stack([x, x], dim=1)[:, 0] for x in (rewards, cu_turns, group_ids, turn_ids)]
    assert not strided[0].is_contiguous()
    for got, want in zip(
        turn_advantages(*strided, backend="cpp"),
        turn_advantages(rewards, cu_turns, group_ids, turn_ids, backend="cpp"),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_bad_values_are_refused_at_the_door() -> None:
    good = (torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="turn_rewards must be finite"):
        turn_advantages(torch.tensor([0.0, float("nan")]), *good[1:], backend="cpp")
    with pytest.raises(ValueError, match="cu_turns must rise"):
        turn_advantages(good[0], torch.tensor([0, 1]), *good[2:], backend="cpp")
    with pytest.raises(ValueError, match="turn_ids must lie"):
        turn_advantages(*good[:3], torch.tensor([2]), backend="cpp")


def test_the_compiled_module_checks_what_it_dereferences() -> None:
    from gtpo_kernels import _cpu

    rewards, cu_turns, groups, ids = np.zeros(2), np.array([0, 2]), np.array([0]), np.array([0, 1])
    rule = {"gamma": 0.9, "scope": _cpu.Scope.group, "population": _cpu.Population.turns, "ddof": 1, "eps": 1e-6}
    for bad_cu_turns in ([0, 3], [1, 2], [0, 3, 2], [0, -1, 2]):
        with pytest.raises(ValueError, match="cu_turns must rise from 0"):
            _cpu.turn_returns(rewards, np.array(bad_cu_turns), 0.9)
    with pytest.raises(ValueError, match=r"cu_turns must be \[B\+1\]"):
        _cpu.turn_returns(rewards, np.zeros(0, np.int64), 0.9)
    for bad_id in (2, -2):
        with pytest.raises(ValueError, match="turn_ids must lie in"):
            _cpu.turn_advantages(rewards, cu_turns, groups, np.array([bad_id]), **rule)
    with pytest.raises(ValueError, match=r"group_ids must be \[1\]"):
        _cpu.turn_advantages(rewards, cu_turns, np.array([0, 0]), ids, **rule)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.turn_advantages(rewards.astype(np.float32), cu_turns, groups, ids, **rule)


def test_registered_op_with_this_backend() -> None:
    rewards, cu_turns, group_ids, turn_ids = random_batch(5, reward_dtype=torch.float32, id_dtype=torch.int64)
    op = torch.ops.gtpo_kernels.turn_advantages.default
    arguments = (rewards, cu_turns, group_ids, turn_ids, 0.9, "group", "turns", 1, 1e-6, "cpp")
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}

    def double_advantages(x: Tensor) -> Tensor:
        return 2 * turn_advantages(x, cu_turns, group_ids, turn_ids, backend="cpp").advantages

    compiled = torch.compile(double_advantages, fullgraph=True, backend="eager")
    assert torch.equal(compiled(rewards), double_advantages(rewards))


def test_asked_for_by_name_it_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="backend='cpp' has no kernel for gtpo_loss"):
        select_backend("gtpo_loss", "cpp", CPU)
    with pytest.raises(BackendUnavailable, match="backend='cpp' runs on the CPU only, got tensors on meta"):
        select_backend("turn_advantages", "cpp", torch.device("meta"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rewards, cu_turns = torch.tensor([0.0, 1.0]), torch.tensor([0, 2])
    with pytest.raises(BackendUnavailable, match=r"backend='cpp' needs the compiled module gtpo_kernels\._cpu"):
        turn_returns(rewards, cu_turns, backend="cpp")
    # the rest works without it
    assert turn_returns(rewards, cu_turns, gamma=0.5).tolist() == [0.5, 1.0]
