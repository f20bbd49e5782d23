"""Tools of an episode in the call format "code": the model's Python calls them as functions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from gtpo.environments.episode import EpisodeLost, Grade, Reply
from gtpo.sandbox import SandboxUnavailable
from gtpo.tools import RunTools, Toolbox, python_schema
from gtpo.types import Message, ToolCall, ToolResult, ToolSchema, ToolStatus, Trajectory, Turn


class _Episode(Protocol):
    messages: Sequence[Message]
    tools: Sequence[ToolSchema]

    async def step(self, turn: Turn) -> Reply: ...

    async def grade(self, trajectory: Trajectory) -> Grade: ...


class CalledFromCode:
    """`episode`, played by code: each call that a cell makes is a step of the episode with that call alone.

    What those steps give beside their results (rewards, messages, tools, the end) comes with the reply to the turn.
    A turn without code is passed on as it is.
    """

    def __init__(self, episode: _Episode, tools: RunTools, *, explain_protocol: bool) -> None:
        self._episode = episode
        self._run_tools = tools
        self._python: Toolbox | None = None
        self._lent = Toolbox([_Lent(self, schema) for schema in episode.tools])
        self._made = Reply()
        self._fault: Exception | None = None
        self.explain_protocol = explain_protocol
        self.messages = episode.messages
        self.tools: Sequence[ToolSchema] = [python_schema(), *episode.tools]

    async def step(self, turn: Turn) -> Reply:
        if not turn.calls:
            reply = await self._episode.step(turn)
            self._lend(reply.tools)
            return reply
        self._made = Reply()
        try:
            if self._python is None:
                self._python = await self._run_tools.open_python(self._lent)
            results = await self._python.execute(turn.calls)
        except (SandboxUnavailable, OSError) as failure:
            raise EpisodeLost(f"sandbox failure: {failure}") from failure
        if self._fault is not None:
            raise self._fault
        self._lend(self._made.tools)
        return replace(self._made, results=results)

    def _lend(self, tools: Sequence[ToolSchema]) -> None:
        for schema in tools:
            self._lent.add(_Lent(self, schema))

    async def grade(self, trajectory: Trajectory) -> Grade:
        await self.close()
        return await self._episode.grade(trajectory)

    async def close(self) -> None:
        python, self._python = self._python, None
        if python is not None:
            await python.close()

    async def call(self, call: ToolCall) -> ToolResult:
        """One call that a cell made. A fault is kept for the turn: it must not pass through the cell."""
        if self._made.done:
            return ToolResult(ToolStatus.ERROR, f"{call.name}: the task is over")
        try:
            reply = await self._episode.step(Turn(completion_ids=[], rollout_logprobs=[], text="", calls=[call]))
        except Exception as fault:
            self._fault = fault
            return ToolResult(ToolStatus.INFRA_ERROR, str(fault))
        self._made = _both(self._made, reply)
        return reply.results[0]


def _both(first: Reply, second: Reply) -> Reply:
    """What two steps of one turn gave, but for their results. Rewards of one name add up."""
    verdicts = [reply.as_expected for reply in (first, second) if reply.as_expected is not None]
    rewards = dict(first.rewards)
    for term, value in second.rewards.items():
        rewards[term] = rewards.get(term, 0.0) + value
    return Reply(
        messages=[*first.messages, *second.messages],
        rewards=rewards,
        tools=[*first.tools, *second.tools],
        done=second.done,
        as_expected=all(verdicts) if verdicts else None,
    )


class _Lent:
    """A tool of the episode, as code calls it."""

    def __init__(self, player: CalledFromCode, schema: ToolSchema) -> None:
        self._player = player
        self.schema = schema
        self.name: str = schema["function"]["name"]

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        return await self._player.call(ToolCall(self.name, arguments))
