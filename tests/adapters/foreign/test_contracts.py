"""Our functions take the arguments of the trainers' functions that they stand for, in the same places."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from areal.api import RolloutWorkflow
from skyrl.backends.skyrl_train.utils import ppo_utils
from tinker_cookbook.rl import data_processing
from verl.trainer.ppo import core_algos

from gtpo.adapters import areal, skyrl, tinker_cookbook, verl

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "verl estimator": (verl.gtpo_advantages, core_algos.compute_grpo_outcome_advantage),
    "verl loss": (verl.gtpo_policy_loss, core_algos.compute_policy_loss_vanilla),
    "skyrl estimator": (skyrl.gtpo_advantages, ppo_utils.compute_grpo_outcome_advantage),
    "skyrl loss": (skyrl.gtpo_policy_loss, ppo_utils.ppo_policy_loss),
    "areal workflow": (areal.GroupTurnCreditWorkflow.arun_episode, RolloutWorkflow.arun_episode),
    "tinker-cookbook advantages": (tinker_cookbook.compute_advantages, data_processing.compute_advantages),
    "tinker-cookbook data": (tinker_cookbook.assemble_training_data, data_processing.assemble_training_data),
}


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_are_theirs(name: str) -> None:
    ours, theirs = (inspect.signature(function) for function in PAIRS[name])
    positional = [
        p.name for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    assert list(ours.parameters)[: len(positional)] == positional
    ours.bind(**dict.fromkeys(p.name for p in theirs.parameters.values() if p.kind is not p.VAR_KEYWORD))
