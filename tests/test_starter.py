"""`gtpo init`: what it writes is whole, and its oracle solves its tasks."""

import asyncio
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtpo.__main__ import main
from gtpo.assembly import make_mixture, make_own_terms
from gtpo.chat import Chat
from gtpo.config import load_config
from gtpo.policy import Policy
from gtpo.rewards import turn_rewards
from gtpo.sandbox import SandboxPool
from gtpo.sft import demonstrate_one
from gtpo.types import Trajectory
from tests.trainer.conftest import make_rollout, policy  # noqa: F401


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    assert main(["init", str(tmp_path / "project")]) == 0
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "project"
    for name in ("warehouse", "warehouse_rewards"):
        sys.modules.pop(name, None)


def test_the_oracle_solves_its_tasks_and_the_terms_count(project: Path, policy: Policy) -> None:  # noqa: F811
    config = load_config("warehouse.toml")
    mixture, own = make_mixture(config), make_own_terms(config)
    chat = Chat(policy.tokenizer, call_format=config.rollout.call_format)

    async def run() -> list[Trajectory]:
        async with SandboxPool(min_tier="landlock") as pool:
            tasks = mixture.tasks("train", 4, seed=0)
            limits = {"max_turns": 7, "max_trajectory_tokens": 2000, "max_completion_tokens": 200}
            rollout_config = type(config.rollout)(**limits)  # type: ignore[arg-type]
            rollout = make_rollout(mixture.of(tasks[0]), chat, pool, rollout_config)
            return [await demonstrate_one(rollout, mixture.oracle(t, random.Random(2)), t) for t in tasks]

    played = asyncio.run(run())
    assert [trajectory.outcome for trajectory in played] == [1.0] * 4
    for trajectory, reward in zip(played, turn_rewards(played, config.reward, own), strict=True):
        looks = len(trajectory.turns) - 1
        assert dict(trajectory.measures) == {"looks": looks}
        assert reward.terms["found"] == [0.0] * (looks - 1) + [0.1, 0.0]
        assert sum(reward.terms["few_looks"]) == pytest.approx(-0.05 * max(looks - 2, 0))


def test_nothing_is_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "warehouse.py").write_text("mine")
    assert main(["init", str(project)]) == 2
    assert "DIR must not hold warehouse.py yet" in capsys.readouterr().err
    assert (project / "warehouse.py").read_text() == "mine"
    assert main(["init", str(project), "--train.steps", "2"]) == 2
