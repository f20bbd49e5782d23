"""The folder of a run: whole checkpoints, links, logs, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from gtpo.config import Config, config_from_dict, config_to_dict
from gtpo.report.compare import differences
from gtpo.report.compare import main as compare
from gtpo.run_folder import RunFolder, read_rows, versions, write_json


def make_config(folder: Path, **changes: object) -> Config:
    return config_from_dict({"output_dir": str(folder / "run"), **changes})


def opened(config: Config, digests: dict[str, str] | None = None, **asked: bool) -> RunFolder:
    run = RunFolder(config, **asked)
    run.open(digests)
    return run


def save(run: RunFolder, step: int, *, best: bool = False) -> Path:
    return run.save_checkpoint(step, {"step": step}, lambda folder: write_json(folder / "model.json", step), best=best)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_configuration_and_versions_are_saved(tmp_path: Path) -> None:
    config = make_config(tmp_path, seed=3, train={"steps": 7})
    run = opened(config)
    run.close()
    saved = json.loads((run.path / "config.json").read_text())
    assert config_from_dict(saved) == config and saved == json.loads(json.dumps(config_to_dict(config)))
    found = json.loads((run.path / "versions.json").read_text())
    assert found == versions() and found["torch"] == torch.__version__
    assert {"python", "platform", "cpu_capability", "gtpo", "transformers", "numpy"} <= found.keys()


def test_the_last_two_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    run = opened(make_config(tmp_path))
    assert run.last_checkpoint() is None and run.load_state() is None
    kept = []
    for step, best in [(0, False), (2, True), (4, False), (10, False)]:
        assert save(run, step, best=best) == run.last_checkpoint()
        kept.append(names(run))
    assert kept == [
        ["last", "step-000000"],
        ["best", "last", "step-000000", "step-000002"],
        ["best", "last", "step-000002", "step-000004"],
        ["best", "last", "step-000002", "step-000004", "step-000010"],
    ]
    assert json.loads((run.checkpoints / "best" / "model.json").read_text()) == 2
    assert json.loads((run.checkpoints / "last" / "model.json").read_text()) == 10
    run.mark_best()
    assert names(run) == ["best", "last", "step-000004", "step-000010"]
    assert json.loads((run.checkpoints / "best" / "model.json").read_text()) == 10
    run.close()
    again = RunFolder(make_config(tmp_path), resume=True)
    state = again.load_state()
    assert state is not None and state["step"] == 10 and again.checkpoint == run.checkpoints / "step-000010"
    again.close()


def test_there_is_no_best_without_a_checkpoint(tmp_path: Path) -> None:
    run = opened(make_config(tmp_path))
    with pytest.raises(ValueError, match="must hold a checkpoint to be linked to"):
        run.mark_best()
    run.close()


def test_an_interrupted_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = opened(config)
    whole = save(run, 1)

    def fail(folder: Path) -> None:
        (folder / "model.json").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(2, {"step": 2}, fail, best=True)
    (run.checkpoints / "last.tmp").symlink_to("step-000002")
    run.close()
    assert names(run) == ["last", "last.tmp", "step-000001", "step-000002.tmp"]
    again = opened(config, resume=True)
    assert again.last_checkpoint() == whole
    assert names(again) == ["last", "step-000001"]
    assert save(again, 2).name == "step-000002" and names(again) == ["last", "step-000001", "step-000002"]
    again.close()


def test_links_that_were_not_reached_are_made_on_resuming(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = opened(config)
    save(run, 1)
    save(run, 2, best=True)
    run.close()
    (run.checkpoints / "best").unlink()
    (run.checkpoints / "last").unlink()
    again = opened(config, resume=True)
    again.close()
    assert names(again) == ["best", "last", "step-000001", "step-000002"]


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = opened(config)
    run.log({"step": 1, "loss": 0.1})
    run.log_turn({"step": 1, "text": "a\nü"})
    save(run, 1)
    run.log({"step": 2, "loss": 0.2})
    run.log_turn({"step": 2, "text": "b"})
    run.close()
    with open(run.path / "turns.jsonl", "a") as log:
        log.write('{"step": 3, "te')
    again = opened(config, resume=True)
    again.log({"step": 2, "loss": 0.5})
    again.close()
    assert read_rows(run.path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.5}]
    assert read_rows(run.path / "turns.jsonl") == [{"step": 1, "text": "a\nü"}]


def test_without_a_checkpoint_a_resumed_run_starts_with_empty_logs(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = opened(config)
    run.log({"step": 1})
    run.close()
    opened(config, resume=True).close()
    assert (run.path / "metrics.jsonl").read_bytes() == b""


def test_a_run_is_neither_mixed_with_another_nor_lost_by_accident(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = opened(config)
    save(run, 1)
    run.log({"step": 1})
    run.close()
    with pytest.raises(
        ValueError,
        match=r"run holds a run already; pass --overwrite, another --output_dir, or `gtpo train --resume`",
    ):
        RunFolder(config)
    with pytest.raises(ValueError, match=r"changed: rollout\.group_size was 8, now 4; seed was 0, now 1$"):
        RunFolder(make_config(tmp_path, seed=1, rollout={"group_size": 4}), resume=True)
    assert names(run) == ["last", "step-000001"] and read_rows(run.path / "metrics.jsonl") == [{"step": 1}]
    fresh = opened(make_config(tmp_path, seed=1), overwrite=True)
    fresh.close()
    assert names(fresh) == [] and (run.path / "metrics.jsonl").read_bytes() == b""


def test_only_a_run_is_ever_deleted(tmp_path: Path) -> None:
    model = tmp_path / "run"
    model.mkdir()
    # what a Hugging Face model looks like
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    for asked in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"run is not empty and holds no run of gtpo; pass another --output_dir"):
            RunFolder(make_config(tmp_path), **asked)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_of_runs_may_hold_a_run_itself(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    inner = opened(config_from_dict({"output_dir": f"{config.output_dir}/eval"}))
    inner.close()
    opened(config).close()
    assert (inner.path / "versions.json").exists()


def test_resuming_and_overwriting_at_once_is_refused(tmp_path: Path) -> None:
    run = opened(make_config(tmp_path))
    save(run, 1)
    run.close()
    with pytest.raises(ValueError, match="expected --resume or --overwrite, got both"):
        RunFolder(make_config(tmp_path), resume=True, overwrite=True)
    assert names(run) == ["last", "step-000001"]


def test_a_run_killed_before_its_first_files_can_be_resumed(tmp_path: Path) -> None:
    run = opened(make_config(tmp_path))
    run.close()
    (run.path / "config.json").unlink()
    (run.path / "versions.json").unlink()
    opened(make_config(tmp_path), resume=True).close()
    assert (run.path / "config.json").exists() and (run.path / "versions.json").exists()


def test_a_moved_run_is_resumed(tmp_path: Path) -> None:
    run = opened(make_config(tmp_path))
    save(run, 1)
    run.close()
    (tmp_path / "elsewhere").mkdir()
    run.path.rename(tmp_path / "elsewhere" / "run")
    again = opened(make_config(tmp_path / "elsewhere"), resume=True)
    again.close()
    assert names(again) == ["last", "step-000001"] and again.notes == []


def test_a_resumed_run_keeps_the_versions_that_it_began_with_and_says_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(make_config(tmp_path))
    save(run, 1)
    run.close()
    began = json.loads((run.path / "versions.json").read_text())
    monkeypatch.setattr("gtpo.run_folder.versions", lambda: began | {"torch": "9.9"})
    again = opened(make_config(tmp_path), resume=True)
    again.close()
    assert again.notes == [f"versions changed since the run began: torch was {torch.__version__}, now 9.9"]
    assert json.loads((run.path / "versions.json").read_text()) == began


def test_compare_finds_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, loss, seconds in (("a", 0.1, 1.0), ("b", 0.1, 2.0), ("c", 0.1 + 1e-17, 1.0), ("d", 0.1 + 2e-17, 1.0)):
        (tmp_path / name).mkdir()
        run = opened(make_config(tmp_path / name))
        run.log({"step": 1, "loss": loss, "time/step_s": seconds, "nan": float("nan")})
        run.close()
        runs.append(run.path)
    a, b, _, d = runs
    assert differences(a, b) == [] and differences(a, d) == ["metrics.jsonl row 1: loss: 0.1 / 0.10000000000000002"]
    assert compare([str(a), str(b)]) == 0 and compare([str(a), str(d)]) == 1 and compare([str(a)]) == 2
    assert "1 rows of metrics are equal bit for bit" in capsys.readouterr().out
    with open(b / "turns.jsonl", "a") as log:
        log.write("{}\n")
    assert differences(a, b) == ["turns.jsonl: 0 rows against 1"]
