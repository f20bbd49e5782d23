"""Reward terms of the user's own: a function of a trajectory, or of a whole group, that gives a float a turn."""

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gtpo.loading import load_object
from gtpo.types import RunFault, Trajectory


class RewardFault(RunFault):
    """A reward function raised, or gave something else than a finite float a turn. One line."""


@dataclass(frozen=True)
class RewardFunction:
    """One term: `function` of what `takes` says, times `weight`.

    takes: "trajectory": function(trajectory) gives a list, a float a turn; "group": function(group) gives one such list
    for each trajectory of the group, lost ones left out. options: further arguments, by name.

    >>> def short(trajectory, least):
    ...     return [float(len(turn.text) <= least) for turn in trajectory.turns]
    >>> from gtpo.types import Task, Turn
    >>> played = Trajectory(Task("t", "e", "?", "4"), 0, [1], [Turn([2], [0.0], "four"), Turn([2], [0.0], "4")])
    >>> RewardFunction("short", short, "trajectory", weight=0.5, options={"least": 1})([played])
    [[0.0, 0.5]]
    """

    name: str
    function: Callable[..., Any]
    takes: Literal["trajectory", "group"]
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, group: Sequence[Trajectory]) -> list[list[float]]:
        """The weighted term of every turn of every trajectory. Raises RewardFault, with the task, for what is wrong."""
        try:
            if self.takes == "group":
                found = self.function(group, **self.options)
            else:
                found = [self.function(trajectory, **self.options) for trajectory in group]
        # SystemExit too: a function that leaves the program must not end a run as if all were well
        except (Exception, SystemExit) as error:
            raise self._fault(group, f"raised {_described(error)}") from error
        if not _is_list(found) or len(found) != len(group):
            raise self._fault(group, f"must give a list for each of {len(group)} trajectories, got {_shown(found)}")
        weighted = []
        for trajectory, values in zip(group, found, strict=True):
            turns = len(trajectory.turns)
            floats = list(map(self._weighted, values)) if _is_list(values) else []
            if len(floats) != turns or None in floats:
                raise self._fault(group, f"must give a finite float for each of {turns} turns, got {_shown(values)}")
            weighted.append([value for value in floats if value is not None])
        return weighted

    def _weighted(self, value: object) -> float | None:
        """`value` times the weight; None where either is no finite number."""
        if not isinstance(value, numbers.Real):
            return None
        try:
            found = self.weight * float(value)
        except (OverflowError, TypeError, ValueError):
            return None
        return found if math.isfinite(found) else None

    def _fault(self, group: Sequence[Trajectory], what: str) -> RewardFault:
        task = f", task {group[0].task.id!r}" if group else ""
        return RewardFault(f"reward {self.name!r}{task}: {' '.join(what.split())}")


def load_reward_function(
    reference: str, *, name: str = "", weight: float = 1.0, options: Mapping[str, Any] | None = None
) -> RewardFunction:
    """The term that "file.py:name" or "package.module:name" defines; it is called like the function unless `name` says.

    The function's first parameter says what it takes: `trajectory` or `group`.
    Raises ValueError for another one, for options that it does not have and for those that it needs.
    """
    function = load_object(reference, what="function")
    if not callable(function):
        raise ValueError(f"function {reference!r} must name a function, found {function!r}")
    parameters = inspect.signature(function).parameters
    takes = next(iter(parameters), "")
    if takes not in ("trajectory", "group"):
        raise ValueError(
            f"function {reference!r} must take `trajectory` or `group` as its first parameter, got {takes or 'none'}"
        )
    options = dict(options or {})
    try:
        inspect.signature(function).bind(None, **options)
    except TypeError as error:
        raise ValueError(f"options of function {reference!r}: {error}") from None
    return RewardFunction(name or reference.rpartition(":")[2], function, takes, weight, options)  # type: ignore[arg-type]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shown(value: object) -> str:
    """`repr`, cut short; whatever a user's object does when it is asked."""
    try:
        return f"{value!r:.200}"
    except Exception as error:
        return f"a {type(value).__name__} whose repr raises {type(error).__name__}"


def _described(error: BaseException) -> str:
    """The exception with the place where it was raised."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
