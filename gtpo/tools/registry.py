"""The tools that a configuration can name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gtpo.tools.arithmetic import calculator
from gtpo.tools.base import Tool
from gtpo.tools.function import FunctionTool
from gtpo.tools.python import PythonTool, python_schema

if TYPE_CHECKING:
    from gtpo.sandbox import SandboxSession


@dataclass(frozen=True)
class ToolFactory:
    """A tool by its schema, and `make`, which gives that of one trajectory, with its session in the sandbox.

    needs_session: the tool runs code. `make` of any other takes None.
    """

    schema: Callable[[], Mapping[str, Any]]
    make: Callable[["SandboxSession | None"], Tool]
    needs_session: bool = False


def _make_python(session: "SandboxSession | None") -> Tool:
    if session is None:
        raise ValueError('the tool "python" needs a session in a sandbox, got none')
    return PythonTool(session)


TOOLS: dict[str, ToolFactory] = {
    "python": ToolFactory(python_schema, _make_python, needs_session=True),
    "calculator": ToolFactory(lambda: FunctionTool(calculator).schema, lambda _: FunctionTool(calculator)),
}


def named_tools(names: Sequence[str]) -> list[ToolFactory]:
    """The tools of these names, in order. Raises ValueError for an unknown one.

    >>> [tool.needs_session for tool in named_tools(["python", "calculator"])]
    [True, False]
    """
    for name in names:
        if name not in TOOLS:
            raise ValueError(f"rollout.tools must be among {', '.join(TOOLS)}, got {name!r}")
    return [TOOLS[name] for name in names]
