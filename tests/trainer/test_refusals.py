"""What can be known to be wrong is refused before the run's folder is touched: exit code 2, one line, no traceback."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gtpo.__main__ import main
from gtpo.config import config_from_dict, load_config
from gtpo.environments import ENVIRONMENTS, RetryEnvironment
from gtpo.memory import refuse_unaffordable, refuse_unaffordable_cache
from gtpo.policy import Policy
from gtpo.report.signal import SpreadWatch
from gtpo.run_folder import read_rows
from gtpo.trainer import Trainer
from gtpo.types import Task
from tests.trainer.test_cli import ROWS, refused, with_jsonl, write_rows
from tests.trainer.test_trainer import TINY_RUN, make_trainer, write_config

GOOD = b'{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n'
BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(GOOD[:-9]),
    "latin-1": lambda path: path.write_bytes(GOOD.replace(b"b", b"\xe9")),
    "UTF-16": lambda path: path.write_bytes(GOOD.decode().encode("utf-16")),
    "NUL bytes": lambda path: path.write_bytes(GOOD + b"\0" * 64),
    "half a surrogate pair": lambda path: path.write_bytes(GOOD.replace(b'"a"', b'"\\ud83d"')),
    "a key twice": lambda path: path.write_bytes(GOOD.replace(b'"answer": "1"', b'"answer": "1", "answer": "2"')),
    "two answers": lambda path: path.write_bytes(GOOD + GOOD.replace(b'"1"', b'"3"')),
    "a dead link": lambda path: path.symlink_to("nowhere"),
    "a loop of links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("flaw", BAD_FILES)
@pytest.mark.parametrize("option", ["path", "eval_path"])
def test_a_data_file_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flaw: str, option: str
) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    BAD_FILES[flaw](bad)
    good.write_bytes(GOOD.replace(b'"a"', b'"c"').replace(b'"b"', b'"d"'))
    paths = {"path": bad, "eval_path": good} if option == "path" else {"path": good, "eval_path": bad}
    options = ", ".join(f'{key} = "{path}"' for key, path in paths.items())
    text = TINY_RUN.replace('"retry"', '"jsonl"').replace("num_items = 1, num_getters = 2", options)
    write_config(tmp_path, text.replace("num_eval = 4", "num_eval = 1").replace("steps = 30", "steps = 0"))
    error = refused(tmp_path, capsys)
    assert "bad.jsonl" in error and "environments.0" in error and len(error) < 900
    if flaw in ("missing", "a directory", "a dead link", "a loop of links"):
        assert error.startswith(f"gtpo: environments.0.options.{option} must be a file that can be read, got ")
    elif flaw != "empty":
        assert "line " in error


@pytest.mark.parametrize("flaw", ["missing", "a directory", "latin-1", "NUL bytes", "cut short", "a loop of links"])
@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_configuration_file_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flaw: str, command: str
) -> None:
    BAD_FILES[flaw](tmp_path / "config.toml")
    words = ["--checkpoint", str(tmp_path)] if command == "eval" else []
    assert "config.toml" in refused(tmp_path, capsys, *words, command=command)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("flaw", ["missing", "empty", "NUL bytes", "cut short", "a directory"])
def test_a_model_whose_files_are_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: Policy, name: str, flaw: str
) -> None:
    folder = tmp_path / "model"
    policy.save_model(folder)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if flaw == "cut short":
        (folder / name).write_bytes(whole[: len(whole) // 2])
    else:
        BAD_FILES[flaw](folder / name)
    write_config(tmp_path)
    error = refused(tmp_path, capsys, "--model.source", str(folder))
    assert error.startswith(f"gtpo: model.source = '{folder}': ") and len(error) < 600


COMMANDS = [
    ["bogus"],
    ["--bogus"],
    ["train"],
    ["train", "--resume"],
    ["train", "a.toml", "b.toml"],
    ["train", "none.toml"],
    ["train", "none.toml", "--seed"],
    ["train", "{config}", "--min-tier", "landlock"],
    ["train", "{config}", "--checkpoint", "x"],
    ["train", "{config}", "--resume=yes"],
    ["train", "{config}", "--res"],
    ["train", "{config}", "-x"],
    ["train", "{config}", "--output_dir", "{config}"],
    ["train", "{config}", "--output_dir", "{config}/run"],
    ["train", "{config}", "--output_dir", "/proc/run"],
    ["train", "{config}", "--model.source", "\ud83d"],
    ["train", "{config}", "--environments.0.options.num_items", "nan"],
    ["train", "{config}", "--environments.0.options.num_items", "true"],
    ["train", "{config}", "--environments.0.options.num_getters", "100000000000"],
    ["train", "{config}", "--environments.0.name", "jsonl"],
    ["train", "{config}", "--sandbox.adapter", "no:such"],
    ["train", "{config}", "--sandbox.adapter", "json"],
    ["train", "{config}", "--sandbox.memory_bytes", "1"],
    ["train", "{config}", "--tools.python.max_calls", "true"],
    ["train", "{config}", "--tools.python.max_calls", "-1"],
    ["sft"],
    ["sft", "{config}", "--resume"],
    ["sft", "{config}", "--sft.steps", "0"],
    ["eval"],
    ["eval", "{config}"],
    ["eval", "{config}", "--checkpoint"],
    ["eval", "{config}", "--checkpoint", "none"],
    ["eval", "{config}", "--checkpoint", ""],
    ["eval", "{config}", "--checkpoint", "a\0b"],
    ["eval", "{config}", "--checkpoint", "{config}"],
    ["eval", "{config}", "--checkpoint", "{folder}"],
    ["eval", "{config}", "--overwrite"],
    ["config", "x"],
    ["config", "--seed", "1"],
    ["methods", "x"],
    ["methods", "--seed=1"],
    ["sandbox"],
    ["sandbox", "chek"],
    ["sandbox", "check", "--min-tier", "none"],
    ["sandbox", "check", "--min-tier"],
    ["sandbox", "check", "--profile", "none"],
    ["sandbox", "check", "--kind", "none"],
    ["sandbox", "check", "--adapter", "no:such"],
    ["sandbox", "check", "--seed", "1"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words).encode("ascii", "replace").decode())
def test_a_command_line_that_asks_for_nothing_sensible_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = main([word.format(config=config, folder=tmp_path) if "\ud83d" not in word else word for word in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading weights")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("gtpo: ") and len(lines[0]) < 900, lines
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ({"rollout": {"max_trajectory_tokens": 10**9}}, "rollout.max_trajectory_tokens = 1000000000"),
        ({"rollout": {"group_size": 10**8}}, "rollout.group_size = 100000000"),
        ({"rollout": {"tasks_per_step": 2**62}}, "rollout.tasks_per_step = 4611686018427387904"),
        ({"tasks": {"num_train": 10**9}}, "tasks.num_train = 1000000000"),
        ({"tasks": {"num_eval": 10**9}}, "tasks.num_eval = 1000000000"),
        ({"eval": {"samples": 10**9}}, "eval.samples = 1000000000"),
        ({"sft": {"steps": 1, "num_demonstrations": 10**9}}, "sft.num_demonstrations = 1000000000"),
        ({"model": {"hidden_size": 10**9}}, "model.hidden_size = 1000000000"),
        ({"model": {"num_layers": 10**9}}, "model.num_layers = 1000000000"),
        ({"model": {"num_heads": 10**9}}, "model.num_heads = 1000000000"),
        ({"model": {"intermediate_size": 10**9}}, "model.intermediate_size = 1000000000"),
        ({"model": {"head_dim": 10**9}}, "model.head_dim = 1000000000"),
        ({"model": {"lora_rank": 10**9}}, "model.lora_rank = 1000000000"),
    ],
)
def test_what_no_memory_can_hold_is_refused_with_what_it_would_take(table: dict[str, Any], keys: str) -> None:
    with pytest.raises(ValueError, match=r"would take at least [\d,.]+ GB of memory, there are [\d,.]+ GB$") as said:
        refuse_unaffordable(config_from_dict(table))
    assert keys in str(said.value)


def test_what_a_run_takes_is_no_reason_to_refuse_it(policy: Policy) -> None:
    config = config_from_dict({"rollout": {"max_trajectory_tokens": 4096}, "tasks": {"num_train": 100_000}})
    refuse_unaffordable(config)
    refuse_unaffordable_cache(config, policy)


def test_keys_and_values_that_have_no_room_are_refused(policy: Policy) -> None:
    # 2 layers, 1 head of 16, keys and values in float32: 256 bytes a token
    rollout = {"max_trajectory_tokens": 1_000_000, "group_size": 2, "tasks_per_step": 512, "max_concurrent": 1024}
    with pytest.raises(ValueError, match=r"max_concurrent = 1024, .* = 1000000 would take at least 262\.1 GB"):
        refuse_unaffordable_cache(config_from_dict({"rollout": rollout}), policy)


def test_too_many_tasks_of_a_small_family_are_refused_soon() -> None:
    with pytest.raises(ValueError, match="must have enough different tasks for 1000000 of split 'eval', got "):
        RetryEnvironment(num_items=1, num_getters=2, num_digits=1).tasks("eval", 1_000_000, 0)


@pytest.mark.parametrize("what", ["tasks", "oracle", "constructor"])
def test_an_environment_at_fault_before_the_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    class Faulty(RetryEnvironment):
        def __init__(self, **options: Any) -> None:
            if what == "constructor":
                raise KeyError("size")
            super().__init__(**options)

        def tasks(self, split: Any, num: int, seed: int) -> list[Task]:
            if what == "tasks":
                raise ZeroDivisionError("by zero")
            return super().tasks(split, num, seed)

        def oracle(self, task: Task, rng: Any) -> Any:
            if what == "oracle":
                raise KeyError("size")
            return super().oracle(task, rng)

    monkeypatch.setitem(ENVIRONMENTS, "retry", lambda num_items=1, num_getters=2: Faulty(num_items=num_items))
    write_config(tmp_path)
    error = refused(tmp_path, capsys)
    assert ("environments.0 ('retry')" if what == "constructor" else "environment 'retry', ta") in error


def faulty_grade(monkeypatch: pytest.MonkeyPatch, grade: Callable[[int], Any]) -> None:
    calls = iter(range(10**6))
    monkeypatch.setattr(RetryEnvironment, "grade", lambda self, task, answer: grade(next(calls)))


def late(value: Any) -> Callable[[int], Any]:
    """Right at first: in the demonstrations, the first evaluation and step 1; from step 2 on `value`."""

    def grade(number: int) -> Any:
        if number < 8 + 4 + 4:
            return float(number < 8)
        if isinstance(value, Exception):
            raise value
        return value

    return grade


@pytest.mark.parametrize("value", [None, float("nan"), 2, "1", KeyError("answer")], ids=repr)
def test_a_grade_at_fault_ends_the_run_in_one_line_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    config = write_config(tmp_path)
    words = ["train", str(config), "--sft.steps", "1", "--train.checkpoint_every", "100", "--train.steps", "2"]
    with monkeypatch.context() as patched:
        faulty_grade(patched, late(value))
        assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gtpo: environment 'retry', task 'retry-train-0-") and ": grade " in last
    run = tmp_path / "run"
    # of the step at fault nothing is logged, and what came before it is in a checkpoint
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row["phase"] == "train"] == [1]
    assert {row["step"] for row in read_rows(run / "turns.jsonl")} == {1}
    assert (run / "checkpoints" / "last").resolve().name == "step-000001"
    assert main([*words, "--resume"]) == 0
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row["phase"] == "train"] == [1, 2]


def test_a_disk_that_fills_in_mid_run_ends_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    words = ["train", str(config), "--sft.steps", "1", "--train.checkpoint_every", "1", "--train.steps", "2"]
    save_model = Policy.save_model

    def full(self: Policy, folder: Path) -> None:
        if folder.name == "step-000002.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_model(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(Policy, "save_model", full)
        assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "step-000002 cannot be written: No space left on device (" in last and "--resume` goes on" in last
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "best", "last", "step-000000", "step-000001"
    ]  # fmt: skip
    assert main([*words, "--resume"]) == 0
    assert "run folder" in capsys.readouterr().err


def test_data_that_changed_is_refused_on_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    text = with_jsonl(data).replace("num_eval = 4", "num_eval = 1").replace("steps = 30", "steps = 0")
    words = ["train", str(write_config(tmp_path, text)), "--train.steps", "1"]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    write_rows(data, [*ROWS[:-1], {"question": "7 + 7?", "answer": "15"}])
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "gtpo: a run can only be resumed with the data it began with; changed: environments.0.options."
    )
    assert said.count("\n") == 1
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path.name != "gtpo_run"} == {
        path: data for path, data in before.items() if path.name != "gtpo_run"
    }


def test_overlong_prompts_are_refused_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, {"question": "1 + 1? " * 100, "answer": "2"}, {"question": "2 + 2? " * 90, "answer": "4"}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    held_out = write_rows(tmp_path / "eval.jsonl", [{"question": "9 + 9?", "answer": "18"}])
    text = with_jsonl(data).replace("num_eval = 4", "num_eval = 1").replace("steps = 30", "steps = 0")
    text = text.replace("num_train = 6", "num_train = 10").replace('path = "', f'eval_path = "{held_out}", path = "')
    write_config(tmp_path, text)
    error = refused(tmp_path, capsys)
    assert "2 of 10 training tasks have prompts too long for rollout.max_trajectory_tokens = 256; " in error
    assert 'set tasks.overlong_prompts = "leave_out"' in error
    config = load_config(tmp_path / "config.toml", ["--tasks.overlong_prompts", "leave_out"])
    with Trainer(config) as trainer:
        assert len(trainer.train_tasks) == 8 and max(len(task.prompt) for task in trainer.train_tasks) < 20
        assert any(line.startswith("left out: 2 of 10 training tasks") for line in trainer.describe())
    write_rows(held_out, [{"question": "9 + 9? " * 100, "answer": "18"}])
    assert main(["train", str(tmp_path / "config.toml"), "--overwrite", "--tasks.overlong_prompts=leave_out"]) == 2
    assert "1 of 1 eval tasks have prompts too long" in capsys.readouterr().err


def test_rewards_that_never_differ_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unshaped = [f"--reward.{name}=0" for name in ("format_penalty", "execution_penalty", "execution_bonus")]
    with make_trainer(tmp_path, "--sft.steps=0", *unshaped) as trainer:
        monkeypatch.setattr(RetryEnvironment, "grade", lambda self, task, answer: 0.0)
        monkeypatch.setattr(trainer, "spread", SpreadWatch())
        trainer.spread.count = 8
        capsys.readouterr()
        rows = [trainer.step(step) for step in (0, 1)]
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]
    assert [row["steps_without_spread"] for row in rows] == [9.0, 10.0]
    assert "step 2: no group had two different rewards for 10 steps (success 0%)" in capsys.readouterr().err


INTERRUPTED = "import sys; from gtpo.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    config = write_config(tmp_path)
    command = [sys.executable, "-c", INTERRUPTED, "train", str(config), "--sft.steps", "1", "--train.steps", "1000"]
    # a shell starts what runs in the background without SIGINT
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type,return-value]
    ) as process:
        yield process
        process.kill()


def test_ctrl_c_is_one_line_and_the_run_can_be_resumed(
    tmp_path: Path, running: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text().count('"phase": "train"') >= 2):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 130, errors
    lines = errors.splitlines()
    assert lines[-1] == "gtpo: interrupted; a run goes on from its last checkpoint with --resume"
    assert "Traceback" not in errors
    words = ["train", str(tmp_path / "config.toml"), "--sft.steps", "1", "--train.steps", "4", "--resume"]
    assert main(words) == 0
    assert "train.steps was 1000, now 4" in capsys.readouterr().err


def test_a_resumed_run_holds_its_weights_once(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--sft.steps", "1", "--train.steps", "1") as trainer:
        trainer.train()
        state = torch.load(trainer.run.path / "checkpoints" / "last" / "trainer.pt", weights_only=True)
        shapes = [tuple(weight.shape) for weight in trainer.policy.trainable().values()]
    assert state["reference"] == {}
    # AdamW's two moments of each weight, and the weights themselves in the model beside it only
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values() if value.ndim]
    assert sorted(tuple(value.shape) for value in moments) == sorted(shapes * 2)
