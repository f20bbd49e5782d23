"""GRPO's advantages through each adapter, and by the trainers' own code.

GRPO is the one credit that all of them know: trajectories of 8 turns, one reward at the end.  Some trainers take the
mean off and do not divide by the deviation; so does the adapter beside them.
"""

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.credit import EPS, GROUP_SIZE
from benchmarks.credit_rollout import NUM_TURNS, Rollout, exact_outputs, in_groups, make_rollout
from benchmarks.measure import Contestant, Outputs, Row, compare, find, set_ratios
from benchmarks.trainer_credit import OWN
from gtpo.adapters import areal, nemo_rl, openrlhf, prime_rl, rllm, skyrl, slime, tinker_cookbook, verl
from gtpo.adapters.layouts import GRPO, list_turn_advantages, packed_turn_advantages, padded_turn_advantages
from gtpo.adapters.trl_turns import ScoredRow, group_advantages
from gtpo.adapters.turn_lists import advantages_by_token, padded_turn_ids, turn_lengths

OPTIONS = {**GRPO, "eps": EPS}
CENTRED = {**GRPO, "scale": "none"}
FLOOR = "floor: the result written once"


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
        return {"advantages": rollout.spread(torch.tensor([row[0] for row in values]))}

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
    return lambda: {"advantages": estimator.compute_advantage(rollout.prompts, rollout.outcomes, rollout.mask)}


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
    trajectories = [SimpleNamespace(steps=row) for row in rollout.turns(response_ids=[0] * rollout.sampled)]
    groups = [SimpleNamespace(trajectories=group) for group in in_groups(trajectories)]
    rewards = list(rollout.outcomes.double().view(-1, GROUP_SIZE).numpy())

    def call() -> Outputs:
        values, _ = rllm.gtpo_advantages(rewards, SimpleNamespace(gtpo=OPTIONS), traj_groups=groups)
        return {"advantages": rollout.spread(torch.from_numpy(np.concatenate(values)))}

    return call


def _prime_rl(rollout: Rollout) -> Callable[[], Outputs]:
    """Group by group, as prime-rl calls it."""
    nodes = [SimpleNamespace(mask=[kind] * rollout.sampled) for _ in range(NUM_TURNS) for kind in (True, False)]
    groups = in_groups([SimpleNamespace(nodes=nodes, info={}, reward=reward) for reward in rollout.outcomes.tolist()])

    def call() -> Outputs:
        assigned: list[list[float]] = []
        for traces in groups:
            prime_rl.assign_turn_advantages(traces, lambda trace, values: assigned.append(values), **CENTRED)
        return {"centred": rollout.spread(torch.tensor([values[0] for values in assigned]))}

    return call


def _areal(rollout: Rollout) -> Callable[[], Outputs]:
    """Group by group, as its workflow does.  The advantages take the place of rewards, which are put back each time."""
    response = SimpleNamespace(output_tokens=[0] * rollout.sampled)
    rewards = rollout.turn_rewards.tolist()
    rows = rollout.turns(model_response=response)
    groups = in_groups([{f"{row}-{turn}": value for turn, value in enumerate(turns)} for row, turns in enumerate(rows)])

    def call() -> Outputs:
        for turns, row in zip(rows, rewards, strict=True):
            for turn, reward in zip(turns, row, strict=True):
                turn.reward = reward
        for group in groups:
            areal.set_turn_advantages(group, **OPTIONS)
        return {"advantages": rollout.spread(torch.tensor([turns[0].reward for turns in rows]))}

    return call


def _tinker_cookbook(rollout: Rollout) -> Callable[[], Outputs]:
    action = SimpleNamespace(tokens=[0] * rollout.sampled)
    trajectories = [SimpleNamespace(transitions=row) for row in rollout.turns(ac=action)]
    groups = [
        SimpleNamespace(trajectories_G=group, final_rewards_G=[0.0] * GROUP_SIZE) for group in in_groups(trajectories)
    ]

    def call() -> Outputs:
        values = tinker_cookbook.compute_advantages(groups, **CENTRED)
        return {"centred": rollout.spread(torch.stack([turns[0] for group in values for turns in group]))}

    return call


def _floor(rollout: Rollout) -> Callable[[], Outputs]:
    def write() -> Outputs:
        rollout.spread(rollout.outcomes)
        return {}

    return write


# An adapter follows its trainer.
CREDIT: list[Contestant[Rollout]] = [
    Contestant(FLOOR, "torch", _floor),
    Contestant("padded", "cpp", _padded),
    Contestant("packed", "cpp", _packed),
    Contestant("lists", "cpp", _lists),
    *chain.from_iterable(
        (OWN[name], Contestant(name, "cpp", prepare))
        for name, prepare in {
            "verl": _verl,
            "SkyRL": _skyrl,
            "OpenRLHF": _openrlhf,
            "AReaL": _areal,
            "tinker-cookbook": _tinker_cookbook,
            "TRL": _trl,
            "NeMo-RL": _nemo_rl,
            "slime": _slime,
            "rLLM": _rllm,
            "prime-rl": _prime_rl,
        }.items()
    ),
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
    for name, own in OWN.items():
        set_ratios([find(rows, name)], find(rows, own.name).cpu_s, label="x the trainer's own")
    return rows
