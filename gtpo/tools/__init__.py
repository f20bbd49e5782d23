"""Tools that a model can call: a `ToolSet` is those of a run, its `toolbox` serves a trajectory. See docs/tools.md."""

from gtpo.tools.arithmetic import calculator
from gtpo.tools.base import NO_OUTPUT, Tool, ToolTimeout, ToolUnavailable
from gtpo.tools.function import FunctionTool
from gtpo.tools.python import PythonTool, python_schema
from gtpo.tools.registry import TOOL_KINDS, ToolSet
from gtpo.tools.run_tools import RunTools
from gtpo.tools.source import ToolSource, shared
from gtpo.tools.toolbox import CallGate, CallLimits, Toolbox, readable

__all__ = [
    "NO_OUTPUT",
    "TOOL_KINDS",
    "CallGate",
    "CallLimits",
    "FunctionTool",
    "PythonTool",
    "RunTools",
    "Tool",
    "ToolSet",
    "ToolSource",
    "ToolTimeout",
    "ToolUnavailable",
    "Toolbox",
    "calculator",
    "python_schema",
    "readable",
    "shared",
]
