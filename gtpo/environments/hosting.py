"""Where episodes live during a rollout: away from the event loop where they block, bounded in number and in time.

What an episode gives is checked here, once: a dead world loses its trajectory, a faulty environment ends the run in one
line that names it and the task, and neither is ever a reward of 0.
"""

import asyncio
import contextlib
import inspect
import math
import numbers
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gtpo.daemon_thread import DaemonThread
from gtpo.environments.base import Environment
from gtpo.environments.checked import EnvironmentFault, cut, described, place
from gtpo.environments.episode import BlockingEpisode, Episode, EpisodeLost, Grade, Reply
from gtpo.environments.from_code import CalledFromCode
from gtpo.tools import RunTools, readable
from gtpo.types import Message, Task, ToolSchema, Trajectory, Turn

# how a process, a pipe or a server that is gone shows itself
_DEATHS = (EpisodeLost, ConnectionError, EOFError, TimeoutError)


class HostedEpisode:
    """An open episode as the rollout sees it: coroutines only, and nothing but valid replies and grades.

    Its coroutines raise EpisodeLost where the world died or hung, EnvironmentFault where the environment is at fault.
    """

    def __init__(self, episode: Episode | BlockingEpisode, call: "_Caller", *, explain_protocol: bool) -> None:
        self._episode = episode
        self._call = call
        self.explain_protocol = explain_protocol
        self.messages: Sequence[Message] = tuple(episode.messages)
        self.tools: Sequence[ToolSchema] = tuple(episode.tools)
        roles = [message.role for message in self.messages]
        if "user" not in roles or "system" in roles[1:]:
            raise call.fault("messages", f"must be at most one system message, then one of the user, got {roles}")

    async def step(self, turn: Turn) -> Reply:
        reply = await self._call("step", lambda: self._episode.step(turn))
        if not isinstance(reply, Reply):
            raise self._call.fault("step", f"must return a Reply, got {cut(repr(reply))}")
        num_calls, num_results = len(turn.calls if reply.calls is None else reply.calls), len(reply.results)
        if num_results != num_calls:
            raise self._call.fault("step", f"must give a result for each of {num_calls} calls, got {num_results}")
        if not (reply.done or reply.results or reply.messages or reply.tools):
            raise self._call.fault("step", "must be done or give the model something to read, got an empty Reply")
        if not isinstance(reply.as_expected, bool | None):
            raise self._call.fault("step", f"must give as_expected as True, False or None, got {reply.as_expected!r}")
        return replace(
            reply,
            results=[replace(result, text=readable(result.text)) for result in reply.results],
            messages=[replace(message, content=readable(message.content)) for message in reply.messages],
            rewards=self._numbers("step", "rewards", reply.rewards),
        )

    async def grade(self, trajectory: Trajectory) -> Grade:
        grade = await self._call("grade", lambda: self._episode.grade(trajectory))
        if not isinstance(grade, Grade):
            raise self._call.fault("grade", f"must return a Grade, got {cut(repr(grade))}")
        if not _is_number(grade.outcome) or not 0 <= grade.outcome <= 1:
            raise self._call.fault("grade", f"must give an outcome in [0, 1], got {cut(repr(grade.outcome))}")
        return Grade(float(grade.outcome), self._numbers("grade", "measures", grade.measures))

    def _numbers(self, method: str, what: str, values: Mapping[str, float]) -> dict[str, float]:
        for name, value in values.items():
            if not _is_number(value):
                raise self._call.fault(method, f"must give finite numbers as {what}, got {name} = {cut(repr(value))}")
        return {name: float(value) for name, value in values.items()}


class EpisodeHost:
    """Opens the episodes of a run's environments."""

    def __init__(self, environment_of: Callable[[Task], Environment], tools: RunTools) -> None:
        self._environment_of = environment_of
        self._tools = tools
        self._slots: dict[str, asyncio.Semaphore] = {}

    @contextlib.asynccontextmanager
    async def open(self, task: Task, *, sample: int) -> AsyncIterator[HostedEpisode | CalledFromCode]:
        """The world of one trajectory, closed at the end."""
        environment = self._environment_of(task)
        async with contextlib.AsyncExitStack() as stack:
            if environment.max_open is not None:
                slots = self._slots.setdefault(environment.name, asyncio.Semaphore(environment.max_open))
                await stack.enter_async_context(slots)
            thread = stack.enter_context(DaemonThread()) if environment.blocks else None
            call = _Caller(environment, task, thread)
            episode = await call("open", lambda: environment.open(task, sample=sample, tools=self._tools))
            stack.push_async_callback(_close, call, episode)
            hosted = HostedEpisode(episode, call, explain_protocol=environment.explain_protocol)
            if self._tools.call_format == "json" or environment.offers_run_tools:
                yield hosted
            else:
                called = CalledFromCode(hosted, self._tools, explain_protocol=environment.explain_protocol)
                stack.push_async_callback(called.close)
                yield called


class _Caller:
    """Calls an episode's methods: in its thread if it has one, within the time that its environment allows."""

    def __init__(self, environment: Environment, task: Task, thread: DaemonThread | None) -> None:
        self._environment = environment
        self._task = task
        self._thread = thread
        self._hangs = False

    async def __call__(self, method: str, work: Callable[[], Any]) -> Any:
        if self._hangs:
            raise EpisodeLost(f"{self.where(method)}: an earlier call still hangs")
        try:
            async with asyncio.timeout(self._environment.timeout_s):
                value = work() if self._thread is None else await self._thread.run(work)
                return await value if inspect.isawaitable(value) else value
        except EnvironmentFault:
            raise
        except _DEATHS as death:
            self._hangs = isinstance(death, TimeoutError)
            seconds = self._environment.timeout_s
            reason = str(death) or (f"took longer than {seconds:g} seconds" if seconds else type(death).__name__)
            raise EpisodeLost(f"{self.where(method)}: {reason}") from death
        except Exception as error:
            raise self.fault(method, f"raised {described(error)}") from error

    def fault(self, method: str, what: str) -> EnvironmentFault:
        return EnvironmentFault(f"{self.where(method)} {what}")

    def where(self, method: str) -> str:
        return place(self._task, method)


async def _close(call: _Caller, episode: Episode | BlockingEpisode) -> None:
    # the trajectory has its grade by now: a world that dies as it is closed takes nothing with it
    with contextlib.suppress(EpisodeLost):
        await call("close", episode.close)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
