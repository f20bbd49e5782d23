"""The slopes of any `LossRule` in closed form: a few elementwise operations on [N], the same ones for all backends.

What a backend is chosen for, the rows of logits, is not here; the plain clipped surrogate, which backends fuse into
their sweeps, does not come here either.
"""

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.reference import (
    MAX_LOG_RATIO,
    LossTerms,
    active_tokens,
    beyond_clips,
    gamma_weights,
    gate_of,
    loss_denominator,
    product_ratio,
    segment_means,
)


def ruled_slopes(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    old_logprobs: Tensor | None,
    num_loss_tokens: Tensor | None,
    terms: LossTerms,
) -> tuple[Tensor, Tensor | None]:
    """(d loss / d logprob, d loss / d entropy or None where it is 0), [N] each, 0 where a token is not active."""
    accumulator = accumulator_dtype(logprobs.dtype)
    d_logprobs = torch.zeros_like(logprobs, dtype=accumulator)
    d_entropy = torch.zeros_like(d_logprobs) if terms.entropy_coef else None
    rows = active_tokens(advantages, loss_mask, terms).nonzero().squeeze(1)
    of_logprobs, of_entropy = token_slopes(
        logprobs[rows].to(accumulator),
        advantages[rows].to(accumulator),
        None if old_logprobs is None else old_logprobs[rows].to(accumulator),
        loss_denominator(num_loss_tokens, loss_mask, accumulator),
        terms.of_rows(rows),
    )
    d_logprobs[rows] = of_logprobs
    if d_entropy is not None and of_entropy is not None:
        d_entropy[rows] = of_entropy
    return d_logprobs, d_entropy


def token_slopes(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None, denominator: Tensor, terms: LossTerms
) -> tuple[Tensor, Tensor | None]:
    """(d loss / d logprob, d loss / d entropy or None where it is 0) of active tokens, which all its tensors hold.

    Where tokens share a ratio they must all be here.
    """
    old = logprobs if old_logprobs is None else old_logprobs
    dead = logprobs.isinf() | old.isinf()
    ref = None if terms.ref_logprobs is None else terms.ref_logprobs.to(logprobs.dtype)
    if ref is not None:
        dead = dead | ref.isinf()
    weights = None if terms.token_weights is None else terms.token_weights.to(logprobs.dtype)

    def weigh(slopes: Tensor) -> Tensor:
        return slopes if weights is None else slopes * weights

    log_ratio = (logprobs - old).masked_fill(dead, 0.0)
    own_log_ratio = log_ratio
    if terms.ratio_ids is not None:
        log_ratio = segment_means(log_ratio, terms.ratio_ids, ~dead)
    if terms.surrogate == "ppo":
        slopes = weigh(_ppo_slopes(log_ratio, advantages, terms))
    elif terms.surrogate == "cispo":
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        slopes = weigh(-ratio.clamp(1.0 - terms.clip_low, 1.0 + terms.clip_high) * advantages)
    elif terms.surrogate == "sapo":
        slopes = weigh(_sapo_slopes(log_ratio, advantages, terms))
    elif terms.surrogate == "vespo":
        product = product_ratio(own_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), ~dead, terms)
        slopes = weigh(-gamma_weights(product, advantages, terms) * advantages)
    elif terms.cuts_probabilities:
        ratio = log_ratio.exp()
        low, high = beyond_clips(logprobs, old, ratio, advantages, terms)
        slopes = weigh((-ratio * advantages).masked_fill(low | high | (log_ratio.abs() > MAX_LOG_RATIO), 0.0))
    else:
        slopes = weigh(-advantages)
    if terms.kl != "none":
        assert ref is not None
        log_ref = (ref - logprobs).masked_fill(dead, 0.0)
        slopes = slopes + terms.kl_coef * weigh(_kl_slopes(log_ref, log_ratio, terms.kl))
    slopes = slopes.masked_fill(dead, 0.0) / denominator
    if not terms.entropy_coef:
        return slopes, None
    of_entropy = weigh(torch.full_like(slopes, -terms.entropy_coef))
    return slopes, of_entropy.masked_fill(dead, 0.0) / denominator


def _kl_slopes(log_ref: Tensor, log_ratio: Tensor, kl: str) -> Tensor:
    """Of the estimate of KL(policy || reference), 0 where a clamp acts.  log_ref: log(reference / policy)."""
    k3 = -torch.expm1(log_ref)
    slopes = {"k1": torch.ones_like(log_ref), "k2": -log_ref, "k3": k3, "rho_k3": k3}[kl]
    slopes = slopes.masked_fill(log_ref.abs() > MAX_LOG_RATIO, 0.0)
    if kl != "rho_k3":
        return slopes
    held = log_ref.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    of_ratio = (torch.expm1(held) - held).masked_fill(log_ratio.abs() > MAX_LOG_RATIO, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * (slopes + of_ratio)


def _sapo_slopes(log_ratio: Tensor, advantages: Tensor, terms: LossTerms) -> Tensor:
    """-4 s (1 - s) ratio * advantage with s = sigmoid(tau (ratio - 1)), 0 where clamped."""
    ratio = log_ratio.exp()
    x = gate_of(advantages > 0, terms.gate, advantages) * (ratio - 1.0)
    # sigmoid(-x) is 1 - s without its rounding
    slopes = -4.0 * torch.sigmoid(x) * torch.sigmoid(-x) * ratio * advantages
    return slopes.masked_fill(log_ratio.abs() > MAX_LOG_RATIO, 0.0)


def _ppo_slopes(log_ratio: Tensor, advantages: Tensor, terms: LossTerms) -> Tensor:
    """-ratio * advantage, 0 where clipped or clamped.  A NaN fails every test and stays to be seen."""
    ratio = log_ratio.exp()
    cut = torch.where(advantages > 0, ratio > 1.0 + terms.clip_high, ratio < 1.0 - terms.clip_low)
    if terms.dual_clip is not None:
        cut |= (advantages < 0) & (ratio > terms.dual_clip)
    cut = (cut & ~advantages.isnan()) | (log_ratio.abs() > MAX_LOG_RATIO)
    return (-ratio * advantages).masked_fill(cut, 0.0)
