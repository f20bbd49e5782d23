"""The CUDA kernels, compiled for the host and run there: values, the contract, and races under the thread sanitizer.

csrc/emulation replaces the CUDA runtime; kernels, launchers, bindings and `kernel_cuda.py` are the real ones.  What only a
GPU can show (speed, its exp and tanh, registers) is not shown here.
"""

import dataclasses
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
from torch import Tensor

import gtpo_kernels
from gtpo_kernels import backend as registry
from gtpo_kernels import gtpo_loss, gtpo_loss_, linear_gtpo_loss, linear_token_logprobs, token_logprobs
from gtpo_kernels import turn_advantages, turn_returns
from gtpo_kernels.testing import assert_matches_reference

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("gtpo_loss.cu", "token_logprobs.cu", "turn_advantages.cu")
COMPILER = shutil.which("g++")
INF, NAN = float("inf"), float("nan")
Case = dict[str, Any]


def compile_for_host(csrc: Path, main: Path, output: Path, *flags: str) -> None:
    assert COMPILER, "g++ is needed: the emulation uses its _Float16 and its sanitizer's fibers"
    sources = [str(main), *(str(csrc / source) for source in SOURCES)]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{csrc}", *flags]
    done = subprocess.run(
        [COMPILER, *options, "-x", "c++", *sources, "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """gtpo_kernels._cuda, built for the host."""
    library = tmp_path_factory.mktemp("emulation") / "_cuda.so"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    compile_for_host(CSRC, CSRC / "bindings_cuda.cpp", library, "-O2", "-shared", "-fPIC", *includes)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def emulated(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """backend="cuda" runs on CPU tensors, by the emulation."""
    for name in [name for name in sys.modules if name.startswith("gtpo_kernels.") and "cuda" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gtpo_kernels._cuda", compiled)
    monkeypatch.setattr(gtpo_kernels, "_cuda", compiled, raising=False)
    row = dataclasses.replace(registry.BACKENDS["cuda"], why_unavailable=lambda device: None)
    monkeypatch.setitem(registry.BACKENDS, "cuda", row)
    from gtpo_kernels import cuda_launch

    def launch(function: Callable[..., None], device: torch.device, *args: Any, **kwargs: Any) -> None:
        assert device.type == "cpu"
        function(*args, **kwargs, stream=0)

    monkeypatch.setattr(cuda_launch, "launch", launch)
    yield
    for name in [name for name in sys.modules if name.startswith("gtpo_kernels.") and "cuda" in name]:
        sys.modules.pop(name)


def test_smoke() -> None:
    logits = torch.randn(5, 507)
    targets = torch.randint(507, (5,))
    assert_matches_reference(token_logprobs, [{"logits": logits, "targets": targets}], ["logits"], backend="cuda")
