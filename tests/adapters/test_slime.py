"""The slime adapter, called as slime calls it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gtpo.adapters import slime
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, TURN_IDS, outcomes_apart


def slime_samples() -> list[Any]:
    turn_rewards, outcomes = outcomes_apart()
    return [
        SimpleNamespace(
            group_index=ATTEMPTS.groups[i],
            loss_mask=[int(turn >= 0) for turn in turns],
            response_length=len(turns),
            metadata={"turn_rewards": turn_rewards[i]},
            get_reward_value=lambda args, i=i: outcomes[i],
        )
        for i, turns in enumerate(TURN_IDS)
    ]


def test_slime_from_samples_to_tokens() -> None:
    """The global view makes the credit, a data-parallel rank spreads it over its own tokens."""
    samples = slime_samples()
    raw, rewards = slime.reward_post_process(SimpleNamespace(), samples)
    assert raw == [1.0] * 6
    ours = [3, 0, 4]
    data = {
        "rewards": [rewards[i] for i in ours],
        "loss_masks": [torch.tensor(samples[i].loss_mask) for i in ours],
        "log_probs": [torch.zeros(samples[i].response_length) for i in ours],
    }
    slime.compute_advantages(SimpleNamespace(), data)
    for i, advantages, returns in zip(ours, data["advantages"], data["returns"], strict=True):
        assert advantages.tolist() == pytest.approx(BY_TOKEN[i], rel=1e-5)
        assert torch.equal(advantages, returns)
    assert all(isinstance(reward, float) for reward in data["rewards"])


def test_slime_refusals() -> None:
    samples = slime_samples()
    samples[0].metadata["turn_rewards"] = [1.0]
    with pytest.raises(ValueError, match="sample 0 has 3 turns in its loss mask, got 1 rewards"):
        slime.reward_post_process(SimpleNamespace(), samples)
    data = {"rewards": [1.0], "loss_masks": [torch.ones(2)]}
    with pytest.raises(ValueError, match="pass it as --custom-reward-post-process-path"):
        slime.compute_advantages(SimpleNamespace(), data)
    data = {"rewards": [torch.ones(1)], "loss_masks": [torch.ones(4)], "log_probs": [torch.zeros(2)]}
    with pytest.raises(ValueError, match="context parallelism is not supported"):
        slime.compute_advantages(SimpleNamespace(), data)
