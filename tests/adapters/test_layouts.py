"""Every layout gives the advantages of the formula, and says what is wrong with a batch that does not fit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gtpo.adapters.layouts import (
    GRPO,
    list_turn_advantages,
    number_groups,
    packed_turn_advantages,
    padded_turn_advantages,
    token_reward_advantages,
    turn_ids_of_runs,
)
from gtpo.credit import group_advantages
from gtpo.methods import METHODS, Term
from tests.adapters.attempts import ATTEMPTS, Attempts, by_the_formula, turn_ids_of
from tests.adapters.conftest import ROOT, run_python_blocks

WIDTH = 11


def random_attempts(seed: int) -> Attempts:
    generator = np.random.default_rng(seed)
    turns = generator.integers(1, 6, size=12)
    return Attempts(
        rewards=[generator.normal(size=n).round(3).tolist() for n in turns],
        num_tokens=[generator.integers(1, 5, size=n).tolist() for n in turns],
        num_tool_tokens=[[*generator.integers(1, 4, size=n - 1).tolist(), 0] for n in turns],
        groups=[f"task {i % 3}" for i in range(12)],
    )


def padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows)) + 2
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def expected_by_token(attempts: Attempts, by_turn: list[list[float]]) -> list[list[float]]:
    return [
        [0.0 if turn < 0 else values[turn] for turn in turns]
        for values, turns in zip(by_turn, turn_ids_of(attempts), strict=True)
    ]


def assert_rows(found: Tensor, expected: list[list[float]]) -> None:
    """Padding must be exactly 0."""
    for row, values in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values), rtol=1e-5, atol=1e-6)
        assert not row[len(values) :].any()


@pytest.mark.parametrize("attempts", [ATTEMPTS, *map(random_attempts, range(8))])
def test_every_layout_gives_the_formula(attempts: Attempts) -> None:
    by_turn = by_the_formula(attempts.rewards, attempts.groups)
    by_token = expected_by_token(attempts, by_turn)
    rows = turn_ids_of(attempts)

    lists = list_turn_advantages(attempts.rewards, attempts.groups, num_tokens=attempts.num_tokens)
    assert [len(row) for row in lists] == [len(row) for row in by_turn]
    for row, values in zip(lists, by_turn, strict=True):
        assert row == pytest.approx(values, rel=1e-5, abs=1e-6)

    turn_ids = padded(rows, -1)
    assert_rows(padded_turn_advantages(attempts.rewards, turn_ids, attempts.groups).advantages, by_token)

    most = max(map(len, attempts.rewards))
    table = torch.tensor([row + [99.0] * (most - len(row)) for row in attempts.rewards])
    num_turns = torch.tensor([len(row) for row in attempts.rewards])
    credit = padded_turn_advantages(table, turn_ids, attempts.groups, num_turns=num_turns, loss_mask=turn_ids >= 0)
    assert_rows(credit.advantages, by_token)

    flat = torch.tensor([turn for row in rows for turn in row])
    cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0)
    packed = packed_turn_advantages(attempts.rewards, flat, cu_seqlens, attempts.groups, loss_mask=flat >= 0)
    assert_rows(packed.advantages[None], [[value for row in by_token for value in row]])

    token_rewards = torch.zeros(turn_ids.shape)
    for number, row in enumerate(attempts.rewards):
        for turn, reward in enumerate(row):
            token_rewards[number, max(t for t, of in enumerate(rows[number]) if of == turn)] = reward
    mask = (turn_ids >= 0).long()
    uids = np.array(attempts.groups, dtype=object)
    assert_rows(token_reward_advantages(token_rewards, mask, uids).advantages, by_token)
    assert_rows(token_reward_advantages(token_rewards, mask, uids, turn_ids=turn_ids).advantages, by_token)


def test_returns_are_those_of_the_turn() -> None:
    credit = padded_turn_advantages([[0.0, 1.0]], torch.tensor([[0, 0, -1, 1]]), ["a"], gamma=0.5)
    assert credit.returns.tolist() == [[0.5, 0.5, 0.0, 1.0]]


def test_options_reach_the_op() -> None:
    """With gamma 1 and one entry a trajectory a terminal reward is GRPO: the same on all turns of a trajectory."""
    outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    turns = [[0.0] * n + [outcome] for n, outcome in zip((0, 2, 1, 3, 0), outcomes.tolist(), strict=True)]
    values = list_turn_advantages(turns, [0] * 5, **GRPO, eps=1e-4)
    expected = (outcomes - outcomes.mean()) / (outcomes.std() + 1e-4)
    for row, value in zip(values, expected.tolist(), strict=True):
        assert row == pytest.approx([value] * len(row), rel=1e-5)


@pytest.mark.parametrize("rows", [[np.array([0.0, 1.0]), np.array([0.5])], [torch.tensor([0.0, 1.0]), (0.5,)]])
def test_rewards_may_be_arrays_and_tensors(rows: list[object]) -> None:
    expected = list_turn_advantages([[0.0, 1.0], [0.5]], "aa")
    assert list_turn_advantages(rows, np.array(["a", "a"])) == expected  # type: ignore[arg-type]


def test_a_preset_can_be_named_and_changed() -> None:
    """RLOO: the reward of a trajectory less the mean of the others' in its group, on all of its turns."""
    rewards, groups = [[0.0, 1.0], [0.5], [0.0, 0.0]], ["a"] * 3
    assert list_turn_advantages(rewards, groups, method="rloo") == [[0.75, 0.75], [0.0], [-0.75, -0.75]]
    grpo = list_turn_advantages(rewards, groups, **GRPO, eps=1e-4)
    for row, values in zip(list_turn_advantages(rewards, groups, method="grpo", eps=1e-4), grpo, strict=True):
        assert row == pytest.approx(values, rel=1e-6)
    with pytest.raises(ValueError, match=r"method must be one of gtpo, .*, got 'ppo'"):
        list_turn_advantages(rewards, groups, method="ppo")
    with pytest.raises(ValueError, match="a credit has no field lam"):
        list_turn_advantages(rewards, groups, method="rloo", lam=0.9)


def test_credits_take_what_they_need_of_the_batch() -> None:
    """MT-GRPO by hand in `gtpo methods`, and GiGPO; in every layout, whatever its labels are."""
    rewards, tokens = [[0.2, 1.0], [0.0, 0.0]], torch.tensor([[0, -1, 1], [0, -1, 1]])
    mt_grpo = {"method": "mt_grpo", "outcomes": [1.0, 0.0], "turns_with_calls": [[True, False]] * 2}
    gigpo = {"method": "gigpo", "anchor_ids": [["start", "page"], ["start", "end"]]}
    for options in (mt_grpo, gigpo):
        lists = list_turn_advantages(rewards, "aa", **options)
        assert lists[0][0] != lists[0][1]
        padded_ = padded_turn_advantages(rewards, tokens, "aa", **options).advantages
        packed = packed_turn_advantages(rewards, tokens.flatten(), torch.tensor([0, 3, 6]), "aa", **options).advantages
        laid = torch.tensor([[0.2, 0.0, 1.0], [0.0, 0.0, 0.0]])
        on_tokens = token_reward_advantages(laid, (tokens >= 0).int(), "aa", **options).advantages
        for found in (padded_, packed.view(2, 3), on_tokens):
            assert found[:, [0, 2]].tolist() == [pytest.approx(row, rel=1e-6) for row in lists]
    by_hand = group_advantages(METHODS["mt_grpo"].credit, rewards, outcomes=[1.0, 0.0], calls=[[True, False]] * 2)
    assert list_turn_advantages(rewards, "aa", **mt_grpo) == [pytest.approx(row, abs=1e-4) for row in by_hand]


def test_terms_may_be_mappings_and_the_backend_is_passed_on() -> None:
    whole = {"weight": 0.5, "quantity": "trajectory_return", "gamma": 1.0, "population": "trajectories"}
    terms = [whole, Term(weight=0.5, gamma=0.9, scope="group_turn")]
    given = list_turn_advantages(ATTEMPTS.rewards, ATTEMPTS.groups, terms=terms)
    assert given == list_turn_advantages(ATTEMPTS.rewards, ATTEMPTS.groups, method="matchtir", backend="reference")
    changed = list_turn_advantages(ATTEMPTS.rewards, ATTEMPTS.groups, method="matchtir", terms={1: {"gamma": 0.5}})
    by_key = list_turn_advantages(ATTEMPTS.rewards, ATTEMPTS.groups, method="matchtir", terms={"1": {"gamma": 0.5}})
    terms[1] = Term(weight=0.5, gamma=0.5, scope="group_turn")
    assert changed == by_key == list_turn_advantages(ATTEMPTS.rewards, ATTEMPTS.groups, terms=terms) != given
    with pytest.raises(ValueError, match="backend"):
        list_turn_advantages(ATTEMPTS.rewards, ATTEMPTS.groups, method="matchtir", backend="fortran")


def test_rewards_of_one_kind_come_by_name() -> None:
    """GDPO: outcome and format, each normalised by itself, in every layout."""
    rewards, tokens = [[0.0, 0.9], [-0.2], [0.5, -0.1]], torch.tensor([[0, -1, 1], [0, 0, -1], [0, 1, 1]])
    named = {"outcome": [[0.0, 1.0], [0.0], [0.5, 0.0]], "format": [[0.0, -0.1], [-0.2], [0.0, -0.1]]}
    options: dict[str, Any] = {"method": "gdpo", "named_rewards": named}
    lists = list_turn_advantages(rewards, "aaa", num_tokens=[[1, 1], [2], [1, 2]], **options)
    assert lists[0][0] > 0 > lists[1][0]
    found = padded_turn_advantages(rewards, tokens, "aaa", **options).advantages
    for row, turns, values in zip(found, tokens.tolist(), lists, strict=True):
        assert row.tolist() == pytest.approx([0.0 if turn < 0 else values[turn] for turn in turns], rel=1e-5)
    alone = {"terms": [{"reward": "mine", "scope": "group"}], "named_rewards": {"mine": named["format"]}}
    assert list_turn_advantages(rewards, "aaa", **alone) == list_turn_advantages(named["format"], "aaa")
    for wrong, message in (
        ({"method": "gdpo"}, "'gdpo' needs named_rewards, which is not given here"),
        ({"named_rewards": named}, "named_rewards must be left out: no term"),
        ({**options, "named_rewards": {"format": named["format"]}}, "named_rewards must hold 'outcome', .* got format"),
        (
            {**options, "named_rewards": {**named, "format": [[0.0], [0.0], [0.0]]}},
            r"named_rewards\['format'\] must have",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            list_turn_advantages(rewards, "aaa", **wrong)


def test_turns_without_tokens_may_be_allowed() -> None:
    """Their reward reaches the turns before them, and they leave the statistics."""
    credit = padded_turn_advantages([[0.0, 1.0, 5.0], [0.0]], IDS, "aa", gamma=1.0, allow_empty_turns=True)
    assert credit.returns.tolist() == [[6.0, 0.0, 6.0], [0.0, 0.0, 0.0]]
    kept = list_turn_advantages([[0.0, 1.0, 5.0], [0.0]], "aa", num_tokens=[[1, 1, 0], [2]], gamma=1.0)
    assert credit.advantages[0, [0, 2]].tolist() == pytest.approx(kept[0][:2])
    assert kept[0][2] == 0.0


def test_lists_weigh_turns_by_their_tokens_where_the_population_says_so() -> None:
    rewards, tokens = [[1.0], [0.0]], [[3], [1]]
    found = list_turn_advantages(rewards, "aa", num_tokens=tokens, population="tokens", eps=0.0)
    assert found == [pytest.approx([0.25 / 0.5]), pytest.approx([-0.75 / 0.5])]


def test_turns_that_touch_need_explicit_ids() -> None:
    """Two turns with no token between are one run: the explicit ids keep them apart."""
    rewards, mask = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), torch.ones(2, 4, dtype=torch.bool)
    turn_ids = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert turn_ids_of_runs(mask).unique().tolist() == [0]
    apart = token_reward_advantages(rewards, mask, ["a", "a"], turn_ids=turn_ids, gamma=0.5).returns
    assert apart[0].tolist() == [0.5, 0.5, 1.0, 1.0]


def test_reward_on_tool_output_belongs_to_the_turn_that_caused_it() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    credit = token_reward_advantages(rewards, torch.tensor([[1, 0, 1], [1, 0, 1]]), ["a", "a"], gamma=1.0)
    assert credit.returns.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_zero_rewards_are_turns_too() -> None:
    """A turn is where tokens were sampled, not where a reward is not 0."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    credit = token_reward_advantages(rewards, torch.tensor([[1, 0, 1], [1, 0, 1]]), ["a", "a"], gamma=0.0)
    expected = by_the_formula([[0.0, 1.0], [0.0, 0.0]], ["a", "a"], gamma=0.0)
    assert credit.advantages[0, [0, 2]].tolist() == pytest.approx(expected[0], rel=1e-5)


def test_trajectory_without_sampled_tokens_leaves_the_statistics() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 1], [0, 0]])
    credit = token_reward_advantages(rewards, mask, ["a"] * 3)
    assert_rows(credit.advantages, [[0.70710] * 2, [-0.70710] * 2, [0.0, 0.0]])


class TestTraps:
    """What goes wrong in silence when TRL's tensors are taken as they are."""

    def test_tool_mask_padded_with_1(self) -> None:
        """TRL pads `tool_mask` with 1, so that padding would count as sampled."""
        completion_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        tool_mask = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])
        turn_ids = turn_ids_of_runs(completion_mask * tool_mask)
        rewards = [[0.0, 1.0], [0.0]]
        with pytest.raises(ValueError, match=r"loss_mask must mark only .* marks \[1, 2\].* TRL's tool_mask"):
            padded_turn_advantages(rewards, turn_ids, ["a", "a"], loss_mask=tool_mask)
        credit = padded_turn_advantages(rewards, turn_ids, ["a", "a"], loss_mask=completion_mask * tool_mask)
        assert not credit.advantages[1, 2:].any()

    def test_group_split_over_ranks(self) -> None:
        """Each half looks like a group of its own; `group_size` makes the difference an error."""
        whole = list_turn_advantages([[1.0], [0.0], [0.0], [0.0]], ["a"] * 4, group_size=4)
        half = list_turn_advantages([[1.0], [0.0]], ["a"] * 2)
        assert half != whole[:2]
        with pytest.raises(ValueError, match="group_size=4 trajectories, but 'a' has 2: was it split over ranks"):
            list_turn_advantages([[1.0], [0.0]], ["a"] * 2, group_size=4)

    def test_rows_shuffled_after_scoring(self) -> None:
        """Advantages of tokens travel with their rows; turn rewards looked up by row number would not."""
        turn_ids = padded(turn_ids_of(ATTEMPTS), -1)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        before = padded_turn_advantages(ATTEMPTS.rewards, turn_ids, ATTEMPTS.groups).advantages
        rewards, groups = ([values[i] for i in order] for values in (ATTEMPTS.rewards, ATTEMPTS.groups))
        after = padded_turn_advantages(rewards, turn_ids[order], groups).advantages
        torch.testing.assert_close(before[order], after, rtol=0, atol=1e-6)
        assert not torch.equal(before[order], before)


IDS, REWARDS = torch.tensor([[0, -1, 1], [0, 0, -1]]), [[0.0, 1.0], [0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: padded_turn_advantages(REWARDS, IDS[0], "aa"), r"turn_ids must be \[B, T\], got shape \(3,\)"),
        (lambda: padded_turn_advantages(REWARDS[:1], IDS, "aa"), "one list for each of 2 trajectories, got 1"),
        (lambda: padded_turn_advantages([1.0, 2.0], IDS, "aa"), "a list of floats for each trajectory, got 1.0"),
        (lambda: padded_turn_advantages(REWARDS, IDS, "aab"), "one label for each of 2 trajectories, got 3"),
        (
            lambda: padded_turn_advantages([[0.0], [0.0]], IDS, "aa"),
            r"turn_ids must number .* at \[0, 2\] it is 1 where turn_rewards has 1 turns",
        ),
        (lambda: padded_turn_advantages(REWARDS, IDS - 1, "aa"), r"at \[0, 1\] it is -2 where"),
        (
            lambda: padded_turn_advantages(torch.zeros(2, 3), IDS, "aa", num_turns=torch.tensor([2, 4])),
            r"num_turns must lie in \[0, 3\], the width of turn_rewards, got \[2, 4\]",
        ),
        (
            lambda: padded_turn_advantages(REWARDS, IDS, "aa", loss_mask=torch.full((2, 3), 2)),
            "loss_mask must be bool or hold 0 and 1 only",
        ),
        (
            lambda: padded_turn_advantages(REWARDS, IDS, "aa", loss_mask=torch.ones(2, 4)),
            r"loss_mask must have shape \(2, 3\) on cpu, got \(2, 4\) on cpu",
        ),
        (lambda: padded_turn_advantages(REWARDS, IDS, "aa", scope="prompt"), "scope must be one of 'group'"),
        (
            lambda: packed_turn_advantages(REWARDS, IDS.flatten(), torch.tensor([0, 3, 5]), "aa"),
            "cu_seqlens must rise from 0 to N = 6",
        ),
        (
            lambda: token_reward_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]), "a"),
            "must not lie before the first sampled token: row 0, column 0 has one",
        ),
        (
            lambda: token_reward_advantages(
                torch.zeros(1, 3), torch.ones(1, 3), "a", turn_ids=torch.tensor([[0, 2, 2]])
            ),
            "turn_ids must number the turns of a row 0, 1, 2 and so on in order, row 0 does not",
        ),
        (
            lambda: token_reward_advantages(
                torch.zeros(1, 3), torch.ones(1, 3), "a", turn_ids=torch.tensor([[0, 1, 0]])
            ),
            "in order, row 0 does not",
        ),
        (
            lambda: token_reward_advantages(torch.tensor([[float("nan")]]), torch.ones(1, 1), "a"),
            "turn_rewards must be finite",
        ),
        (
            lambda: list_turn_advantages(REWARDS, "aa", num_tokens=[[1], [1]]),
            "num_tokens must have one entry for every",
        ),
        (
            lambda: padded_turn_advantages([[0.0, 1.0, 5.0], [0.0]], IDS, "aa"),
            "turn 2 of trajectory 0 has none in turn_ids, and 0 more: pass allow_empty_turns=True",
        ),
        (
            lambda: packed_turn_advantages([[0.0, 1.0], [0.0, 1.0]], IDS.flatten(), torch.tensor([0, 3, 6]), "aa"),
            "turn 1 of trajectory 1 has none",
        ),
        (lambda: list_turn_advantages(REWARDS, "aa", num_tokens=[[1, 1], [-1]]), "num_tokens must be 0 or more"),
        (lambda: list_turn_advantages(REWARDS, "aa", num_tokens=[[1, 1], [1.5]]), "num_tokens must have a list of int"),
        (lambda: list_turn_advantages([["a"], [0.0]], "aa"), "turn_rewards must have a list of floats"),
        (
            lambda: list_turn_advantages([[[0.0]], [[1.0]]], "aa"),
            "list of floats for each trajectory: must be real number, not list",
        ),
        (lambda: list_turn_advantages(REWARDS, None), r"group_ids must be a list, .* of labels, got None"),
        (lambda: padded_turn_advantages(REWARDS, IDS, torch.zeros(2, 1)), r"group_ids must be .*, got shape \(2, 1\)"),
        (lambda: number_groups([float("nan")] * 2, 2), "labels that can be told apart, got nan"),
        (lambda: number_groups([["a"], ["b"]], 2), r"labels that can be told apart, got \['a'\]"),
        (lambda: turn_ids_of_runs(torch.ones(3)), r"loss_mask must be a tensor \[B, T\], got shape \(3,\)"),
        (lambda: list_turn_advantages(REWARDS, "aa", method="rloo", clip_low=0.9), "a credit has no clip_low"),
        (lambda: list_turn_advantages(REWARDS, "aa", method="mt_grpo"), "'mt_grpo' needs outcomes, turns_with_calls"),
        (lambda: list_turn_advantages(REWARDS, "aa", scope="group_anchor"), "this credit needs anchor_ids"),
        (lambda: list_turn_advantages(REWARDS, "aa", outcomes=[1.0, 0.0]), "outcomes must be left out: no term"),
        (
            lambda: list_turn_advantages(REWARDS, "aa", method="gigpo", anchor_ids=[[0], [0]]),
            r"anchor_ids must have one list for each trajectory, one entry a turn: \[2, 1\], got \[1, 1\]",
        ),
        (
            lambda: list_turn_advantages(
                REWARDS, "aa", method="mt_grpo", turns_with_calls=[[True, True], [True]], outcomes=[1.0]
            ),
            "outcomes must be",
        ),
        (
            lambda: list_turn_advantages(REWARDS, "aa", scale="none", eps=0.1),
            r"credit.terms.0.eps has no effect with credit.terms.0.scale = 'none': it must be 1e-06, got 0.1",
        ),
        (
            lambda: list_turn_advantages(REWARDS, "aa", terms=[{}, {"quantity": "turn_reward", "gamma": 0.5}]),
            "credit.terms.1.gamma has no effect",
        ),
        (lambda: list_turn_advantages(REWARDS, "aa", terms=[3]), "terms must hold Terms or mappings"),
        (lambda: list_turn_advantages(REWARDS, "aa", terms=[]), "credit.terms must hold at least one term, got none"),
        (lambda: list_turn_advantages(REWARDS, "aa", terms=3), "terms must be a list of Terms or mappings, .* got 3"),
        (lambda: list_turn_advantages(REWARDS, "aa", terms={1: {}}), r"credit.terms.1: .* one of 1 terms, .* got '1'"),
        (lambda: list_turn_advantages(REWARDS, "aa", terms=[{}], gamma=1.0), "gamma must stand in terms"),
        (
            lambda: list_turn_advantages(REWARDS, "aa", method="matchtir", gamma=1.0),
            r"'matchtir' has 2 terms: say of which gamma is, as in terms=\{0: \{...\}\}",
        ),
        (lambda: list_turn_advantages(REWARDS, "aa", extra_terms=[{}]), "extra_terms is now terms, which holds the"),
        (lambda: number_groups(["a"], 1, group_size=2), "group_size=2 trajectories, but 'a' has 1"),
    ],
)
def test_errors_say_what_was_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_page_runs() -> None:
    run_python_blocks(ROOT / "docs" / "adapters" / "layouts.md")
