"""The definition of `token_logprobs` and `linear_token_logprobs`: plain PyTorch, in float64 for float64 inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype


class TokenLogprobs(NamedTuple):
    """What a softmax row says of its target.  Each [N], float32 (float64 for float64 inputs).

    logprobs: log p(target).  -inf where the target's logit is -inf, or all are.
    entropy: -sum_v p_v log p_v in nats.  0 for a row of all -inf.
    lse: log sum_v exp(logit_v / temperature).  For information: it carries no gradient.
    """

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


class RowStatistics(NamedTuple):
    """What a backend keeps of every row from forward to backward.  Each [N], float32 (float64 for float64 inputs).

    row_max: the largest scaled logit.  log_sum: log sum_v exp(x_v - row_max), so lse = row_max + log_sum.
    """

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


def token_logprobs_reference(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, softcap: float = 0.0
) -> TokenLogprobs:
    """`token_logprobs` as its definition; see `gtpo_kernels.token_logprobs`."""
    inf = float("inf")
    dtype = accumulator_dtype(logits.dtype)
    scale = temperature.detach().to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    scaled = cap(logits.to(dtype), softcap) / scale
    # A row of all -inf has no distribution: it takes part as zeros, and its results are overwritten below.
    dead = scaled.detach().amax(dim=1) == -inf
    alive = scaled.masked_fill(dead[:, None], 0.0)
    log_p = torch.log_softmax(alive, dim=1)
    target_log_p = log_p.gather(1, targets.long()[:, None]).squeeze(1)
    # masked_fill, not arithmetic: the gradient of a log-probability of -inf is 0, never 0 * inf.
    logprobs = target_log_p.masked_fill(dead | (target_log_p.detach() == -inf), -inf)
    # p log p is 0 where p is 0
    finite_log_p = log_p.masked_fill(log_p.detach() == -inf, 0.0)
    entropy = -(log_p.exp() * finite_log_p).sum(dim=1).masked_fill(dead, 0.0)
    lse = torch.logsumexp(scaled.detach(), dim=1)
    return TokenLogprobs(logprobs, entropy, lse)


def linear_token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
) -> TokenLogprobs:
    """`linear_token_logprobs` as its definition; see `gtpo_kernels.linear_token_logprobs`."""
    return token_logprobs_reference(project(hidden, weight, bias), targets, temperature, softcap)


def cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits where softcap is 0.0.  An infinite logit stays what it is."""
    if softcap == 0.0:
        return logits
    infinite = logits.detach().isinf()
    capped = softcap * torch.tanh(logits.masked_fill(infinite, 0.0) / softcap)
    return torch.where(infinite, logits, capped)


def head_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The accumulator dtype of hidden states and a head, each in a dtype of its own."""
    return accumulator_dtype(*(tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """logits = hidden @ weight.T + bias in the accumulator dtype.  [N, D], [V, D], [V] -> [N, V]."""
    accumulator = head_dtype(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(accumulator) @ weight.to(accumulator).T
    return logits if bias is None else logits + bias.to(accumulator)
