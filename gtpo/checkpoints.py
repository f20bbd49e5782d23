"""The checkpoints of a run: written whole or not at all, and looked through before one is used.

`step-N/` holds a plain Hugging Face model, `trainer.pt` and `manifest.json`: length and SHA-256 of each file, and how
long the logs were. `last` and `best` are links. The newest two and the best stay: where the newest is damaged, the one
before it is there.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gtpo.types import RunFault

_MANIFEST, _STATE = "manifest.json", "trainer.pt"


class CannotWrite(RunFault):
    """The disk is full, over quota, read-only or broken. What was written before is as it was."""


class Checkpoints:
    """The folder `path` of one run's checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[Path]:
        """All checkpoints, the newest first."""
        found = [path for path in self.path.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name)]
        return sorted(found, key=step_of, reverse=True)

    def newest_whole(self, log_sizes: Mapping[str, int]) -> tuple[Path | None, dict[Path, str]]:
        """The newest checkpoint that is whole, and what is wrong with those that are newer. Changes nothing.

        log_sizes: bytes that the logs have now. One that was written when they were longer does not go with them.
        """
        damaged: dict[Path, str] = {}
        for path in self.steps():
            if not (fault := _fault(path, log_sizes)):
                return path, damaged
            damaged[path] = fault
        return None, damaged

    def begin(self, damaged: Mapping[Path, str]) -> None:
        """Makes the folder ready to be written: leftovers go, damaged checkpoints are set aside."""
        self.path.mkdir(exist_ok=True)
        for leftover in self.path.glob("*.tmp"):
            _remove(leftover)
        for path in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            _remove(aside)
            os.rename(path, aside)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        save_model: Callable[[Path], None],
        *,
        log_sizes: Mapping[str, int],
        best: bool,
    ) -> Path:
        """Writes a checkpoint beside the others, syncs it to disk, then renames it: it is whole or it is not there."""
        final = self.path / f"step-{step:06d}"
        temporary = self.path / f"{final.name}.tmp"
        with writing(final):
            temporary.mkdir()
            try:
                save_model(temporary)
                # through a file of Python's, whose errors say why
                with open(temporary / _STATE, "wb") as file:
                    torch.save(dict(state), file)
                _write_manifest(temporary, {"step": step, "is_best": best, "log_sizes": dict(log_sizes)})
                sync(temporary)
                os.rename(temporary, final)
            except Exception:
                # it may be what fills the disk
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            _remove(self.path / f"damaged-{final.name}")
            self.link_newest(best=best)
        return final

    def link_newest(self, *, best: bool) -> None:
        """Links to the newest checkpoint, then deletes those that nothing needs."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.path} must hold a checkpoint to be linked to, got none")
        for name in ("last", "best") if best else ("last",):
            self._link(name, steps[0])
        sync_folder(self.path)
        linked = {path.resolve() for path in (self.path / "last", self.path / "best") if path.exists()}
        for path in steps[2:]:
            if path.resolve() not in linked:
                shutil.rmtree(path)

    def _link(self, name: str, target: Path) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.symlink_to(target.name)
        os.replace(temporary, self.path / name)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What the trainer saved, on the CPU wherever it was: a machine without a GPU reads it too."""
    path = checkpoint / _STATE
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be the state of a trainer, but reading it raised: {reason}") from error
    return state


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_text())
    return manifest


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CannotWrite where the system cannot write, in whichever library's words that came."""
    try:
        yield
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        where = path if path.exists() else path.parent
        with contextlib.suppress(OSError):
            cause += f" ({shutil.disk_usage(where).free / 1e6:,.0f} MB free)"
        raise CannotWrite(
            f"{path} cannot be written: {cause}; what was written before is whole, and "
            "`gtpo train CONFIG.toml --resume` goes on from the last checkpoint"
        ) from error


def _os_error(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        # as safetensors says it
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return os.strerror(int(found[1]))
        error = error.__cause__ or error.__context__
    return None


def _write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _MANIFEST).write_text(json.dumps({**entries, "files": files}, indent=2) + "\n")


def _fault(checkpoint: Path, log_sizes: Mapping[str, int]) -> str:
    """What is wrong with a checkpoint, beginning with the file; empty where it is whole."""
    try:
        manifest = read_manifest(checkpoint)
        if not isinstance(manifest["is_best"], bool) or _STATE not in manifest["files"]:
            raise ValueError(f"is_best must be true or false, and {_STATE} among the files")
        if manifest["log_sizes"].keys() != log_sizes.keys():
            raise ValueError(f"log_sizes must be of {', '.join(sorted(log_sizes))}")
        if not all(type(length) is int and length >= 0 for length in manifest["log_sizes"].values()):
            raise ValueError("log_sizes must be numbers of bytes")
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{path} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{path} has {size} bytes, {expected['bytes']} were written"
            if _sha256(path) != expected["sha256"]:
                return f"{path} is not what was written: its content has changed"
        for name, length in manifest["log_sizes"].items():
            if log_sizes[name] < length:
                return f"{checkpoint.parent.parent / name} has {log_sizes[name]} bytes, it had {length}"
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{checkpoint / _MANIFEST} is not a manifest: {type(error).__name__}: {error}"
    return ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "r+b") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        sync_folder(path)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
