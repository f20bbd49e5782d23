"""Losses of verl and the options of ours that mean the same, on padded rows [B, T] as verl holds them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gtpo_kernels import LossRule, clipped_loss, loss_mean, sequence_ids

BATCH, LONGEST = 6, 11
# verl's name of a mean: ours
MEANS = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "constant",
}
# verl's name of a loss: the options of its config, and ours
LOSSES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "vanilla": ({"clip_ratio_c": 1.4}, {"rule": LossRule(dual_clip=1.4)}),
    "cispo": ({}, {"rule": LossRule("cispo")}),
    "gpg": ({}, {"rule": LossRule("reinforce")}),
    "gspo": (
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04},
        {"clip_low": 0.03, "clip_high": 0.04, "ratio_ids": sequence_ids(torch.arange(BATCH + 1) * LONGEST, 66)},
    ),
}
CONFIG = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
# verl's name of an estimate of the divergence: ours
PENALTIES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


class Rows(NamedTuple):
    """All [BATCH, LONGEST], mask bool."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


def ragged(seed: int) -> Rows:
    """Several turns a row, each with an advantage of its own; tools spoke between them, and one row is empty.

    Every second batch is in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if seed % 2 else torch.float64
    uniform = torch.rand(2, BATCH, LONGEST, generator=generator)
    new, ref, by_turn = torch.randn(3, BATCH, LONGEST, generator=generator)
    mask = uniform[0] < 0.7
    mask[seed % BATCH] = False
    turns = (mask & ~mask.roll(1, dims=1)).cumsum(dim=1)
    old = (-3 * uniform[1]).to(dtype)
    logprobs, ref_logprobs = ((old + 0.4 * noise).to(dtype) for noise in (new, ref))
    return Rows(logprobs, old, ref_logprobs, by_turn.gather(1, turns.clamp(max=LONGEST - 1)).to(dtype), mask)


def our_loss(rows: Rows, mean: str, **options: Any) -> tuple[Tensor, Tensor]:
    """`clipped_loss` of the rows, and its gradient [BATCH, LONGEST]."""
    mask, aggregation = rows.mask.flatten(), MEANS[mean]
    constant = float(LONGEST) if aggregation == "constant" else None
    of_mean = loss_mean(aggregation, mask, torch.arange(BATCH + 1) * LONGEST, constant=constant)  # type: ignore[arg-type]
    leaf = rows.logprobs.clone().requires_grad_()
    loss = clipped_loss(
        leaf.flatten(),
        rows.advantages.flatten(),
        loss_mask=mask,
        old_logprobs=rows.old_logprobs.flatten(),
        token_weights=of_mean.token_weights,
        num_loss_tokens=of_mean.num_loss_tokens,
        **options,
    ).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def our_penalty(rows: Rows, kl: str) -> tuple[Tensor, Tensor]:
    """The KL term alone, as a mean over tokens, and its gradient."""
    silent = rows._replace(advantages=torch.zeros_like(rows.advantages))
    rule = LossRule(kl=kl, kl_coef=1.0)  # type: ignore[arg-type]
    return our_loss(silent, "token-mean", rule=rule, ref_logprobs=rows.ref_logprobs.flatten())


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Loss and gradient, but for rounding; verl adds 1e-8 to lengths."""
    exact = ours[1].dtype == torch.float64
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7 if exact else 1e-6, atol=1e-7 if exact else 1e-6)
