"""Every loss that TRL has too: its `GRPOTrainer._compute_loss` beside ours, value and gradient, on ragged batches."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor

from gtpo_kernels import LossRule, clipped_loss, loss_mean, sequence_ids

# TRL and what it stands on warn about each other
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT, LONGEST, BATCH = 3, 9, 5


def trl_loss(rows: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """TRL's loss of padded rows [B, T], and its gradient; the model is a table of log-probabilities."""
    logps = rows["logprobs"].clone().requires_grad_()
    arguments = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1, **options.pop("args", {})}
    trainer: Any = SimpleNamespace(
        loss_type="grpo",
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.28,
        entropy_coef=0.0,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        use_adaptive_entropy=False,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, rows["entropy"], None),
    )
    trainer.__dict__.update(options, args=SimpleNamespace(**arguments))
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0.0
    inputs = {
        "prompt_ids": torch.zeros(BATCH, PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(BATCH, PROMPT),
        "completion_ids": torch.zeros(BATCH, LONGEST, dtype=torch.long),
        "completion_mask": rows["mask"].long(),
        "advantages": rows["advantages"],
        "old_per_token_logps": rows["old_logprobs"],
        "ref_per_token_logps": rows["ref_logprobs"],
        "importance_sampling_ratio": rows["weights"],
        "num_items_in_batch": rows["mask"].sum(),
    }
    if not trainer.use_vllm:
        del inputs["importance_sampling_ratio"]
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


def ragged(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Padded completions of 2 to LONGEST tokens, with holes where tools spoke; every second batch has an empty one."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(6, BATCH, LONGEST, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, LONGEST + 1, (BATCH, 1), generator=generator)
    mask = (torch.arange(LONGEST) < lengths) & (uniform[5] < 0.8)
    mask[:, 0] = True
    if seed % 2:
        mask[seed % BATCH] = False
    values = {
        "logprobs": -3 * uniform[0],
        "old_logprobs": -3 * uniform[0] + uniform[1] - 0.5,
        "ref_logprobs": -3 * uniform[0] + uniform[2] - 0.5,
        "entropy": uniform[3],
        "weights": 0.5 + uniform[4],
        "advantages": 2 * torch.rand(BATCH, generator=generator, dtype=torch.float64) - 1,
    }
    return {name: value.to(dtype) for name, value in values.items()} | {"mask": mask}


# name: options of TRL, ours, the mean that it takes
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "grpo": ({}, {}, "seq-mean-token-mean"),
    "dapo": ({"loss_type": "dapo"}, {}, "token-mean"),
    "bnpo": ({"loss_type": "bnpo"}, {}, "token-mean"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}, "constant"),
    "luspo": ({"loss_type": "luspo"}, {}, "seq-mean-token-sum"),
    "k3": ({"beta": 0.3}, {"rule": LossRule(kl="k3", kl_coef=0.3)}, "seq-mean-token-mean"),
    "k3 times the ratio": (
        {"loss_type": "dapo", "beta": 0.3, "args": {"use_bias_correction_kl": True, "delta": 1.4}},
        {"rule": LossRule(dual_clip=1.4, kl="rho_k3", kl_coef=0.3)},
        "token-mean",
    ),
    "dual clip": ({"args": {"delta": 1.4}}, {"rule": LossRule(dual_clip=1.4)}, "seq-mean-token-mean"),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        {"clip_low": 0.03, "clip_high": 0.04, "ratio_ids": "sequence"},
        "seq-mean-token-mean",
    ),
    # its epsilon_high is the greatest ratio itself, and it has no least one
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"rule": LossRule("cispo"), "clip_low": 1.0, "clip_high": 0.2},
        "token-mean",
    ),
    "sapo": (
        {"loss_type": "sapo", "args": {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}},
        {"rule": LossRule("sapo", gate=(1.0, 1.05))},
        "seq-mean-token-mean",
    ),
    "sapo of sequences": (
        {
            "loss_type": "sapo",
            "importance_sampling_level": "sequence",
            "args": {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0},
            "beta": 0.3,
        },
        {"rule": LossRule("sapo", kl="k3", kl_coef=0.3, gate=(0.5, 2.0)), "ratio_ids": "sequence"},
        "seq-mean-token-mean",
    ),
    "vespo": (
        {
            "loss_type": "vespo",
            "args": {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
            "get_gamma_weights": trl.GRPOTrainer.get_gamma_weights,
            "_metrics": defaultdict(lambda: defaultdict(list)),
        },
        {"rule": LossRule("vespo", gate=(2.0, 3.0, 3.0, 2.0)), "ratio_ids": "sequence"},
        "token-mean",
    ),
    "entropy": ({"loss_type": "dapo", "entropy_coef": 0.1}, {"rule": LossRule(entropy_coef=0.1)}, "token-mean"),
    "rollout weights": (
        {"beta": 0.2, "use_vllm": True, "vllm_importance_sampling_correction": True},
        {"rule": LossRule(kl="k3", kl_coef=0.2), "weights": True},
        "seq-mean-token-mean",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(LOSSES))
def test_our_loss_is_that_of_trl(name: str, dtype: torch.dtype) -> None:
    of_trl, ours, aggregation = LOSSES[name]
    atol = 1e-6 if dtype == torch.float32 else 1e-8  # TRL rounds a few of its numbers to float32 in either
    for seed in range(30):
        rows = ragged(seed, dtype)
        loss, gradient = trl_loss(rows, **of_trl)
        options = dict(ours)
        cu_seqlens = torch.arange(BATCH + 1) * LONGEST
        mask = rows["mask"].flatten()
        advantages = rows["advantages"][:, None].expand(-1, LONGEST)
        if options.pop("weights", False):
            advantages = advantages * rows["weights"]
        if options.get("ratio_ids") == "sequence":
            options["ratio_ids"] = sequence_ids(cu_seqlens, BATCH * LONGEST)
        if options.get("rule", LossRule()).kl != "none":
            options["ref_logprobs"] = rows["ref_logprobs"].flatten()
        mean = loss_mean(aggregation, mask, cu_seqlens, constant=LONGEST if aggregation == "constant" else None)  # type: ignore[arg-type]
        # TRL's means over sequences count those without a token in the loss too
        all_rows = 1.0 if aggregation == "token-mean" else BATCH / int(rows["mask"].any(dim=1).sum())
        logprobs = rows["logprobs"].flatten().requires_grad_()
        result = clipped_loss(
            logprobs,
            advantages.flatten(),
            loss_mask=mask,
            old_logprobs=rows["old_logprobs"].flatten(),
            entropy=rows["entropy"].flatten(),
            token_weights=mean.token_weights,
            num_loss_tokens=mean.num_loss_tokens * all_rows,
            **options,
        )
        result.loss.backward()
        torch.testing.assert_close(result.loss.detach(), loss, rtol=1e-6, atol=atol)
        assert logprobs.grad is not None
        torch.testing.assert_close(logprobs.grad.view_as(gradient), gradient, rtol=1e-6, atol=atol)
