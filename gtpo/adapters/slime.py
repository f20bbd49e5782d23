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
    rewards, num_tokens = [], []
    for place, (sample, raw) in enumerate(zip(samples, raw_rewards, strict=True)):
        if sample.group_index is None:
            raise ValueError(f"samples must have a group_index, sample {place} has none")
        tokens = _turn_lengths(sample.loss_mask, sample.response_length)
        turns = [float(reward) for reward in (sample.metadata or {}).get("turn_rewards", [0.0] * len(tokens))]
        if len(turns) != len(tokens):
            raise ValueError(
                f"metadata['turn_rewards'] must have one reward for each turn: sample {place} has {len(tokens)} turns "
                f"in its loss mask, got {len(turns)} rewards"
            )
        if turns:
            turns[-1] += raw
        rewards.append(turns)
        num_tokens.append(tokens)
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
    advantages = []
    for place, (turns, loss_mask) in enumerate(zip(rollout_data["rewards"], rollout_data["loss_masks"], strict=True)):
        if not isinstance(turns, Tensor) or turns.dim() != 1:
            raise ValueError(
                f"rewards must be those of gtpo.adapters.slime.reward_post_process, response {place} has {turns!r}: "
                "pass it as --custom-reward-post-process-path"
            )
        mask = torch.as_tensor(loss_mask)
        for name in ("log_probs", "rollout_log_probs"):
            present = rollout_data.get(name)
            if present and len(present[place]) != len(mask):
                raise ValueError(
                    f"{name} must have one entry for each response token, response {place} has "
                    f"{len(present[place])} of {len(mask)}: context parallelism is not supported"
                )
        turn_ids = turn_ids_of_runs(mask[None])[0]
        if turn_ids.numel() and int(turn_ids.max()) >= len(turns):
            raise ValueError(f"response {place} has {int(turn_ids.max()) + 1} turns, but rewards of {len(turns)}")
        by_turn = torch.nn.functional.pad(turns.to(mask.device, torch.float32), (0, 1))
        advantages.append(by_turn[turn_ids.long()])
    rollout_data["advantages"] = advantages
    rollout_data["returns"] = list(advantages)
    rollout_data["rewards"] = [float(turns.mean()) if len(turns) else 0.0 for turns in rollout_data["rewards"]]


def _turn_lengths(loss_mask: Sequence[int] | None, response_length: int) -> list[int]:
    """Sampled tokens of each run of 1s.  slime takes a response without a mask for one turn.

    >>> _turn_lengths([1, 1, 0, 1], 4), _turn_lengths(None, 3)
    ([2, 1], [3])
    """
    lengths: list[int] = []
    before = 0
    for now in [1] * response_length if loss_mask is None else loss_mask:
        if now and before:
            lengths[-1] += 1
        elif now:
            lengths.append(1)
        before = now
    return lengths
