"""A run's folder under what goes wrong around it: other processes, changed data, damaged files, a full disk."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gtpo.checkpoints import CannotWrite, load_state
from gtpo.config import Config, config_from_dict
from gtpo.provenance import data_digests
from gtpo.report.compare import main as compare
from gtpo.run_folder import RunFolder, read_rows
from gtpo.types import Task
from tests.trainer.test_run_folder import make_config, names, opened, save

HOLD = """
import sys
from gtpo.config import config_from_dict
from gtpo.run_folder import RunFolder
run = RunFolder(config_from_dict({"output_dir": sys.argv[1]}), resume=True)
run.open()
print("held", flush=True)
sys.stdin.read()
"""


def ended_run(tmp_path: Path) -> RunFolder:
    """A run of two checkpoints whose process has ended."""
    run = opened(make_config(tmp_path))
    for step in (2, 4):
        run.log({"phase": "train", "step": step})
        save(run, step)
    run.close()
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return ended_run(tmp_path)


def resumed(run: RunFolder, **changes: object) -> RunFolder:
    return RunFolder(make_config(run.path.parent, **changes), resume=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def other_process(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_live_run_is_neither_resumed_nor_overwritten_and_a_killed_one_leaves_no_lock(
    run: RunFolder, other_process: subprocess.Popen[str]
) -> None:
    before = content(run.path)
    for asked in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(ValueError, match=rf"run is being written by process {other_process.pid} on .*; wait until"):
            RunFolder(make_config(run.path.parent), **asked)
    assert content(run.path) == before
    # an evaluation writes beside it
    opened(config_from_dict({"output_dir": f"{run.path}/eval"}), overwrite=True).close()
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    resumed(run).close()


def test_two_runs_of_one_process_are_kept_apart_too(run: RunFolder) -> None:
    first = resumed(run)
    with pytest.raises(ValueError, match="is being written by"):
        resumed(run)
    first.close()
    second = resumed(run)
    second.close()


def test_a_folder_that_holds_a_live_run_is_not_overwritten(run: RunFolder) -> None:
    inner = opened(config_from_dict({"output_dir": f"{run.path}/deep/eval"}))
    before = content(run.path)
    with pytest.raises(ValueError, match=r"run cannot be overwritten: .*deep/eval in it is being written"):
        RunFolder(make_config(run.path.parent), overwrite=True)
    assert content(run.path) == before
    inner.close()
    opened(make_config(run.path.parent), overwrite=True).close()
    assert not inner.path.exists()


def test_of_two_processes_that_begin_a_run_at_once_the_second_is_refused(tmp_path: Path) -> None:
    first, second = RunFolder(make_config(tmp_path)), RunFolder(make_config(tmp_path))
    first.open()
    with pytest.raises(ValueError, match="is being written by"):
        second.open()
    first.close()
    with pytest.raises(ValueError, match="holds a run already, which another process has just begun"):
        second.open()
    second.close()


def data_config(folder: Path, **changes: object) -> Config:
    options = {"path": str(folder / "tasks.jsonl")}
    tools = {"docs": {"kind": "search", "corpus": str(folder / "corpus")}}
    environments = [{"name": "jsonl", "options": options}]
    rollout = {"tools": ["python", "docs"], "call_format": "json"}
    return make_config(folder, environments=environments, tools=tools, rollout=rollout, **changes)


TASK = Task("a", "jsonl", "2 + 2?", "4")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "tasks.jsonl").write_text("b"), r"environments\.0\.options\.path \(.*tasks\.jsonl\)"),
        (lambda folder: (folder / "tasks.jsonl").unlink(), r"environments\.0\.options\.path \("),
        (lambda folder: (folder / "corpus" / "new.txt").write_text(""), r"tools\.docs\.corpus \(.*corpus\)"),
        (lambda folder: (folder / "corpus" / "a.txt").write_text("other"), r"tools\.docs\.corpus \("),
        (lambda folder: (folder / "corpus" / "a.txt").rename(folder / "corpus" / "b.txt"), r"tools\.docs\.corpus \("),
    ],
)
def test_other_data_than_the_run_began_with_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], named: str
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    (tmp_path / "tasks.jsonl").write_text("a")
    config = data_config(tmp_path)
    run = opened(config, data_digests(config, [TASK]))
    save(run, 1)
    run.close()
    again = RunFolder(config, resume=True)
    again.refuse_other_data(data_digests(config, [TASK]))
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"resumed with the data it began with; changed: {named}"):
        again.refuse_other_data(data_digests(config, [TASK]))
    again.close()


def test_other_tasks_of_the_same_options_are_refused(run: RunFolder) -> None:
    config = make_config(run.path.parent)
    digests = [data_digests(config, [task]) for task in (TASK, Task("b", "jsonl", "2 + 2?", "5"))]
    # the name of a task is not its content
    assert digests[0] == data_digests(config, [Task("x", "jsonl", "2 + 2?", "4")])
    (run.path / "data.json").write_text(json.dumps(digests[0]))
    again = resumed(run)
    again.refuse_other_data(digests[0])
    with pytest.raises(ValueError, match="changed: the training tasks"):
        again.refuse_other_data(digests[1])
    again.close()


def test_a_models_folder_is_data_and_a_word_that_names_a_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    config = make_config(
        tmp_path, model={"source": "model"}, environments=[{"name": "jsonl", "options": {"name": "model"}}]
    )
    first = data_digests(config, [])
    assert list(first) == ["model.source"]
    (tmp_path / "model" / "weights").write_bytes(b"2")
    assert data_digests(config, []) != first


def test_how_long_a_run_is_and_how_it_is_looked_at_may_change_and_nothing_else(run: RunFolder) -> None:
    free = {
        "train": {"steps": 9, "eval_every": 3, "checkpoint_every": 4},
        "eval": {"samples": 2, "temperature": 0.5},
        "tasks": {"num_eval": 7},
        "model": {"device": "cpu"},
    }
    again = resumed(run, **free)
    again.open()
    again.close()
    assert again.notes == [
        "configuration changed since the last start: eval.samples was 1, now 2; eval.temperature was None, now 0.5; "
        "model.device was auto, now cpu; tasks.num_eval was 200, now 7; train.checkpoint_every was 20, now 4; "
        "train.eval_every was 0, now 3; train.steps was 100, now 9"
    ]
    assert json.loads((run.path / "config.json").read_text())["train"]["steps"] == 9
    with pytest.raises(ValueError, match=r"changed: train\.learning_rate was 0\.0002, now 1\.0$"):
        resumed(run, **free | {"train": {"learning_rate": 1.0, "steps": 9}})
    with pytest.raises(ValueError, match=r"changed: environments\.0\.options\.num_items was None, now 1$"):
        resumed(run, environments=[{"name": "retry", "options": {"num_items": 1}}])
    with pytest.raises(ValueError, match=r"train\.steps must be at least 4, which the run has done already, got 3"):
        resumed(run, train={"steps": 3})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("place", ["model", "state", "in safetensors", "rename"])
def test_a_disk_that_does_not_take_a_checkpoint_is_said_and_the_last_one_stays(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, code: int, place: str
) -> None:
    again = resumed(run)
    again.open()
    before = content(again.checkpoints)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    def save_model(folder: Path) -> None:
        (folder / "model.json").write_text("half")
        if place == "model":
            fail()
        if place == "in safetensors":
            # the words of its SafetensorError
            raise Exception(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    if place == "state":
        monkeypatch.setattr("gtpo.checkpoints.torch.save", fail)
    if place == "rename":
        monkeypatch.setattr("gtpo.checkpoints.os.rename", fail)
    with pytest.raises(
        CannotWrite, match=rf"step-000006 cannot be written: {os.strerror(code)} \([\d,]+ MB free\); "
    ) as said:
        again.save_checkpoint(6, {"step": 6}, save_model, best=True)
    assert "\n" not in str(said.value)
    assert content(again.checkpoints) == before and names(again) == ["last", "step-000002", "step-000004"]
    again.close()


def test_a_fault_that_is_not_the_disks_is_left_as_it_is(run: RunFolder) -> None:
    again = resumed(run)
    again.open()

    def save_model(folder: Path) -> None:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        again.save_checkpoint(6, {}, save_model, best=False)
    again.close()


def test_a_row_that_the_disk_does_not_take_is_said_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    again = resumed(run)
    again.open()

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    again._files["metrics.jsonl"].close()
    again._files["metrics.jsonl"] = Full()  # type: ignore[assignment]
    with pytest.raises(CannotWrite, match=r"metrics\.jsonl cannot be written: No space left on device"):
        again.log({"step": 5})
    again.close()


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_what_the_kernel_refuses_to_write_is_said_in_its_words(run: RunFolder, library: str) -> None:
    again = resumed(run)
    again.open()
    before = content(again.checkpoints)
    weights = {"weights": torch.zeros(200_000)}

    def save_model(folder: Path) -> None:
        if library == "safetensors":
            save_file(weights, folder / "model.safetensors")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as on a disk that is full: a write of more bytes than this fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CannotWrite, match=r"step-000006 cannot be written: File too large \("):
            again.save_checkpoint(6, weights, save_model, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(again.checkpoints) == before
    assert save(again, 6).name == "step-000006"
    again.close()


def test_a_state_of_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what torch.save writes of a tensor on a GPU, but for the tensor
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"moment": torch.arange(3.0)}, tmp_path / "trainer.pt")
    monkeypatch.undo()
    assert b"cuda:0" in (tmp_path / "trainer.pt").read_bytes()
    state = load_state(tmp_path)
    assert state["moment"].device.type == "cpu" and state["moment"].tolist() == [0.0, 1.0, 2.0]


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "trainer.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(
        ValueError, match=r"trainer\.pt must be the state of a trainer, but reading it raised: "
    ) as said:
        load_state(tmp_path)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("kind", ["a file", "below a file", "too long"])
def test_a_path_that_can_be_no_folder_is_named_with_its_key(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    path = {"a file": "file", "below a file": "file/run", "too long": "x" * 300}[kind]
    with pytest.raises(ValueError, match=r"^output_dir must be a folder to write to, got ") as said:
        RunFolder(config_from_dict({"output_dir": str(tmp_path / path)}))
    assert "\n" not in str(said.value)


def test_rows_of_a_log_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object, got "):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        (lambda path: path.unlink(), "a run must have logs that can be read, got .*metrics.jsonl: No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "a run must have logs that can be read, .*: Is a directory"),
        (lambda path: path.write_bytes(b'{"a": 1}\n{"a'), r"metrics\.jsonl, line 2: expected a JSON object, got "),
        (lambda path: path.write_bytes(b"[1]\n"), r"metrics\.jsonl, line 1: expected a JSON object, got list"),
        (lambda path: path.write_bytes(b"\xff\n"), r"metrics\.jsonl, line 1: expected a JSON object, got "),
    ],
)
def test_what_is_no_run_cannot_be_compared(
    run: RunFolder, capsys: pytest.CaptureFixture[str], flaw: Callable[[Path], Any], message: str
) -> None:
    flaw(run.path / "metrics.jsonl")
    assert compare([str(run.path), str(run.path)]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"compare: .*{message}", said) and said.count("\n") == 1
