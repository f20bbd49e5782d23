"""The fused loss of `GTPOTrainer` beside the loss of TRL's own trainer: equal step by step, or refused by name."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
import trl

from gtpo.adapters.trl_loss import (
    FUSED_LOSS_TYPES,
    fused_arguments,
    loss_arguments,
    refuse_other_logits,
    refuse_other_losses,
)
from gtpo.methods import METHODS, PolicyLoss
from gtpo_kernels import LossRule
from tests.adapters.conftest import ROOT
from tests.adapters.trl_trainer.training import BUILT, TRL_GRPO, example, generated, loss_and_gradients, totals, trained

# TRL and what it stands on warn about each other
pytestmark = pytest.mark.filterwarnings("ignore")


# Every loss of TRL that is fused, and every option of one, at least once.
LOSSES: dict[str, dict[str, Any]] = {
    **{loss_type: {"loss_type": loss_type} for loss_type in FUSED_LOSS_TYPES},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.02},
    "kl of grpo": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "kl of dapo": {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    "kl times the ratio": {"loss_type": "grpo", "beta": 0.3},  # TRL's default
    "kl times the ratio of cispo": {"loss_type": "cispo", "beta": 0.3, "epsilon_high": 1.02},
    "delta": {"loss_type": "dapo", "delta": 1.03},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.002},
    "entropy of grpo": {"loss_type": "grpo", "entropy_coef": 0.05},
    "entropy of dapo": {"loss_type": "dapo", "entropy_coef": 0.05},
    "truncated": {"loss_type": "grpo", "mask_truncated_completions": True, "max_completion_length": 12},
}


def loss_settings(name: str) -> dict[str, Any]:
    loss = LOSSES[name]
    return {"epsilon": 0.02, "epsilon_high": loss.get("epsilon", 0.02), **loss}


SAME_BUT_FOR_THE_MEAN = {"kl of dapo", "kl times the ratio of cispo", "entropy of grpo"}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - SAME_BUT_FOR_THE_MEAN))
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
    clip = "cispo_clip_ratio" if "cispo" in name else "clip_ratio/region_mean"
    assert any(line[clip] > 0 for line in runs[0])
    compared = ["loss", "grad_norm", "entropy"]
    compared += ["kl"] * ("beta" in LOSSES[name]) + ["policy_loss", "entropy_coef"] * ("entropy_coef" in LOSSES[name])
    clips = [clip] if "cispo" in name else [f"clip_ratio/{part}_mean" for part in ("low", "high", "region")]
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
    for metric in ("entropy", "cispo_clip_ratio" if "cispo" in name else "clip_ratio/region_mean"):
        theirs, ours = trainer._metrics["train"][metric]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), metric
        assert theirs > 0.1


def test_softcap_of_the_model_is_in_the_fused_loss(build: BUILT, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = example.build_model()
    model.config.final_logit_softcapping = 0.3
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 0.3 * torch.tanh(head(hidden) / 0.3)
    monkeypatch.setattr(example, "build_model", lambda: (model, tokenizer))
    trainer = build()
    inputs = generated(trainer)
    ours = trainer._compute_loss(trainer.model, inputs).detach()
    theirs = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs).detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    capped, seen = trainer._metrics["train"]["entropy"]
    assert capped == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("method", ["gtpo", "deepseek_grpo", "dr_grpo", "dapo", "gspo", "cispo", "gigpo"])
def test_loss_of_a_preset_as_trls_arguments(build: BUILT, method: str) -> None:
    """The loss that `GRPOConfig` then asks for has the settings of the preset, and is fused."""
    preset = METHODS[method].loss
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
        (PolicyLoss(ratio_level="turn", kl="k2", kl_coef=0.1), "ratio_level='turn', kl='k2'"),
        (PolicyLoss(ratio_level="sequence", kl="rho_k3", kl_coef=0.1), "kl='rho_k3'"),
        ("dppo", "surrogate='dppo', ratio_to='sampler'"),
        ("ipo", "surrogate='ipo', ratio_to='sampler', kl='k2', kl_reference='sampler'"),
        (PolicyLoss(surrogate="sapo", gate=(1.0, 1.05)), "aggregation='token-mean'"),
        (PolicyLoss(surrogate="vespo", gate=(2.0, 3.0, 3.0, 2.0)), "ratio_level='token'"),
        (PolicyLoss(rollout_correction="masked"), "rollout_correction='masked'"),
    ):
        with pytest.raises(ValueError, match=f"GRPOConfig has no field for {named}"):
            loss_arguments(method)
    for kl in ("k3", "rho_k3"):
        assert loss_arguments(PolicyLoss(kl=kl, kl_coef=0.1))["use_bias_correction_kl"] == (kl == "rho_k3")  # type: ignore[arg-type]
    sapo, vespo = loss_arguments("sapo"), loss_arguments("vespo")
    assert (sapo["loss_type"], sapo["sapo_temperature_neg"]) == ("sapo", 1.05)
    assert (vespo["loss_type"], vespo["vespo_lambda_pos"], vespo["vespo_k_neg"]) == ("vespo", 3.0, 3.0)
    assert trl.GRPOConfig(**sapo, use_cpu=True, bf16=False).loss_type == "sapo"
    assert trl.GRPOConfig(**vespo, use_cpu=True, bf16=False).importance_sampling_level == "token"
    with pytest.raises(ValueError, match="method must be one of gtpo, "):
        loss_arguments("ppo")


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"delta": 1.1}, "delta=1.1, at most 1 [+] epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 2.0, "delta": 3.0}, "loss_type='cispo' with delta=3.0"),
        ({"loss_type": "cispo"}, "loss_type='cispo' with epsilon_high=0.28, the greatest ratio, below 1"),
        (
            {"beta": 0.1, "importance_sampling_level": "sequence"},
            "use_bias_correction_kl with importance_sampling_level='sequence'",
        ),
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


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "covered"),
    [
        (transformers.LlamaConfig(**SMALL), True),
        (transformers.Gemma2Config(**SMALL, final_logit_softcapping=0.05), True),
        (transformers.PhiConfig(**SMALL), True),  # a head with a bias
        (transformers.ModernBertDecoderConfig(**SMALL, cls_token_id=0, sep_token_id=0), False),
        (transformers.CohereConfig(**SMALL, logit_scale=0.5), False),
        (transformers.GraniteConfig(**SMALL, logits_scaling=4.0), False),
        (transformers.NemotronConfig(**SMALL), True),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_heads_that_are_more_than_a_linear_map_are_refused(config: Any, covered: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    state = torch.get_rng_state()
    if covered:
        refuse_other_logits(model)
    else:
        with pytest.raises(ValueError, match=f"{config.model_type} model, whose logits are more than a linear map"):
            refuse_other_logits(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_the_trainer_compares_the_fused_logits_with_the_models(build: BUILT, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = example.build_model()
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * head(hidden)
    monkeypatch.setattr(example, "build_model", lambda: (model, tokenizer))
    with pytest.raises(ValueError, match=r"more than a linear map .*: pass fused_loss=False for TRL's own loss"):
        build()
    assert build(fused_loss=False).fused_loss is False
