"""Attempts at two tasks with their advantages by the formula, as plain lists and as the tensors that trainers hold."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor


class Attempts(NamedTuple):
    """Trajectories as plain lists: rewards and sampled tokens of each turn, tool tokens after it, and the group."""

    rewards: list[list[float]]
    num_tokens: list[list[int]]
    num_tool_tokens: list[list[int]]
    groups: list[str]


ATTEMPTS = Attempts(
    rewards=[[0.0, -0.1, 1.0], [0.0], [0.5, 0.0], [-0.1, 0.0, 0.0, 1.0], [0.0, 1.0], [0.25, 0.0]],
    num_tokens=[[2, 1, 3], [4], [1, 2], [1, 1, 2, 1], [3, 2], [2, 2]],
    num_tool_tokens=[[1, 2, 0], [0], [3, 0], [1, 1, 1, 0], [2, 0], [1, 0]],
    groups=["a", "a", "b", "a", "b", "b"],
)


def by_the_formula(
    rewards: Sequence[Sequence[float]], groups: Sequence[object], *, gamma: float = 0.9, eps: float = 1e-6
) -> list[list[float]]:
    """GTPO's advantages: A = (R - mean) / (std + eps) over all turns of a group, every turn with tokens, ddof 1."""
    returns = []
    for row in rewards:
        values = list(row)
        for j in range(len(values) - 2, -1, -1):
            values[j] += gamma * values[j + 1]
        returns.append(values)
    pools = {g: [r for row, h in zip(returns, groups, strict=True) if h == g for r in row] for g in groups}
    return [
        [(r - mean(pools[g])) / (stdev(pools[g]) + eps) if max(pools[g]) > min(pools[g]) else 0.0 for r in row]
        for row, g in zip(returns, groups, strict=True)
    ]


def turn_ids_of(attempts: Attempts) -> list[list[int]]:
    """Of each trajectory's tokens after the prompt."""
    return [
        [
            turn
            for number, (sampled, inserted) in enumerate(zip(*lengths, strict=True))
            for turn in [number] * sampled + [-1] * inserted
        ]
        for lengths in zip(attempts.num_tokens, attempts.num_tool_tokens, strict=True)
    ]


EXPECTED = by_the_formula(ATTEMPTS.rewards, ATTEMPTS.groups)
TURN_IDS = turn_ids_of(ATTEMPTS)
BY_TOKEN = [
    [0.0 if turn < 0 else values[turn] for turn in turns] for values, turns in zip(EXPECTED, TURN_IDS, strict=True)
]


def padded(rows: Iterable[Iterable[float]], width: int = 12) -> Tensor:
    return torch.tensor([[*row, *[0.0] * width][:width] for row in rows])


MASK = padded([[float(turn >= 0) for turn in turns] for turns in TURN_IDS])


def token_rewards() -> Tensor:
    rewards = torch.zeros(MASK.shape)
    for row, (values, turns) in enumerate(zip(ATTEMPTS.rewards, TURN_IDS, strict=True)):
        for turn, reward in enumerate(values):
            rewards[row, max(t for t, of in enumerate(turns) if of == turn)] = reward
    return rewards


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def outcomes_apart() -> tuple[list[list[float]], list[float]]:
    """The same rewards as turn rewards and one number for each trajectory, which is paid on its last turn."""
    return [[*row[:-1], row[-1] - 1.0] for row in ATTEMPTS.rewards], [1.0] * len(ATTEMPTS.rewards)
