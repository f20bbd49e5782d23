"""A run that was killed, with SIGKILL and at any moment, and resumed leaves the records of an uninterrupted one."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gtpo.run_folder
from gtpo.__main__ import main
from gtpo.report.compare import differences
from gtpo.run_folder import read_rows
from gtpo.trainer import Trainer
from tests.trainer.test_trainer import write_config

OVERRIDES = ["--train.steps", "4", "--train.eval_every", "3"]
TRAIN = "import sys; from gtpo.__main__ import main; sys.exit(main(sys.argv[1:]))"
# the process stops, to be killed, within the writing of the checkpoint of step 2
HANG_IN_CHECKPOINT = """
import pathlib, time
import gtpo.policy
write = gtpo.policy.Policy.save_model
def save_model(self, folder):
    write(self, folder)
    if folder.name == "step-000002.tmp":
        (folder / "model.safetensors").write_bytes(b"half")
        time.sleep(3600)
gtpo.policy.Policy.save_model = save_model
"""
# the checkpoint of step 2 is whole, and no link leads to it
HANG_BEFORE_LINK = """
import time
import gtpo.checkpoints
link = gtpo.checkpoints.Checkpoints._link
def _link(self, name, target):
    if target.name == "step-000002":
        time.sleep(3600)
    link(self, name, target)
gtpo.checkpoints.Checkpoints._link = _link
"""


def train(folder: Path, *overrides: str) -> Path:
    assert main(["train", str(write_config(folder)), *OVERRIDES, *overrides]) == 0
    return folder / "run"


def rows_so_far(run: Path, phase: str) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count(f'"phase": "{phase}"') if log.exists() else 0


def train_until(folder: Path, condition: Callable[[Path], bool], *, prelude: str = "") -> Path:
    """Starts a run in a process of its own and kills it when `condition` holds."""
    config = write_config(folder)
    command = [sys.executable, "-c", prelude + TRAIN] if prelude else [sys.executable, "-m", "gtpo"]
    process = subprocess.Popen([*command, "train", str(config), *OVERRIDES], stderr=subprocess.PIPE, text=True)
    run = folder / "run"
    while process.poll() is None and not condition(run):
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("uninterrupted"))


def test_one_seed_gives_one_run_and_another_another(uninterrupted: Path, tmp_path: Path) -> None:
    assert differences(uninterrupted, train(tmp_path)) == []
    assert len(read_rows(uninterrupted / "metrics.jsonl")) == 30 + 4 + 3
    assert any(row["grad_norm"] > 0 for row in read_rows(uninterrupted / "metrics.jsonl") if row["phase"] == "train")
    assert any(row["tools"] for row in read_rows(uninterrupted / "turns.jsonl"))
    other = differences(uninterrupted, train(tmp_path, "--overwrite", "--seed", "1"))
    assert any(line.startswith("metrics.jsonl row") and "loss" in line for line in other)
    assert any(line.startswith("turns.jsonl") for line in other)


@pytest.mark.parametrize(
    ("moment", "prelude", "checkpoint"),
    [
        (lambda run: rows_so_far(run, "sft") >= 5, "", None),
        (lambda run: rows_so_far(run, "train") >= 3, "", "step-000002"),
        (lambda run: any(run.glob("checkpoints/*2.tmp/model.safetensors")), HANG_IN_CHECKPOINT, "step-000000"),
        (lambda run: (run / "checkpoints" / "step-000002").exists(), HANG_BEFORE_LINK, "step-000002"),
    ],
    ids=["in the warm-up", "after a step", "in a checkpoint", "between a checkpoint and its link"],
)
def test_killed_and_resumed_equals_uninterrupted(
    uninterrupted: Path, tmp_path: Path, moment: Callable[[Path], bool], prelude: str, checkpoint: str | None
) -> None:
    run = train_until(tmp_path, moment, prelude=prelude)
    assert not (run / "summary.json").exists()
    if checkpoint is None:
        assert not any(run.glob("checkpoints/step-*"))
    else:
        assert (run / "checkpoints" / checkpoint / "trainer.pt").exists()
    assert differences(uninterrupted, run) != []
    for name in ("metrics.jsonl", "turns.jsonl"):
        with open(run / name, "a") as log:
            log.write('{"phase": "train", "step": 99}\n{"phase": "tr')
    assert train(tmp_path, "--resume") == run
    assert_same_records(uninterrupted, run)


def assert_same_records(whole: Path, resumed: Path) -> None:
    """Equal metrics and turns, checkpoints of the same steps, and the last of them with equal weights."""
    assert differences(whole, resumed) == []
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (whole, resumed)]
    assert names[0] == names[1]
    one, two = (torch.load(path / "checkpoints/last/trainer.pt", weights_only=True) for path in (whole, resumed))
    assert one["num_tokens"] == two["num_tokens"] and one["best_outcome"] == two["best_outcome"]
    assert str(one["optimizer"]) == str(two["optimizer"]) and str(one["reference"]) == str(two["reference"])
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        paths = [path / "checkpoints/last" / file for path in (whole, resumed)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            models = [load_file(path) for path in paths]
            assert models[0].keys() == models[1].keys() and len(models[0]) > 10
            for name, value in models[0].items():
                assert torch.equal(value, models[1][name]), name


# in one process: what a kill adds is tested above
@pytest.mark.parametrize(
    "overrides",
    [
        ("--model.lora_rank=2", "--model.gradient_checkpointing=true", "--sft.learning_rate=0.05"),
        (
            "--model.freeze_head=true",
            "--train.updates_per_rollout=2",
            "--train.eval_every=1",
            "--loss.kl=k3",
            "--loss.kl_coef=0.1",
        ),
        ("--model.lora_rank=2", "--model.dtype=bfloat16", "--sft.optimizer=muon"),
        (
            "--model.compute_dtype=bfloat16",
            "--sft.optimizer=muon",
            "--train.updates_per_rollout=2",
            "--model.reference_device=cpu",
            "--loss.kl=k3",
            "--loss.kl_coef=0.1",
        ),
        ("--model.compute_dtype=bfloat16", "--model.lora_rank=2", "--loss.kl=k3", "--loss.kl_coef=0.1"),
    ],
    ids=[
        "adapters and checkpointing",
        "frozen head, two updates, a reference policy",
        "adapters of a bfloat16 model",
        "bfloat16 passes over float32 weights, a reference policy",
        "adapters in bfloat16 passes, a reference policy",
    ],
)
def test_an_interrupted_run_of_other_options_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    step = Trainer.step

    def interrupted(self: Trainer, number: int) -> dict[str, Any]:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    whole = train(folders[0], *overrides)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        assert main(["train", str(write_config(folders[1])), *OVERRIDES, *overrides]) == 130
    assert (folders[1] / "run" / "checkpoints" / "last").resolve().name == "step-000002"
    assert_same_records(whole, train(folders[1], *overrides, "--resume"))
    assert any(row["grad_norm"] > 0 for row in read_rows(whole / "metrics.jsonl") if row["phase"] == "train")


def test_a_warm_up_alone_and_the_rest_later_equal_one_run(uninterrupted: Path, tmp_path: Path) -> None:
    assert main(["sft", str(write_config(tmp_path)), *OVERRIDES]) == 0
    assert_same_records(uninterrupted, train(tmp_path, "--resume"))


def test_the_total_of_seconds_holds_those_before_the_interruption(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path)
    load = gtpo.run_folder.load_state
    monkeypatch.setattr(gtpo.run_folder, "load_state", lambda path: load(path) | {"total_seconds": 1000.0})
    train(tmp_path, "--resume")
    seconds = json.loads((run / "summary.json").read_text())["seconds"]
    assert seconds["total"] > 1000.0
    began = json.loads((uninterrupted / "summary.json").read_text())["seconds"]
    assert began["total"] >= began["sft"] + began["generate"] + began["train"]


def test_a_finished_run_resumed_stays_as_it_is(uninterrupted: Path, tmp_path: Path) -> None:
    run = train(tmp_path)
    checkpoint = (run / "checkpoints" / "last").resolve()
    written = (checkpoint / "model.safetensors").stat().st_mtime_ns
    train(tmp_path, "--resume")
    assert differences(uninterrupted, run) == []
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == written


def test_resuming_with_another_configuration_is_refused(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    config = str(uninterrupted.parent / "config.toml")
    assert main(["train", config, *OVERRIDES, "--resume", "--seed", "1", "--train.learning_rate", "0.5"]) == 2
    errors = capsys.readouterr().err
    assert "changed: seed was 0, now 1; train.learning_rate was 0.01, now 0.5\n" in errors
    assert main(["train", config, *OVERRIDES]) == 2
    assert "holds a run already; pass --overwrite" in capsys.readouterr().err
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
