"""TRL's losses from hidden states and head, inside the model's forward pass, for `gtpo.adapters.trl`."""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gtpo.methods import METHODS, PolicyLoss
from gtpo_kernels import LossRule, linear_gtpo_loss
from gtpo_kernels.clipped_loss.reference import ClippedLoss, Penalty

FUSED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_REMEDY = "pass fused_loss=False for TRL's own loss"
# Losses that are loss types of TRL's, with one way of taking a mean, and the names of the numbers in their gates.
OWN_MEAN = {"cispo": "token-mean", "sapo": "seq-mean-token-mean", "vespo": "token-mean"}
GATES = {
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
AGGREGATIONS = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "luspo",
    "constant": "dr_grpo",
}


class FusedLoss(NamedTuple):
    """What the model's forward needs to return the loss: the targets [B, T], and the arguments of `linear_gtpo_loss`.

    advantages and the tensors among the options: [B, T], at the place of the token that is predicted.
    """

    targets: Tensor
    advantages: Tensor
    options: dict[str, Any]


def loss_arguments(method: str | PolicyLoss) -> dict[str, Any]:
    """The fields of TRL's `GRPOConfig` that make its loss the one of a preset: `GRPOConfig(**loss_arguments("gspo"))`.

    method: a name that `gtpo methods` lists, or a `PolicyLoss`.
    Raises ValueError, by name, for what no field of `GRPOConfig` says.

    >>> loss_arguments("gspo")["importance_sampling_level"], loss_arguments("gtpo")["epsilon_high"]
    ('sequence', 0.28)
    >>> loss_arguments("rloo")
    Traceback (most recent call last):
    ...
    ValueError: GRPOConfig has no field for surrogate='reinforce'
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    m = METHODS[method].loss if isinstance(method, str) else method
    is_cispo = m.surrogate == "cispo"
    refused = {
        "surrogate": m.surrogate in ("reinforce", "dppo", "ipo"),
        "ratio_level": m.ratio_level == "turn" or (m.ratio_level == "token" and m.surrogate == "vespo"),
        "ratio_to": m.ratio_to != "old",
        "kl": m.kl in ("k1", "k2") or (m.kl == "rho_k3" and m.ratio_level == "sequence"),
        "kl_reference": m.kl_reference != "start",
        "clip_low": is_cispo and m.clip_low != 1.0,
        "aggregation": m.aggregation != OWN_MEAN.get(m.surrogate, m.aggregation),
        "aggregation_constant": m.aggregation_constant is not None,
        "entropy_coef": m.entropy_coef != 0.0 and m.aggregation != "token-mean",
        "rollout_correction": m.rollout_correction != "none",
        "mask_void_turns": m.mask_void_turns,
    }
    found = [f"{name}={getattr(m, name)!r}" for name, holds in refused.items() if holds]
    if found:
        raise ValueError(f"GRPOConfig has no field for {', '.join(found)}")
    clips = {"epsilon_high": 1.0 + m.clip_high} if is_cispo else {"epsilon": m.clip_low, "epsilon_high": m.clip_high}
    return {
        "loss_type": m.surrogate if m.surrogate in OWN_MEAN else AGGREGATIONS[m.aggregation],
        # of "vespo" the ratio is that of the sequence whatever this says
        "importance_sampling_level": "token" if m.surrogate == "vespo" else m.ratio_level,
        **dict(zip(GATES.get(m.surrogate, ()), m.gate, strict=True)),
        **clips,
        "delta": m.dual_clip,
        "beta": m.kl_coef if m.kl != "none" else 0.0,
        "use_bias_correction_kl": m.kl == "rho_k3",
        "entropy_coef": m.entropy_coef,
        "mask_truncated_completions": m.mask_truncated,
    }


def refuse_other_losses(trainer: Any, model: Any) -> None:
    """Raises ValueError, by name, for options of TRL that `linear_gtpo_loss` does not compute."""
    t, args, config = trainer, trainer.args, model.config.get_text_config()
    scale = next((name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1.0)), None)
    is_cispo = t.loss_type == "cispo"
    refused = {
        f"loss_type={t.loss_type!r}": t.loss_type not in FUSED_LOSS_TYPES,
        f"loss_type='cispo' with epsilon_high={t.epsilon_high}, the greatest ratio, below 1": is_cispo
        and t.epsilon_high < 1.0,
        f"loss_type='cispo' with delta={args.delta}": is_cispo and args.delta is not None,
        f"delta={args.delta}, at most 1 + epsilon_high": not is_cispo
        and args.delta is not None
        and args.delta <= 1.0 + t.epsilon_high,
        "use_bias_correction_kl with importance_sampling_level='sequence'": t.beta != 0.0
        and args.use_bias_correction_kl
        and t.importance_sampling_level == "sequence",
        f"top_entropy_quantile={t.top_entropy_quantile}": t.top_entropy_quantile < 1.0,
        "an adaptive entropy bonus": t.use_adaptive_entropy,
        "an entropy bonus beside beta with loss_type='grpo'": t._entropy_bonus_enabled
        and t.beta != 0.0
        and t.loss_type == "grpo",
        "off_policy_mask_threshold": t.off_policy_mask_threshold is not None,
        "a router loss (router_aux_loss_coef)": t.aux_loss_enabled,
        "a vision model": t._is_vlm,
        f"a model with {scale}": scale is not None,
        "DeepSpeed": t.is_deepspeed_enabled,
    }
    found = [name for name, holds in refused.items() if holds]
    if found:
        raise ValueError(f"fused_loss=True does not cover {', '.join(found)}: {_REMEDY}")


@torch.no_grad()
def refuse_other_logits(model: Any) -> None:
    """Raises ValueError unless a model's logits are a linear map of its last hidden states, and then its softcap.

    Found by a forward pass of 16 tokens: the head of some models has further layers, and the fused loss knows one.
    """
    kind = model.config.model_type
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(f"fused_loss=True does not cover a {kind} model, which has no linear head: {_REMEDY}")
    ids = torch.randint(len(head.weight), (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    was_training = model.training
    model.eval()
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    weight, bias = _head(model)
    logits = F.linear(hidden.to(weight.dtype), weight, bias).float()
    cap = _softcap(model)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    # less their mean, which softmax forgets
    logits, expected = (x - x.mean(dim=-1, keepdim=True) for x in (logits, expected))
    distance, norm = float((logits - expected).norm()), float(expected.norm())
    # not >: NaN is refused too
    if not distance <= (1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.05) * norm:
        raise ValueError(
            f"fused_loss=True does not cover a {kind} model, whose logits are more than a linear map of its hidden "
            f"states (distance {distance:.2g}, norm {norm:.2g}): {_REMEDY}"
        )


def fused_arguments(trainer: Any, inputs: dict[str, Any]) -> FusedLoss:
    """What TRL's `_compute_loss` makes of a batch, as arguments of `linear_gtpo_loss`."""
    t = trainer
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    advantages = inputs["advantages"]
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    if "importance_sampling_ratio" in inputs:  # of vLLM's log-probs: a positive weight of the token's gain
        advantages = advantages * inputs["importance_sampling_ratio"]
    advantages = advantages.expand(mask.shape)
    denominator = _num_loss_tokens(t, mask, inputs["num_items_in_batch"])
    weights = None
    if t.loss_type == "grpo":  # the mean over a completion
        weights = (1.0 / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))).expand(mask.shape)
    entropy_coef = 0.0
    if t._entropy_bonus_enabled:
        # a mean over the tokens of the micro-batch, whatever the loss is divided by
        entropy_coef = float(t.entropy_coef * denominator / (mask.sum().clamp(min=1) * _accumulated(t)))
        if weights is not None:
            advantages, weights = advantages * weights, None
    is_cispo = t.loss_type == "cispo"
    kl: Penalty = "none" if t.beta == 0.0 else "rho_k3" if t.args.use_bias_correction_kl else "k3"
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)
    options = {
        "loss_mask": mask.bool(),
        "old_logprobs": inputs.get("old_per_token_logps"),
        "ref_logprobs": inputs["ref_per_token_logps"] if t.beta != 0.0 else None,
        "token_weights": weights,
        "ratio_ids": rows if t.importance_sampling_level == "sequence" else None,
        "temperature": t.temperature,
        # TRL's epsilon_high is the greatest ratio of cispo itself, and it has no least one
        "clip_low": 1.0 if is_cispo else t.epsilon_low,
        "clip_high": t.epsilon_high - 1.0 if is_cispo else t.epsilon_high,
        "rule": LossRule(
            "cispo" if is_cispo else "ppo",
            dual_clip=t.args.delta,
            kl=kl,
            kl_coef=t.beta,
            entropy_coef=entropy_coef,
        ),
        "num_loss_tokens": denominator,
        "metrics": "all",
    }
    return FusedLoss(inputs["completion_ids"], advantages, options)


def _accumulated(trainer: Any) -> float:
    return float(trainer.current_gradient_accumulation_steps) if trainer.model.training else 1.0


def _num_loss_tokens(trainer: Any, mask: Tensor, num_items_in_batch: Tensor) -> Tensor | float:
    """What TRL divides the sum over tokens by, for each of its loss types."""
    t, accumulated = trainer, _accumulated(trainer)
    if t.loss_type in ("dapo", "cispo"):
        share = accumulated / t.args.steps_per_generation if t.model.training else 1.0
        return num_items_in_batch.clamp(min=1.0) / t.accelerator.num_processes * share
    if t.loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulated
    if t.loss_type == "dr_grpo":
        return float(len(mask) * t.max_completion_length * accumulated)
    return float(len(mask) * accumulated) if t.loss_type == "luspo" else accumulated


def log_loss(trainer: Any, result: ClippedLoss) -> None:
    """TRL's metrics of the same names, over the loss tokens of all ranks."""
    t, seen = trainer, result.metrics
    assert seen.entropy is not None
    count = (seen.num_active_tokens - seen.nonfinite_tokens).float()
    ref_kl = torch.zeros_like(count) if seen.ref_kl is None else seen.ref_kl
    means = [seen.entropy, ref_kl, seen.clip_low_fraction, seen.clip_high_fraction, torch.ones_like(count)]
    sums = torch.stack(means) * count
    totals = t.accelerator.reduce(sums.detach(), reduction="sum").tolist()
    entropy, kl, low, high = (total / max(totals[-1], 1.0) for total in totals[:-1])
    mode = "train" if t.model.training else "eval"
    metrics = t._metrics[mode]
    metrics["entropy"].append(entropy)
    if t.beta != 0.0:
        metrics["kl"].append(kl)
    if t.loss_type == "cispo":
        metrics["cispo_clip_ratio"].append(high)
    else:
        metrics["clip_ratio/low_mean"].append(low)
        metrics["clip_ratio/high_mean"].append(high)
        metrics["clip_ratio/region_mean"].append(low + high)
    if t._entropy_bonus_enabled:
        accumulated = _accumulated(t)
        policy_loss = result.loss.detach() + t.entropy_coef * seen.entropy / accumulated
        if t.loss_type not in ("dapo", "cispo"):
            policy_loss = policy_loss * accumulated
        metrics["policy_loss"].append(t.accelerator.gather(policy_loss).nanmean().item())
        if mode == "train" and t.accelerator.sync_gradients:
            metrics["entropy_coef"].append(t.entropy_coef)


def _whole(parameter: Any) -> Tensor:
    """The parameter itself; under FSDP2, where it is a DTensor, gathered."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def _head(model: Any) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return _whole(head.weight), None if bias is None else _whole(bias)


def _softcap(model: Any) -> float | None:
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def add_fused_loss(model: Any, *, cast_head: bool) -> None:
    """Let `model(..., gtpo_loss=FusedLoss)` return the loss.

    Inside forward, since wrappers (DDP, FSDP) gather parameters and reduce gradients around forward only.
    """
    original: Callable[..., Any] = model.forward
    softcap = _softcap(model)

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, gtpo_loss: FusedLoss | None = None, **kwargs: Any) -> Any:
        if gtpo_loss is None:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        weight, bias = _head(self)
        device_type = hidden.device.type
        mixed = torch.is_autocast_enabled(device_type) and not cast_head
        dtype = torch.get_autocast_dtype(device_type) if mixed else weight.dtype
        shape = gtpo_loss.targets.shape
        of_tokens: dict[str, Any] = {
            name: value.reshape(-1) if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in gtpo_loss.options.items()
        }
        return linear_gtpo_loss(
            hidden[:, -shape[1] - 1 : -1].reshape(-1, hidden.shape[-1]).to(dtype),
            weight.to(dtype),
            gtpo_loss.targets.reshape(-1),
            gtpo_loss.advantages.reshape(-1),
            bias=None if bias is None else bias.to(dtype),
            softcap=softcap,
            **of_tokens,
        )

    model.forward = types.MethodType(forward, model)
