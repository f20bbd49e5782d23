"""What keeps the packages from being imported on a CPU and Python 3.11, and has no part in what is tested here."""

import importlib.machinery
import sys
import typing
from types import ModuleType
from typing import Any

import typing_extensions

if sys.version_info < (3, 12):
    # SkyRL asks for 3.12, since pydantic refuses the TypedDict of 3.11
    typing.TypedDict = typing_extensions.TypedDict

# OpenRLHF imports them and CPUs lack them
ABSENT = ("flash_attn", "deepspeed", "vllm")


class Absent(importlib.machinery.SourceFileLoader):
    """Any module of an absent package, in which every name is None."""

    def __init__(self) -> None:
        super().__init__("", "")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: None  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None: ...

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, cls(), is_package=True)
        return None


sys.meta_path.append(Absent)  # type: ignore[arg-type]
