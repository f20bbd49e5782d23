"""Which implementation of an op runs.  An explicit backend never falls back to another.

A backend is a file, `gtpo_kernels/<family>/kernel_<backend>.py`, imported when it is first used, and a row of
`BACKENDS`.  `reference` is the definition and runs as plain autograd; every other runs inside a registered op.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIN_TRITON = (3, 4)
FAMILIES = frozenset({"token_logprobs", "turn_advantages", "clipped_loss", "gtpo_loss"})


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run here; the message says why."""


def _runs_everywhere(device: torch.device) -> str | None:
    return None


def _needs_compiled_cpu_module(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU only, got tensors on {device}"
    # finding a module does not load it
    if importlib.util.find_spec("gtpo_kernels._cpu") is None:
        return (
            "needs the compiled module gtpo_kernels._cpu: install the package with pip, editable where you work on it"
        )
    return None


def _needs_compiled_cuda_module(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs only, got tensors on {device}"
    if importlib.util.find_spec("gtpo_kernels._cuda") is None:
        return (
            "needs the compiled module gtpo_kernels._cuda: install the package from source with nvcc on the PATH and "
            "-C cmake.define.GTPO_CUDA=ON"
        )
    return None


def _why_no_triton() -> str | None:
    """Why the installed Triton does not compile the kernels, or that there is none; None where it does."""
    return _fault_of_triton()


# A compiler takes what it gives, and does not look into the package's metadata itself. This is what
# `torch.compiler.assume_constant_result` sets; that loads the compiler, and Triton with it, at import.
_why_no_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _fault_of_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is in the extra 'gpu'"
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            # older ones evaluate both sides of `and`, though the first is known when they compile
            recent = release_of(version) >= MIN_TRITON
            wanted = ".".join(map(str, MIN_TRITON))
            return None if recent else f"needs triton {wanted} or newer, got {package} {version}"
    return None


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number, to be compared as numbers; a pre-release counts as what it leads to.

    >>> release_of("2.11.0a0+git1"), release_of("2.9.1") < release_of("2.11")
    ((2, 11), True)
    """
    major, minor = version.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor)[0])  # type: ignore[index]


def _needs_triton(device: torch.device) -> str | None:
    reason = _why_no_triton()
    if reason is not None:
        return reason
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs an NVIDIA or AMD GPU, or TRITON_INTERPRET=1 to be interpreted slowly, got tensors on {device}"
    return None


@dataclass(frozen=True)
class Backend:
    """One row of the registry.

    families: the op families it implements.
    why_unavailable: device -> None where it can run, else the reason, which ends the sentence "backend='x' ...".
    """

    families: frozenset[str] = FAMILIES
    why_unavailable: Callable[[torch.device], str | None] = _runs_everywhere


BACKENDS: dict[str, Backend] = {
    "reference": Backend(),
    "torch": Backend(),
    "cpp": Backend(why_unavailable=_needs_compiled_cpu_module),
    "triton": Backend(why_unavailable=_needs_triton),
    "cuda": Backend(frozenset({"turn_advantages", "token_logprobs", "gtpo_loss"}), _needs_compiled_cuda_module),
}
# By kind of device, what runs in place of DEFAULT_BACKEND where it can.
PREFERRED_BACKEND = {"cpu": "cpp", "cuda": "triton"}
DEFAULT_BACKEND = "torch"


def select_backend(family: str, requested: str | None, device: torch.device) -> str:
    """The backend that runs `family` on `device`: `requested`, or the device's default where it is None.

    The default is the preferred one of the device if that can run there, else `torch`.
    Raises ValueError for a name that is not registered, BackendUnavailable where the named backend cannot run.

    >>> select_backend("gtpo_loss", None, torch.device("cpu"))   # 'torch' without the compiled module
    'cpp'
    """
    name = default_backend(family, device) if requested is None else requested
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    backend = BACKENDS[name]
    if family not in backend.families:
        raise BackendUnavailable(f"backend={name!r} has no kernel for {family}")
    reason = backend.why_unavailable(device)
    if reason is not None:
        raise BackendUnavailable(f"backend={name!r} {reason}")
    return name


def default_backend(family: str, device: torch.device) -> str:
    """The preferred backend of the device where it has a kernel for `family` and can run, else DEFAULT_BACKEND."""
    name = PREFERRED_BACKEND.get(device.type, DEFAULT_BACKEND)
    backend = BACKENDS[name]
    can_run = family in backend.families and backend.why_unavailable(device) is None
    return name if can_run else DEFAULT_BACKEND


def run_kernel(family: str, backend: str, function: str, device: torch.device, *args: Any) -> Any:
    """Call `function` of the family's kernel file, outside autocast: an op states its own dtypes."""
    module = importlib.import_module(f"gtpo_kernels.{family}.kernel_{backend}")
    with torch.autocast(device.type, enabled=False):
        return getattr(module, function)(*args)
