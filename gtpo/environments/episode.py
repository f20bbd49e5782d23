"""What the model talks to: an episode is the world of one trajectory, with its prompt, its tools and its state.

`Episode` is the protocol of coroutines; `BlockingEpisode` is the same with plain methods, for worlds that may block
(a simulator, a database): the rollout runs all of one such episode in a thread of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from gtpo.tools import ToolUnavailable
from gtpo.types import Message, ToolCall, ToolResult, ToolSchema, Trajectory, Turn


class EpisodeLost(ToolUnavailable):
    """The world died through no fault of the model: its trajectory is lost, and neither rewarded nor punished."""


@dataclass(frozen=True)
class Reply:
    """What a turn brings about.

    results: one for each call of the turn, in their order. messages: what is said next, after the tools' output: a user
    who answers. rewards: named terms of this turn, each logged and added to its reward. tools: those that are new from
    here on; the model reads their schemas in a message. done: the episode is over. as_expected: whether the tools gave
    what the task expects, None where it does not say. calls: where the environment reads actions of its own out of the
    turn's text, those that it read; None leaves what the chat read.
    A reply that is not done holds a result, a message or a tool: something for the model to read.
    """

    results: Sequence[ToolResult] = ()
    messages: Sequence[Message] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    tools: Sequence[ToolSchema] = ()
    done: bool = False
    as_expected: bool | None = None
    calls: Sequence[ToolCall] | None = None


@dataclass(frozen=True)
class Grade:
    """What a whole trajectory is worth: `outcome` in [0, 1], and whatever else was measured, by name."""

    outcome: float
    measures: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Episode(Protocol):
    """messages: the prompt: at most one system message, first; at least one of the user. tools: of this task.

    step: what a turn brings about, called once for every turn that was not cut short, calls or not. grade: called once,
    after the last turn. close: called once, whatever happened. Raise EpisodeLost where the world died; ConnectionError
    (a broken pipe too), EOFError and TimeoutError count as that. Any other exception is a fault of the environment and
    ends the run.
    """

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Sequence[ToolSchema]: ...

    async def step(self, turn: Turn) -> Reply: ...

    async def grade(self, trajectory: Trajectory) -> Grade: ...

    async def close(self) -> None: ...


class BlockingEpisode(Protocol):
    """`Episode` with plain methods, which may block."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Sequence[ToolSchema]: ...

    def step(self, turn: Turn) -> Reply: ...

    def grade(self, trajectory: Trajectory) -> Grade: ...

    def close(self) -> None: ...
