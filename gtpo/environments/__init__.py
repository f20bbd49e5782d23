"""Multi-turn tool tasks. `make_environment("retry", num_items=3)` builds one by name; `Mixture` draws from several."""

import inspect
from collections.abc import Callable
from typing import Any

from gtpo.environments.base import Answer, Call, Demonstration, Environment, GeneratedEnvironment, Split
from gtpo.environments.checked import CheckedEnvironment, EnvironmentFault
from gtpo.environments.jsonl import JsonlEnvironment
from gtpo.environments.mixture import Mixture
from gtpo.environments.programs import ProgramCase, passes, program_of
from gtpo.environments.reasoning import ReasoningGymEnvironment
from gtpo.environments.retry import RetryEnvironment

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "retry": RetryEnvironment,
    "reasoning_gym": ReasoningGymEnvironment,
    "jsonl": JsonlEnvironment,
}

__all__ = [
    "ENVIRONMENTS",
    "Answer",
    "Call",
    "CheckedEnvironment",
    "Demonstration",
    "Environment",
    "EnvironmentFault",
    "GeneratedEnvironment",
    "JsonlEnvironment",
    "Mixture",
    "ProgramCase",
    "ReasoningGymEnvironment",
    "RetryEnvironment",
    "Split",
    "make_environment",
    "passes",
    "program_of",
]


def make_environment(name: str, /, **options: Any) -> Environment:
    """The environment registered as `name`. Raises ValueError for an unknown name, an unknown or a missing option.

    >>> make_environment("retry", num_items=3).tasks("train", 1, seed=0)[0].prompt
    'get toy, rope, lamp'
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"environment must be one of {', '.join(sorted(ENVIRONMENTS))}, got {name!r}")
    factory = ENVIRONMENTS[name]
    signature = inspect.signature(factory)
    unknown = sorted(set(options) - set(signature.parameters))
    if unknown:
        expected = ", ".join(signature.parameters) or "none"
        raise ValueError(f"options of environment '{name}' must be among {expected}, got {', '.join(unknown)}")
    required = {key for key, parameter in signature.parameters.items() if parameter.default is inspect.Parameter.empty}
    if missing := sorted(required - set(options)):
        raise ValueError(f"environment '{name}' needs the options {', '.join(missing)}, got {sorted(options)}")
    return factory(**options)
