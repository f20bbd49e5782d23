"""Batches of turns for the tests of turn credit."""

import random

import torch
from torch import Tensor

from tests.kernels.conftest import Case


def random_case(
    seed: int, *, max_turns: int = 5, dtype: torch.dtype = torch.float32, ids: torch.dtype = torch.int64
) -> Case:
    """Up to 8 trajectories in up to 3 groups; some have no turn, some turns no token, some tokens no turn."""
    generator = random.Random(seed)
    lengths = [generator.randint(0, max_turns) for _ in range(generator.randint(0, 8))]
    num_turns = sum(lengths)
    rewards = [generator.choice([0.0, 1.0, -0.1, generator.gauss(0.0, 1.0)]) for _ in range(num_turns)]
    turn_ids = [generator.randint(-1, num_turns - 1) for _ in range(generator.randint(0, 3 * num_turns))]
    return {
        "turn_rewards": torch.tensor(rewards, dtype=dtype),
        "cu_turns": torch.tensor([0, *lengths]).cumsum(0).to(ids),
        "group_ids": torch.tensor([generator.choice([-4, 0, 7]) for _ in lengths], dtype=ids),
        "turn_ids": torch.tensor(turn_ids, dtype=ids),
    }


def general_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """`random_case` with outcomes and anchor ids."""
    case = random_case(seed, dtype=dtype, ids=(torch.int32, torch.int64)[seed % 2])
    generator = random.Random(seed + 1000)
    num_turns, ids = len(case["turn_rewards"]), case["group_ids"].dtype
    outcomes = [generator.choice([0.0, 1.0, generator.random()]) for _ in case["group_ids"]]
    anchors = [generator.choice([-(10**9), 0, 5]) for _ in range(num_turns)]
    return {**case, "outcomes": torch.tensor(outcomes, dtype=dtype), "anchor_ids": torch.tensor(anchors, dtype=ids)}


def reversed_trajectories(case: Case) -> tuple[Case, Tensor]:
    """The same batch, last trajectory first, and the old index of every new turn."""
    lengths = case["cu_turns"].diff()
    turns = torch.arange(len(case["turn_rewards"])).split(lengths.tolist())
    order = torch.cat([torch.zeros(0, dtype=torch.long), *reversed(turns)])
    new_id = torch.cat([order.argsort(), torch.tensor([-1])])  # the index -1 finds -1
    return {
        "turn_rewards": case["turn_rewards"][order],
        "cu_turns": torch.cat([torch.zeros(1, dtype=torch.long), lengths.flip(0).cumsum(0)]),
        "group_ids": case["group_ids"].flip(0),
        "turn_ids": new_id[case["turn_ids"]],
    }, order
