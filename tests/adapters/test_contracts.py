"""Adapters to trainers that are not installed here take the calls that stand in the trainers' published sources.

`test_<trainer>.py` make those calls, with objects of the same form; `foreign/` repeats what it can with the trainers.
"""

import inspect

import pytest

from gtpo.adapters import areal, nemo_rl, prime_rl, rllm, skyrl, slime, tinker_cookbook, verl

# (function, keywords of the call in the trainer's source, where that is)
CALLS = {
    "verl estimator": (
        verl.gtpo_advantages,
        ("token_level_rewards", "response_mask", "config", "index"),
        "verl 0.9.1, verl/trainer/ppo/ray_trainer.py, compute_advantage",
    ),
    "verl loss": (
        verl.gtpo_policy_loss,
        (
            *("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"),
            "rollout_is_weights",
        ),
        "verl 0.9.1, verl/workers/utils/losses.py, ppo_loss",
    ),
    "skyrl estimator": (
        skyrl.gtpo_advantages,
        ("token_level_rewards", "response_mask", "index", "values", "grpo_norm_by_std", "gamma", "lambd", "config"),
        "skyrl 0.3.0, skyrl/backends/skyrl_train/utils/ppo_utils.py, compute_advantages_and_returns",
    ),
    "skyrl loss": (
        skyrl.gtpo_policy_loss,
        ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"),
        "skyrl 0.3.0, the same file, ppo_policy_loss",
    ),
    "nemo-rl estimator": (
        nemo_rl.GTPOAdvantageEstimator().compute_advantage,
        ("prompt_ids", "rewards", "mask", "repeated_batch", "logprobs_policy", "logprobs_reference", "valid_mask"),
        "NVIDIA-NeMo/RL 00925dd, nemo_rl/algorithms/advantage_estimator.py",
    ),
    "rllm estimator": (
        rllm.gtpo_advantages,
        ("rewards", "algorithm_config", "traj_groups"),
        "rllm-org/rllm 18c8622, rllm/trainer/algorithms/advantage.py",
    ),
    "slime rewards": (
        slime.reward_post_process,
        ("args", "samples"),
        "THUDM/slime, slime/ray/rollout.py, _post_process_rewards",
    ),
    "slime advantages": (
        slime.compute_advantages,
        ("args", "rollout_data"),
        "THUDM/slime, slime/backends/megatron_utils/loss.py, compute_advantages_and_returns",
    ),
    "prime-rl loss": (prime_rl.gtpo_loss, ("inputs",), "PrimeIntellect-ai/prime-rl, docs, custom losses"),
    "areal workflow": (
        areal.GroupTurnCreditWorkflow(None, 2).arun_episode,
        ("engine", "data"),
        "areal 1.0.4, areal/api/workflow_api.py",
    ),
    "tinker-cookbook data": (
        tinker_cookbook.assemble_training_data,
        ("trajectory_groups_P", "advantages_P", "include_provenance"),
        "tinker-cookbook 0.6.1, tinker_cookbook/rl/data_processing.py",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_trainers_call_fits(name: str) -> None:
    function, keywords, _ = CALLS[name]
    inspect.signature(function).bind(**dict.fromkeys(keywords))
