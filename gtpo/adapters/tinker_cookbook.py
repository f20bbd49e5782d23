"""tinker-cookbook: turn-level advantages in the training data of `tinker_cookbook.rl.data_processing`.

`compute_advantages` and `assemble_training_data` stand for the functions of those names, one list of advantages (one a
transition) in the place of one number for each trajectory.  Written against tinker-cookbook 0.6.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gtpo.adapters.layouts import list_turn_advantages


def compute_advantages(trajectory_groups_P: Sequence[Any], **options: Any) -> list[list[Tensor]]:
    """For each group, for each trajectory: [number of transitions] advantages of its turns.

    trajectory_groups_P: `TrajectoryGroup`s.  A transition's own reward is that of its turn; the trajectory's reward in
        `final_rewards_G` is paid on its last turn.
    options: those of `gtpo.adapters.layouts`.
    Source: arXiv 2511.14846; the name and first argument are those of `compute_advantages` in
        tinker_cookbook/rl/data_processing.py, which returns one [group_size] tensor for each group.
    """
    rewards, num_tokens, labels = [], [], []
    for number, group in enumerate(trajectory_groups_P):
        for trajectory, final in zip(group.trajectories_G, group.final_rewards_G, strict=True):
            turns = [float(transition.reward) for transition in trajectory.transitions]
            if turns:
                turns[-1] += float(final)
            rewards.append(turns)
            num_tokens.append([len(transition.ac.tokens) for transition in trajectory.transitions])
            labels.append(number)
    values = iter(list_turn_advantages(rewards, labels, num_tokens=num_tokens, **options))
    return [[torch.tensor(next(values)) for _ in group.trajectories_G] for group in trajectory_groups_P]


def trajectory_to_data(
    traj: Any, turn_advantages: Sequence[float] | Tensor, include_provenance: bool = True
) -> list[Any]:
    """tinker-cookbook's `trajectory_to_data`, with one advantage for each transition instead of one for all.

    Returns its `Datum`s, in which "advantages" holds the turn's advantage at each of its trained tokens, 0 elsewhere
    (turns that tinker-cookbook masks for a parse error among them).
    Raises ValueError for another number of advantages than of transitions.
    """
    from tinker_cookbook.rl import data_processing
    from tinker_cookbook.rl.types import PARSE_ERROR_MASKED_METRIC_KEY

    counts = [
        0 if transition.metrics.get(PARSE_ERROR_MASKED_METRIC_KEY, 0.0) >= 1.0 else len(transition.ac.tokens)
        for transition in traj.transitions
    ]
    if len(turn_advantages) != len(counts):
        raise ValueError(
            f"turn_advantages must have one number for each of {len(counts)} transitions, got {len(turn_advantages)}"
        )
    by_token = torch.as_tensor(turn_advantages, dtype=torch.float32).repeat_interleave(torch.tensor(counts))
    data = data_processing.trajectory_to_data(traj, 1.0, include_provenance=include_provenance)
    place = 0
    for datum in data:
        inputs = datum.loss_fn_inputs
        mask = inputs["mask"].to_torch() > 0
        sampled = int(mask.sum())
        advantages = torch.zeros(mask.shape)
        advantages[mask] = by_token[place : place + sampled]
        place += sampled
        inputs["advantages"] = type(inputs["advantages"]).from_torch(advantages)
    if place != len(by_token):
        raise ValueError(
            f"the data train {place} sampled tokens where the transitions have {len(by_token)}: an action without "
            "an observation before it has no token to be predicted from"
        )
    return data


def assemble_training_data(
    trajectory_groups_P: Sequence[Any],
    advantages_P: Sequence[Sequence[Sequence[float] | Tensor]],
    include_provenance: bool = True,
) -> tuple[list[Any], list[dict[str, int]]]:
    """tinker-cookbook's `assemble_training_data` for the advantages of `compute_advantages` above."""
    data, metadata = [], []
    for group_idx, (group, advantages) in enumerate(zip(trajectory_groups_P, advantages_P, strict=True)):
        for traj_idx, (trajectory, by_turn) in enumerate(zip(group.trajectories_G, advantages, strict=True)):
            new = trajectory_to_data(trajectory, by_turn, include_provenance)
            data += new
            metadata += [{"group_idx": group_idx, "traj_idx": traj_idx} for _ in new]
    return data, metadata
