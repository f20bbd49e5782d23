"""The tinker-cookbook adapter, called as tinker-cookbook calls it; `foreign/` has tinker-cookbook itself."""

from types import SimpleNamespace

import pytest

from gtpo.adapters import tinker_cookbook
from tests.adapters.attempts import ATTEMPTS, EXPECTED, outcomes_apart


def test_tinker_cookbook_advantages_of_transitions() -> None:
    groups = []
    for label in ("a", "b"):
        rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == label]
        trajectories = [
            SimpleNamespace(
                transitions=[
                    SimpleNamespace(reward=reward, ac=SimpleNamespace(tokens=[0] * tokens))
                    for reward, tokens in zip(outcomes_apart()[0][i], ATTEMPTS.num_tokens[i], strict=True)
                ]
            )
            for i in rows
        ]
        groups.append(SimpleNamespace(trajectories_G=trajectories, final_rewards_G=[1.0] * len(rows)))
    found = [row.tolist() for group in tinker_cookbook.compute_advantages(groups, gamma=0.9) for row in group]
    order = sorted(range(6), key=lambda i: ATTEMPTS.groups[i])
    for i, row in zip(order, found, strict=True):
        assert row == pytest.approx(EXPECTED[i], rel=1e-5)
