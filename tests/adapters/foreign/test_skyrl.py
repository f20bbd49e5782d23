"""SkyRL's own registries, estimators, losses and trainer class beside ours."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch, pad_training_input_batch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig
from skyrl.train.trainer import RayPPOTrainer

from gtpo.adapters import skyrl as adapter
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, MASK, TURN_IDS, assert_close, padded, token_rewards


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    adapter.register()


@pytest.mark.parametrize("seed", range(10))
def test_estimator_through_skyrls_dispatch(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """One turn a trajectory and a terminal reward: SkyRL's GRPO, up to its eps."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(9) < torch.randint(1, 9, (12, 1), generator=generator)).float()
    rewards = torch.zeros(12, 9)
    rewards[torch.arange(12), mask.sum(1).long() - 1] = torch.rand(12, generator=generator)
    index = np.array([f"task {i % 3}" for i in range(12)])
    arguments = {"token_level_rewards": rewards, "response_mask": mask, "index": index, "config": AlgorithmConfig()}
    token = adapter._loss_mask_passed.set(True)
    ours = ppo_utils.compute_advantages_and_returns(adv_estimator="gtpo", gamma=1.0, **arguments)[0]
    adapter._loss_mask_passed.reset(token)
    theirs = ppo_utils.compute_advantages_and_returns(adv_estimator="grpo", **arguments)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_loss_is_skyrls_clip(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, advantages = torch.randn(2, 5, 8, generator=generator)
    new = old + 0.3 * torch.randn(old.shape, generator=generator)
    mask = (torch.rand(old.shape, generator=generator) < 0.7).float()
    config = AlgorithmConfig(eps_clip_low=0.1, eps_clip_high=0.28, policy_loss_type="regular")
    results = []
    for name in ("gtpo", "regular"):
        leaf = new.clone().requires_grad_()
        loss, metrics = ppo_utils.PolicyLossRegistry.get(name)(leaf, old, advantages, config, mask, None)
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics["clip_ratio"]))
    (ours, our_gradient, our_clip), (theirs, their_gradient, their_clip) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)
    assert our_clip == pytest.approx(their_clip, abs=0.05)  # theirs counts a mean over sequences


def test_skyrls_trainer_shows_the_turns_and_its_padding_has_none() -> None:
    trainer = object.__new__(adapter.trainer_class())
    assert isinstance(trainer, RayPPOTrainer)
    algorithm = AlgorithmConfig(advantage_estimator="gtpo", gamma=0.9)
    trainer.cfg = SimpleNamespace(
        generator=SimpleNamespace(step_wise_trajectories=False), trainer=SimpleNamespace(algorithm=algorithm)
    )
    trainer.all_metrics = {}
    lengths = torch.tensor([len(turns) for turns in TURN_IDS])
    response_mask = (torch.arange(MASK.shape[1]) < lengths[:, None]).long()
    batch = TrainingInputBatch(
        {
            "sequences": torch.zeros(MASK.shape, dtype=torch.long),
            "attention_mask": response_mask,
            "response_mask": response_mask,
            "loss_mask": MASK.long(),
            "rewards": token_rewards(),
            "values": None,
        }
    )
    batch.metadata = {"uids": list(ATTEMPTS.groups), "avg_response_length": 1.0}
    found = trainer.compute_advantages_and_returns(pad_training_input_batch(batch, 2))
    assert_close(found["advantages"][:-2], padded(BY_TOKEN))
    assert not found["advantages"][-2:].any()
    assert torch.equal(found["response_mask"][:-2], response_mask)
