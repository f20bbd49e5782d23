"""The kinds of tools that a configuration can name, and the tools that a run builds from it."""

import asyncio
import builtins
import dataclasses
import keyword
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtpo.tools.arithmetic import calculator
from gtpo.tools.base import Tool
from gtpo.tools.function import FunctionTool, function_source
from gtpo.tools.http_api import http_api_source
from gtpo.tools.mcp_client import mcp_source
from gtpo.tools.python import PythonTool, python_schema
from gtpo.tools.search import search_source
from gtpo.tools.signature import KeywordCheck
from gtpo.tools.source import ToolSource, shared
from gtpo.tools.sql import sql_source
from gtpo.tools.toolbox import CallGate, CallLimits, Toolbox

if TYPE_CHECKING:
    from gtpo.sandbox import Session


def _python_source(name: str, *, code_mode: bool = False, max_code_calls: int = 20) -> ToolSource:
    """The tool of kind "python". code_mode: the code can call the other tools of the run as functions, up to
    `max_code_calls` times a cell."""
    if max_code_calls < 1:
        raise ValueError(f"max_code_calls must be at least 1, got {max_code_calls}")
    if name != "python":
        raise ValueError(f'a tool of kind "python" must be called "python", got {name!r}')

    def make(session: "Session | None") -> Sequence[Tool]:
        if session is None:
            raise ValueError('the tool "python" needs a session in a sandbox, got none')
        return [PythonTool(session, max_code_calls=max_code_calls)]

    return ToolSource([python_schema()], make, needs_session=True, code_mode=code_mode)


def _calculator_source(name: str) -> ToolSource:
    return shared(FunctionTool(calculator, name=name))


# A kind takes the tool's name and, as typed keywords, the options of its table.
TOOL_KINDS: dict[str, Callable[..., ToolSource]] = {
    "python": _python_source,
    "calculator": _calculator_source,
    "search": search_source,
    "sql": sql_source,
    "http_api": http_api_source,
    "mcp": mcp_source,
    "function": function_source,
}

_LIMITS = frozenset(entry.name for entry in dataclasses.fields(CallLimits))


class ToolSet:
    """The tools of a run. `toolbox` gives a trajectory its own.

    names: the entries of `rollout.tools`. tables: for an entry its table `[tools.NAME]`: `kind` (the name, if left
    out), the limits of `CallLimits`, and the options of the kind.
    In code mode a tool must have a name that code can call and that is not one of Python's builtins.
    Raises ValueError, and ImportError where a package is missing, with the table's name; nothing is left running then.

    >>> tools = ToolSet(["sums"], {"sums": {"kind": "calculator", "max_calls": 2}})
    >>> tools.names, tools.needs_session
    (['sums'], False)
    >>> ToolSet(["calculator"], {"calculator": {"digits": 3}})
    Traceback (most recent call last):
    ValueError: tools.calculator: unexpected option 'digits', known are max_calls, max_concurrent, ...
    """

    def __init__(self, names: Sequence[str], tables: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._sources: list[tuple[ToolSource, CallLimits, asyncio.Semaphore | None]] = []
        tables = tables or {}
        if unused := [name for name in tables if name not in names]:
            raise ValueError(f"tools.{unused[0]} is not offered: rollout.tools must hold {unused[0]!r}, got {[*names]}")
        try:
            for name in names:
                source, limits = _build(name, tables.get(name, {}))
                num_slots = limits.max_concurrent or source.max_concurrent
                slots = None if num_slots is None else asyncio.Semaphore(num_slots)
                self._sources.append((source, limits, slots))
            if twice := sorted({tool for tool in self.names if self.names.count(tool) > 1}):
                raise ValueError(f"tools must have different names, got {', '.join(twice)} twice")
            if self.code_mode:
                _check_callable(self.names)
        except BaseException:
            self.stop()
            raise

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The JSON schemas of all tools, in their order."""
        return [
            dict(schema)
            for source, _, _ in self._sources
            for schema in ([python_schema(self.lent_schemas)] if source.code_mode else source.schemas)
        ]

    @property
    def lent_schemas(self) -> list[Mapping[str, Any]]:
        """Of the tools that code in the sandbox can call."""
        if not self.code_mode:
            return []
        return [schema for source, _, _ in self._sources if not source.code_mode for schema in source.schemas]

    @property
    def names(self) -> list[str]:
        """The names that the model calls the tools by, in their order."""
        return [name for source, _, _ in self._sources for name in source.names]

    @property
    def needs_session(self) -> bool:
        """Whether one of the tools runs code in the sandbox."""
        return any(source.needs_session for source, _, _ in self._sources)

    @property
    def code_mode(self) -> bool:
        """Whether code in the sandbox calls the other tools."""
        return any(source.code_mode for source, _, _ in self._sources)

    def toolbox(self, session: "Session | None") -> Toolbox:
        """The tools of one trajectory, whose calls are counted from zero."""
        tools: list[Tool] = []
        gates: dict[str, CallGate] = {}
        for source, limits, slots in self._sources:
            gate = CallGate(limits, slots)
            tools += source.make(session)
            gates |= dict.fromkeys(source.names, gate)
        if self.code_mode:
            # through the same gates: a call counts the same, wherever it comes from
            lent = Toolbox([tool for tool in tools if not isinstance(tool, PythonTool)], gates)
            for tool in tools:
                if isinstance(tool, PythonTool):
                    tool.lend(lent)
        return Toolbox(tools, gates, session=session)

    async def close(self) -> None:
        """Gives back what the tools hold: connections, processes. Closing twice is harmless."""
        sources, self._sources = self._sources, []
        for source, _, _ in sources:
            await source.close()

    def stop(self) -> None:
        """`close` for tools that no event loop has called yet."""
        # in a thread, since the caller may be inside a loop
        closing = threading.Thread(target=lambda: asyncio.run(self.close()))
        closing.start()
        closing.join()


def _check_callable(names: Sequence[str]) -> None:
    """Raises ValueError for a tool that code could not call by its name, or whose name means something else there."""
    for name in names:
        if name != "python" and (not name.isidentifier() or keyword.iskeyword(name)):
            raise ValueError(f"tools.python.code_mode: a tool's name must be one that code can call, got {name!r}")
        if hasattr(builtins, name) or name in ("ToolError", "__cell__"):
            raise ValueError(f"tools.python.code_mode: a tool must not have the name of a Python builtin, got {name!r}")


def _build(name: str, table: Mapping[str, Any]) -> tuple[ToolSource, CallLimits]:
    kind = table.get("kind", name)
    if kind not in TOOL_KINDS:
        known = ", ".join(TOOL_KINDS)
        hint = "" if "kind" in table else f', or have a table [tools.{name}] with "kind" among them'
        what = f"tools.{name}.kind" if "kind" in table else "rollout.tools"
        raise ValueError(f"{what} must be among {known}{hint}; got {kind!r}")
    options = {key: value for key, value in table.items() if key != "kind"}
    try:
        options = KeywordCheck(TOOL_KINDS[kind], CallLimits, noun="option", without=("name",)).parse(options)
        limits = CallLimits(**{key: options.pop(key) for key in _LIMITS & options.keys()})
        source = TOOL_KINDS[kind](name=name, **options)
        if source.needs_session and limits.retries:
            raise ValueError(f"retries must be 0, since the sandbox itself tries a cell again; got {limits.retries}")
        return source, limits
    except (ValueError, OSError) as error:
        raise ValueError(f"tools.{name}: {error}") from error
    except ImportError as error:
        raise ImportError(f"tools.{name}: {error}") from error
