"""The verl adapter, called as verl calls it; `foreign/test_verl.py` has verl itself."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gtpo.adapters import verl
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, MASK, assert_close, padded, token_rewards


def test_verl_estimator() -> None:
    uids = np.array(ATTEMPTS.groups, dtype=object)
    config = {"gamma": 0.9, "gtpo": {"eps": 1e-6}}
    advantages, returns = verl.gtpo_advantages(token_rewards(), MASK, index=uids, config=config)
    assert_close(advantages, padded(BY_TOKEN))
    assert returns.shape == advantages.shape
    # verl's default discount is 1, and what stands under algorithm.gtpo comes before it
    plain = verl.gtpo_advantages(token_rewards(), MASK, index=uids, config={"gamma": 1.0})[0]
    assert not torch.allclose(plain, advantages)
    assert_close(
        verl.gtpo_advantages(token_rewards(), MASK, uids, {"gamma": 1.0, "gtpo": {"gamma": 0.9}})[0], advantages
    )
    with pytest.raises(ValueError, match="index must hold the uid"):
        verl.gtpo_advantages(token_rewards(), MASK)


class ActorConfig(SimpleNamespace):
    def get(self, name: str, default: object = None) -> Any:
        return getattr(self, name, default)


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
@pytest.mark.parametrize("is_global", [False, True])
def test_verl_loss_aggregates_as_verl_does(mode: str, is_global: bool) -> None:
    """Against the formulas of verl's `agg_loss`, by hand; with counts of a batch larger than the one here."""
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(2, *MASK.shape, generator=generator)
    new = (old + 0.3 * torch.randn(old.shape, generator=generator)).requires_grad_()
    weights = torch.rand(old.shape, generator=generator)
    mask = MASK.clone()
    mask[2] = 0  # a sequence masked as a whole counts for nothing
    info = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 7} if is_global else {}
    config = ActorConfig(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.28, global_batch_info=info)
    loss, metrics = verl.gtpo_policy_loss(old, new, advantages, mask.bool(), mode, config, weights)
    loss -= 0.1 * new.sum()  # as verl subtracts its entropy term, in place
    (gradient,) = torch.autograd.grad(loss, new)

    ratio = (new - old).exp()
    token_loss = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.28) * advantages) * weights * mask
    tokens = mask.sum(1)
    num_sequences = 16 if is_global else (tokens > 0).sum()
    expected = {
        "token-mean": token_loss.sum() / (100 if is_global else tokens.sum()),
        "token-sum": token_loss.sum(),
        "seq-mean-token-sum": token_loss.sum() / num_sequences,
        "seq-mean-token-sum-norm": token_loss.sum() / num_sequences / (7 if is_global else mask.shape[1]),
        "seq-mean-token-mean": (token_loss.sum(1) / (tokens + 1e-8)).sum() / num_sequences,
    }[mode] * info.get("dp_size", 1) - 0.1 * new.sum()
    assert_close(loss, expected)
    assert_close(gradient, torch.autograd.grad(expected, new)[0])
    assert 0.0 < metrics["actor/pg_clipfrac"] < 1.0


def test_verl_loss_refuses_what_it_cannot_divide_by() -> None:
    rows = torch.zeros(1, 2)
    config = ActorConfig(clip_ratio=0.2, global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match="batch_num_tokens of the whole batch is needed with dp_size=2"):
        verl.gtpo_policy_loss(rows, rows, rows, rows.bool(), "token-mean", config)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of verl's, got 'mean'"):
        verl.gtpo_policy_loss(rows, rows, rows, rows.bool(), "mean", config)
