"""The `cuda` backend without a GPU: csrc/*.cu compiled for the host, on CPU tensors.

csrc/emulation stands in for the CUDA runtime and the device; the kernels, their launchers, the bindings and
`kernel_cuda.py` are the real ones.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch

import gtpo_kernels
from gtpo_kernels.backend import BACKENDS

CSRC = Path(__file__).parents[2] / "csrc"
BUILDS = Path(__file__).parents[2] / "build" / "emulation"


def compile_for_host(csrc: Path, main: Path, output: Path, *flags: str) -> None:
    """Compile `main` with the kernels of `csrc`; warnings are errors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++: the emulation uses its _Float16 and its thread sanitizer")
    sources = [str(path) for path in (main, *sorted(csrc.glob("*.cu")))]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{csrc}", *flags]
    command = [compiler, *options, "-x", "c++", *sources, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def emulated_module() -> ModuleType:
    """gtpo_kernels._cuda, built for the host: once for all processes of a run, and for later runs of the same csrc."""
    library = _built_library()
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built_library() -> Path:
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-O2", "-shared", "-fPIC", *includes]
    contents = hashlib.sha256(repr((flags, pybind11.__version__)).encode())
    for path in sorted(CSRC.rglob("*.*")):
        contents.update(path.name.encode() + path.read_bytes())
    folder = BUILDS / contents.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_cuda.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_for_host(CSRC, CSRC / "bindings_cuda.cpp", folder / "unfinished.so", *flags)
            (folder / "unfinished.so").rename(library)
    return library


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within it backend="cuda" takes CPU tensors."""

    def launch(function: Callable[..., None], device: torch.device, *args: Any, **kwargs: Any) -> None:
        assert device.type == "cpu"
        function(*args, **kwargs, stream=0)

    with pytest.MonkeyPatch.context() as patch:
        everywhere = dataclasses.replace(BACKENDS["cuda"], why_unavailable=lambda device: None)
        patch.setitem(BACKENDS, "cuda", everywhere)
        patch.setattr(gtpo_kernels, "_cuda", emulated_module(), raising=False)
        # the files that import the module are imported anew, here and by whoever comes after
        importers = ["gtpo_kernels.cuda_launch", *(f"gtpo_kernels.{f}.kernel_cuda" for f in everywhere.families)]
        for name in importers:
            patch.delitem(sys.modules, name, raising=False)
        patch.setattr(importlib.import_module(importers[0]), "launch", launch)
        try:
            yield
        finally:
            for name in importers:
                sys.modules.pop(name, None)
