"""How much a token counts: the mean that makes one loss of many tokens, and the correction of a sampler's log-probs.

Elementwise and by segment, on any device, without a kernel of its own; what comes out goes into a loss as
`token_weights`, `num_loss_tokens` or, times the advantages, `advantages`.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype, check_choice, check_tensor, check_values
from gtpo_kernels.clipped_loss.reference import MAX_LOG_RATIO, segment_means

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
Correction = Literal["truncated", "masked"]


class LossMean(NamedTuple):
    """A mean over tokens as the losses take it: loss = sum_i token_weights_i loss_i / num_loss_tokens.

    token_weights: [N] float32, or None where all are 1.  num_loss_tokens: scalar float64; those of
    micro-batches add up.
    """

    token_weights: Tensor | None
    num_loss_tokens: Tensor


def loss_mean(
    aggregation: Aggregation, loss_mask: Tensor, cu_seqlens: Tensor, *, constant: float | None = None
) -> LossMean:
    """Weights and denominator of a mean over the tokens in the loss; S counts the sequences that have one, n_s theirs.

        "token-mean":          sum_i loss_i / sum_s n_s                every token counts the same (DAPO)
        "seq-mean-token-mean": 1/S sum_s 1/n_s sum_{i in s} loss_i     every sequence counts the same (GRPO)
        "seq-mean-token-sum":  1/S sum_s sum_{i in s} loss_i
        "constant":            1/(S constant) sum_i loss_i             free of lengths (Dr. GRPO)

    S is verl's.  TRL 1.16 divides by all rows, those without a token in the loss too: its losses but the token means
    are ours times S over their number.

    loss_mask: [N] bool.  cu_seqlens: [B+1] int, where each of the packed sequences begins, and N.
    constant: tokens a sequence is taken to have; required with, and only with, "constant".
    Raises ValueError for other shapes, dtypes or values.
    Source: arXiv 2402.03300 (seq-mean-token-mean), arXiv 2503.14476 (token-mean), arXiv 2503.20783 (constant).

    >>> mask, cu_seqlens = torch.tensor([True, False, True, True]), torch.tensor([0, 3, 4])
    >>> mean = loss_mean("seq-mean-token-mean", mask, cu_seqlens)
    >>> mean.token_weights.tolist(), mean.num_loss_tokens.item()
    ([0.5, 0.0, 0.5, 1.0], 2.0)
    """
    check_choice("aggregation", aggregation, get_args(Aggregation))
    check_tensor("loss_mask", loss_mask, layout="[N]", shape=(None,), kind="bool")
    if (aggregation == "constant") != (constant is not None):
        raise ValueError(f"constant must be given with 'constant', and only then, got {constant} with {aggregation!r}")
    if constant is not None and not 0.0 < constant < float("inf"):
        raise ValueError(f"constant must be positive and finite, got {constant}")
    ids = sequence_ids(cu_seqlens, len(loss_mask))
    if aggregation == "token-mean":
        return LossMean(None, loss_mask.sum().double())
    # whole numbers, so that the order of the additions does not matter
    counts = torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add_(0, ids, loss_mask.long())
    num_sequences = (counts > 0).sum().double()
    if aggregation == "seq-mean-token-mean":
        return LossMean((loss_mask / counts.clamp(min=1)[ids]).float(), num_sequences)
    return LossMean(None, num_sequences * (1.0 if constant is None else constant))


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[N]: which of the packed sequences a token belongs to; as `ratio_ids` they give GSPO's ratio.

    >>> sequence_ids(torch.tensor([0, 3, 4]), 4).tolist()
    [0, 0, 0, 1]
    """
    check_tensor("cu_seqlens", cu_seqlens, layout="[B+1]", shape=(None,), kind="int")
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens must be [B+1], got nothing in it")
    lengths = cu_seqlens.diff()
    holds = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (lengths >= 0).all()
    check_values(holds, f"cu_seqlens must not decrease, from 0 to the {num_tokens} tokens, got values that do not")
    # not by repeat_interleave, whose size is a value, which a compiler does not know
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)


def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    correction: Correction,
    low: float = 0.5,
    high: float = 2.0,
    ratio_ids: Tensor | None = None,
) -> Tensor:
    """Weights that correct for a sampler whose probabilities are not the trainer's: w = pi_old / pi_rollout, bounded.

    With w_i = exp(clamp(old_logprobs_i - rollout_logprobs_i, -20, 20)):
        "truncated": min(w_i, high);   "masked": w_i where low <= w_i <= high, else 0.

    All [N].  low: used by "masked" alone.
    ratio_ids: tokens of one id in the loss mask share one w, the geometric mean of theirs: that of a turn, or of a
        sequence (a product would leave no long sequence within the bounds).  None for a w a token.
    Returns [N], of the dtype of old_logprobs, computed in float32 (float64 where an input is) and rounded once; at most
        that dtype's largest number.  Multiply the advantages by them, which leaves a KL or entropy term as it is.  0
        outside the loss mask, and where a log-probability is infinite.
    Raises ValueError for other shapes, dtypes, devices or values.
    Source: arXiv 2505.24298 (decoupled old and behaviour policy); truncation and masks as in TRL 1.16
    (`vllm_importance_sampling_mode`), whose "sequence" modes take the product.

    >>> w = rollout_weights(
    ...     torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]), torch.tensor([True, True]), correction="truncated")
    >>> w.tolist()
    [1.0, 2.0]
    """
    check_tensor("old_logprobs", old_logprobs, layout="[N]", shape=(None,), kind="float")
    shape, device = old_logprobs.shape, old_logprobs.device
    check_tensor("rollout_logprobs", rollout_logprobs, layout="[N]", shape=shape, kind="float", device=device)
    check_tensor("loss_mask", loss_mask, layout="[N]", shape=shape, kind="bool", device=device)
    check_choice("correction", correction, get_args(Correction))
    if not 0.0 <= (low if correction == "masked" else 0.0) <= high < float("inf"):
        raise ValueError(f"low and high must be 0 <= low <= high < inf, got {low} and {high}")
    live = loss_mask & ~old_logprobs.isinf() & ~rollout_logprobs.isinf()
    accumulator = accumulator_dtype(old_logprobs.dtype, rollout_logprobs.dtype)
    log_ratio = old_logprobs.detach().to(accumulator) - rollout_logprobs.detach().to(accumulator)
    log_ratio = log_ratio.masked_fill(~live, 0.0)
    if ratio_ids is not None:
        check_tensor("ratio_ids", ratio_ids, layout="[N]", shape=shape, kind="int", device=device)
        log_ratio = segment_means(log_ratio, ratio_ids, live)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if correction == "truncated":
        weights = weights.clamp(max=high)
    else:
        weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
    largest = torch.finfo(old_logprobs.dtype).max
    return weights.masked_fill(~live, 0.0).clamp(max=largest).to(old_logprobs.dtype)
