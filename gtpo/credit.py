"""Credit: from turn rewards to one advantage for every sampled token, once for a whole rollout.

The arithmetic is `gtpo_kernels.turn_advantages`; this module lays trajectories out as its arguments and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gtpo.batch import PackedSequence
from gtpo.config import Method
from gtpo.rewards import TurnRewards, is_void_turn
from gtpo.types import StopReason, Trajectory
from gtpo_kernels import turn_advantages


@dataclass(frozen=True)
class Credit:
    """For one trajectory: discounted `returns` and normalised `advantages`, one a turn."""

    returns: list[float]
    advantages: list[float]


def assign_credit(
    groups: Sequence[Sequence[Trajectory]], rewards: Sequence[Sequence[TurnRewards]], method: Method
) -> list[list[Credit]]:
    """Returns and advantages of all groups of a rollout, lost trajectories left out: a group has its true size."""
    trajectories = [trajectory for group in groups for trajectory in group]
    flat_rewards = [reward for group in rewards for trajectory in group for reward in trajectory.rewards]
    num_turns = [len(trajectory.turns) for trajectory in trajectories]
    turn_ids = [
        turn
        for turn, sampled in enumerate(turn for trajectory in trajectories for turn in trajectory.turns)
        for _ in sampled.completion_ids
    ]
    result = turn_advantages(
        torch.tensor(flat_rewards, dtype=torch.float32),
        torch.tensor([0, *num_turns]).cumsum(0).to(torch.int32),
        torch.tensor([number for number, group in enumerate(groups) for _ in group]),
        torch.tensor(turn_ids, dtype=torch.long),
        gamma=method.gamma,
        scope=method.scope,
        population=method.population,
        ddof=method.ddof,
        eps=method.eps,
    )
    per_trajectory = iter(
        Credit(returns.tolist(), advantages.tolist())
        for returns, advantages in zip(
            result.returns.split(num_turns), result.turn_advantages.split(num_turns), strict=True
        )
    )
    return [[next(per_trajectory) for _ in group] for group in groups]


def to_sequence(
    trajectory: Trajectory, credit: Credit, *, mask_truncated: bool, mask_void_turns: bool
) -> PackedSequence:
    """The trajectory as training sees it. Masked out of the loss: prompt and tool tokens, and on demand all of a
    truncated trajectory or of one with a void turn; these keep their place in the group's statistics."""
    is_masked = (mask_truncated and trajectory.stop is StopReason.TRUNCATED) or (
        mask_void_turns and any(is_void_turn(trajectory, turn) for turn in range(len(trajectory.turns)))
    )
    turns = trajectory.turn_index_of_tokens()
    logprobs = [0.0] * len(trajectory.prompt_ids)
    for turn in trajectory.turns:
        logprobs += turn.rollout_logprobs
        logprobs += [0.0] * len(turn.tool_ids)
    return PackedSequence(
        token_ids=trajectory.token_ids(),
        advantages=[0.0 if turn < 0 else credit.advantages[turn] for turn in turns],
        loss_mask=[turn >= 0 and not is_masked for turn in turns],
        rollout_logprobs=logprobs,
    )
