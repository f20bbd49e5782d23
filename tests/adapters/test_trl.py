"""`GTPOTrainer` beside TRL's own trainer: what it trains on, what it refuses, and that it learns."""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch import Tensor
from trl.trainer.utils import shuffle_sequence_dict

from gtpo.adapters.layouts import GRPO
from gtpo.adapters.trl import FUSED_LOSS_TYPES, ScoredRow, check_hooks, group_advantages
from tests.adapters.attempts import by_the_formula
from tests.adapters.conftest import ROOT, load_example, run_python_blocks

# TRL and what it stands on warn about each other
pytestmark = pytest.mark.filterwarnings("ignore")

example = load_example("trl_turn_rewards")
TRL_GRPO = {**GRPO, "eps": 1e-4}
BUILT = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(tmp_path: Path) -> BUILT:
    def build(**options: Any) -> Any:
        arguments = {"per_device_train_batch_size": 8, "num_generations": 4, **options.pop("arguments", {})}
        return example.build_trainer(str(tmp_path), arguments=arguments, **options)

    return build


def generated(trainer: Any) -> dict[str, Any]:
    """Rollouts of one generation batch, as `_prepare_inputs` gets them before it shuffles."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._generate_and_score_completions(batch)


def trained(trainer: Any) -> list[dict[str, float]]:
    with redirect_stdout(io.StringIO()):
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def loss_and_gradients(loss: Tensor, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def totals(func: Callable[..., Any]) -> Callable[..., list[float]]:
    """The reward function as TRL's own trainer takes it: one number for each trajectory."""

    def total(**kwargs: Any) -> list[float]:
        return [sum(row) if isinstance(row, list) else row for row in func(**kwargs)]

    return total


def test_it_learns_to_call_the_tool_and_then_to_answer(build: BUILT) -> None:
    trainer = build(arguments={"per_device_train_batch_size": 64, "num_generations": 16})
    logs = trained(trainer)
    first, last = ([line["reward"] for line in part] for part in (logs[:4], logs[-4:]))
    assert max(first) < 0.4
    assert min(last) > 0.9  # of 1.5: a call pays 0.5, and the answer after it 1
    assert logs[-1]["rewards/answered/mean"] > 0.7
    assert {"turns/mean", "turns/max", "turn_reward/mean", "entropy", "clip_ratio/region_mean"} <= logs[-1].keys()


@pytest.mark.parametrize("loss_type", FUSED_LOSS_TYPES)
def test_grpo_gives_trls_own_losses_step_by_step(build: BUILT, loss_type: str) -> None:
    """Two optimizer steps on every generation, so that ratios leave 1; accumulated over two micro-batches."""
    arguments = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "epsilon": 0.02,
    }
    rewards = [totals(example.first_look), example.answered]
    runs = [
        trained(build(steps=6, arguments=arguments, reward_funcs=rewards, **options))
        for options in ({"trainer": trl.GRPOTrainer}, {"credit": TRL_GRPO})
    ]
    assert len(runs[0]) == 6
    assert any(line["clip_ratio/region_mean"] > 0 for line in runs[0])
    for theirs, ours in zip(*runs, strict=True):
        for name in {"loss", "grad_norm", "entropy", "reward", "reward_std"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), name
        for name in ("low_mean", "high_mean", "region_mean"):  # at the clip a rounding error is a token
            assert ours[f"clip_ratio/{name}"] == pytest.approx(theirs[f"clip_ratio/{name}"], abs=0.02)


@pytest.mark.parametrize("loss_type", FUSED_LOSS_TYPES)
def test_fused_loss_is_trls_loss_of_turn_advantages(build: BUILT, loss_type: str) -> None:
    trainer = build(arguments={"loss_type": loss_type})
    inputs = generated(trainer)
    logprobs = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].shape[1],
    )[0].detach()
    inputs["old_per_token_logps"] = logprobs + 0.4 * torch.randn(logprobs.shape, generator=torch.manual_seed(0))
    expected, expected_gradients = loss_and_gradients(
        trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs), trainer.model
    )

    def refuse(*args: object) -> None:
        raise AssertionError("the head was called: logits of the whole batch were made")

    trainer.model.lm_head.forward = refuse
    loss, gradients = loss_and_gradients(trainer._compute_loss(trainer.model, inputs), trainer.model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)
    ours, theirs = (trainer._metrics["train"][name] for name in ("entropy", "clip_ratio/region_mean"))
    assert ours[1] == pytest.approx(ours[0], rel=1e-5)
    assert theirs[1] == pytest.approx(theirs[0], abs=1e-6)
    assert theirs[0] > 0.1


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
    assert not inputs["advantages"][[0, 4]].any()
    expected = by_the_formula([[1.0], [2.0], [3.0]], "aaa")[0][0]
    rewards = [row.turn_rewards for row in trainer._scored_rows()]
    assert rewards[0] is None and rewards[4] is None
    if all(len(row or [0]) == 1 for row in rewards):
        assert inputs["advantages"][1, 0].item() == pytest.approx(expected, rel=1e-5)


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"delta": 3.0}, "delta=3.0"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
        ({"entropy_coef": 0.01}, "an entropy bonus"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ],
)
def test_losses_that_are_not_fused_are_refused_by_name(build: BUILT, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"does not cover {named}: pass fused_loss=False"):
        build(arguments=arguments)


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
    assert run_python_blocks(ROOT / "docs" / "adapters" / "trl.md") > 0
