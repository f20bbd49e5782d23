"""A run on disk: resolved config, digests of its data, versions, metrics and turns as JSON lines, checkpoints.

`gtpo_run` (marks what `--overwrite` may delete, is locked while a process writes the run), `config.json`, `data.json`,
`versions.json`, `metrics.jsonl`, `turns.jsonl`, `summary.json`, `checkpoints/`. A checkpoint knows how long the logs
were when it was written; resuming cuts them back to that, so a killed and resumed run leaves the records of an
uninterrupted one.
"""

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gtpo.checkpoints import Checkpoints, load_state, read_manifest, step_of, sync, writing
from gtpo.config import Config, config_to_dict
from gtpo.provenance import versions

_LOGS = ("metrics.jsonl", "turns.jsonl")
_MARKER = "gtpo_run"
_MARKER_BYTES = 256
# what may change when a run goes on: how long it is, when it is looked at, and where
_FREE_KEYS = frozenset(
    {
        "output_dir",
        "model.device",
        "model.reference_device",
        "tasks.num_eval",
        "rollout.max_logprob_gap",
        "train.steps",
        "train.eval_every",
        "train.checkpoint_every",
        "eval.samples",
        "eval.temperature",
    }
)


class RunFolder:
    """The folder of one run. It is looked at and locked when this is made, and changed from `open` on.

    checkpoint: the one that a resumed run goes on from, else None. notes: what a user should know of how it is resumed:
    damaged checkpoints, changed keys and versions.

    Raises ValueError if it holds a run already and not exactly one of `resume` and `overwrite` is asked for; whatever
    is asked for if another process has the run open, or if it holds anything else than a run, or folders of runs; on
    resuming, for another configuration, and where the checkpoints are gone or none is whole.
    """

    def __init__(self, config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(config.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.checkpoint: Path | None = None
        self.notes: list[str] = []
        self._config = config_to_dict(config)
        self._store = Checkpoints(self.checkpoints)
        self._damaged: dict[Path, str] = {}
        self._overwrite = overwrite
        self._files: dict[str, BinaryIO] = {}
        self._lock: BinaryIO | None = None
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        try:
            self._look(config, resume=resume, overwrite=overwrite)
        except OSError as error:
            self.close()
            raise ValueError(
                f"output_dir must be a folder to write to, got {str(self.path)!r}: {error.strerror}"
            ) from error
        except BaseException:
            self.close()
            raise

    def _look(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        if (self.path / _MARKER).exists():
            self._take_lock()
            if overwrite:
                self._refuse_live_runs_within()
            elif not resume:
                raise ValueError(
                    f"{self.path} holds a run already; pass --overwrite, another --output_dir, or `gtpo train --resume`"
                )
            else:
                self._look_for_checkpoint(config.train.steps)
        elif self.path.is_symlink() and not self.path.exists():
            raise ValueError(f"{self.path} is a link to {os.readlink(self.path)}, which is not there")
        elif self.path.exists() and any(not (entry / _MARKER).exists() for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run of gtpo; pass another --output_dir")
        there = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"output_dir must be a folder to write to, got {str(self.path)!r}: {there} is not writable"
            )

    def _take_lock(self) -> None:
        self._lock = _locked(self.path / _MARKER)
        if self._lock is None:
            holder = _read_marker(self.path / _MARKER).get("process", "another process")
            raise ValueError(
                f"{self.path} is being written by {holder}; wait until it has ended, or pass another --output_dir"
            )

    def _refuse_live_runs_within(self) -> None:
        for marker in sorted(self.path.rglob(_MARKER)):
            if marker.parent != self.path:
                lock = _locked(marker)
                if lock is None:
                    raise ValueError(f"{self.path} cannot be overwritten: {marker.parent} in it is being written")
                lock.close()

    def _look_for_checkpoint(self, steps: int) -> None:
        if (saved := _read_json(self.path / "config.json")) is not None:
            self._refuse_other_config(saved)
        sizes = {name: (self.path / name).stat().st_size for name in _LOGS if (self.path / name).exists()}
        self.checkpoint, self._damaged = self._store.newest_whole(sizes)
        faults = list(self._damaged.values())
        if self.checkpoint is None and faults:
            raise ValueError(
                f"{self.path} cannot be resumed, no checkpoint is whole: {faults[0]}; --overwrite begins anew"
            )
        if self.checkpoint is None and self._had_checkpoint():
            raise ValueError(
                f"{self.path} cannot be resumed, its checkpoints are gone; put them back into {self.checkpoints}, or "
                "begin anew with --overwrite"
            )
        if self.checkpoint is not None:
            self.notes += [f"{fault}: going on from {self.checkpoint.name}" for fault in faults]
            if steps < (step := step_of(self.checkpoint)):
                raise ValueError(f"train.steps must be at least {step}, which the run has done already, got {steps}")
            saved_versions = _read_json(self.path / "versions.json") or {}
            if changed := _changes(saved_versions, versions()):
                self.notes.append(f"versions changed since the run began: {changed}")

    def _had_checkpoint(self) -> bool:
        held = _read_marker(self.path / _MARKER)
        if "checkpoint" in held:
            return held["checkpoint"] is not None
        # the marker of an older version is empty
        log = self.path / "metrics.jsonl"
        return (self.checkpoints / "last").is_symlink() or (log.exists() and b'"phase": "train"' in log.read_bytes())

    def _refuse_other_config(self, saved: Mapping[str, Any]) -> None:
        was, now = _flat(saved), _flat(json.loads(json.dumps(self._config)))
        fixed = [{key: value for key, value in table.items() if key not in _FREE_KEYS} for table in (was, now)]
        if changed := _changes(*fixed):
            raise ValueError(f"a run can only be resumed with the configuration it began with; changed: {changed}")
        free = [{key: table.get(key) for key in _FREE_KEYS - {"output_dir"}} for table in (was, now)]
        if changed := _changes(*free):
            self.notes.append(f"configuration changed since the last start: {changed}")

    def refuse_other_data(self, digests: Mapping[str, str]) -> None:
        """Raises ValueError where a resumed run began with other data (see `gtpo.provenance.data_digests`)."""
        saved = _read_json(self.path / "data.json") if self.checkpoint is not None else None
        if saved is None:
            return
        flat = _flat(self._config)
        changed = [key for key in sorted(saved.keys() | digests.keys()) if saved.get(key) != digests.get(key)]
        if changed:
            named = ", ".join(f"{key} ({flat[key]})" if key in flat else key for key in changed)
            raise ValueError(f"a run can only be resumed with the data it began with; changed: {named}")

    def open(self, digests: Mapping[str, str] | None = None) -> None:
        """From here on the folder is changed: an older run is deleted, or the logs are cut back to the checkpoint.

        digests: of the run's data, to be kept. Raises ValueError where another process was faster, and CannotWrite.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                (self.path / _MARKER).touch()
                self._take_lock()
                if any(entry.name not in (_MARKER,) and entry.is_file() for entry in self.path.iterdir()):
                    raise ValueError(f"{self.path} holds a run already, which another process has just begun")
            if self._overwrite:
                _delete_all_but_marker(self.path)
            self._store.begin(self._damaged)
            self._write_marker()
            write_json(self.path / "config.json", self._config)
            sizes = dict.fromkeys(_LOGS, 0)
            if self.checkpoint is None:
                write_json(self.path / "versions.json", versions())
                write_json(self.path / "data.json", dict(digests or {}))
            else:
                manifest = read_manifest(self.checkpoint)
                sizes = manifest["log_sizes"]
                # it may have been killed between the checkpoint and the links to it
                self._store.link_newest(best=manifest["is_best"])
            for name in _LOGS:
                (self.path / name).touch()
                os.truncate(self.path / name, sizes[name])
                # without a buffer: what a full disk did not take is not tried again when the file is closed
                self._files[name] = open(self.path / name, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", row)

    def log_turn(self, row: Mapping[str, Any]) -> None:
        self._append("turns.jsonl", row)

    def last_checkpoint(self) -> Path | None:
        return next(iter(self._store.steps()), None)

    def load_state(self) -> dict[str, Any] | None:
        """The trainer's state at the checkpoint that the run goes on from, or None at the start of a run."""
        return None if self.checkpoint is None else load_state(self.checkpoint)

    def save_checkpoint(
        self, step: int, state: Mapping[str, Any], save_model: Callable[[Path], None], *, best: bool
    ) -> Path:
        """See `Checkpoints.save`; the logs are synced first."""
        with writing(self.path):
            for file in self._files.values():
                os.fsync(file.fileno())
        sizes = {name: (self.path / name).stat().st_size for name in _LOGS}
        saved = self._store.save(step, state, save_model, log_sizes=sizes, best=best)
        self._write_marker()
        return saved

    def mark_best(self) -> None:
        """Links `best` to the last checkpoint, which is not written anew: at every moment a whole one is there."""
        with writing(self.checkpoints / "best"):
            self._store.link_newest(best=True)

    def _write_marker(self) -> None:
        """In place and of one length, so that the lock stays and a full disk has room for it."""
        assert self._lock is not None
        last = self.last_checkpoint()
        held = {"process": f"process {os.getpid()} on {platform.node()}"[:100], "checkpoint": last and last.name}
        os.pwrite(self._lock.fileno(), json.dumps(held).ljust(_MARKER_BYTES).encode(), 0)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        left = memoryview(json.dumps(row).encode() + b"\n")
        with writing(self.path / name):
            while left:
                left = left[self._files[name].write(left) :]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a log. Raises ValueError with file and line for what is no row."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def write_json(path: Path, value: Any) -> None:
    """Written beside, synced, renamed: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        sync(temporary)
        os.replace(temporary, path)


def _locked(marker: Path) -> BinaryIO | None:
    """The open marker, locked for as long as it is open, however its process ends; None where another has it."""
    file = open(marker, "r+b", buffering=0)  # noqa: SIM115 - its caller keeps it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise ValueError(f"output_dir must be on a file system with locks, got {marker.parent}: {error}") from error
    return file


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        held = json.loads(marker.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises ValueError, with its name, for one that is no table."""
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, as a run writes it: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON object, as a run writes it, got {type(table).__name__}")
    return table


def _delete_all_but_marker(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != _MARKER:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    return "; ".join(f"{key} was {was.get(key)}, now {now.get(key)}" for key in changed)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables, and lists of tables, as one table; its keys as the command line writes them."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
