"""The SkyRL adapter, called as SkyRL calls it; `foreign/test_skyrl.py` has SkyRL itself."""

import sys
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gtpo.adapters import skyrl
from gtpo_kernels import clipped_loss
from tests.adapters.attempts import (
    ATTEMPTS,
    BY_TOKEN,
    MASK,
    TURN_IDS,
    assert_close,
    by_the_formula,
    padded,
    token_rewards,
)


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


def test_skyrl_options_come_from_register(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}

    class Registry:
        @classmethod
        def register(cls, name: str, function: Any) -> None:
            registered[f"{name} {function.func.__name__}"] = function

    utils: Any = ModuleType("skyrl.backends.skyrl_train.utils.ppo_utils")
    utils.AdvantageEstimatorRegistry = utils.PolicyLossRegistry = Registry
    for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)

    with pytest.raises(ValueError, match="a credit has no field popluation"):
        skyrl.register(popluation="turns")
    with pytest.raises(ValueError, match="needs anchor_ids, which is not given here"):
        skyrl.register(method="gigpo")
    skyrl.register(method="gtpo", scope="batch", dual_clip=1.5)
    estimator, loss = registered["gtpo gtpo_advantages"], registered["gtpo gtpo_policy_loss"]
    monkeypatch.setattr(skyrl, "_loss_mask_passed", ContextVar("shown", default=True))
    arguments = {"token_level_rewards": token_rewards(), "response_mask": MASK, "index": ATTEMPTS.groups}
    whole = by_the_formula(ATTEMPTS.rewards, ["one"] * 6, gamma=0.9)  # of the preset, not SkyRL's default of 1
    expected = [
        [0.0 if turn < 0 else values[turn] for turn in turns] for values, turns in zip(whole, TURN_IDS, strict=True)
    ]
    assert_close(estimator(**arguments, gamma=1.0)[0], padded(expected))
    with pytest.raises(ValueError, match=r"algorithm.gamma=0.8 is no discount of the credit, which has 0.9"):
        estimator(**arguments, gamma=0.8)
    # the discount that SkyRL always sends is none of a reward that is not discounted
    skyrl.register(quantity="turn_reward", scope="none")
    rows = zip(ATTEMPTS.rewards, TURN_IDS, strict=True)
    plain = padded([0.0 if turn < 0 else rewards[turn] for turn in turns] for rewards, turns in rows)
    assert_close(registered["gtpo gtpo_advantages"](**arguments, gamma=1.0)[0], plain)
    config = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.28, off_policy_correction=None)
    one = torch.ones(1, 1)
    assert loss(one, 0 * one, -one, config)[0].item() == pytest.approx(1.5)
