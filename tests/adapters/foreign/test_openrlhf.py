"""OpenRLHF's own experience maker, and Ray, beside ours."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from gtpo.adapters import openrlhf as adapter
from tests.adapters.attempts import BY_TOKEN, padded
from tests.adapters.test_openrlhf import openrlhf_experiences


def maker(**options: object) -> RemoteExperienceMaker:
    made = object.__new__(adapter.experience_maker_class(RemoteExperienceMaker, **options))
    advantage = SimpleNamespace(estimator="group_norm", gamma=1.0, lambd=1.0, no_std_norm=False)
    made.strategy = SimpleNamespace(
        args=SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=3),
            algo=SimpleNamespace(advantage=advantage),
            reward=SimpleNamespace(
                clip_range=None, overlong_buffer_len=None, overlong_penalty_factor=None, stop_properly_penalty_coef=None
            ),
        )
    )
    made.advantage_estimator, made.kl_ctl = "group_norm", SimpleNamespace(value=0.0)
    return made


def experiences(with_turn_rewards: bool = True) -> list[Experience]:
    return [
        Experience(
            index=e.index,
            action_mask=e.action_mask.bool(),
            rewards=e.rewards.clone(),
            info=e.info,
            kl=torch.zeros(e.action_mask.shape),
            response_length=e.action_mask.sum(1),
            truncated=torch.zeros(len(e.rewards)),
        )
        for e in openrlhf_experiences(with_turn_rewards)
    ]


def test_real_experiences_get_turn_advantages() -> None:
    rows = [e.rows for e in openrlhf_experiences()]
    for experience, row in zip(maker(gamma=0.9).compute_advantages_and_returns(experiences()), rows, strict=True):
        expected = padded([BY_TOKEN[i] for i in row], experience.action_mask.shape[1])
        torch.testing.assert_close(experience.advantages, expected, rtol=1e-5, atol=1e-6)
        assert "group_reward_std" in experience.info  # OpenRLHF's own work is done too


def test_with_grpos_options_it_gives_openrlhfs_group_norm() -> None:
    ours = maker(gamma=1.0, population="trajectories", eps=1e-9).compute_advantages_and_returns(experiences(False))
    plain = maker()
    plain.__class__ = RemoteExperienceMaker
    for one, other in zip(ours, plain.compute_advantages_and_returns(experiences(False)), strict=True):
        theirs = other.advantages * other.action_mask
        torch.testing.assert_close(one.advantages, theirs, rtol=1e-5, atol=1e-6)


RUN = """
import ray
import openrlhf.trainer.ppo_trainer as here

@ray.remote
class Trainer:
    def maker(self):
        from openrlhf.trainer import ppo_trainer
        return ppo_trainer.RemoteExperienceMaker.__name__

print("WORKER", ray.get(Trainer.remote().maker.remote()))
"""


def test_the_command_reaches_ray_workers(tmp_path: Path) -> None:
    """With a package in the place of OpenRLHF's, whose trainer needs GPUs: Ray and our command are the real ones."""
    files = {
        "openrlhf/__init__.py": "",
        "openrlhf/trainer/__init__.py": "",
        "openrlhf/trainer/ppo_trainer.py": "class RemoteExperienceMaker: ...",
        "openrlhf/cli/__init__.py": "",
        "openrlhf/cli/train_ppo_ray.py": RUN,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "gtpo.adapters.openrlhf",
        "--gtpo",
        '{"gamma": 0.9}',
        "--actor.x",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RAY_num_prestart_python_workers": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "WORKER TurnCreditExperienceMaker" in done.stdout, done.stderr[-2000:]


def test_install_is_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("openrlhf.trainer.ppo_trainer")
    module.RemoteExperienceMaker = RemoteExperienceMaker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("openrlhf.trainer.ppo_trainer", module, raising=False)
    adapter.install()
    first = module.RemoteExperienceMaker
    adapter.install()
    assert module.RemoteExperienceMaker is first
    assert issubclass(first, RemoteExperienceMaker)
