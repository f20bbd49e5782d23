"""The python tool: runs a cell in a trajectory's sandbox session."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from gtpo.sandbox.code_tools import CodeTools
from gtpo.tools.base import NO_OUTPUT
from gtpo.tools.signature import CallSignature
from gtpo.tools.toolbox import Toolbox
from gtpo.types import ToolCall, ToolResult, ToolStatus

if TYPE_CHECKING:
    from gtpo.sandbox import CellResult, SandboxSession, Session

# by the name of the state that a cell left its session in
_NOTES = {
    "KEPT": "",
    "ROLLED_BACK": "All variables are as they were before this call.",
    "LOST": "The interpreter was restarted: all variables are lost.",
}
# of what a tool said to code, for the record
_MAX_KEPT_CHARS = 1000


@functools.cache
def _python_signature() -> CallSignature:
    def python(code: str) -> str:
        """Run Python code. Variables are kept between calls. Only what is printed is returned.

        Args:
            code: The Python source to run.
        """
        raise NotImplementedError

    return CallSignature(python)


def python_schema(tools: Sequence[Mapping[str, Any]] = ()) -> Mapping[str, Any]:
    """The JSON schema of the python tool, the same for all sessions. `tools`: schemas of those that code can call."""
    schema = _python_signature().schema
    if not tools:
        return schema
    function = schema["function"]
    calls = ", ".join(f"{tool['function']['name']}({', '.join(parameters_of(tool))})" for tool in tools)
    text = f"{function['description']} The code can call these tools as functions, which return text: {calls}."
    return {**schema, "function": {**function, "description": text}}


class PythonTool:
    """Runs `code` in `session`; the model reads what was printed, and the error without its traceback.

    max_code_calls: calls of lent tools that one cell may make.
    An infrastructure error keeps its status, so that the rollout can mark the trajectory as lost; that of a tool which
    the code called is one of the whole call.
    """

    name = "python"

    def __init__(self, session: "Session", *, max_code_calls: int = 20) -> None:
        self._session = session
        self._max_code_calls = max_code_calls
        self._lent: Toolbox | None = None

    @property
    def schema(self) -> Mapping[str, Any]:
        return python_schema()

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            parsed = _python_signature().parse(arguments)
        except ValueError as fault:
            return ToolResult(ToolStatus.ERROR, str(fault))
        if self._lent is None:
            return _result_of(await self._session.run(parsed["code"]))
        return await self._run_with_tools(parsed["code"], self._lent)

    def lend(self, tools: Toolbox) -> None:
        """Let the code call `tools` as functions. The session must be one of `gtpo.sandbox`, not of an adapter."""
        self._lent = tools

    async def _run_with_tools(self, code: str, toolbox: Toolbox) -> ToolResult:
        calls: list[tuple[str, ToolResult]] = []

        async def call(name: str, arguments: Mapping[str, Any]) -> tuple[bool, str]:
            (result,) = await toolbox.execute([ToolCall(name, arguments)])
            # The code has the text, and says what the model reads of it.
            calls.append((name, replace(result, text=result.text[:_MAX_KEPT_CHARS])))
            return result.status is ToolStatus.OK, result.text

        parameters = {name: parameters_of(schema) for name, schema in toolbox.by_name.items()}
        tools = CodeTools(parameters, call, max_calls=self._max_code_calls)
        session = cast("SandboxSession", self._session)
        result = replace(_result_of(await session.run(code, tools=tools)), calls=tuple(calls))
        faults = [inner.text for _, inner in calls if inner.status is ToolStatus.INFRA_ERROR]
        return replace(result, status=ToolStatus.INFRA_ERROR, text=faults[0]) if faults else result


def _result_of(cell: "CellResult") -> ToolResult:
    # each way that a cell can end is a way that a call can end, under the same name
    return ToolResult(ToolStatus[cell.status.name], observation_of(cell), seconds=cell.wall_time_s)


def parameters_of(schema: Mapping[str, Any]) -> list[str]:
    """The names of a tool's parameters, in the order of its schema."""
    return list(schema["function"]["parameters"].get("properties", {}))


def observation_of(result: "CellResult") -> str:
    """What the model reads of a cell: its output (the sandbox notes a cut), the error, what became of its variables."""
    parts = [result.stdout.rstrip(), result.error.strip(), _NOTES[result.state.name]]
    return "\n".join(part for part in parts if part) or NO_OUTPUT
