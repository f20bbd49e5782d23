"""The AReaL adapter, called as AReaL calls it; `foreign/test_areal.py` has AReaL itself."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gtpo.adapters import areal
from tests.adapters.attempts import ATTEMPTS, EXPECTED


def test_areal_workflow_credits_its_group() -> None:
    rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == "b"]
    todo = iter([*rows, None])

    class Episodes:
        async def arun_episode(self, engine: object, data: dict[str, Any]) -> dict[str, Any] | None:
            i = next(todo)
            if i is None:  # rejected
                return None
            return {
                f"{i}-{j}": SimpleNamespace(reward=reward, model_response=SimpleNamespace(output_tokens=[0] * tokens))
                for j, (reward, tokens) in enumerate(zip(ATTEMPTS.rewards[i], ATTEMPTS.num_tokens[i], strict=True))
            }

    found = asyncio.run(areal.GroupTurnCreditWorkflow(Episodes(), 4, gamma=0.9).arun_episode(None, {}))
    assert found is not None
    for i in rows:
        assert [found[f"{i}-{j}"].reward for j in range(len(EXPECTED[i]))] == pytest.approx(EXPECTED[i], rel=1e-5)
    with pytest.raises(ValueError, match="'x' is in two trajectories"):
        areal.set_turn_advantages([{"x": None}, {"x": None}])
    with pytest.raises(ValueError, match="'input_ids' is a Tensor"):
        areal.set_turn_advantages([{"input_ids": torch.zeros(1)}])
