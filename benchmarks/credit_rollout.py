"""A rollout in the forms that trainers hold it in, and its advantages by the one credit that all of them know: GRPO."""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.credit import EPS, GROUP_SIZE
from benchmarks.measure import Outputs

NUM_TURNS = 8


@dataclass(frozen=True)
class Rollout:
    """Trajectories of NUM_TURNS turns, each of `sampled` tokens and as many of tool output after it, rewarded at the
    end.  Groups of GROUP_SIZE stand one after another."""

    outcomes: Tensor
    sampled: int

    @property
    def num_trajectories(self) -> int:
        return len(self.outcomes)

    @cached_property
    def turn_ids(self) -> Tensor:
        turns = torch.arange(NUM_TURNS).repeat_interleave(self.sampled).view(NUM_TURNS, -1)
        row = torch.cat([turns, torch.full_like(turns, -1)], dim=1).flatten()
        return row.expand(self.num_trajectories, -1).contiguous()

    @cached_property
    def mask(self) -> Tensor:
        return (self.turn_ids >= 0).float()

    @cached_property
    def turn_rewards(self) -> Tensor:
        rewards = torch.zeros(self.num_trajectories, NUM_TURNS)
        rewards[:, -1] = self.outcomes
        return rewards

    @cached_property
    def token_rewards(self) -> Tensor:
        rewards = torch.zeros(self.turn_ids.shape)
        rewards[:, -1 - self.sampled] = self.outcomes
        return rewards

    @cached_property
    def groups(self) -> Tensor:
        return torch.arange(self.num_trajectories) // GROUP_SIZE

    @cached_property
    def uids(self) -> np.ndarray:
        return np.array([f"task {group}" for group in self.groups.tolist()], dtype=object)

    @cached_property
    def prompts(self) -> Tensor:
        """[B, 32] tokens, equal in a group."""
        return self.groups[:, None].expand(-1, 32).contiguous()

    @cached_property
    def num_tokens(self) -> list[list[int]]:
        return [[self.sampled] * NUM_TURNS] * self.num_trajectories

    def turns(self, **fields: Any) -> list[list[SimpleNamespace]]:
        """For each trajectory an object a turn, of `reward` and the fields."""
        return [[SimpleNamespace(reward=r, **fields) for r in row] for row in self.turn_rewards.tolist()]

    def spread(self, by_trajectory: Tensor) -> Tensor:
        """[B, T] of [B]."""
        return by_trajectory.float().unsqueeze(1) * self.mask


def make_rollout(num_trajectories: int, sampled: int) -> Rollout:
    return Rollout(torch.rand(num_trajectories, generator=torch.Generator().manual_seed(0)), sampled)


def in_groups(rows: list[Any]) -> list[list[Any]]:
    return [rows[first : first + GROUP_SIZE] for first in range(0, len(rows), GROUP_SIZE)]


def exact_outputs(rollout: Rollout) -> Outputs:
    """advantages: GRPO's.  centred: without the deviation, for trainers that do not divide by it."""
    groups = rollout.outcomes.double().view(-1, GROUP_SIZE)
    centred = groups - groups.mean(1, keepdim=True)
    values = {"advantages": centred / (groups.std(1, keepdim=True) + EPS), "centred": centred}
    return {name: value.flatten().unsqueeze(1) * rollout.mask.double() for name, value in values.items()}
