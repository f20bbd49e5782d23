"""slime: two functions for its command line, since only the first sees whole groups and only the second sees tokens.

    --custom-reward-post-process-path gtpo.adapters.slime.reward_post_process
    --custom-advantage-function-path  gtpo.adapters.slime.compute_advantages

Turn rewards are what a custom generate function puts into `sample.metadata["turn_rewards"]`, one float for each turn.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gtpo.adapters.layouts import list_turn_advantages, turn_ids_of_runs
from gtpo.adapters.turn_lists import advantages_by_token, padded_turn_ids, turn_lengths


def reward_post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[Tensor]]:
    """slime's `--custom-reward-post-process-path`: (raw rewards, the advantages of each sample's turns).

    samples: slime's `Sample`s of a whole rollout.  A turn is a run of 1s in `loss_mask`; `group_index` is the group;
        the sample's own reward is paid on its last turn, `metadata["turn_rewards"]` on each.
    args: slime's; a dictionary `args.gtpo` holds options of `gtpo.adapters.layouts`, if it is there.
    Returns tensors of one dimension, which slime carries through to `compute_advantages` with the rewards.
    Raises ValueError for samples without a group, or with another number of turn rewards than of turns.
    Source: arXiv 2511.14846; the signature is that of docs/en/get_started/customization.md in THUDM/slime.
    """
    raw_rewards = [float(sample.get_reward_value(args)) for sample in samples]
    masks = [[1] * s.response_length if s.loss_mask is None else s.loss_mask for s in samples]  # slime takes None so
    rewards, num_tokens = [], turn_lengths(padded_turn_ids(masks))
    for place, (sample, raw, tokens) in enumerate(zip(samples, raw_rewards, num_tokens, strict=True)):
        if sample.group_index is None:
            raise ValueError(f"samples must have a group_index, sample {place} has none")
        turns = [float(reward) for reward in (sample.metadata or {}).get("turn_rewards", [0.0] * len(tokens))]
        if len(turns) != len(tokens):
            raise ValueError(
                f"metadata['turn_rewards'] must have one reward for each turn: sample {place} has {len(tokens)} turns "
                f"in its loss mask, got {len(turns)} rewards"
            )
        if turns:
            turns[-1] += raw
        rewards.append(turns)
    advantages = list_turn_advantages(
        rewards, [sample.group_index for sample in samples], num_tokens=num_tokens, **getattr(args, "gtpo", {})
    )
    return raw_rewards, [torch.tensor(row, dtype=torch.float32) for row in advantages]


def compute_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's `--custom-advantage-function-path`: sets "advantages" and "returns", one tensor for each response.

    rollout_data: of one data-parallel rank; "rewards" as `reward_post_process` made them, "loss_masks" [response] each.
    Both results are the turn's advantage on each of its tokens, 0 elsewhere.  "rewards" become plain numbers again.
    Raises ValueError under context parallelism, which cuts responses up, and for rewards of another function.
    """
    masks = [torch.as_tensor(mask) for mask in rollout_data["loss_masks"]]
    lengths, rewards = [mask.shape[0] for mask in masks], rollout_data["rewards"]
    wrong = next((row for row, turns in enumerate(rewards) if getattr(turns, "ndim", None) != 1), None)
    if wrong is not None:
        raise ValueError(
            f"rewards must be those of gtpo.adapters.slime.reward_post_process, response {wrong} has "
            f"{rewards[wrong]!r}: pass it as --custom-reward-post-process-path"
        )
    for name in ("log_probs", "rollout_log_probs"):
        present = [len(row) for row in rollout_data.get(name) or ()] or lengths
        place = next((row for row, (n, length) in enumerate(zip(present, lengths, strict=True)) if n != length), None)
        if place is not None:
            raise ValueError(
                f"{name} must have one entry for each response token, response {place} has {present[place]} of "
                f"{lengths[place]}: context parallelism is not supported"
            )
    by_turn = [turns.tolist() for turns in rewards]
    turn_ids = turn_ids_of_runs(torch.nn.utils.rnn.pad_sequence(masks, batch_first=True))
    counted = (torch.nn.functional.pad(turn_ids, (0, 1), value=-1).amax(dim=1) + 1).tolist()
    for place, (turns, count) in enumerate(zip(by_turn, counted, strict=True)):
        if count > len(turns):
            raise ValueError(f"response {place} has {count} turns, but rewards of {len(turns)}")
    by_token = advantages_by_token(by_turn, turn_ids.cpu()).to(turn_ids.device)
    advantages = [row[:length] for row, length in zip(by_token.unbind(), lengths, strict=True)]
    rollout_data["advantages"] = advantages
    rollout_data["returns"] = list(advantages)
    rollout_data["rewards"] = [sum(turns) / max(len(turns), 1) for turns in by_turn]
