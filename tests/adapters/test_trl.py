"""`GTPOTrainer` beside TRL's own trainer: what it trains on, what it refuses, and that it learns."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from torch import Tensor
from trl.trainer.utils import shuffle_sequence_dict

from gtpo.adapters.layouts import GRPO, list_turn_advantages
from gtpo.adapters.trl import check_hooks
from gtpo.adapters.trl_loss import FUSED_LOSS_TYPES, fused_arguments, loss_arguments, refuse_other_losses
from gtpo.adapters.trl_turns import ScoredRow, group_advantages
from gtpo.methods import METHODS, Method
from gtpo_kernels import LossRule
from tests.adapters.attempts import by_the_formula
from tests.adapters.conftest import ROOT, load_example, run_python_blocks

# TRL and what it stands on warn about each other
pytestmark = pytest.mark.filterwarnings("ignore")

example = load_example("trl_turn_rewards")
example_model = example.build_model
TRL_GRPO = {**GRPO, "eps": 1e-4}
BUILT = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BUILT:
    def build(**options: Any) -> Any:
        arguments = {"per_device_train_batch_size": 8, "num_generations": 4, **options.pop("arguments", {})}
        if arguments.get("beta"):
            # TRL loads the reference policy from where the model came from
            model, tokenizer = example_model()
            model.save_pretrained(tmp_path / "model")
            model.config._name_or_path = str(tmp_path / "model")
            monkeypatch.setattr(example, "build_model", lambda: (model, tokenizer))
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


# Every loss of TRL that is fused, and every option of one, at least once.
LOSSES: dict[str, dict[str, Any]] = {
    **{loss_type: {"loss_type": loss_type} for loss_type in FUSED_LOSS_TYPES},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.02},
    "kl of grpo": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "kl of dapo": {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    "delta": {"loss_type": "dapo", "delta": 1.03},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.002},
    "entropy of grpo": {"loss_type": "grpo", "entropy_coef": 0.05},
    "entropy of dapo": {"loss_type": "dapo", "entropy_coef": 0.05},
    "truncated": {"loss_type": "grpo", "mask_truncated_completions": True, "max_completion_length": 12},
}


def loss_settings(name: str) -> dict[str, Any]:
    loss = LOSSES[name]
    return {"epsilon": 0.02, "epsilon_high": loss.get("epsilon", 0.02), **loss}


# the two left out differ from their like in the mean alone
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"kl of dapo", "entropy of grpo"}))
def test_grpo_gives_trls_own_losses_step_by_step(build: BUILT, name: str) -> None:
    """Two optimizer steps on every generation, so that ratios leave 1; accumulated over two micro-batches."""
    arguments = {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        # Adam would make steps of the rounding errors of gradients that are 0
        "optim": "sgd",
        "learning_rate": 1.0,
        **loss_settings(name),
    }
    rewards = [totals(example.first_look), example.answered]
    runs = [
        trained(build(steps=3, arguments=arguments, reward_funcs=rewards, **options))
        for options in ({"trainer": trl.GRPOTrainer}, {"credit": TRL_GRPO})
    ]
    assert len(runs[0]) == 3
    clip = "cispo_clip_ratio" if name == "cispo" else "clip_ratio/region_mean"
    assert any(line[clip] > 0 for line in runs[0])
    compared = ["loss", "grad_norm", "entropy"]
    compared += ["kl"] * ("beta" in LOSSES[name]) + ["policy_loss", "entropy_coef"] * ("entropy_coef" in LOSSES[name])
    clips = [clip] if name == "cispo" else [f"clip_ratio/{part}_mean" for part in ("low", "high", "region")]
    for number, (theirs, ours) in enumerate(zip(*runs, strict=True)):
        for metric in [*compared, *["reward", "reward_std"] * (number % 2 == 0)]:  # of steps that generate
            assert ours[metric] == pytest.approx(theirs[metric], rel=2e-5, abs=2e-6), metric
        for metric in clips if name != "sequence" else ():  # of which TRL counts sequences, not tokens
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-6), metric


# TRL shares the slope of a sequence's tokens, which averages advantages of turns away
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"sequence"}))
def test_fused_loss_is_trls_loss_of_turn_advantages(build: BUILT, name: str) -> None:
    trainer = build(arguments=loss_settings(name))
    inputs = generated(trainer)
    logprobs = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].shape[1],
    )[0].detach()
    noise = torch.rand(3, *logprobs.shape, generator=torch.manual_seed(0)) - 0.5
    inputs["old_per_token_logps"] = logprobs + noise[0]
    inputs["ref_per_token_logps"] = logprobs + noise[1]
    inputs["importance_sampling_ratio"] = 1.0 + noise[2]  # vLLM's, which does not weigh the KL term
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    expected, expected_gradients = loss_and_gradients(
        trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs), trainer.model
    )

    def refuse(*args: object) -> None:
        raise AssertionError("the head was called: logits of the whole batch were made")

    trainer.model.lm_head.forward = refuse
    loss, gradients = loss_and_gradients(trainer._compute_loss(trainer.model, inputs), trainer.model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-3, atol=1e-6)
    for metric in ("entropy", "cispo_clip_ratio" if name == "cispo" else "clip_ratio/region_mean"):
        theirs, ours = trainer._metrics["train"][metric]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), metric
        assert theirs > 0.1


def test_softcap_of_the_model_is_in_the_fused_loss(build: BUILT, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = example.build_model()
    model.config.final_logit_softcapping = 0.3
    monkeypatch.setattr(example, "build_model", lambda: (model, tokenizer))
    trainer = build()
    inputs = generated(trainer)
    ours = trainer._compute_loss(trainer.model, inputs).detach()
    head = trainer.model.lm_head.forward
    trainer.model.lm_head.forward = lambda hidden: 0.3 * torch.tanh(head(hidden) / 0.3)
    theirs = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs).detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    capped, seen = trainer._metrics["train"]["entropy"]
    assert capped == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("method", ["gtpo", "deepseek_grpo", "dr_grpo", "dapo", "gspo", "cispo", "gigpo"])
def test_loss_of_a_preset_as_trls_arguments(build: BUILT, method: str) -> None:
    """The loss that `GRPOConfig` then asks for has the settings of the preset, and is fused."""
    preset = METHODS[method]
    trainer = build(arguments=loss_arguments(method), credit={"method": method})
    inputs = generated(trainer)
    inputs.setdefault("ref_per_token_logps", None)
    options = fused_arguments(trainer, inputs).options
    rule = LossRule(preset.surrogate, preset.dual_clip, preset.kl, preset.kl_coef)
    assert options["rule"]._replace(entropy_coef=0.0) == rule
    assert options["rule"].entropy_coef == pytest.approx(preset.entropy_coef)
    assert (options["clip_low"], options["clip_high"]) == pytest.approx((preset.clip_low, preset.clip_high))
    assert (options["ratio_ids"] is not None) == (preset.ratio_level == "sequence")
    assert trainer.mask_truncated_completions == preset.mask_truncated
    assert trainer._compute_loss(trainer.model, inputs).isfinite()


def test_loss_arguments_refuse_by_name() -> None:
    for method, named in (
        ("rloo", "surrogate='reinforce'"),
        ("simpletir", "mask_void_turns=True"),
        (Method(ratio_level="turn", kl="k2", kl_coef=0.1), "ratio_level='turn', kl='k2'"),
        (Method(rollout_correction="masked"), "rollout_correction='masked'"),
    ):
        with pytest.raises(ValueError, match=f"GRPOConfig has no field for {named}"):
            loss_arguments(method)
    with pytest.raises(ValueError, match="method must be one of gtpo, "):
        loss_arguments("ppo")


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


def test_two_ranks_give_trls_own_losses() -> None:
    """Real ones, over gloo, in another process: a group of sixteen is split over both."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.adapters.two_ranks"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    ranks = json.loads(found.stdout.splitlines()[-1])
    assert [number for number, *_ in ranks] == [0, 1]
    for _, theirs, ours in ranks:
        assert len(theirs) == 3
        assert ours == [pytest.approx(step, rel=1e-5) for step in theirs]


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
        ({"method": "gspo", "reward": "turn"}, "a credit has no reward: "),
    ],
)
def test_options_that_are_no_credit_are_refused_at_once(build: BUILT, credit: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(credit=credit)


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
        ({"delta": 1.1}, "delta=1.1, at most 1 [+] epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 2.0, "delta": 3.0}, "loss_type='cispo' with delta=3.0"),
        ({"loss_type": "cispo"}, "loss_type='cispo' with epsilon_high=0.28, the greatest ratio, below 1"),
        ({"beta": 0.1}, "use_bias_correction_kl"),  # TRL's default
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
        (
            {"loss_type": "grpo", "entropy_coef": 0.01, "beta": 0.1, "use_bias_correction_kl": False},
            "an entropy bonus beside beta with loss_type='grpo'",
        ),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ],
)
def test_losses_that_are_not_fused_are_refused_by_name(build: BUILT, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"does not cover {named}: pass fused_loss=False"):
        build(arguments=arguments)


@pytest.mark.parametrize(
    ("attribute", "named"),
    [
        ("_is_vlm", "a vision model"),
        ("aux_loss_enabled", "a router loss"),
        ("use_adaptive_entropy", "an adaptive entropy bonus"),
        ("is_deepspeed_enabled", "DeepSpeed"),
    ],
)
def test_models_and_engines_that_are_not_fused_are_refused(
    build: BUILT, monkeypatch: pytest.MonkeyPatch, attribute: str, named: str
) -> None:
    trainer = build()
    monkeypatch.setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=f"does not cover {named}"):
        refuse_other_losses(trainer, trainer.model)
    monkeypatch.setattr(trainer, attribute, False)
    trainer.model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="does not cover a model with logit_scale"):
        refuse_other_losses(trainer, trainer.model)


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
