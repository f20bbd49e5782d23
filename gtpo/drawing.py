"""Drawing tokens: what a sequence samples is a function of its logits and of its own stream of uniforms."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms_of(seed: Sequence[int], num: int) -> np.ndarray:
    """The stream of one sequence, [num + 1] float64 in [0, 1): entry t decides the token at position t."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed)))).random(num + 1)


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: token i is the first whose cumulative probability exceeds u_i, in float64.

    logits: [B, V].  uniforms: [B] float64 in [0, 1).  Returns (token ids [B], their log-probs [B] float32).
    temperature: 0 takes the likeliest token, of equal ones the first; nothing else can be drawn, so its log-prob is 0.

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(2, 3)
    >>> sample_tokens(logits, torch.tensor([0.2, 0.7]).double(), temperature=1.0)[0]
    tensor([0, 1])
    >>> sample_tokens(logits, torch.tensor([0.2, 0.7]).double(), temperature=0.0)
    (tensor([0, 0]), tensor([0., 0.]))
    """
    if temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # strictly below the total: tokens of probability 0 behind the last possible one must stay out of reach
    thresholds = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # of a row of NaN the search finds the place behind the last token
    tokens = torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
