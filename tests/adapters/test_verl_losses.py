"""Our losses against verl's formulas (0.9.1, `core_algos.py`), written out; foreign/test_verl_losses.py runs verl."""

import pytest
import torch
from torch import Tensor

from tests.adapters.verl_losses import (
    CONFIG,
    LONGEST,
    LOSSES,
    MEANS,
    PENALTIES,
    Rows,
    assert_same,
    our_loss,
    our_penalty,
    ragged,
)


def of_tokens(name: str, leaf: Tensor, rows: Rows, c: dict[str, float]) -> Tensor:
    """[BATCH, LONGEST]: verl's loss of every token."""
    low, high = 1 - c["clip_ratio_low"], 1 + c["clip_ratio_high"]
    log_ratio, negative = leaf - rows.old_logprobs, -rows.advantages
    if name == "gpg":
        return negative * leaf
    if name == "gspo":
        of_sequence = (log_ratio * rows.mask).sum(dim=1) / rows.mask.sum(dim=1).clamp(min=1)
        ratio = (leaf - leaf.detach() + of_sequence.detach()[:, None]).exp()
        return torch.maximum(negative * ratio, negative * ratio.clamp(low, high))
    ratio = log_ratio.exp()
    if name == "cispo":
        return negative * ratio.clamp(low, high).detach() * leaf
    clipped = torch.maximum(negative * ratio, negative * ratio.clamp(low, high))
    return torch.where(rows.advantages < 0, torch.minimum(negative * c["clip_ratio_c"], clipped), clipped)


def mean_of(by_token: Tensor, mask: Tensor, mean: str) -> Tensor:
    """verl's `agg_loss`: rows without a token in the loss are no sequences."""
    sums, counts = (by_token * mask).sum(dim=1), mask.sum(dim=1)
    if mean == "token-mean":
        return sums.sum() / counts.sum()
    if mean == "seq-mean-token-mean":
        sums = sums / counts.clamp(min=1)
    return sums.sum() / (counts > 0).sum() / (LONGEST if mean == "seq-mean-token-sum-norm" else 1)


@pytest.mark.parametrize("mean", list(MEANS))
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_is_that_of_verl(name: str, mean: str) -> None:
    of_verl, ours = LOSSES[name]
    for seed in range(30):
        rows = ragged(seed)
        leaf = rows.logprobs.clone().requires_grad_()
        loss = mean_of(of_tokens(name, leaf, rows, CONFIG | of_verl), rows.mask, mean)
        assert_same(our_loss(rows, mean, **ours), (loss.detach(), torch.autograd.grad(loss, leaf)[0]))


@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_a_penalty_is_that_of_verl(penalty: str) -> None:
    for seed in range(30):
        rows = ragged(seed)
        leaf = rows.logprobs.clone().requires_grad_()
        x = rows.ref_logprobs - leaf
        by_token = {"kl": -x, "mse": x.square() / 2, "low_var_kl": x.exp() - x - 1}[penalty]
        loss = mean_of(by_token, rows.mask, "token-mean")
        assert_same(our_penalty(rows, PENALTIES[penalty]), (loss.detach(), torch.autograd.grad(loss, leaf)[0]))
