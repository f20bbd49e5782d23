"""Multi-turn tool tasks. `make_environment("retry", num_items=3)` builds one by name; `Mixture` draws from several."""

import inspect
from collections.abc import Callable
from typing import Any

from gtpo.environments.base import (
    Answer,
    Call,
    Demonstration,
    Environment,
    GeneratedEnvironment,
    Say,
    Split,
    Use,
    written,
)
from gtpo.environments.checked import EnvironmentFault
from gtpo.environments.code import CodeEnvironment
from gtpo.environments.episode import BlockingEpisode, Episode, EpisodeLost, Grade, Reply
from gtpo.environments.functions import FunctionEpisode
from gtpo.environments.hosting import EpisodeHost, HostedEpisode
from gtpo.environments.jsonl import JsonlEnvironment
from gtpo.environments.mixture import Mixture
from gtpo.environments.programs import ProgramCase, passes, program_of
from gtpo.environments.reasoning import ReasoningGymEnvironment
from gtpo.environments.retry import RetryEnvironment
from gtpo.loading import is_reference, load_object

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "retry": RetryEnvironment,
    "reasoning_gym": ReasoningGymEnvironment,
    "jsonl": JsonlEnvironment,
}

__all__ = [
    "ENVIRONMENTS",
    "Answer",
    "BlockingEpisode",
    "Call",
    "CodeEnvironment",
    "Demonstration",
    "Environment",
    "EnvironmentFault",
    "Episode",
    "EpisodeHost",
    "EpisodeLost",
    "FunctionEpisode",
    "GeneratedEnvironment",
    "Grade",
    "HostedEpisode",
    "JsonlEnvironment",
    "Mixture",
    "ProgramCase",
    "ReasoningGymEnvironment",
    "Reply",
    "RetryEnvironment",
    "Say",
    "Split",
    "Use",
    "make_environment",
    "passes",
    "program_of",
    "written",
]


def make_environment(name: str, /, **options: Any) -> Environment:
    """The environment registered as `name`, or the class of one that "file.py:Name" or "package.module:Name" names.

    Raises ValueError for an unknown name, an unknown or a missing option.

    >>> make_environment("retry", num_items=3).tasks("train", 1, seed=0)[0].prompt
    'get toy, rope, lamp'
    """
    factory = load_object(name, what="environment") if is_reference(name) else ENVIRONMENTS.get(name)
    if factory is None:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise ValueError(
            f'environment must be one of {known}, or "file.py:Name" or "package.module:Name" of your own; got {name!r}'
        )
    if not callable(factory):
        raise ValueError(f"environment {name!r} must be a class, got {factory!r}")
    signature = inspect.signature(factory)
    unknown = sorted(set(options) - set(signature.parameters))
    if unknown:
        expected = ", ".join(signature.parameters) or "none"
        raise ValueError(f"options of environment '{name}' must be among {expected}, got {', '.join(unknown)}")
    required = {key for key, parameter in signature.parameters.items() if parameter.default is inspect.Parameter.empty}
    if missing := sorted(required - set(options)):
        raise ValueError(f"environment '{name}' needs the options {', '.join(missing)}, got {sorted(options)}")
    if missing := sorted(getattr(factory, "__abstractmethods__", ())):
        raise ValueError(f"environment {name!r} lacks the methods {', '.join(missing)}")
    environment: Environment = factory(**options)
    if missing := [method for method in ("name", "tasks", "open") if not hasattr(environment, method)]:
        raise ValueError(f"environment {name!r} must have {', '.join(missing)}: derive it from gtpo.Environment")
    return environment
