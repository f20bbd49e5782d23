"""GRPO's advantages by the trainers' own code, from what the trainer holds to [B, T].

Their functions are called where they are installed (`make test-adapters`).  The rows "restated from" are lines that
stand in the middle of longer methods, or in trainers that are not on PyPI, written down again from the source that
each names.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.credit import EPS, GROUP_SIZE
from benchmarks.credit_rollout import Rollout, in_groups
from benchmarks.foreign_imports import import_foreign
from benchmarks.measure import Contestant, Outputs

# of a deviation without to one with ddof 1
WITHOUT_DDOF = (GROUP_SIZE / (GROUP_SIZE - 1)) ** 0.5


def _of_core_algos(module: str) -> Callable[[Rollout], Callable[[], Outputs]]:
    """verl's function, and SkyRL's of the same name and signature."""

    def prepare(rollout: Rollout) -> Callable[[], Outputs]:
        estimator = import_foreign(module).compute_grpo_outcome_advantage
        return lambda: {"advantages": estimator(rollout.token_rewards, rollout.mask, rollout.uids, epsilon=EPS)[0]}

    return prepare


def _openrlhf(rollout: Rollout) -> Callable[[], Outputs]:
    """Its experience maker, without the Ray actors that it is told of."""
    maker_class = import_foreign("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    experience_class = import_foreign("openrlhf.trainer.ppo_utils.experience").Experience
    penalties = ("clip_range", "overlong_buffer_len", "overlong_penalty_factor", "stop_properly_penalty_coef")
    maker = object.__new__(maker_class)
    maker.advantage_estimator, maker.kl_ctl = "group_norm", SimpleNamespace(value=0.0)
    maker.strategy = SimpleNamespace(
        args=SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=GROUP_SIZE),
            algo=SimpleNamespace(
                advantage=SimpleNamespace(estimator="group_norm", gamma=1.0, lambd=1.0, no_std_norm=False)
            ),
            reward=SimpleNamespace(**dict.fromkeys(penalties)),
        )
    )
    index, mask = list(range(rollout.num_trajectories)), rollout.mask.bool()
    lengths, kl, truncated = mask.sum(1), torch.zeros(mask.shape), torch.zeros(len(mask))

    def call() -> Outputs:
        experience = experience_class(
            index=index,
            action_mask=mask,
            rewards=rollout.outcomes,
            info={},
            kl=kl,
            response_length=lengths,
            truncated=truncated,
        )
        (made,) = maker.compute_advantages_and_returns([experience])
        # after the last sampled token it has zeros, and between turns what the loss masks
        return {"advantages": made.advantages * rollout.mask}

    return call


def _areal(rollout: Rollout) -> Callable[[], Outputs]:
    """What `reward_norm` of its actor is; its loop over tokens then carries the result from the last to the first."""
    levels = {"mean_level": "group", "std_level": "group", "group_size": GROUP_SIZE, "eps": EPS}
    normalise = import_foreign("areal.utils.data").Normalization(
        import_foreign("areal.api.cli_args").NormConfig(**levels)
    )
    return lambda: {"advantages": rollout.spread(normalise(rollout.outcomes))}


def _tinker_cookbook(rollout: Rollout) -> Callable[[], Outputs]:
    """It takes the mean off and does not divide."""
    compute = import_foreign("tinker_cookbook.rl.data_processing").compute_advantages
    group_class = import_foreign("tinker_cookbook.rl.types").TrajectoryGroup
    trajectories = [SimpleNamespace(transitions=row) for row in rollout.turns()]
    groups = [group_class(group, [0.0] * GROUP_SIZE, [{}] * GROUP_SIZE) for group in in_groups(trajectories)]
    return lambda: {"centred": rollout.spread(torch.cat(compute(groups)))}


def _trl(rollout: Rollout) -> Callable[[], Outputs]:
    """`_generate_and_score_completions` with scale_rewards="group"; its loss spreads them over tokens."""

    def lines() -> Outputs:
        rewards = rollout.outcomes
        means = torch.nanmean(rewards.view(-1, GROUP_SIZE), dim=1).repeat_interleave(GROUP_SIZE, dim=0)
        stds = rewards.view(-1, GROUP_SIZE).std(dim=1).repeat_interleave(GROUP_SIZE, dim=0)
        return {"advantages": rollout.spread((rewards - means) / (stds + EPS))}

    return lines


def _nemo_rl(rollout: Rollout) -> Callable[[], Outputs]:
    """`calculate_baseline_and_std_per_prompt` without leave-one-out, in `GRPOAdvantageEstimator`; scaled."""
    prompts, rewards = rollout.prompts, rollout.outcomes

    def loop() -> Outputs:
        baseline, squares, valid = torch.zeros_like(rewards), torch.zeros_like(rewards), torch.ones_like(rewards)
        for prompt in torch.unique(prompts, dim=0):
            rows = torch.arange(len(prompts))[(prompts == prompt).all(1)]
            weights = torch.ones(len(rows), len(rows))
            count = valid[rows].sum()
            baseline[rows] = torch.matmul(weights, rewards[rows] * valid[rows]) / count
            squares[rows] = torch.matmul(weights, rewards[rows].pow(2) * valid[rows]) / count
        std = (squares - baseline.square()).sqrt().nan_to_num(0)
        advantages = (rewards - baseline).unsqueeze(-1)
        spread = std > 0
        advantages[spread] = advantages[spread] / (std.unsqueeze(-1)[spread] * WITHOUT_DDOF + EPS)
        return {"advantages": advantages.expand(rollout.mask.shape) * rollout.mask}

    return loop


def _slime(rollout: Rollout) -> Callable[[], Outputs]:
    """`_post_process_rewards` of slime/ray/rollout.py, then `get_grpo_returns` of slime/utils/ppo_utils.py."""
    samples = [SimpleNamespace(reward=reward) for reward in rollout.outcomes.tolist()]
    kl = list(torch.zeros(rollout.mask.shape))

    def lines() -> Outputs:
        rewards = torch.tensor([sample.reward for sample in samples]).reshape(-1, GROUP_SIZE)
        rewards = rewards - rewards.mean(dim=-1, keepdim=True)
        rewards = (rewards / (rewards.std(dim=-1, keepdim=True) + EPS)).flatten()
        returns = [torch.ones_like(row) * reward for row, reward in zip(kl, rewards, strict=True)]
        return {"advantages": torch.stack(returns) * rollout.mask}

    return lines


def _rllm(rollout: Rollout) -> Callable[[], Outputs]:
    """`calculate_grpo_advantages`, scaled."""
    groups = list(rollout.outcomes.double().view(-1, GROUP_SIZE).numpy())

    def loop() -> Outputs:
        values = [(rewards - rewards.mean()) / (rewards.std() * WITHOUT_DDOF + EPS) for rewards in groups]
        return {"advantages": rollout.spread(torch.from_numpy(np.concatenate(values)))}

    return loop


def _prime_rl(rollout: Rollout) -> Callable[[], Outputs]:
    """`default_advantage_fn` of src/prime_rl/orchestrator/algo/advantage.py, group by group; it does not divide."""
    groups = in_groups([{"reward": reward} for reward in rollout.outcomes.tolist()])
    length = rollout.mask.shape[1]

    def loop() -> Outputs:
        assigned: list[list[float]] = []
        for group in groups:
            rewards = torch.tensor([trace["reward"] for trace in group], dtype=torch.float32)
            assigned += [[float(value)] * length for value in (rewards - rewards.mean()).tolist()]
        return {"centred": rollout.spread(torch.tensor([values[0] for values in assigned]))}

    return loop


# By the name that our adapter has in the table.
OWN: dict[str, Contestant[Rollout]] = {
    "verl": Contestant(
        "verl 0.9.1: compute_grpo_outcome_advantage", "verl", _of_core_algos("verl.trainer.ppo.core_algos")
    ),
    "SkyRL": Contestant(
        "SkyRL 0.3.0: compute_grpo_outcome_advantage",
        "skyrl",
        _of_core_algos("skyrl.backends.skyrl_train.utils.ppo_utils"),
    ),
    "OpenRLHF": Contestant("OpenRLHF 0.11.2: compute_advantages_and_returns", "openrlhf", _openrlhf),
    "AReaL": Contestant("AReaL 1.0.4: Normalization", "areal", _areal),
    "tinker-cookbook": Contestant("tinker-cookbook 0.6.1: compute_advantages", "tinker_cookbook", _tinker_cookbook),
    "TRL": Contestant("restated from TRL 1.16.0", "trl, restated", _trl),
    "NeMo-RL": Contestant("restated from NVIDIA-NeMo/RL 7fb98c8", "nemo_rl, restated", _nemo_rl),
    "slime": Contestant("restated from THUDM/slime a51f071", "slime, restated", _slime),
    "rLLM": Contestant("restated from rllm-org/rllm 18c8622", "rllm, restated", _rllm),
    "prime-rl": Contestant("restated from PrimeIntellect-ai/prime-rl 039b400", "prime_rl, restated", _prime_rl),
}
