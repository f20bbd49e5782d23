"""The OpenRLHF adapter, called as OpenRLHF calls it; `foreign/test_openrlhf.py` has OpenRLHF itself."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gtpo.adapters import openrlhf
from gtpo.adapters.layouts import list_turn_advantages
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, TURN_IDS, assert_close, padded


def openrlhf_experiences(with_turn_rewards: bool = True) -> list[Any]:
    """In another order than the prompts, and with different widths."""
    order = sorted(range(6), key=lambda i: ATTEMPTS.groups[i])  # place in the order of prompts -> row of ATTEMPTS
    experiences = []
    for places in ([4, 0], [1, 5, 3, 2]):
        rows = [order[place] for place in places]
        logs = [openrlhf.turn_reward_logs(ATTEMPTS.rewards[i], max_turns=5) for i in rows]
        experiences.append(
            SimpleNamespace(
                index=places,
                rows=rows,
                action_mask=padded(
                    [[float(t >= 0) for t in TURN_IDS[i]] for i in rows], max(len(TURN_IDS[i]) for i in rows)
                ),
                rewards=torch.tensor([sum(ATTEMPTS.rewards[i]) for i in rows]),
                info={k: torch.tensor([log[k] for log in logs]) for k in logs[0]} if with_turn_rewards else {},
                kl=None,
            )
        )
    return experiences


def test_openrlhf_experience_maker() -> None:
    class RemoteExperienceMaker:
        kl_ctl = SimpleNamespace(value=0.1)
        strategy = SimpleNamespace(args=SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=3)))

        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            for experience in experiences:
                experience.info["return"] = experience.rewards
            return experiences

    maker = openrlhf.experience_maker_class(RemoteExperienceMaker, gamma=0.9)()
    for experience in maker.compute_advantages_and_returns(openrlhf_experiences()):
        assert "return" in experience.info
        assert_close(
            experience.advantages, padded([BY_TOKEN[i] for i in experience.rows], experience.action_mask.shape[1])
        )
        assert experience.returns.shape == experience.action_mask.shape
    penalised = openrlhf_experiences()
    penalised[0].kl = torch.ones(2, 3)
    with pytest.raises(ValueError, match="a KL penalty in the reward is not supported"):
        maker.compute_advantages_and_returns(penalised)


def test_openrlhf_outcome_alone_lies_on_the_last_turn() -> None:
    experiences = openrlhf_experiences(with_turn_rewards=False)
    openrlhf.set_turn_advantages(experiences, 3)
    rewards = [[0.0] * (len(row) - 1) + [sum(row)] for row in ATTEMPTS.rewards]
    expected = list_turn_advantages(rewards, ATTEMPTS.groups)
    for experience in experiences:
        for row, i in enumerate(experience.rows):
            values = experience.advantages[row][experience.action_mask[row].bool()]
            assert values.tolist() == pytest.approx(np.repeat(expected[i], ATTEMPTS.num_tokens[i]).tolist(), rel=1e-5)


def test_openrlhf_refusals() -> None:
    experiences = openrlhf_experiences()
    for experience in experiences:
        experience.info = {"turn_reward_0": experience.rewards}
    with pytest.raises(ValueError, match=r"a row has \d turns, got 1"):
        openrlhf.set_turn_advantages(experiences, 3)
    with pytest.raises(ValueError, match="group_size=2 trajectories, but"):
        openrlhf.set_turn_advantages(openrlhf_experiences()[:1], 2)
    with pytest.raises(ValueError, match="at most max_turns=1 rewards, got 2"):
        openrlhf.turn_reward_logs([0.0, 1.0], max_turns=1)


def test_openrlhf_turns_that_touch_are_refused() -> None:
    """Two turns without a token between are one run of the mask; the second one's reward would be lost."""
    experience = SimpleNamespace(
        index=[0, 1],
        action_mask=torch.ones(2, 4),
        rewards=torch.tensor([1.0, 0.0]),
        info={"turn_reward_0": torch.zeros(2), "turn_reward_1": torch.tensor([1.0, 0.0])},
    )
    with pytest.raises(ValueError, match="a row has 1, but a reward at turn 1: two turns that touch"):
        openrlhf.set_turn_advantages([experience], 2)
    with pytest.raises(ValueError, match="experiences must hold at least one"):
        openrlhf.set_turn_advantages([], 2)
