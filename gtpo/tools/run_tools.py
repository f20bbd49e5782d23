"""What a run offers to each of its trajectories: the tools of its configuration, and the sandbox that code runs in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gtpo.tools.python import PythonTool, python_schema
from gtpo.tools.registry import ToolSet
from gtpo.tools.toolbox import Toolbox
from gtpo.types import ToolSchema

if TYPE_CHECKING:
    from gtpo.sandbox import Sandbox


@dataclass(frozen=True)
class RunTools:
    """tools: those of `rollout.tools`. sandbox: where their code runs; None where none of them runs code."""

    tools: ToolSet
    sandbox: "Sandbox | None" = None
    call_format: Literal["code", "json"] = "json"

    @property
    def schemas(self) -> Sequence[ToolSchema]:
        """What the model reads. In the format "code" those that its code can call are listed beside python."""
        if self.call_format == "code" and self.tools.code_mode:
            return [python_schema(), *self.tools.lent_schemas]
        return self.tools.schemas

    async def open(self, setup_code: str = "") -> Toolbox:
        """The tools of one trajectory; `setup_code` runs in its session first. Close it when the trajectory ends.

        Raises SandboxUnavailable or OSError where the sandbox has no session to give.
        """
        session = None
        if self.sandbox is not None and self.tools.needs_session:
            session = await self.sandbox.open(setup_code)
        return self.tools.toolbox(session)

    async def open_python(self, lent: Toolbox) -> Toolbox:
        """A python tool alone, whose code can call the tools `lent` as functions."""
        if self.sandbox is None:
            raise ValueError('tools that code calls need the tool "python" in rollout.tools')
        session = await self.sandbox.open("")
        python = PythonTool(session)
        python.lend(lent)
        return Toolbox([python], session=session)
