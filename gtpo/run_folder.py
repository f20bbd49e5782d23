"""A run on disk: resolved config and versions, metrics and turns as JSON lines, checkpoints, and what resuming needs.

`gtpo_run` (an empty file: it marks what `--overwrite` may delete), `config.json`, `versions.json`, `metrics.jsonl`,
`turns.jsonl`, `summary.json`, `checkpoints/step-N/` (a plain Hugging Face model and `trainer.pt`), `checkpoints/last`
and `checkpoints/best` (links). A checkpoint holds how long the logs were when it was written; resuming cuts them back
to that, so a killed and resumed run leaves the records of an uninterrupted one.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gtpo.config import Config, config_to_dict

_LOGS = ("metrics.jsonl", "turns.jsonl")
_MARKER = "gtpo_run"


class RunFolder:
    """The folder of one run. `changed_versions` says what a resumed run finds installed in place of what it began with.

    Raises ValueError if it holds a run already and not exactly one of `resume` and `overwrite` is asked for, and
    whatever is asked for if it holds anything else than a run, or folders of runs.
    """

    def __init__(self, config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(config.output_dir)
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        saved, self.changed_versions = self.path / "config.json", ""
        if (self.path / _MARKER).exists():
            if overwrite:
                shutil.rmtree(self.path)
            elif not resume:
                raise ValueError(
                    f"{self.path} holds a run already; pass --overwrite, another --output_dir, or `gtpo train --resume`"
                )
            elif saved.exists():
                _refuse_other_config(json.loads(saved.read_text()), json.loads(json.dumps(config_to_dict(config))))
        elif self.path.exists() and any(not (entry / _MARKER).exists() for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run of gtpo; pass another --output_dir")
        self.checkpoints = self.path / "checkpoints"
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _MARKER).touch()
        self.checkpoints.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        write_json(saved, config_to_dict(config))
        state = self.load_state()
        if state is None:
            write_json(self.path / "versions.json", versions())
        else:
            self.changed_versions = _changes(json.loads((self.path / "versions.json").read_text()), versions())
            # it may have been killed between the checkpoint and the links to it
            self._link_last(best=state["is_best"])
        self._cut_logs(dict.fromkeys(_LOGS, 0) if state is None else state["log_sizes"])
        self._files = {name: open(self.path / name, "ab") for name in _LOGS}  # noqa: SIM115 - open as long as the run

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def log(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", row)

    def log_turn(self, row: Mapping[str, Any]) -> None:
        self._append("turns.jsonl", row)

    def last_checkpoint(self) -> Path | None:
        complete = [path for path in self.checkpoints.glob("step-*") if not path.name.endswith(".tmp")]
        return max(complete, default=None, key=lambda path: int(path.name.removeprefix("step-")))

    def load_state(self) -> dict[str, Any] | None:
        """The trainer's state at the last checkpoint, or None at the start of a run."""
        last = self.last_checkpoint()
        return None if last is None else torch.load(last / "trainer.pt", weights_only=True)

    def save_checkpoint(
        self, step: int, state: Mapping[str, Any], save_model: Callable[[Path], None], *, best: bool
    ) -> Path:
        """Writes a checkpoint beside the others, syncs it to disk, then renames it: it is whole or it is not there."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        final = self.checkpoints / f"step-{step:06d}"
        temporary = self.checkpoints / f"step-{step:06d}.tmp"
        temporary.mkdir()
        save_model(temporary)
        sizes = {name: (self.path / name).stat().st_size for name in _LOGS}
        torch.save({**state, "log_sizes": sizes, "is_best": best}, temporary / "trainer.pt")
        _sync(temporary)
        os.rename(temporary, final)
        self._link_last(best=best)
        return final

    def mark_best(self) -> None:
        """Links `best` to the last checkpoint, which is not written anew: at every moment a whole one is there."""
        self._link_last(best=True)

    def _link_last(self, *, best: bool) -> None:
        """Links to the last checkpoint, then deletes those without a link."""
        last = self.last_checkpoint()
        if last is None:
            raise ValueError(f"{self.checkpoints} must hold a checkpoint to be linked to, got none")
        for name in ("last", "best") if best else ("last",):
            self._link(name, last)
        _sync_folder(self.checkpoints)
        kept = {path.resolve() for path in (self.checkpoints / "last", self.checkpoints / "best") if path.exists()}
        for path in self.checkpoints.glob("step-*"):
            if path.resolve() not in kept:
                shutil.rmtree(path)

    def _link(self, name: str, target: Path) -> None:
        temporary = self.checkpoints / f"{name}.tmp"
        temporary.symlink_to(target.name)
        os.replace(temporary, self.checkpoints / name)

    def _cut_logs(self, sizes: Mapping[str, int]) -> None:
        for name in _LOGS:
            path = self.path / name
            path.touch()
            os.truncate(path, sizes[name])

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(row).encode() + b"\n")
        self._files[name].flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_json(path: Path, value: Any) -> None:
    """Written beside, synced, renamed: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    _sync(temporary)
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """What the figures of a run depend on beside its config."""
    names = ("gtpo", "torch", "transformers", "tokenizers", "numpy", "reasoning_gym", "peft")
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _refuse_other_config(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # a folder may be moved, or named in another way
    if changed := _changes(_flat({**saved, "output_dir": ""}), _flat({**now, "output_dir": ""})):
        raise ValueError(f"a run can only be resumed with the configuration it began with; changed: {changed}")


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    return "; ".join(f"{key} was {was.get(key)}, now {now.get(key)}" for key in changed)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, its keys as the command line writes them."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        # opened for writing: Windows syncs nothing else
        with open(file, "r+b") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        _sync_folder(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
