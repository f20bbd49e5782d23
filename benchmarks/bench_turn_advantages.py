"""`turn_advantages`: rewards and turn ids to one advantage a token, on the CPU.

Beside the backends: the plain Python loop that trainers run today, and the floor, one indexed read for every token.
"""

from collections.abc import Callable
from statistics import mean, stdev
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gtpo_kernels import turn_advantages

GAMMA, EPS = 0.9, 1e-6


class Batch(NamedTuple):
    """The first four arguments of `turn_advantages`."""

    turn_rewards: Tensor
    cu_turns: Tensor
    group_ids: Tensor
    turn_ids: Tensor


def make_batch(num_groups: int, group_size: int, tokens_a_turn: int) -> Batch:
    """Groups of trajectories of 2 to 8 turns; before every turn's tokens come as many of a tool."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (num_groups * group_size,), generator=generator)
    num_turns = int(lengths.sum())
    turns = torch.arange(num_turns)[:, None].expand(-1, tokens_a_turn)
    return Batch(
        torch.rand(num_turns, generator=generator),
        torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        torch.arange(num_groups).repeat_interleave(group_size),
        torch.cat([torch.full_like(turns, -1), turns], dim=1).flatten(),
    )


def python_loop(batch: Batch) -> Tensor:
    """Returns backwards over each trajectory, statistics of each group's turns, then every token its turn's value."""
    returns = batch.turn_rewards.tolist()
    bounds = batch.cu_turns.tolist()
    group_of_turn: list[int] = []
    for trajectory, group in enumerate(batch.group_ids.tolist()):
        first, end = bounds[trajectory], bounds[trajectory + 1]
        group_of_turn += [group] * (end - first)
        for k in range(end - 2, first - 1, -1):
            returns[k] += GAMMA * returns[k + 1]
    pools: dict[int, list[float]] = {}
    for group, value in zip(group_of_turn, returns, strict=True):
        pools.setdefault(group, []).append(value)
    statistics = {group: (mean(pool), stdev(pool)) for group, pool in pools.items()}
    advantages = [
        (value - statistics[group][0]) / (statistics[group][1] + EPS)
        for group, value in zip(group_of_turn, returns, strict=True)
    ]
    return torch.tensor([advantages[k] if k >= 0 else 0.0 for k in batch.turn_ids.tolist()])


@pytest.fixture(scope="module")
def batch(smoke: bool) -> Batch:
    """Made, and every way checked on it, before anything is timed."""
    made = make_batch(*((2, 3, 4) if smoke else (64, 16, 200)))
    expected = python_loop(made)
    for backend in ("torch", "cpp"):
        torch.testing.assert_close(turn_advantages(*made, gamma=GAMMA, eps=EPS, backend=backend).advantages, expected)
    return made


def facts(batch: Batch) -> dict[str, int]:
    return {
        "num_trajectories": len(batch.group_ids),
        "num_turns": len(batch.turn_rewards),
        "num_tokens": len(batch.turn_ids),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def bench_ours(batch: Batch, measure: Callable[..., None], backend: str) -> None:
    measure(lambda: turn_advantages(*batch, gamma=GAMMA, eps=EPS, backend=backend), **facts(batch))


def bench_python_loop(batch: Batch, measure: Callable[..., None]) -> None:
    measure(lambda: python_loop(batch), **facts(batch))


def bench_floor_one_read_a_token(batch: Batch, measure: Callable[..., None]) -> None:
    by_turn = torch.cat([batch.turn_rewards, torch.zeros(1)])
    index = batch.turn_ids.where(batch.turn_ids >= 0, len(batch.turn_rewards))
    measure(lambda: by_turn.index_select(0, index), **facts(batch))
