"""The rLLM adapter, called as rLLM calls it."""

from types import SimpleNamespace

import numpy as np
import pytest

from gtpo.adapters import rllm
from tests.adapters.attempts import ATTEMPTS, EXPECTED, by_the_formula


def test_rllm_writes_the_steps() -> None:
    groups, rewards = [], []
    for label in ("a", "b"):
        rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == label]
        trajectories = [
            SimpleNamespace(
                steps=[
                    SimpleNamespace(reward=reward, response_ids=[0] * tokens, advantage=None)
                    for reward, tokens in zip(ATTEMPTS.rewards[i], ATTEMPTS.num_tokens[i], strict=True)
                ]
            )
            for i in rows
        ]
        groups.append((rows, SimpleNamespace(trajectories=trajectories)))
        rewards.append(np.array([sum(ATTEMPTS.rewards[i]) for i in rows]))
    config = SimpleNamespace(estimator="gtpo")
    advantages, returns = rllm.gtpo_advantages(
        rewards=rewards, algorithm_config=config, traj_groups=[g for _, g in groups]
    )
    assert [len(row) for row in advantages] == [len(row) for row in returns] == [3, 3]
    for rows, group in groups:
        for i, trajectory in zip(rows, group.trajectories, strict=True):
            for j, step in enumerate(trajectory.steps):
                assert step.advantage == pytest.approx([EXPECTED[i][j]] * ATTEMPTS.num_tokens[i][j], rel=1e-5)
    assert rllm.gtpo_advantages.writes_step_advantages  # type: ignore[attr-defined]


def test_rllm_pays_an_outcome_on_the_last_step() -> None:
    steps = [SimpleNamespace(reward=0.0, response_ids=[0], advantage=None) for _ in range(3)]
    group = SimpleNamespace(trajectories=[SimpleNamespace(steps=steps[:2]), SimpleNamespace(steps=steps[2:])])
    rllm.gtpo_advantages([np.array([1.0, 0.0])], SimpleNamespace(gtpo={"gamma": 0.5}), traj_groups=[group])
    expected = by_the_formula([[0.0, 1.0], [0.0]], "aa", gamma=0.5)
    assert [step.advantage[0] for step in steps] == pytest.approx([*expected[0], *expected[1]], rel=1e-5)
