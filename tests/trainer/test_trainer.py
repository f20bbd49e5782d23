"""The trainer's step: gradients, old log-probs, credit by method, refusals, metrics, checkpoints, on a tiny run."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gtpo.batch import Batch, PackedSequence, pack
from gtpo.config import load_config
from gtpo.credit import Credit, to_sequence
from gtpo.environments import RetryEnvironment, Split
from gtpo.evaluation import Evaluation
from gtpo.finite import NonFiniteLoss
from gtpo.local_sampler import LocalSampler
from gtpo.report.compare import without_timing
from gtpo.run_folder import read_rows
from gtpo.trainer import Trainer
from gtpo.types import StopReason, Task, ToolStatus
from gtpo_kernels import LossMetrics, linear_token_logprobs
from tests.trainer.conftest import make_sequence, make_trajectory, make_turn, prompt

# enough of a warm-up that the model calls tools, and rewards differ within groups
TINY_RUN = """
num_threads = 1
[model]
device = "cpu"
hidden_size = 32
num_layers = 2
num_heads = 2
head_dim = 16
intermediate_size = 48
[[environments]]
name = "retry"
options = { num_items = 1, num_getters = 2 }
[tasks]
num_train = 6
num_eval = 4
[rollout]
tasks_per_step = 2
group_size = 2
max_turns = 3
max_completion_tokens = 32
max_trajectory_tokens = 256
# a fixed schedule: several tests repeat the run bit for bit
tool_join_steps = 4
# log-probs that a test makes up are nowhere near
max_logprob_gap = 100.0
[sft]
steps = 30
learning_rate = 0.01
warmup_steps = 1
batch_size = 8
num_demonstrations = 8
[train]
steps = 3
learning_rate = 0.01
warmup_steps = 1
checkpoint_every = 2
"""


def write_config(folder: Path, text: str = TINY_RUN) -> Path:
    """A configuration file in `folder` whose run goes to `folder`/run."""
    path = folder / "config.toml"
    path.write_text(f'output_dir = "{folder}/run"\n{text}')
    return path


def make_trainer(folder: Path, *overrides: str) -> Trainer:
    return Trainer(load_config(write_config(folder), overrides))


def random_sequences(num: int) -> list[PackedSequence]:
    """Sequences of 4 to 20 tokens with a prompt, two turns and tool tokens between them."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in torch.randint(4, 21, (num,), generator=generator).tolist():
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        turns = [-1, 0, *([-1] * (length - 3)), 1]
        advantages = [0.0 if turn < 0 else float(torch.randn((), generator=generator)) for turn in turns]
        sequences.append(PackedSequence(ids, advantages, [turn >= 0 for turn in turns], [0.0] * length))
    return sequences


class GradientsOfUpdate(torch.optim.SGD):
    """Keeps the gradients that each step is given."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.policy.trainable().values(), lr=1.0)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        super().step(closure)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A run that has ended: shared, not to be changed."""
    with make_trainer(tmp_path_factory.mktemp("finished")) as trainer:
        trainer.train()
        yield trainer


@pytest.mark.parametrize("micro_batch_tokens", [1, 25, 10_000])
def test_accumulated_gradients_are_those_of_the_definition(tmp_path: Path, micro_batch_tokens: int) -> None:
    sequences = random_sequences(7)
    overrides = ("--train.micro_batch_tokens", str(micro_batch_tokens), "--train.max_grad_norm", "1e9")
    with make_trainer(tmp_path, *overrides, "--rollout.temperature", "0.7") as trainer:
        policy, batch = trainer.policy, pack(sequences)
        logits = policy.hidden_states(batch) @ policy.head.weight.T / 0.7
        logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        # at ratio 1 the gradient of ratio * A is that of logprob * A; the denominator is all loss tokens of the step
        loss = -(logprobs * batch.advantages)[batch.loss_mask].sum() / batch.num_loss_tokens
        expected = torch.autograd.grad(loss, list(policy.trainable().values()))
        trainer.learner.optimizer = optimizer = GradientsOfUpdate(trainer)
        metrics = trainer.update(sequences, step=0)
    (seen,) = optimizer.seen
    assert len(seen) == len(expected) > 10
    for gradient, reference in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=2e-6, rtol=1e-4)
    norm = torch.stack([reference.norm() for reference in expected]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["loss"] == pytest.approx(-float(batch.advantages[batch.loss_mask].mean()), abs=1e-5)
    assert metrics["loss/num_active_tokens"] == batch.num_loss_tokens == 14


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--train.max_grad_norm", "0.01") as trainer:
        trainer.learner.optimizer = optimizer = GradientsOfUpdate(trainer)
        metrics = trainer.update(random_sequences(3), step=0)
    clipped = torch.stack([gradient.norm() for gradient in optimizer.seen[0]]).norm()
    assert metrics["grad_norm"] > 0.1 and float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_a_second_update_is_measured_against_the_policy_that_sampled(tmp_path: Path) -> None:
    sequences = random_sequences(6)
    with make_trainer(tmp_path, "--train.updates_per_rollout", "2") as trainer:
        policy, whole = trainer.policy, pack(sequences)
        head = policy.head.weight.detach()
        before = linear_token_logprobs(policy.hidden_states(whole).detach(), head, whole.targets).logprobs.clone()
        seen: list[tuple[Batch, LossMetrics]] = []
        accumulate = trainer.learner.accumulate_gradient

        def record(batch: Batch, *, num_loss_tokens: int) -> tuple[float, LossMetrics, Tensor]:
            loss, metrics, gap = accumulate(batch, num_loss_tokens=num_loss_tokens)
            seen.append((batch, metrics))
            return loss, metrics, gap

        trainer.learner.accumulate_gradient = record  # type: ignore[method-assign]
        trainer.learner.optimizer = optimizer = GradientsOfUpdate(trainer)
        trainer.update(sequences, step=0)
        after = linear_token_logprobs(policy.hidden_states(whole).detach(), policy.head.weight.detach(), whole.targets)
    assert len(optimizer.seen) == 2
    (first, first_metrics), (second, second_metrics) = seen
    assert first.old_logprobs is not None and second.old_logprobs is not None
    assert [first.lengths, second.lengths] == [whole.lengths[:3], whole.lengths[3:]]
    old = torch.cat([first.old_logprobs, second.old_logprobs])
    torch.testing.assert_close(old, before * whole.loss_mask, atol=1e-5, rtol=1e-5)
    assert (after.logprobs - before).abs().max() > 1e-3
    assert float(first_metrics.ratio_mean) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(second_metrics.ratio_max) - 1.0) > 1e-3


def test_grpo_changes_the_credit_and_nothing_before_it(tmp_path: Path) -> None:
    rows, metrics = {}, {}
    for method in ("gtpo", "grpo"):
        folder = tmp_path / method
        folder.mkdir()
        with make_trainer(folder, "--method", method) as trainer:
            trainer.warm_up_only()
            metrics[method] = trainer.step(0)
        rows[method] = read_rows(folder / "run" / "turns.jsonl")
    credit = ("reward", "reward_terms", "return", "advantage")
    sampled = {
        name: [{k: v for k, v in without_timing(row).items() if k not in credit} for row in found]
        for name, found in rows.items()
    }
    assert sampled["gtpo"] == sampled["grpo"] and len(sampled["gtpo"]) > 4
    assert metrics["gtpo"]["turns/mean"] == metrics["grpo"]["turns/mean"] > 1
    assert metrics["gtpo"]["reward"] < metrics["grpo"]["reward"] == metrics["grpo"]["success"]
    assert any(abs(row["return"] - row["reward"]) > 0.01 for row in rows["gtpo"])


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(tmp_path: Path) -> None:
    sequences = random_sequences(3)
    with make_trainer(tmp_path) as trainer:
        weight = trainer.policy.model.get_input_embeddings().weight
        with torch.no_grad():
            weight[sequences[0].token_ids[0]] = float("nan")
        kept = trainer.policy.head.weight.detach().clone()
        with pytest.raises(NonFiniteLoss, match=r"step 5: loss .*nonfinite_batch_step_5\.pt, the last good weights"):
            trainer.update(sequences, step=4)
        assert torch.equal(trainer.policy.head.weight, kept)
        saved = torch.load(tmp_path / "run" / "nonfinite_batch_step_5.pt", weights_only=True)
        assert saved["step"] == 5
        assert torch.equal(torch.cat([batch["targets"] for batch in saved["batches"]]), pack(sequences).targets)
        with pytest.raises(NonFiniteLoss, match=r"the first is model\.embed_tokens\.weight; nothing was sampled"):
            trainer.step(0)


def test_a_warm_up_that_is_not_finite_stops_the_run_and_saves_the_batch(tmp_path: Path) -> None:
    with make_trainer(tmp_path) as trainer:
        weight = trainer.policy.model.get_input_embeddings().weight
        with torch.no_grad():
            weight[:] = float("nan")
        kept = trainer.policy.head.weight.detach().clone()
        with pytest.raises(NonFiniteLoss, match=r"^warm-up step 1: loss nan.*nonfinite_batch_warm-up_step_1\.pt"):
            trainer.train()
        assert torch.equal(trainer.policy.head.weight, kept)
        saved = torch.load(tmp_path / "run" / "nonfinite_batch_warm-up_step_1.pt", weights_only=True)
    assert saved["step"] == 1 and len(saved["batches"]) == 8 and saved["batches"][0]["token_ids"]
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_logits_that_overflow_stop_the_run_as_such(tmp_path: Path) -> None:
    with make_trainer(tmp_path) as trainer:
        # finite weights, whose products are not
        with torch.no_grad():
            trainer.policy.head.weight[:] = torch.tensor([3e38, -3e38]).repeat(trainer.policy.head.weight.shape[1] // 2)
            trainer.policy.model.model.norm.weight[:] = 1e30
        with pytest.raises(
            NonFiniteLoss, match=r"logits are NaN or infinite at decoding step 0; the last good weights"
        ):
            trainer.evaluate(step=0)


def test_the_last_checkpoint_is_a_plain_model(finished: Trainer) -> None:
    folder = finished.run.path / "checkpoints" / "last"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "get net"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == finished.chat.prompt_ids(prompt("s", "get net"))
    batch = pack([make_sequence([*ids, 1])])
    with torch.no_grad():
        logits = finished.policy.hidden_states(batch) @ finished.policy.head.weight.T
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0], logits, atol=1e-5, rtol=1e-5)
    assert model.dtype == torch.float32


def test_metrics_have_the_names_of_trl(finished: Trainer) -> None:
    rows = read_rows(finished.run.path / "metrics.jsonl")
    assert [(row["phase"], row["step"]) for row in rows if row["phase"] != "sft"] == [
        ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("eval", 3)
    ]  # fmt: skip
    assert [row["step"] for row in rows if row["phase"] == "sft"] == list(range(1, 31))
    names = {
        "reward", "reward_std", "completions/mean_length", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "grad_norm", "learning_rate", "loss", "turns/mean", "turn_reward/mean", "tools/calls_per_task", "stop/lost",
        "tools/failure_frequency", "stop/finished", "stop/truncated", "stop/max_turns", "shaping/similarity",
    }  # fmt: skip
    for row in (row for row in rows if row["phase"] == "train"):
        assert names <= row.keys()
        assert sum(row[f"stop/{reason.value}"] for reason in StopReason) == 4
        assert row["num_completion_tokens"] == 4 * row["completions/mean_length"]
        assert row["entropy"] >= 0 and row["clip_ratio/low_mean"] == 0
    # 0 where a step's rewards are all equal, so that no token is counted
    assert any(row["entropy"] > 0 for row in rows if row["phase"] == "train")
    assert [row["learning_rate"] for row in rows if row["phase"] == "train"] == pytest.approx([0.01, 0.01, 0.005])
    assert any(row["grad_norm"] > 0 for row in rows if row["phase"] == "train")


def test_the_turn_table_agrees_with_the_metrics(finished: Trainer) -> None:
    turns = read_rows(finished.run.path / "turns.jsonl")
    for row in turns:
        assert list(row) == [
            "step", "task", "trajectory", "turn", "text", "tools", "results", "tokens", "reward",
            "reward_terms", "return", "advantage", "outcome", "stop", "expected_answer", "given_answer",
            "policy_version", "seconds",
        ]  # fmt: skip
        assert len(row["tools"]) == len(row["results"])
    for metrics in (row for row in read_rows(finished.run.path / "metrics.jsonl") if row["phase"] == "train"):
        of_step = [row for row in turns if row["step"] == metrics["step"]]
        assert len(of_step) == 4 * metrics["turns/mean"]
        assert sum(row["tokens"] for row in of_step) == metrics["num_completion_tokens"]
        assert sum(row["reward"] for row in of_step) / 4 == pytest.approx(metrics["reward"])
        assert sum(len(row["tools"]) for row in of_step) / 4 == metrics["tools/calls_per_task"]
        assert len({row["task"] for row in of_step}) == 2


@pytest.mark.parametrize(("temperature", "expected"), [(None, 1.3), ("0.4", 0.4), ("0", 0.0)])
def test_evaluation_has_its_own_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: str | None, expected: float
) -> None:
    seen = []

    run = LocalSampler.run

    async def recorded(self: LocalSampler, *args: Any, temperature: float, **kwargs: Any) -> Any:
        seen.append(temperature)
        return await run(self, *args, temperature=temperature, **kwargs)

    monkeypatch.setattr(LocalSampler, "run", recorded)
    overrides = ["--rollout.temperature", "1.3", "--eval.samples", "2"]
    with make_trainer(tmp_path, *overrides, *(["--eval.temperature", temperature] if temperature else [])) as trainer:
        evaluation = trainer.evaluate(step=0)
        trainer.sample_groups(trainer.train_tasks[:1], seed=[0])
    assert seen == [expected, 1.3] and evaluation.samples == 2 and evaluation.num_tasks == 4


def test_greedy_attempts_at_a_task_are_one_and_take_the_likeliest_tokens(tmp_path: Path) -> None:
    with make_trainer(tmp_path) as trainer:
        sample = functools.partial(trainer._sample, trainer.eval_tasks, group_size=2, temperature=0.0, label="greedy")
        first, other = sample(seed=[1]), sample(seed=[2])
        longest = max((t for group in first for t in group), key=lambda t: len(t.token_ids()))
        batch = pack([to_sequence(longest, Credit([0.0] * 9, [0.0] * 9), mask_truncated=False, mask_void_turns=False)])
        with torch.no_grad():
            logits = trainer.policy.project(trainer.policy.hidden_states(batch))
    texts = [[[turn.text for turn in t.turns] for t in group] for group in first]
    assert all(a == b for a, b in texts) and texts == [[[turn.text for turn in t.turns] for t in g] for g in other]
    best, chosen = logits.amax(dim=-1), logits.gather(1, batch.targets[:, None])[:, 0]
    # what is as likely up to rounding may be taken
    assert ((best - chosen)[batch.loss_mask] < 1e-4).all() and batch.loss_mask.any()


def test_lost_trajectories_are_left_out_and_a_step_of_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = make_trajectory(make_turn(code="a", status=ToolStatus.INFRA_ERROR, output="no worker"), stop=StopReason.LOST)
    lost.lost_because = "no worker"
    right, wrong = make_trajectory(make_turn(code="b"), outcome=1.0), make_trajectory(make_turn(code="c"), sample=1)
    with make_trainer(tmp_path) as trainer:
        monkeypatch.setattr(trainer, "sample_groups", lambda tasks, seed: [[lost, right, wrong], [lost, lost]])
        row = trainer.step(0)
        assert row["stop/lost"] == 3 and row["success"] == 0.5 and row["stop/finished"] == 2
        assert row["tools/status/infra_error"] == 3 and row["tools/status/ok"] == 2
        monkeypatch.setattr(trainer, "sample_groups", lambda tasks, seed: [[lost, lost]])
        with pytest.raises(RuntimeError, match=r"step 2: all 2 trajectories were lost, the first to: no worker"):
            trainer.step(1)
    rows = read_rows(tmp_path / "run" / "turns.jsonl")
    faulty = [row for row in rows if row["stop"] == "lost"]
    assert [row["step"] for row in faulty] == [1, 1, 1, 2, 2] and len(rows) == 7
    for row in faulty:
        assert row["results"] == [{"status": "infra_error", "text": "no worker"}]
        assert row.keys() == rows[-1].keys()
        assert all(row[name] is None for name in ("reward", "return", "advantage", "outcome"))


def test_the_best_is_that_of_the_best_mean_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only 1 is a success, an outcome that grows from 0.2 to 0.6 is none, and is what training is for."""
    overrides = ("--sft.steps", "1", "--train.steps", "2", "--train.eval_every", "1", "--train.checkpoint_every", "1")
    with make_trainer(tmp_path, *overrides) as trainer:
        plain, outcomes = trainer.evaluate(step=0), iter([0.2, 0.6, 0.4])

        def evaluate(step: int) -> Evaluation:
            return dataclasses.replace(plain, success=0.0, outcome=next(outcomes))

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-000001"
    assert trainer.best_outcome == 0.6


def test_training_that_only_harms_leaves_the_first_model_as_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("--sft.steps", "1", "--train.steps", "2", "--train.eval_every", "1", "--train.checkpoint_every", "1")
    with make_trainer(tmp_path, *overrides) as trainer:
        plain, outcomes = trainer.evaluate(step=0), iter([0.9, 0.1, 0.1])
        monkeypatch.setattr(trainer, "evaluate", lambda step: dataclasses.replace(plain, outcome=next(outcomes)))
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-000000"
    assert trainer.best_outcome == 0.9


@pytest.mark.parametrize("split", ["train", "eval", "demonstrations"])
def test_a_prompt_that_is_too_long_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    tasks = RetryEnvironment.tasks

    def with_a_long_one(self: RetryEnvironment, name: Split, num: int, seed: int) -> list[Task]:
        found = tasks(self, name, num, seed)
        if split == (name if name == "eval" or seed == 0 else "demonstrations"):
            found[-1] = dataclasses.replace(found[-1], prompt=" ".join(map(str, range(300))))
        return found

    monkeypatch.setattr(RetryEnvironment, "tasks", with_a_long_one)
    last = {"train": "retry-train-0-5", "eval": "retry-eval-0-3", "demonstrations": "retry-train-1-7"}[split]
    with pytest.raises(ValueError, match=rf"^1 of \d .* rollout\.max_trajectory_tokens = 256; .* '{last}'"):
        make_trainer(tmp_path)
    assert not (tmp_path / "run").exists()


def test_bfloat16_weights_are_evaluated_but_only_adapters_are_trained(tmp_path: Path) -> None:
    bfloat16 = ("--model.dtype", "bfloat16")
    for steps in ("sft", "train"):
        with pytest.raises(ValueError, match=r'"bfloat16" can train adapters only \(model\.lora_rank'):
            make_trainer(tmp_path, *bfloat16, f"--{steps}.steps", "0")
    with make_trainer(tmp_path, *bfloat16, "--sft.steps", "0", "--train.steps", "0") as trainer:
        assert trainer.policy.head.weight.dtype == torch.bfloat16 and trainer.evaluate(step=0).num_tasks == 4
    folder = tmp_path / "lora"
    folder.mkdir()
    with make_trainer(folder, *bfloat16, "--model.lora_rank", "2", "--train.learning_rate", "1e-5") as trainer:
        before = {name: weight.detach().clone() for name, weight in trainer.policy.trainable().items()}
        trainer.update(random_sequences(3), step=0)
        moved = [
            bool((weight != before[name]).any())
            for name, weight in trainer.policy.trainable().items()
            if "lora_B" in name
        ]
        assert {weight.dtype for weight in trainer.policy.trainable().values()} == {torch.float32} and all(moved)


def test_better_evaluations_move_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("--sft.steps", "1", "--train.steps", "4", "--train.eval_every", "1", "--train.checkpoint_every", "1")
    with make_trainer(tmp_path, *overrides) as trainer:
        outcomes = iter([0.1, 0.5, 0.2, 0.3, 0.4])
        plain = trainer.evaluate(step=0)
        monkeypatch.setattr(trainer, "evaluate", lambda step: dataclasses.replace(plain, outcome=next(outcomes)))
        before, after = trainer.train()
    assert (before.outcome, after.outcome) == (0.1, 0.4)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best", "last", "step-000001", "step-000003", "step-000004"
    ]  # fmt: skip
    assert (checkpoints / "best").resolve().name == "step-000001"
    assert (checkpoints / "last").resolve().name == "step-000004"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["steps"] == 4


def test_a_run_says_what_is_trained_and_how_it_is_evaluated(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--model.lora_rank", "2", "--eval.temperature", "0") as trainer:
        said = "\n".join(trainer.describe())
        trained = sum(weight.numel() for weight in trainer.policy.trainable().values())
    assert f", of them {trained / 1e6:.2f} M trained in adapters, " in said
    assert f"evaluation: {len(trainer.eval_tasks)} tasks x 1, greedy" in said
    with make_trainer(tmp_path, "--rollout.temperature", "0.7", "--output_dir", f"{tmp_path}/two") as trainer:
        said = "\n".join(trainer.describe())
    assert "adapters" not in said and f"{len(trainer.eval_tasks)} tasks x 1, temperature 0.7" in said
