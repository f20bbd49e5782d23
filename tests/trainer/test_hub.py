"""A model by its hub id: read from what was kept of the hub on this machine, refused in one line where it is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gtpo.policy import Policy
from tests.trainer.test_trainer import write_config

REVISION = "0" * 40


@pytest.fixture
def hub(tmp_path: Path, policy: Policy) -> Path:
    """A hub cache that holds the model "org/tiny-1.0"."""
    kept = tmp_path / "hub" / "models--org--tiny-1.0"
    policy.save_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", kept / "snapshots" / REVISION)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def train(folder: Path, hub: Path, source: str) -> subprocess.CompletedProcess[str]:
    overrides = [f"--model.source={source}", "--sft.steps=0", "--train.steps=1"]
    command = [sys.executable, "-m", "gtpo", "train", str(write_config(folder)), *overrides]
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_model_of_the_hub_trains(tmp_path: Path, hub: Path) -> None:
    found = train(tmp_path, hub, "org/tiny-1.0")
    assert found.returncode == 0, found.stderr
    assert "model org/tiny-1.0: " in found.stderr


def test_a_model_that_the_hub_has_not_is_refused(tmp_path: Path, hub: Path) -> None:
    found = train(tmp_path, hub, "org/absent")
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 2 and last.startswith("gtpo: model.source = 'org/absent': "), found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "run").exists()
