"""Foreign trainers imported on a CPU and Python 3.11: what keeps them from it has no part in what is called here."""

import importlib
import importlib.machinery
import importlib.util
import sys
import typing
from types import ModuleType
from typing import Any

# OpenRLHF imports them and CPUs lack them
ABSENT = ("flash_attn", "deepspeed", "vllm")


class AbsentPackages(importlib.machinery.SourceFileLoader):
    """Finds any module of an absent package, as one in which every name is None."""

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


def allow_foreign_imports() -> None:
    """For the rest of the process.  Doing it again changes nothing."""
    if sys.version_info < (3, 12):
        import typing_extensions

        # SkyRL asks for 3.12, since pydantic refuses the TypedDict of 3.11
        typing.TypedDict = typing_extensions.TypedDict
    if AbsentPackages not in sys.meta_path:
        sys.meta_path.append(AbsentPackages)  # type: ignore[arg-type]


def import_foreign(name: str) -> Any:
    """A module of a trainer.  Raises ImportError, and leaves imports as they are, where that is not installed."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"No module named {package!r}: `make test-adapters` installs it into .venv-adapters")
    allow_foreign_imports()
    return importlib.import_module(name)
