"""OpenRLHF: an experience maker with turn-level credit, and a command that runs OpenRLHF's training with it.

    python -m gtpo.adapters.openrlhf --gtpo '{"gamma": 0.9}' <the arguments of openrlhf.cli.train_ppo_ray>

OpenRLHF has no registry of estimators, sums the rewards of turns, and makes its experience maker inside a Ray actor.
The command puts `experience_maker_class` in its place in every Ray worker.  An agent reports the rewards of all its
turns with its last step, as `"extra_logs": turn_reward_logs(rewards, max_turns)`.  Written against OpenRLHF 0.11.2.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import torch

from gtpo.adapters.layouts import padded_turn_advantages, turn_ids_of_runs
from gtpo.adapters.options import credit_settings

PREFIX = "turn_reward_"
OPTIONS = "GTPO_OPENRLHF"


def turn_reward_logs(turn_rewards: Sequence[float], max_turns: int) -> dict[str, float]:
    """The rewards of a trajectory's turns as OpenRLHF carries them: one number for each key, the same keys everywhere.

    Raises ValueError for more turns than `max_turns`.

    >>> turn_reward_logs([0.5, 1.0], max_turns=3)
    {'turn_reward_0': 0.5, 'turn_reward_1': 1.0, 'turn_reward_2': 0.0}
    """
    if len(turn_rewards) > max_turns:
        raise ValueError(f"turn_rewards must have at most max_turns={max_turns} rewards, got {len(turn_rewards)}")
    padded = [*map(float, turn_rewards), *[0.0] * (max_turns - len(turn_rewards))]
    return {f"{PREFIX}{turn}": reward for turn, reward in enumerate(padded)}


def set_turn_advantages(experiences: Sequence[Any], group_size: int, **options: Any) -> None:
    """Set `advantages` and `returns` of each experience, [B, A] float32, from the rewards of turns in its `info`.

    experiences: OpenRLHF's `Experience`s, all those of a rollout; `index` is the place of each row in the order of
        prompts, `group_size` rows a prompt.  A turn is a run of 1s in `action_mask`.  Where `info` has no rewards of
        turns, `rewards` is paid on the last turn.
    options: those of `gtpo.adapters.layouts`.
    Raises ValueError where fewer rewards of turns are there than turns, where one is past the last turn, and where a
        group has another size.
    Source: arXiv 2511.14846; `Experience` in openrlhf/trainer/ppo_utils/experience.py.
    """
    if not experiences:
        raise ValueError("experiences must hold at least one Experience, got none")
    widest = max(experience.action_mask.shape[1] for experience in experiences)
    masks, rewards, groups = [], [], []
    for experience in experiences:
        mask = experience.action_mask.bool()
        masks.append(torch.nn.functional.pad(mask, (0, widest - mask.shape[1])))
        groups += [place // group_size for place in experience.index]
        counts = (turn_ids_of_runs(mask).max(dim=1).values + 1).tolist()
        names = sorted(
            (name for name in experience.info if name.startswith(PREFIX)), key=lambda n: int(n[len(PREFIX) :])
        )
        columns = [experience.info[name].tolist() for name in names]
        for row, count in enumerate(counts):
            if not names:
                rewards.append([0.0] * (count - 1) + [float(experience.rewards[row])] * (count > 0))
            elif count > len(names):
                raise ValueError(f"info must hold a reward of each turn: a row has {count} turns, got {len(names)}")
            elif any(column[row] for column in columns[count:]):
                raise ValueError(
                    f"info must hold rewards of as many turns as action_mask shows: a row has {count}, but a reward at "
                    f"turn {max(turn for turn, column in enumerate(columns) if column[row])}: two turns that touch are "
                    "one run of the mask, so let the feedback have a token at least"
                )
            else:
                rewards.append([column[row] for column in columns[:count]])
    credit = padded_turn_advantages(
        rewards, turn_ids_of_runs(torch.cat(masks)), groups, group_size=group_size, **options
    )
    lengths = [len(experience.action_mask) for experience in experiences]
    for experience, advantages, returns in zip(
        experiences, credit.advantages.split(lengths), credit.returns.split(lengths), strict=True
    ):
        width = experience.action_mask.shape[1]
        experience.advantages, experience.returns = advantages[:, :width].clone(), returns[:, :width].clone()


def experience_maker_class(base: Any, **options: Any) -> Any:
    """A subclass of `base`, OpenRLHF's `RemoteExperienceMaker`, whose advantages are those of turns.

    Everything else that `compute_advantages_and_returns` does stays: penalties, metrics.  Length penalties change
    `rewards` and therefore reach the credit only where `info` has no rewards of turns.
    Raises ValueError where a KL penalty is part of the reward: use OpenRLHF's KL loss.
    """
    credit_settings(options, given=())

    class TurnCreditExperienceMaker(base):
        @torch.no_grad()
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            if self.kl_ctl.value and any(e.kl is not None and bool(e.kl.any()) for e in experiences):
                raise ValueError("a KL penalty in the reward is not supported: use the KL loss, or a coefficient of 0")
            experiences = super().compute_advantages_and_returns(experiences)
            set_turn_advantages(experiences, self.strategy.args.rollout.n_samples_per_prompt, **options)
            return experiences

    return TurnCreditExperienceMaker


def install() -> None:
    """Put the experience maker in its place, in this process.  Doing it again changes nothing."""
    from openrlhf.trainer import ppo_trainer

    current = ppo_trainer.RemoteExperienceMaker
    if current.__name__ != "TurnCreditExperienceMaker":
        options = json.loads(os.environ.get(OPTIONS, "{}"))
        ppo_trainer.RemoteExperienceMaker = experience_maker_class(current, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start Ray so that every worker calls `install`, then run OpenRLHF's command with the rest of the arguments."""
    import ray

    parser = argparse.ArgumentParser(prog="python -m gtpo.adapters.openrlhf", description=main.__doc__)
    parser.add_argument("--gtpo", type=json.loads, default={}, help="JSON of options of gtpo.adapters.layouts")
    parsed, rest = parser.parse_known_args(arguments)
    credit_settings(parsed.gtpo, given=())
    variables = {OPTIONS: json.dumps(parsed.gtpo)}
    for name, default in (
        ("TOKENIZERS_PARALLELISM", "true"),
        ("NCCL_DEBUG", "WARN"),
        ("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1"),
    ):  # what OpenRLHF sets where it starts Ray itself
        variables[name] = os.environ.get(name, default)
    ray.init(runtime_env={"env_vars": variables, "worker_process_setup_hook": "gtpo.adapters.openrlhf.install"})
    sys.argv = ["openrlhf.cli.train_ppo_ray", *rest]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


if __name__ == "__main__":
    main()
