"""`GTPOTrainer`: what it trains on, what it refuses, and that it learns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from trl.trainer.utils import shuffle_sequence_dict

from gtpo.adapters.layouts import list_turn_advantages
from gtpo.adapters.trl import check_hooks
from gtpo.adapters.trl_turns import ScoredRow, group_advantages
from tests.adapters.attempts import by_the_formula
from tests.adapters.conftest import ROOT, run_python_blocks
from tests.adapters.trl_trainer.training import BUILT, example, generated, trained

# TRL and what it stands on warn about each other
pytestmark = pytest.mark.filterwarnings("ignore")


def test_it_learns_to_call_the_tool_and_then_to_answer(build: BUILT) -> None:
    trainer = build(arguments={"per_device_train_batch_size": 64, "num_generations": 16})
    logs = trained(trainer)
    first, last = ([line["reward"] for line in part] for part in (logs[:4], logs[-4:]))
    assert max(first) < 0.4
    assert min(last) > 0.9  # of 1.5: a call pays 0.5, and the answer after it 1
    assert logs[-1]["rewards/answered/mean"] > 0.7
    assert {"turns/mean", "turns/max", "turn_reward/mean", "entropy", "clip_ratio/region_mean"} <= logs[-1].keys()


def test_trls_own_loss_takes_the_turn_advantages(build: BUILT) -> None:
    logs = trained(build(steps=2, fused_loss=False, arguments={"loss_type": "cispo", "epsilon_high": 2.0}))
    assert len(logs) == 2
    assert "cispo_clip_ratio" in logs[0]


def test_tokens_carry_the_advantage_of_their_turn(build: BUILT) -> None:
    """Turns by TRL's tool mask before it is padded with 1; the formula by hand on what the reward functions said."""
    kept: list[list[list[float]]] = []

    def turn_rewards(completions: list[Any], **columns: Any) -> list[list[float]]:
        counts = [sum(message["role"] == "assistant" for message in messages) for messages in completions]
        kept.append([[float(i + 2 * j) for j in range(n)] for i, n in enumerate(counts)])
        return kept[-1]

    trainer = build(reward_funcs=[turn_rewards, example.answered])
    inputs = generated(trainer)
    outcomes = trainer._row_rewards[:, 1].tolist()
    rewards = [[*row[:-1], row[-1] + outcome] for row, outcome in zip(kept[0], outcomes, strict=True)]
    expected = by_the_formula(rewards, [row // 4 for row in range(8)])
    assert max(map(len, rewards)) > 1
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    assert (inputs["tool_mask"] > inputs["completion_mask"]).any()  # the trap: padding is 1 there
    assert not inputs["advantages"][mask == 0].any()
    for row, values in enumerate(expected):
        runs = inputs["advantages"][row][mask[row] == 1].unique_consecutive().tolist()
        assert runs == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert list(trainer._logs["extra"]["turn_rewards"]) == rewards


def test_rows_shuffled_after_scoring_keep_their_advantages(build: BUILT) -> None:
    inputs = generated(build())
    torch.manual_seed(3)
    shuffled = shuffle_sequence_dict(inputs)
    assert not torch.equal(shuffled["completion_ids"], inputs["completion_ids"])
    rows = {
        tuple(ids.tolist()): values for ids, values in zip(inputs["completion_ids"], inputs["advantages"], strict=True)
    }
    assert len(rows) == 8
    for ids, values in zip(shuffled["completion_ids"], shuffled["advantages"], strict=True):
        assert torch.equal(rows[tuple(ids.tolist())], values)


def test_group_split_over_ranks_is_normalised_as_one(monkeypatch: pytest.MonkeyPatch, build: BUILT) -> None:
    """Of one group of 8, this rank holds the first half; the other half comes from the other rank."""
    other = [ScoredRow([5.0], [2]), ScoredRow([1.0, 0.0], [1, 3]), ScoredRow([0.0], [1]), ScoredRow([2.0], [4])]
    trainer = build(arguments={"per_device_train_batch_size": 4, "num_generations": 4})
    inputs = generated(trainer)
    alone = inputs["advantages"]
    rows = [*trainer._scored_rows(), *other]

    trainer.num_generations = 8
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", lambda self, batch: dict(inputs))
    monkeypatch.setattr("gtpo.adapters.trl.gather_object", lambda local: [*local, *other])
    advantages = trainer._generate_and_score_completions([])["advantages"]
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    for row, expected in enumerate(group_advantages(rows, 8, {})[:4]):
        assert advantages[row][mask[row]].unique_consecutive().tolist() == pytest.approx(expected, rel=1e-5)
    assert not torch.allclose(advantages, alone)
    with pytest.raises(ValueError, match="whole groups of 8 rows, got 4: were the ranks gathered"):
        group_advantages(rows[:4], 8, {})


def test_completions_that_no_function_scores_leave_the_statistics(build: BUILT) -> None:
    def some(completions: list[Any], **columns: Any) -> list[float | None]:
        return [None if row % 4 == 0 else float(row % 4) for row in range(len(completions))]

    trainer = build(reward_funcs=[some])
    inputs = generated(trainer)
    rows = trainer._scored_rows()
    assert rows[0].turn_rewards is None and rows[4].turn_rewards is None
    assert not inputs["advantages"][[0, 4]].any()
    for first in (1, 5):
        rewards = [[0.0] * (len(rows[first + i].num_tokens) - 1) + [1.0 + i] for i in range(3)]
        for row, expected in enumerate(by_the_formula(rewards, "aaa"), start=first):
            mask = (inputs["completion_mask"] * inputs["tool_mask"])[row] == 1
            found = inputs["advantages"][row][mask].unique_consecutive().tolist()
            assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("as_kind", [torch.tensor, np.array, list])
def test_rewards_may_be_tensors_and_arrays(build: BUILT, as_kind: Callable[[Any], Any]) -> None:
    def outcome(completions: list[Any], **columns: Any) -> Any:
        return as_kind([float(row) for row in range(len(completions))])

    def turns(completions: list[Any], **columns: Any) -> Any:
        return [as_kind(row) for row in example.first_look(completions)]

    def numbers(completions: list[Any], **columns: Any) -> Any:
        return [as_kind([1.0])[0] for _ in completions]

    trainer = build(reward_funcs=[outcome, turns, numbers])
    generated(trainer)
    rows = trainer._scored_rows()
    looks = example.first_look(trainer._rollout.completions)
    for number, (row, of_turns) in enumerate(zip(rows, looks, strict=True)):
        assert row.turn_rewards == pytest.approx([*of_turns[:-1], of_turns[-1] + number + 1.0])
        assert row.outcome == number + 1.0


def test_turn_rewards_that_are_no_numbers_are_refused(build: BUILT) -> None:
    """Their sum is NaN, which is how TRL says that a function does not apply."""

    def partial(completions: list[Any], **columns: Any) -> list[list[float]]:
        return [[float("nan"), *row[1:]] for row in example.first_look(completions)]

    with pytest.raises(ValueError, match="partial must return finite rewards of turns, completion 0 has"):
        generated(build(reward_funcs=[partial]))


class Generation:
    """What `_generate` of TRL returns for two completions of ids 5, with what the test says about them."""

    def __init__(self, sampled: Any, **extra_fields: Any) -> None:
        look, answer = ({"role": "assistant", "content": text} for text in ("look", "done"))
        tool = {"role": "tool", "content": "a box"}
        completions = [[look, tool, answer], [answer]]
        self.output = ([[1], [1]], [[5] * 4, [5] * 2], sampled, completions, None, extra_fields, None, None)


def test_turns_come_from_the_mask_or_from_the_rollout_function(build: BUILT, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    assert trainer.tools

    def turns(generation: Generation) -> Any:
        monkeypatch.setattr(trl.GRPOTrainer, "_generate", lambda self, prompts: generation.output)
        trainer._generate([])
        return trainer._rollout.turn_ids.tolist(), trainer._rollout.num_tokens

    assert turns(Generation([[1, 0, 1, 1], [1, 1]])) == ([[0, -1, 1, 1], [0, 0, -1, -1]], [[1, 2], [2]])
    given = [[0, 0, 1, 1], [0, 0]]  # which touch
    assert turns(Generation(None, turn_ids=given)) == ([[0, 0, 1, 1], [0, 0, -1, -1]], [[2, 2], [2]])
    with pytest.raises(RuntimeError, match="completion 0 has 2 assistant messages, but its tool mask shows 1 turns"):
        turns(Generation([[1, 1, 1, 1], [1, 1]]))
    with pytest.raises(ValueError, match="env_mask must have one entry for each id"):
        turns(Generation([[1, 1, 1], [1, 1]]))
    with pytest.raises(ValueError, match="env_mask must hold 0 and 1 only"):
        turns(Generation([[1, 0.5, 1, 1], [1, 1]]))


def test_credits_that_ask_for_messages_and_outcomes(build: BUILT) -> None:
    """MT-GRPO and GiGPO, from TRL's messages, as from lists."""
    for method, names in (("mt_grpo", ["outcomes", "turns_with_calls"]), ("gigpo", ["anchor_ids"])):
        trainer = build(credit={"method": method})
        inputs = generated(trainer)
        rows = trainer._scored_rows()
        completions = trainer._rollout.completions
        spoken = [[m for m in messages if m["role"] == "assistant"] for messages in completions]
        assert any(len(turns) > 1 for turns in spoken)
        of_batch: dict[str, Any] = {
            "outcomes": trainer._row_rewards[:, 1].tolist(),
            "turns_with_calls": [[bool(turn.get("tool_calls")) for turn in turns] for turns in spoken],
            # the box says the same whatever is asked of it: what was seen last is whether anything was
            "anchor_ids": [
                ["start", *["".join(m["content"] for m in messages if m["role"] == "tool")[:5]] * (len(turns) - 1)]
                for messages, turns in zip(completions, spoken, strict=True)
            ],
        }
        expected = list_turn_advantages(
            [row.turn_rewards for row in rows],
            [row // 4 for row in range(8)],
            method=method,
            **{name: of_batch[name] for name in names},
        )
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        for row, values in enumerate(expected):
            by_token = np.repeat(values, rows[row].num_tokens)
            assert inputs["advantages"][row][mask[row]].tolist() == pytest.approx(by_token.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        ({"gama": 0.9}, "a credit has no field gama"),
        ({"method": "deepseek_grpo", "kl_coef": 0.5}, "a credit has no kl_coef: rewards and loss are the trainer's"),
        ({"method": "gspo", "format_penalty": 0.2}, "a credit has no format_penalty: "),
    ],
)
def test_options_that_are_no_credit_are_refused_at_once(build: BUILT, credit: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(credit=credit)


def test_tools_may_be_plain_functions(build: BUILT) -> None:
    def look() -> str:
        """
        Look into the box.
        """
        return "box is empty"

    trainer = build(environment_factory=None, tools=[look], reward_funcs=[example.first_look])
    inputs = generated(trainer)
    rows = trainer._scored_rows()
    assert {len(row.num_tokens) for row in rows} > {1}
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    rewards = example.first_look(trainer._rollout.completions)
    for row, values in enumerate(by_the_formula(rewards, [row // 4 for row in range(8)])):
        by_token = np.repeat(values, rows[row].num_tokens).tolist()
        assert inputs["advantages"][row][mask[row]].tolist() == pytest.approx(by_token, rel=1e-4, abs=1e-6)


def test_async_reward_functions_may_return_turn_rewards(build: BUILT) -> None:
    async def turns(completions: list[Any], **columns: Any) -> list[list[float]]:
        return example.first_look(completions)

    trainer = build(reward_funcs=[turns])
    generated(trainer)
    assert any(row.turn_rewards and len(row.turn_rewards) > 1 for row in trainer._scored_rows())


def test_wrong_number_of_turn_rewards_is_named(build: BUILT) -> None:
    def short(completions: list[Any], **columns: Any) -> list[list[float]]:
        return [[] for _ in completions]

    with pytest.raises(ValueError, match="short must return one reward for each turn, or a float: completion 0 has"):
        generated(build(reward_funcs=[short]))


def test_another_trl_is_refused() -> None:
    class Renamed:
        def _generate(self, prompts: object, images: object) -> None: ...

    with pytest.raises(ImportError, match=r"overrides Renamed._generate, which takes \('prompts', 'images'\)"):
        check_hooks(Renamed)
    with pytest.raises(ImportError, match="which is gone in TRL"):
        check_hooks(object)


def test_lora_trains_its_adapters_only(build: BUILT) -> None:
    peft = pytest.importorskip("peft")
    trainer = build(steps=2, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trained(trainer)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python_blocks(ROOT / "docs" / "adapters" / "trl.md")
