"""A run whose files are damaged or gone: what is wrong is named, and the last whole checkpoint is gone on from."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtpo.config import config_from_dict
from gtpo.run_folder import RunFolder, read_rows
from tests.trainer.test_run_folder import names, save
from tests.trainer.test_run_safety import content, ended_run, resumed


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return ended_run(tmp_path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), r" has \d+ bytes, \d+ were written"),
    "empty": (lambda path: os.truncate(path, 0), r" has 0 bytes, \d+ were written"),
    "gone": (lambda path: path.unlink(), " is missing"),
    "one bit": (
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
        " is not what was written: its content has changed",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), " is missing"),
}


@pytest.mark.parametrize("name", ["trainer.pt", "model.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_gone_on_from(
    run: RunFolder, name: str, damage: str
) -> None:
    change, message = DAMAGES[damage]
    newest = run.checkpoints / "step-000004"
    change(newest / name)
    again = resumed(run)
    (note,) = again.notes
    assert re.fullmatch(rf"{re.escape(str(newest / name))}{message}: going on from step-000002", note)
    again.open()
    state = again.load_state()
    assert state is not None and state["step"] == 2
    assert names(again) == ["damaged-step-000004", "last", "step-000002"]
    assert (run.checkpoints / "last").resolve().name == "step-000002"
    # the logs are those of that checkpoint
    assert [row["step"] for row in read_rows(run.path / "metrics.jsonl")] == [2]
    save(again, 4)
    assert names(again) == ["last", "step-000002", "step-000004"]
    again.close()


@pytest.mark.parametrize(
    "changes",
    [{"log_sizes": {}}, {"log_sizes": {"metrics.jsonl": -5, "turns.jsonl": 0}}, {"is_best": 1}, {"files": {}}],
    ids=["no log", "a length below 0", "is_best a number", "no files"],
)
def test_a_manifest_with_other_entries_is_named(run: RunFolder, changes: dict[str, object]) -> None:
    manifest = run.checkpoints / "step-000004" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))
    again = resumed(run)
    assert "step-000004/manifest.json is not a manifest: ValueError: " in again.notes[0]
    again.open()
    again.close()


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"run is a link to .*gone, which is not there"):
        RunFolder(config_from_dict({"output_dir": str(tmp_path / "run")}))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"files": {"a": 5}}', "\udcff", "[" * 100_000])
def test_a_damaged_manifest_is_named(run: RunFolder, text: str) -> None:
    (run.checkpoints / "step-000004" / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    again = resumed(run)
    again.close()
    assert "step-000004/manifest.json is not a manifest: " in again.notes[0]


def test_where_no_checkpoint_is_whole_nothing_is_touched(run: RunFolder) -> None:
    for step in (2, 4):
        os.truncate(run.checkpoints / f"step-{step:06d}" / "trainer.pt", 10)
    before = content(run.path)
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*step-000004/trainer\.pt has 10 bytes") as refused:
        resumed(run)
    assert "\n" not in str(refused.value) and content(run.path) == before


def test_a_log_that_has_lost_rows_is_named_and_made_whole_from_the_checkpoint_before(run: RunFolder) -> None:
    log = run.path / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - 5)
    again = resumed(run)
    assert again.notes[0].startswith(f"{log} has ") and again.notes[0].endswith("going on from step-000002")
    again.open()
    again.close()
    assert [row["step"] for row in read_rows(log)] == [2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: shutil.rmtree(run.checkpoints),
        lambda run: [shutil.rmtree(path) for path in run.checkpoints.glob("step-*")],
        # as an older version left it
        lambda run: (shutil.rmtree(run.checkpoints), (run.path / "gtpo_run").write_bytes(b"")),
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(run: RunFolder, damage: Callable[[RunFolder], Any]) -> None:
    damage(run)
    before = content(run.path)
    with pytest.raises(ValueError, match="cannot be resumed, its checkpoints are gone; put them back into"):
        resumed(run)
    assert content(run.path) == before


@pytest.mark.parametrize("name", ["config.json", "versions.json", "data.json"])
@pytest.mark.parametrize("text", [b"", b'{"seed": ', b"[1]", b"\xff", b"null"])
def test_a_record_that_is_none_is_named(run: RunFolder, name: str, text: bytes) -> None:
    (run.path / name).write_bytes(text)
    with pytest.raises(ValueError, match=rf"run/{name} must (be JSON|hold a JSON object), as a run writes it"):
        again = resumed(run)
        try:
            again.refuse_other_data({})
        finally:
            again.close()
