"""What one entry of `rollout.tools` brings to a run."""

import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gtpo.tools.base import Tool

if TYPE_CHECKING:
    from gtpo.sandbox import Session


async def _nothing() -> None:
    """Closes what holds nothing."""


@dataclass(frozen=True)
class ToolSource:
    """One or more tools, built once for a run.

    schemas: what the model reads of them. make: those of one trajectory, with its session in the sandbox.
    needs_session: the tools run code; `make` of any other takes None. code_mode: that code may call all other tools.
    max_concurrent: calls of all trajectories at once where the table does not say; None: no bound.
    close: gives back what the source holds.
    """

    schemas: Sequence[Mapping[str, Any]]
    make: Callable[["Session | None"], Sequence[Tool]]
    needs_session: bool = False
    code_mode: bool = False
    max_concurrent: int | None = None
    close: Callable[[], Awaitable[None]] = _nothing

    @property
    def names(self) -> list[str]:
        """The names that the model calls the tools by."""
        return [schema["function"]["name"] for schema in self.schemas]


def shared(
    *tools: Tool, max_concurrent: int | None = None, close: Callable[[], Awaitable[None]] = _nothing
) -> ToolSource:
    """The source of tools that keep nothing of a trajectory: all trajectories call the same ones."""
    return ToolSource([tool.schema for tool in tools], lambda _: tools, max_concurrent=max_concurrent, close=close)


def optional_package(module: str, *, tool: str) -> Any:
    """The imported `module`. Raises ImportError that names the `tool` which needs it and the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{tool} needs the package {package}, which is not installed: pip install 'gtpo[tools]'"
        ) from error
