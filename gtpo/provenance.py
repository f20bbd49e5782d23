"""What the figures of a run depend on beside its configuration: the data that the configuration names, and versions."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gtpo.config import Config, config_to_dict
from gtpo.types import Task


def versions() -> dict[str, str]:
    """Of Python, the machine and the packages."""
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


def data_digests(config: Config, training: Sequence[Task]) -> dict[str, str]:
    """SHA-256 by config key of each file or folder that the options of environments and tools name, of the model's
    folder, and of the training tasks themselves, which depend on an environment's code too."""
    found = {key: _digest(Path(value)) for key, value in _paths(config)}
    if training:
        digest = hashlib.sha256()
        for task in training:
            row = [task.environment, task.prompt, task.answer, dict(task.data)]
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        found["the training tasks"] = digest.hexdigest()
    return found


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    plain = config_to_dict(config)
    for key, value in _texts({"environments": plain["environments"], "tools": plain["tools"]}):
        # folders only where the key says so: a word among the options may be the name of any folder
        if _is(Path.is_file, value) or (key.endswith(".corpus") and _is(Path.is_dir, value)):
            yield key, value
    if _is(Path.is_dir, config.model.source) and (config.sft.steps or config.train.steps):
        yield "model.source", config.model.source


def _is(test: Any, value: str) -> bool:
    try:
        return bool(test(Path(value)))
    except (OSError, ValueError):
        return False


def _texts(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield prefix, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, f"{prefix}.{key}" if prefix else str(key))


def _digest(path: Path) -> str:
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = {file.relative_to(path).as_posix(): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest()
