"""The definition of `clipped_loss`: plain PyTorch, differentiable, exact in float64 for float64 inputs."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype

MAX_LOG_RATIO = 20.0
# of the product of ratios that "vespo" takes: log(1e-8), as in its authors' code
MIN_LOG_PRODUCT = math.log(1e-8)
# Metrics of the clipped surrogate alone; any other rule has those of `LossMetrics` that follow as well.
NUM_CLIPPED_METRICS = 11

Surrogate = Literal["ppo", "cispo", "reinforce", "sapo", "vespo", "dppo", "ipo"]
Penalty = Literal["none", "k1", "k2", "k3", "rho_k3"]


class LossRule(NamedTuple):
    """What a token gains, and what it is charged for, beside the two clips; the defaults are PPO's clipped surrogate.

    With A the advantage, rho the ratio, clip(rho) = rho held within [1 - clip_low, 1 + clip_high], sg() a constant,
    x = clamp(ref_logprob - logprob, -20, 20) and H the entropy, a token's loss is

        -gain + kl_coef * kl - entropy_coef * H.

    surrogate: gain is "ppo": min(rho A, clip(rho) A); "cispo": sg(clip(rho)) A logprob; "reinforce": A logprob;
        "sapo": 4 / tau sigmoid(tau (rho - 1)) A, a soft clip: its slope at rho = 1 is A, whatever tau is;
        "vespo": sg(w^k exp(lambda (1 - w))) A logprob, where w is rho, or of tokens that share a ratio their product,
            held within [1e-8, exp(20)];
        "dppo": rho A, but 0 where the probability of the token has moved too far the way that A asks for:
            exp(logprob) - exp(old_logprob) above clip_high with A > 0, or below -clip_low with A < 0;
        "ipo": the same, but 0 whatever the sign of A.
    gate: of "sapo" (tau where A > 0, tau elsewhere); of "vespo" (k, lambda where A >= 0, k, lambda elsewhere);
        positive.  Empty for the others.
    dual_clip: c > 1, for "ppo": where A < 0 the gain is at least c A.  None for no such bound.
    kl: estimate of KL(policy || reference): "k1": -x; "k2": x^2 / 2; "k3": exp(x) - 1 - x; "none" for no such term.
        On-policy the gradient of "k1" as a loss has the expectation 0: it pulls nowhere, and only adds noise.
        "rho_k3": rho (exp(x) - 1 - x), with gradient through rho: the slope is -rho x, and the expectation over tokens
        of the old policy that of the policy's own KL.
    kl_coef, entropy_coef: 0 or more.
    Source: arXiv 1707.06347 (ppo), arXiv 2506.13585 (cispo), arXiv 2402.14740 (reinforce), arXiv 1912.09729 (dual
    clip), http://joschu.net/blog/kl-approx.html (k1 to k3), arXiv 2402.03300 (k3 as a loss),
    arXiv 2512.02556 (rho_k3), arXiv 2511.20347 (sapo), arXiv 2602.10693 (vespo), arXiv 2602.04879 (dppo),
    github.com/PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/loss.py (ipo).
    """

    surrogate: Surrogate = "ppo"
    dual_clip: float | None = None
    kl: Penalty = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    gate: tuple[float, ...] = ()


class LossTerms(NamedTuple):
    """The two clips, the fields of a `LossRule`, and what they need of every token, as ops take them.

    ref_logprobs, token_weights: [N] float.  ratio_ids: [N] int.  See `gtpo_kernels.clipped_loss`.
    """

    clip_low: float
    clip_high: float
    surrogate: str = "ppo"
    dual_clip: float | None = None
    kl: str = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    gate: Sequence[float] = ()
    ref_logprobs: Tensor | None = None
    token_weights: Tensor | None = None
    ratio_ids: Tensor | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether a token of advantage 0 has a loss."""
        return self.kl != "none" or self.entropy_coef != 0.0

    @property
    def cuts_probabilities(self) -> bool:
        """Whether the clips bound the change of a token's probability, not its ratio."""
        return self.surrogate in ("dppo", "ipo")

    @property
    def is_clipped_surrogate(self) -> bool:
        """Whether all there is is the clipped surrogate of one ratio a token, which every backend fuses."""
        plain = self.surrogate == "ppo" and self.dual_clip is None and self.ratio_ids is None
        return plain and not self.is_penalised

    def of_rows(self, rows: Tensor) -> "LossTerms":
        """The terms of some tokens: all active ones, or any where each has a ratio of its own."""
        of_tokens = (self.ref_logprobs, self.token_weights, self.ratio_ids)
        ref, weights, ids = (None if values is None else values[rows] for values in of_tokens)
        return self._replace(ref_logprobs=ref, token_weights=weights, ratio_ids=ids)


def weighted(advantages: Tensor, terms: LossTerms) -> tuple[Tensor, LossTerms]:
    """Advantages with the token weights in them, where the gain is all that they weigh: it is linear in both."""
    if terms.token_weights is None or terms.is_penalised:
        return advantages, terms
    accumulator = accumulator_dtype(advantages.dtype, terms.token_weights.dtype)
    product = advantages.detach().to(accumulator) * terms.token_weights.detach().to(accumulator)
    return product, terms._replace(token_weights=None)


class LossMetrics(NamedTuple):
    """What the pass saw, each a scalar tensor without gradient, on the loss's device.

    Fractions, means and the maximum run over the counted tokens: those of the loss mask with an advantage other than
    0 (all those of the loss mask with metrics="all"), less the `nonfinite_tokens`.  0 where nothing was counted.

    clip_low_fraction: ratio < 1 - clip_low with a negative advantage (gradient cut to 0); of "dppo" and "ipo" the
        tokens cut for a probability that fell too far; 0 of a surrogate without clips.
    clip_high_fraction: ratio > 1 + clip_high with a positive advantage (gradient cut to 0); or that rose too far.
    approx_kl_k1, approx_kl_k3: means of -log ratio and of ratio - 1 - log ratio, estimates of KL(old || new) in nats.
    entropy: mean entropy in nats; None where the op was not given it.
    ratio_mean, ratio_max: of exp(logprob - old_logprob), after the clamp.
    logprob_mean: mean log-probability.
    num_active_tokens: tokens that were computed; num_active_tokens + dropped_tokens is the size of the loss mask.
    dropped_tokens: tokens of the loss mask left out because their advantage is 0 (they stay in the denominator).
    nonfinite_tokens: computed tokens of an infinite log-probability, new, old or reference: loss and gradient 0.
    clip_dual_fraction: ratio > dual_clip with a negative advantage (gradient cut to 0); None without dual clip.
    ref_kl: mean of the rule's estimate of KL(policy || reference) in nats; None without such a term.
    """

    clip_low_fraction: Tensor
    clip_high_fraction: Tensor
    approx_kl_k1: Tensor
    approx_kl_k3: Tensor
    entropy: Tensor | None
    ratio_mean: Tensor
    ratio_max: Tensor
    logprob_mean: Tensor
    num_active_tokens: Tensor
    dropped_tokens: Tensor
    nonfinite_tokens: Tensor
    clip_dual_fraction: Tensor | None = None
    ref_kl: Tensor | None = None


def pack_metrics(loss: Tensor, metrics: Sequence[Tensor | None]) -> Tensor:
    """The metrics as one vector, in the dtype of the loss; 0 for None."""
    return torch.stack([loss.new_zeros(()) if value is None else value for value in metrics])


class ClippedLoss(NamedTuple):
    """loss: scalar, float32 (float64 for float64 inputs).  metrics: see `LossMetrics`."""

    loss: Tensor
    metrics: LossMetrics


def clipped_loss_reference(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    old_logprobs: Tensor | None,
    entropy: Tensor | None,
    num_loss_tokens: Tensor | None,
    terms: LossTerms,
    all_metrics: bool,
) -> ClippedLoss:
    """`clipped_loss` as its definition; see `gtpo_kernels.clipped_loss`."""
    accumulator = accumulator_dtype(logprobs.dtype)
    active = active_tokens(advantages, loss_mask, terms)
    counted = counted_tokens(advantages, loss_mask, terms, all_metrics)

    def given(values: Tensor, where: Tensor) -> Tensor:
        # What lies outside is replaced before any arithmetic, because 0 * NaN is NaN, in the gradient too.
        return values.to(accumulator).masked_fill(~where, 0.0)

    logprobs = differentiable_where(active, given(logprobs, counted))
    advantages = given(advantages.detach(), active)
    old = logprobs.detach() if old_logprobs is None else given(old_logprobs.detach(), counted)
    ref = None if terms.ref_logprobs is None else given(terms.ref_logprobs.detach(), counted)
    nonfinite = logprobs.detach().isinf() | old.isinf()
    if ref is not None:
        nonfinite = nonfinite | ref.isinf()
    live = counted & ~nonfinite

    difference = (logprobs - old).masked_fill(nonfinite, 0.0)
    log_ratio = held(difference)
    if terms.ratio_ids is None:
        ratio = log_ratio.exp()
    else:
        # the value is shared, the gradient a token's own: what follows the mean is 0, with the slope of the token
        shared = segment_means(difference.detach(), terms.ratio_ids, live) + (difference - difference.detach())
        ratio = held(shared).exp()
    if terms.surrogate == "vespo":
        ratio = product_ratio(log_ratio.detach(), live, terms)
    cut_low, cut_high = beyond_clips(logprobs.detach(), old, ratio.detach(), advantages, terms)
    gain = _gain(logprobs.masked_fill(nonfinite, 0.0), ratio, advantages, terms)
    token_loss = -(gain.masked_fill(cut_low | cut_high, 0.0) if terms.cuts_probabilities else gain)
    ref_kl = None
    if terms.kl != "none":
        assert ref is not None
        log_ref = held((ref - logprobs).masked_fill(nonfinite, 0.0))
        k3 = torch.expm1(log_ref) - log_ref
        ref_kl = {"k1": -log_ref, "k2": 0.5 * log_ref * log_ref, "k3": k3, "rho_k3": ratio * k3}[terms.kl]
        token_loss = token_loss + terms.kl_coef * ref_kl
    if terms.entropy_coef != 0.0:
        assert entropy is not None
        token_loss = token_loss - terms.entropy_coef * given(entropy, live)
    if terms.token_weights is not None:
        token_loss = token_loss * given(terms.token_weights.detach(), active)
    denominator = loss_denominator(num_loss_tokens, loss_mask, accumulator)
    loss = token_loss.masked_fill(nonfinite | ~active, 0.0).sum() / denominator

    num_live = live.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return given(values.detach(), live).sum() / num_live

    ratio_where_live = ratio.detach().masked_fill(~live, 0.0)
    metrics = LossMetrics(
        clip_low_fraction=mean(cut_low),
        clip_high_fraction=mean(cut_high),
        approx_kl_k1=mean(-log_ratio),
        approx_kl_k3=mean(torch.expm1(log_ratio) - log_ratio),
        entropy=None if entropy is None else mean(entropy),
        ratio_mean=mean(ratio),
        # a leading 0 makes the maximum of no rows 0
        ratio_max=torch.cat([ratio_where_live.new_zeros(1), ratio_where_live]).max(),
        logprob_mean=mean(logprobs),
        num_active_tokens=counted.sum().to(accumulator),
        dropped_tokens=(loss_mask & ~counted).sum().to(accumulator),
        nonfinite_tokens=(nonfinite & counted).sum().to(accumulator),
        clip_dual_fraction=None if terms.dual_clip is None else mean((ratio > terms.dual_clip) & (advantages < 0)),
        ref_kl=None if ref_kl is None else mean(ref_kl),
    )
    return ClippedLoss(loss, metrics)


def differentiable_where(active: Tensor, values: Tensor) -> Tensor:
    """The values [N, ...], constants where not `active` [N]: a gradient of 0 through a NaN would be NaN."""
    return torch.where(active.view(-1, *[1] * (values.dim() - 1)), values, values.detach())


def held(log_ratio: Tensor) -> Tensor:
    """clamp(log_ratio, -20, 20), but that a NaN's gradient is NaN and not 0: it stays to be seen."""
    bounded = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(log_ratio.detach().abs() > MAX_LOG_RATIO, bounded, log_ratio)


def _gain(logprobs: Tensor, ratio: Tensor, advantages: Tensor, terms: LossTerms) -> Tensor:
    """What the surrogate makes of every token; see `LossRule`."""
    bounded = ratio.clamp(1.0 - terms.clip_low, 1.0 + terms.clip_high)
    if terms.surrogate == "reinforce":
        return advantages * logprobs
    if terms.surrogate == "cispo":
        return bounded.detach() * advantages * logprobs
    if terms.surrogate == "sapo":
        tau = gate_of(advantages > 0, terms.gate, advantages)
        return 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantages
    if terms.surrogate == "vespo":
        return gamma_weights(ratio, advantages, terms) * advantages * logprobs
    if terms.cuts_probabilities:
        return ratio * advantages
    gain = torch.minimum(ratio * advantages, bounded * advantages)
    if terms.dual_clip is None:
        return gain
    return torch.where(advantages < 0, torch.maximum(gain, terms.dual_clip * advantages), gain)


def beyond_clips(
    logprobs: Tensor, old_logprobs: Tensor, ratio: Tensor, advantages: Tensor, terms: LossTerms
) -> tuple[Tensor, Tensor]:
    """([N], [N]) bool: tokens beyond the lower clip and beyond the upper one, as `LossMetrics` counts them."""
    if terms.cuts_probabilities:
        change = logprobs.exp() - old_logprobs.exp()
        low, high = change < -terms.clip_low, change > terms.clip_high
    else:
        low, high = ratio < 1.0 - terms.clip_low, ratio > 1.0 + terms.clip_high
    if terms.surrogate == "ipo":
        return low, high
    has_clips = terms.surrogate in ("ppo", "cispo", "dppo")
    return low & (advantages < 0) & has_clips, high & (advantages > 0) & has_clips


def product_ratio(log_ratio: Tensor, live: Tensor, terms: LossTerms) -> Tensor:
    """[N]: the product of the ratios of all live tokens of an id, or a token's own, within [1e-8, exp(20)]."""
    if terms.ratio_ids is not None:
        log_ratio = segment_sums(log_ratio, terms.ratio_ids, live)
    return log_ratio.clamp(MIN_LOG_PRODUCT, MAX_LOG_RATIO).exp()


def gamma_weights(ratio: Tensor, advantages: Tensor, terms: LossTerms) -> Tensor:
    """[N]: w^k exp(lambda (1 - w)), which is 1 at w = 1."""
    k, decay = (gate_of(advantages >= 0, terms.gate[i::2], advantages) for i in range(2))
    return (decay + k * ratio.log() - decay * ratio).exp()


def gate_of(first: Tensor, gate: Sequence[float], like: Tensor) -> Tensor:
    """[N] as `like`: the first of two numbers where `first` holds, the second elsewhere."""
    return torch.full_like(like, gate[1]).masked_fill(first, gate[0])


def active_tokens(advantages: Tensor, loss_mask: Tensor, terms: LossTerms) -> Tensor:
    """[N] bool: the tokens that may have a gradient, and those that share their ratio with one."""
    if terms.is_penalised:
        return loss_mask
    own = loss_mask & (advantages != 0)
    if terms.ratio_ids is None:
        return own
    # the mean of 0s and 1s over the tokens of an id, of shapes that no value decides
    return segment_means(own.float(), terms.ratio_ids, loss_mask) > 0


def counted_tokens(advantages: Tensor, loss_mask: Tensor, terms: LossTerms, all_metrics: bool) -> Tensor:
    """[N] bool: the active tokens, or the whole loss mask where the metrics ask for it."""
    return loss_mask if all_metrics else active_tokens(advantages, loss_mask, terms)


def segment_means(values: Tensor, ids: Tensor, members: Tensor) -> Tensor:
    """[N]: for each of `members` [N] bool the mean of `values` over the members of its id, 0 for the others.

    Every shape is N, so nothing waits for a device, and a compiler sees through it.
    """
    return _by_segment(values, ids, members, means=True)


def segment_sums(values: Tensor, ids: Tensor, members: Tensor) -> Tensor:
    """As `segment_means`, the sums."""
    return _by_segment(values, ids, members, means=False)


def _by_segment(values: Tensor, ids: Tensor, members: Tensor, *, means: bool) -> Tensor:
    ids, order = ids.sort(stable=True)
    # which of the runs of equal ids, counted from 0, a sorted token is in
    run = torch.cat([ids[:1], ids]).diff().ne(0).cumsum(0)
    # whole numbers, so that the order of the additions does not matter
    lengths = torch.zeros_like(run).scatter_add_(0, run, torch.ones_like(run))
    # a segment reduction adds in a fixed order; scattered adds would not on a GPU
    sums = torch.segment_reduce(values.masked_fill(~members, 0.0)[order], "sum", lengths=lengths, unsafe=True)
    if means:
        sums = sums / torch.zeros_like(run).scatter_add_(0, run, members[order].long()).clamp(min=1)
    return torch.zeros_like(values).index_put((order,), sums[run]).masked_fill(~members, 0.0)


def loss_denominator(num_loss_tokens: Tensor | None, loss_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """num_loss_tokens, or the size of the loss mask; 1 where that is 0, since the sum over no tokens is 0."""
    count = (loss_mask.sum() if num_loss_tokens is None else num_loss_tokens).to(dtype)
    return torch.where(count > 0, count, torch.ones_like(count))
