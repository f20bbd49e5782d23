"""Group Turn Policy Optimization: a trainer for multi-turn, tool-using language models. See docs/library.md.

What is named here is all that a program needs to train on tasks of its own; nothing heavy is imported before its use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtpo.callbacks import Callback
    from gtpo.config import Config, config_from_dict, load_config
    from gtpo.credit import Credit, Scored
    from gtpo.environments import (
        Answer,
        BlockingEpisode,
        Call,
        CodeEnvironment,
        Demonstration,
        Environment,
        Episode,
        EpisodeLost,
        FunctionEpisode,
        GeneratedEnvironment,
        Grade,
        Reply,
        Say,
        Use,
    )
    from gtpo.evaluation import Evaluation
    from gtpo.rewards import TurnRewards
    from gtpo.tools import RunTools
    from gtpo.trainer import Trainer
    from gtpo.types import Message, Task, ToolCall, ToolResult, ToolStatus, Trajectory, Turn

__version__ = "0.1.0"

_MODULE_OF = {
    "Callback": "gtpo.callbacks",
    "Credit": "gtpo.credit",
    "Evaluation": "gtpo.evaluation",
    "Scored": "gtpo.credit",
    "TurnRewards": "gtpo.rewards",
    **dict.fromkeys(("Config", "config_from_dict", "load_config"), "gtpo.config"),
    **dict.fromkeys(
        (
            *("Answer", "BlockingEpisode", "Call", "CodeEnvironment", "Demonstration", "Environment", "Episode"),
            *("EpisodeLost", "FunctionEpisode", "GeneratedEnvironment", "Grade", "Reply", "Say", "Use"),
        ),
        "gtpo.environments",
    ),
    "RunTools": "gtpo.tools",
    "Trainer": "gtpo.trainer",
    **dict.fromkeys(("Message", "Task", "ToolCall", "ToolResult", "ToolStatus", "Trajectory", "Turn"), "gtpo.types"),
}

__all__ = [
    "Answer",
    "BlockingEpisode",
    "Call",
    "Callback",
    "CodeEnvironment",
    "Config",
    "Credit",
    "Demonstration",
    "Environment",
    "Episode",
    "EpisodeLost",
    "Evaluation",
    "FunctionEpisode",
    "GeneratedEnvironment",
    "Grade",
    "Message",
    "Reply",
    "RunTools",
    "Say",
    "Scored",
    "Task",
    "ToolCall",
    "ToolResult",
    "ToolStatus",
    "Trainer",
    "Trajectory",
    "Turn",
    "TurnRewards",
    "Use",
    "config_from_dict",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gtpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
