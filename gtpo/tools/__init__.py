"""Tools that a model can call. A `Toolbox` of a `PythonTool` and `FunctionTool`s serves one trajectory."""

from gtpo.tools.arithmetic import calculator
from gtpo.tools.base import NO_OUTPUT, Tool
from gtpo.tools.function import FunctionTool
from gtpo.tools.python import PythonTool, python_schema
from gtpo.tools.registry import TOOLS, ToolFactory, named_tools
from gtpo.tools.toolbox import Toolbox

__all__ = [
    "NO_OUTPUT",
    "TOOLS",
    "FunctionTool",
    "PythonTool",
    "Tool",
    "ToolFactory",
    "Toolbox",
    "calculator",
    "named_tools",
    "python_schema",
]
