"""What a program is told of a run, and that it can end one early."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gtpo import Callback, Config, Evaluation, Scored, Trainer, load_config
from gtpo.run_folder import read_rows
from tests.trainer.test_trainer import write_config


class Recorder(Callback):
    """Keeps what it is told, and calls `then` after each step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.rows: list[Mapping[str, Any]] = []
        self.turns: list[tuple[float, float]] = []

    def after_step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[Sequence[Scored]]) -> None:
        self.events.append(("step", step))
        self.rows.append(metrics)
        for scored in (scored for group in groups for scored in group):
            self.turns += zip(scored.rewards.rewards, scored.credit.advantages, strict=True)

    def after_evaluation(self, step: int, evaluation: Evaluation) -> None:
        assert 0 <= evaluation.success <= 1
        self.events.append(("evaluation", step))

    def after_checkpoint(self, step: int, path: Path) -> None:
        assert (path / "manifest.json").exists()
        self.events.append(("checkpoint", step))


class StopAfter(Recorder):
    """Ends the run behind one step."""

    trainer: Trainer

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def after_step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[Sequence[Scored]]) -> None:
        super().after_step(step, metrics, groups)
        if step == self.step:
            self.trainer.stop()


def tiny_config(folder: Path, *overrides: str) -> Config:
    return load_config(write_config(folder), ["--sft.steps=0", "--train.steps=3", *overrides])


def test_a_callback_sees_each_step_evaluation_and_checkpoint(tmp_path: Path) -> None:
    seen = Recorder()
    with Trainer(
        tiny_config(tmp_path, "--train.eval_every=2", "--train.checkpoint_every=2"), callbacks=[seen]
    ) as trainer:
        trainer.train()
    assert [event for event in seen.events if event[0] == "step"] == [("step", 1), ("step", 2), ("step", 3)]
    assert [step for kind, step in seen.events if kind == "evaluation"] == [0, 2, 3]
    assert [step for kind, step in seen.events if kind == "checkpoint"] == [0, 2, 3]
    logged = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "train"]
    assert [row["reward"] for row in seen.rows] == [row["reward"] for row in logged]
    turns = read_rows(tmp_path / "run" / "turns.jsonl")
    assert seen.turns == [(row["reward"], row["advantage"]) for row in turns] and len(turns) > 3


def test_a_callback_ends_a_run_which_can_go_on(tmp_path: Path) -> None:
    stopper = StopAfter(1)
    with Trainer(tiny_config(tmp_path), callbacks=[stopper]) as trainer:
        stopper.trainer = trainer
        trainer.train()
    assert stopper.events == [
        *(("evaluation", 0), ("checkpoint", 0)),
        *(("step", 1), ("checkpoint", 1), ("evaluation", 1)),
    ]
    seen = Recorder()
    with Trainer(tiny_config(tmp_path), resume=True, callbacks=[seen]) as trainer:
        trainer.train()
    assert [step for kind, step in seen.events if kind == "step"] == [2, 3]


def test_what_a_callback_raises_ends_the_run(tmp_path: Path) -> None:
    class Broken(Callback):
        def after_step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[Sequence[Scored]]) -> None:
            raise ZeroDivisionError("of the callback")

    with (
        Trainer(tiny_config(tmp_path), callbacks=[Broken()]) as trainer,
        pytest.raises(ZeroDivisionError, match="of the callback"),
    ):
        trainer.train()
