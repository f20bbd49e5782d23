"""The python tool: runs a cell in a trajectory's sandbox session."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gtpo.tools.base import NO_OUTPUT
from gtpo.tools.signature import CallSignature
from gtpo.types import ToolResult, ToolStatus

if TYPE_CHECKING:
    from gtpo.sandbox import CellResult, Session

# by the name of the state that a cell left its session in
_NOTES = {
    "KEPT": "",
    "ROLLED_BACK": "All variables are as they were before this call.",
    "LOST": "The interpreter was restarted: all variables are lost.",
}


@functools.cache
def _python_signature() -> CallSignature:
    def python(code: str) -> str:
        """Run Python code. Variables are kept between calls. Only what is printed is returned.

        Args:
            code: The Python source to run.
        """
        raise NotImplementedError

    return CallSignature(python)


def python_schema() -> Mapping[str, Any]:
    """The JSON schema of the python tool, the same for all sessions."""
    return _python_signature().schema


class PythonTool:
    """Runs `code` in `session`; the model reads what was printed, and the error without its traceback.

    An infrastructure error keeps its status, so that the rollout can mark the trajectory as lost.
    """

    name = "python"

    def __init__(self, session: "Session") -> None:
        self._session = session

    @property
    def schema(self) -> Mapping[str, Any]:
        return python_schema()

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            parsed = _python_signature().parse(arguments)
        except ValueError as fault:
            return ToolResult(ToolStatus.ERROR, str(fault))
        result = await self._session.run(parsed["code"])
        # each way that a cell can end is a way that a call can end, under the same name
        return ToolResult(ToolStatus[result.status.name], observation_of(result), seconds=result.wall_time_s)


def observation_of(result: "CellResult") -> str:
    """What the model reads of a cell: its output (the sandbox notes a cut), the error, what became of its variables."""
    parts = [result.stdout.rstrip(), result.error.strip(), _NOTES[result.state.name]]
    return "\n".join(part for part in parts if part) or NO_OUTPUT
