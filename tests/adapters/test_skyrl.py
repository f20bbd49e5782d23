"""The SkyRL adapter, called as SkyRL calls it; `foreign/test_skyrl.py` has SkyRL itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gtpo.adapters import skyrl
from gtpo_kernels import clipped_loss
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, MASK, TURN_IDS, assert_close, padded, token_rewards


class SkyRLTrainer:
    """As `RayPPOTrainer.compute_advantages_and_returns`: passes `response_mask`, which covers tool output."""

    def compute_advantages_and_returns(self, data: dict[str, Any]) -> dict[str, Any]:
        data["advantages"], data["returns"] = skyrl.gtpo_advantages(
            token_level_rewards=data["rewards"],
            response_mask=data["response_mask"],
            index=data["uids"],
            values=None,
            grpo_norm_by_std=True,
            gamma=0.9,
            lambd=1.0,
            config=None,
        )
        return data


def test_skyrl_trainer_shows_the_turns() -> None:
    lengths = torch.tensor([len(turns) for turns in TURN_IDS])
    response_mask = (torch.arange(MASK.shape[1]) < lengths[:, None]).float()
    data = {"rewards": token_rewards(), "response_mask": response_mask, "loss_mask": MASK, "uids": ATTEMPTS.groups}
    with pytest.raises(RuntimeError, match="hides the turns"):
        SkyRLTrainer().compute_advantages_and_returns(dict(data))
    found = skyrl.trainer_class(SkyRLTrainer)().compute_advantages_and_returns(data)
    assert_close(found["advantages"], padded(BY_TOKEN))
    assert found["response_mask"] is response_mask


def test_skyrl_loss_is_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, *MASK.shape, generator=generator)
    scaled = advantages / MASK.sum()
    config = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.28, off_policy_correction=None)
    loss, metrics = skyrl.gtpo_policy_loss(new, old, scaled, config, loss_mask=MASK)
    expected = clipped_loss(
        new.flatten(), advantages.flatten(), loss_mask=MASK.bool().flatten(), old_logprobs=old.flatten()
    )
    assert_close(loss, expected.loss)
    assert 0.0 < metrics["clip_ratio"] < 1.0
    config.off_policy_correction = SimpleNamespace(tis_ratio_type="token")
    with pytest.raises(ValueError, match="no off-policy correction, got tis_ratio_type"):
        skyrl.gtpo_policy_loss(new, old, scaled, config)
