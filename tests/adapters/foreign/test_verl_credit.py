"""Credits against the advantage estimators of the installed verl: 100 random ragged multi-turn batches each."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos

from gtpo.credit import credit_advantages
from gtpo.methods import METHODS

Estimator = Callable[..., tuple[Tensor, Tensor]]


def padded_batch(seed: int) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """One batch as verl's arguments and as ours, and the turn of every token of verl's rows."""
    generator = random.Random(seed)
    groups = [g for g in range(3) for _ in range(generator.randint(1, 5))]
    generator.shuffle(groups)
    rows: list[list[int]] = []
    rewards: list[float] = []
    for _ in groups:
        row: list[int] = []
        for turn in range(generator.randint(1, 4)):
            row += [-1] * generator.randint(1, 3) * (turn > 0) + [len(rewards)] * generator.randint(1, 4)
            rewards.append(generator.choice([0.0, 1.0, -0.1, generator.random()]))
        rows.append(row)
    width = max(len(row) for row in rows)
    turn_ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    turn_rewards = torch.tensor(rewards, dtype=torch.float64)
    # a turn's reward is at its last token
    token_rewards = torch.zeros(turn_ids.shape, dtype=torch.float64)
    for row, ids in enumerate(rows):
        for turn in {k for k in ids if k >= 0}:
            token_rewards[row, len(ids) - 1 - ids[::-1].index(turn)] = turn_rewards[turn]
    theirs = {
        "token_level_rewards": token_rewards,
        "response_mask": (turn_ids >= 0).double(),
        "index": np.array([f"uid{group}" for group in groups], dtype=object),
    }
    cu_turns = torch.tensor([0, *(len({k for k in row if k >= 0}) for row in rows)]).cumsum(0)
    flat = {"turn_rewards": turn_rewards, "cu_turns": cu_turns, "group_ids": torch.tensor(groups)}
    return theirs, flat, turn_ids


@pytest.mark.parametrize(
    ("name", "estimator", "options", "singleton"),
    [
        *[
            (name, core_algos.compute_grpo_outcome_advantage, {}, "keep")
            for name in ("grpo", "deepseek_grpo", "dapo", "gspo", "cispo", "simpletir")
        ],
        ("grpo", core_algos.compute_grpo_vectorized_outcome_advantage, {}, "keep"),
        ("dr_grpo", core_algos.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}, "keep"),
        ("rloo", core_algos.compute_rloo_outcome_advantage, {}, "keep"),
        ("rloo", core_algos.compute_rloo_vectorized_outcome_advantage, {}, "zero"),
        ("reinforce_pp", core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage, {}, "keep"),
    ],
)
def test_verl(name: str, estimator: Estimator, options: dict[str, Any], singleton: Any) -> None:
    # verl gives a group of one its score, or its vectorised RLOO zero; both are a rule of ours
    of_preset = METHODS[name].credit
    terms = tuple(dataclasses.replace(term, singleton=singleton) for term in of_preset.terms)
    credit_sum = dataclasses.replace(of_preset, terms=terms)
    for seed in range(100):
        theirs, flat, turn_ids = padded_batch(seed)
        expected, _ = estimator(**theirs, **options)
        credit = credit_advantages(credit_sum, **flat, turn_ids=turn_ids.flatten())
        torch.testing.assert_close(credit.advantages.view(turn_ids.shape), expected, atol=1e-6, rtol=1e-6)
