"""The NeMo-RL adapter, called as NeMo-RL calls it."""

import pytest
import torch

from gtpo.adapters import nemo_rl
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, MASK, assert_close, outcomes_apart, padded


def test_nemo_rl() -> None:
    turn_rewards, outcomes = outcomes_apart()
    prompts = torch.tensor([[1, 2, group == "a"] for group in ATTEMPTS.groups])
    estimator = nemo_rl.GTPOAdvantageEstimator({"name": "gtpo", "gtpo": {"gamma": 0.9}}, None)
    batch = {"turn_rewards": turn_rewards}
    found = estimator.compute_advantage(prompts, torch.tensor(outcomes), MASK, batch, logprobs_policy=None)
    assert_close(found, padded(BY_TOKEN))
    batch["turn_rewards"][1] = [0.0, 0.0]
    with pytest.raises(ValueError, match="row 1 has 1 turns, got 2 rewards"):
        estimator.compute_advantage(prompts, torch.tensor(outcomes), MASK, batch)


def test_nemo_rl_masked_sample_leaves_the_statistics() -> None:
    mask = torch.tensor([[0, 1], [0, 1], [0, 0]])
    found = nemo_rl.GTPOAdvantageEstimator().compute_advantage(torch.zeros(3), torch.tensor([1.0, 0.0, 9.0]), mask)
    assert_close(found[:, 1], torch.tensor([0.70710, -0.70710, 0.0]))
