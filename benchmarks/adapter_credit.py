"""GRPO's advantages through each adapter, and by the trainers' own code.

verl's function is called where verl is installed; the rows "restated from" are lines that stand in the middle of longer
methods there, or in trainers that do not install on a CPU, written down again from the source that each names.

GRPO is the one credit that all of them know: trajectories of 8 turns, one reward at the end.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.credit import EPS, GROUP_SIZE, verl_grpo_advantages
from benchmarks.measure import Contestant, Outputs, Row, compare, find, set_ratios
from gtpo.adapters import nemo_rl, openrlhf, rllm, skyrl, slime, verl
from gtpo.adapters.layouts import GRPO, list_turn_advantages, packed_turn_advantages, padded_turn_advantages
from gtpo.adapters.trl_turns import ScoredRow, group_advantages
from gtpo.adapters.turn_lists import advantages_by_token, padded_turn_ids, turn_lengths

NUM_TURNS = 8
OPTIONS = {**GRPO, "eps": EPS}
FLOOR = "floor: the result written once"
VERL_ITSELF = "verl's compute_grpo_outcome_advantage"
VERL = "restated from verl 0.9.1, SkyRL 0.3.0"
TRL = "restated from TRL 1.16.0"
OPENRLHF = "restated from OpenRLHF 0.11.2"
RLLM = "restated from rllm-org/rllm 18c8622"
OWN = {"verl": VERL, "SkyRL": VERL, "TRL": TRL, "OpenRLHF": OPENRLHF, "rLLM": RLLM}


@dataclass(frozen=True)
class Rollout:
    """Trajectories of NUM_TURNS turns, each of `sampled` tokens and as many of tool output after it."""

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
    def num_tokens(self) -> list[list[int]]:
        return [[self.sampled] * NUM_TURNS] * self.num_trajectories

    def spread(self, by_trajectory: Tensor) -> Outputs:
        return {"advantages": by_trajectory.float().unsqueeze(1) * self.mask}


def make_rollout(num_trajectories: int, sampled: int) -> Rollout:
    return Rollout(torch.rand(num_trajectories, generator=torch.Generator().manual_seed(0)), sampled)


def exact_outputs(rollout: Rollout) -> Outputs:
    groups = rollout.outcomes.double().view(-1, GROUP_SIZE)
    values = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPS)
    return {"advantages": values.flatten().unsqueeze(1) * rollout.mask.double()}


# The trainers' own code.  Each call starts from what the trainer holds, and ends with [B, T].


def _verl_itself(rollout: Rollout) -> Callable[[], Outputs]:
    estimator = importlib.import_module("verl.trainer.ppo.core_algos").compute_grpo_outcome_advantage
    return lambda: {
        "advantages": estimator(rollout.token_rewards, rollout.mask, rollout.uids, epsilon=EPS)[0],
    }


def _verl_own(rollout: Rollout) -> Callable[[], Outputs]:
    return lambda: {"advantages": verl_grpo_advantages(rollout.token_rewards, rollout.mask, rollout.uids)}


def _trl_own(rollout: Rollout) -> Callable[[], Outputs]:
    """TRL 1.16.0, `_generate_and_score_completions` with scale_rewards="group"; its loss spreads them over tokens."""

    def lines() -> Outputs:
        rewards = rollout.outcomes
        means = torch.nanmean(rewards.view(-1, GROUP_SIZE), dim=1).repeat_interleave(GROUP_SIZE, dim=0)
        stds = rewards.view(-1, GROUP_SIZE).std(dim=1).repeat_interleave(GROUP_SIZE, dim=0)
        return rollout.spread((rewards - means) / (stds + EPS))

    return lines


def _openrlhf_own(rollout: Rollout) -> Callable[[], Outputs]:
    """OpenRLHF 0.11.2, `compute_advantages_and_returns` with group_norm, then `get_cumulative_returns` over tokens."""

    def lines() -> Outputs:
        rewards = rollout.outcomes.reshape(-1, GROUP_SIZE)
        rewards = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + EPS)
        token_rewards = torch.zeros(rollout.mask.shape)
        token_rewards[:, -1 - rollout.sampled] = rewards.flatten()
        returns = torch.zeros_like(token_rewards)
        running = torch.zeros(len(returns))
        for t in reversed(range(returns.shape[1])):
            running = token_rewards[:, t] + running
            returns[:, t] = running
        return {"advantages": returns * rollout.mask}

    return lines


def _rllm_own(rollout: Rollout) -> Callable[[], Outputs]:
    """rllm-org/rllm, `calculate_grpo_advantages` (its deviation has ddof 0: scaled here to be comparable)."""
    scale = (GROUP_SIZE / (GROUP_SIZE - 1)) ** 0.5
    groups = list(rollout.outcomes.double().view(-1, GROUP_SIZE).numpy())

    def loop() -> Outputs:
        values = [(rewards - rewards.mean()) / (rewards.std() * scale + EPS) for rewards in groups]
        return rollout.spread(torch.from_numpy(np.concatenate(values)))

    return loop


# Ours: GRPO by options, through each adapter.


def _padded(rollout: Rollout) -> Callable[[], Outputs]:
    def call() -> Outputs:
        credit = padded_turn_advantages(rollout.turn_rewards, rollout.turn_ids, rollout.groups, **OPTIONS)
        return {"advantages": credit.advantages}

    return call


def _packed(rollout: Rollout) -> Callable[[], Outputs]:
    flat, width = rollout.turn_ids.flatten(), rollout.turn_ids.shape[1]
    cu_seqlens = torch.arange(rollout.num_trajectories + 1) * width

    def call() -> Outputs:
        credit = packed_turn_advantages(rollout.turn_rewards, flat, cu_seqlens, rollout.groups, **OPTIONS)
        return {"advantages": credit.advantages.view(-1, width)}

    return call


def _lists(rollout: Rollout) -> Callable[[], Outputs]:
    rewards, uids = rollout.turn_rewards.tolist(), rollout.uids.tolist()

    def call() -> Outputs:
        values = list_turn_advantages(rewards, uids, num_tokens=rollout.num_tokens, **OPTIONS)
        return rollout.spread(torch.tensor([row[0] for row in values]))

    return call


def _verl(rollout: Rollout) -> Callable[[], Outputs]:
    config = {"gtpo": OPTIONS}

    def call() -> Outputs:
        return {"advantages": verl.gtpo_advantages(rollout.token_rewards, rollout.mask, rollout.uids, config)[0]}

    return call


def _skyrl(rollout: Rollout) -> Callable[[], Outputs]:
    """SkyRL's options are its own; a reward at the end of one turn each is GRPO with GTPO's."""

    class Trainer:
        def compute_advantages_and_returns(self, data: dict[str, Any]) -> dict[str, Any]:
            data["advantages"] = skyrl.gtpo_advantages(
                data["rewards"], data["response_mask"], rollout.uids, credit=OPTIONS
            )[0]
            return data

    trainer = skyrl.trainer_class(Trainer)()
    data = {"rewards": rollout.token_rewards, "response_mask": rollout.mask, "loss_mask": rollout.mask}
    return lambda: {"advantages": trainer.compute_advantages_and_returns(dict(data))["advantages"]}


def _trl(rollout: Rollout) -> Callable[[], Outputs]:
    rewards = rollout.turn_rewards.tolist()
    sampled = rollout.mask.int().tolist()

    def call() -> Outputs:
        """All that `GTPOTrainer` does between TRL's lists and its advantages."""
        turn_ids = padded_turn_ids(sampled)
        rows = [ScoredRow(*row) for row in zip(rewards, turn_lengths(turn_ids), strict=True)]
        return {"advantages": advantages_by_token(group_advantages(rows, GROUP_SIZE, OPTIONS), turn_ids)}

    return call


def _openrlhf(rollout: Rollout) -> Callable[[], Outputs]:
    experience = SimpleNamespace(
        index=list(range(rollout.num_trajectories)), action_mask=rollout.mask, rewards=rollout.outcomes, info={}
    )

    def call() -> Outputs:
        openrlhf.set_turn_advantages([experience], GROUP_SIZE, **OPTIONS)
        return {"advantages": experience.advantages}

    return call


def _nemo_rl(rollout: Rollout) -> Callable[[], Outputs]:
    estimator = nemo_rl.GTPOAdvantageEstimator({"gtpo": OPTIONS})
    prompts = rollout.groups[:, None].expand(-1, 32).contiguous()
    return lambda: {"advantages": estimator.compute_advantage(prompts, rollout.outcomes, rollout.mask)}


def _slime(rollout: Rollout) -> Callable[[], Outputs]:
    masks = rollout.mask.int()
    lists = masks.tolist()
    samples = [
        SimpleNamespace(
            group_index=i // GROUP_SIZE,
            loss_mask=lists[i],
            response_length=len(lists[i]),
            metadata=None,
            get_reward_value=lambda args, reward=reward: reward,
        )
        for i, reward in enumerate(rollout.outcomes.tolist())
    ]

    def call() -> Outputs:
        _, rewards = slime.reward_post_process(SimpleNamespace(gtpo=OPTIONS), samples)
        data: dict[str, Any] = {"rewards": rewards, "loss_masks": list(masks)}
        slime.compute_advantages(None, data)
        return {"advantages": torch.stack(data["advantages"])}

    return call


def _rllm(rollout: Rollout) -> Callable[[], Outputs]:
    tokens = [0] * rollout.sampled
    rewards = list(rollout.outcomes.double().view(-1, GROUP_SIZE).numpy())

    def group() -> Any:
        steps = [
            [SimpleNamespace(reward=0.0, response_ids=tokens) for _ in range(NUM_TURNS)] for _ in range(GROUP_SIZE)
        ]
        return SimpleNamespace(trajectories=[SimpleNamespace(steps=row) for row in steps])

    groups = [group() for _ in rewards]

    def call() -> Outputs:
        values, _ = rllm.gtpo_advantages(rewards, SimpleNamespace(gtpo=OPTIONS), traj_groups=groups)
        return rollout.spread(torch.from_numpy(np.concatenate(values)))

    return call


def _floor(rollout: Rollout) -> Callable[[], Outputs]:
    def write() -> Outputs:
        rollout.spread(rollout.outcomes)
        return {}

    return write


CREDIT: list[Contestant[Rollout]] = [
    Contestant(FLOOR, "torch", _floor),
    Contestant(VERL_ITSELF, "verl", _verl_itself),
    Contestant(VERL, "verl, restated", _verl_own),
    Contestant(TRL, "trl, restated", _trl_own),
    Contestant(OPENRLHF, "openrlhf, restated", _openrlhf_own),
    Contestant(RLLM, "rllm, restated", _rllm_own),
    Contestant("padded", "cpp", _padded),
    Contestant("packed", "cpp", _packed),
    Contestant("lists", "cpp", _lists),
    Contestant("verl", "cpp", _verl),
    Contestant("SkyRL", "cpp", _skyrl),
    Contestant("TRL", "cpp", _trl),
    Contestant("OpenRLHF", "cpp", _openrlhf),
    Contestant("NeMo-RL", "cpp", _nemo_rl),
    Contestant("slime", "cpp", _slime),
    Contestant("rLLM", "cpp", _rllm),
]


def measure_credit(num_trajectories: int, sampled: int, rounds: int) -> list[Row]:
    rollout = make_rollout(num_trajectories, sampled)
    shape = {"B": num_trajectories, "J": NUM_TURNS, "T": rollout.turn_ids.shape[1]}
    rows = compare(
        CREDIT,
        rollout,
        exact_outputs(rollout),
        lambda name, backend: Row(name, backend, shape, "float32"),
        allowed=1e-5,
        rounds=rounds,
        device=torch.device("cpu"),
        warm_up_batch=make_rollout(2 * GROUP_SIZE, 2),
    )
    set_ratios(rows, find(rows, FLOOR).cpu_s)
    for ours, own in OWN.items():
        set_ratios([find(rows, ours)], find(rows, own).cpu_s, label="x the trainer's own")
    return rows
