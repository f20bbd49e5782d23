"""Plays scripted demonstrators against the real sandbox."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from gtpo.environments import Answer, Call, Demonstration, Environment
from gtpo.sandbox import SandboxPool
from gtpo.tools import PythonTool, Toolbox
from gtpo.types import Task, ToolCall, ToolResult
from tests.trainer.conftest import undrawn  # noqa: F401  runs of these tests draw none either

Demonstrator = Callable[[Task, random.Random], Demonstration]


@dataclass
class Episode:
    """What a demonstrator did on a task. `answer` is None when it ran out of turns."""

    task: Task
    codes: list[str] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    answer: str | None = None


async def _play_one(
    pool: SandboxPool, environment: Environment, task: Task, demonstration: Demonstration, max_turns: int
) -> Episode:
    episode = Episode(task)
    session = await pool.open(environment.setup_code(task))
    toolbox = Toolbox([PythonTool(session)])
    action = next(demonstration)
    for _ in range(max_turns):
        if isinstance(action, Answer):
            episode.answer = action.text
            break
        (result,) = await toolbox.execute([ToolCall("python", {"code": action.code})])
        episode.codes.append(action.code)
        episode.results.append(result)
        action = demonstration.send(result.text)
    await session.close()
    return episode


Play = Callable[..., list[Episode]]


@pytest.fixture
def play() -> Play:
    """play(environment, tasks, demonstrator=environment.oracle, max_turns=6): one episode a task."""

    def play_all(
        environment: Environment,
        tasks: Sequence[Task],
        demonstrator: Demonstrator | None = None,
        max_turns: int = 6,
    ) -> list[Episode]:
        demonstrator = demonstrator or environment.oracle

        async def run() -> list[Episode]:
            async with SandboxPool(min_tier="landlock") as pool:
                return await asyncio.gather(
                    *(
                        _play_one(pool, environment, task, demonstrator(task, random.Random(number)), max_turns)
                        for number, task in enumerate(tasks)
                    )
                )

        return asyncio.run(run())

    return play_all


@pytest.fixture
def run_cells(play: Play) -> Callable[[Environment, Task, Sequence[str]], list[ToolResult]]:
    """run_cells(environment, task, codes): the results of these cells in one session of the task."""

    def run(environment: Environment, task: Task, codes: Sequence[str]) -> list[ToolResult]:
        def demonstrate(task: Task, rng: random.Random) -> Demonstration:
            for code in codes:
                yield Call(code)
            yield Answer("")

        (episode,) = play(environment, [task], demonstrate, max_turns=len(codes) + 1)
        return episode.results

    return run
