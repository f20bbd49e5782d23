"""Episodes with state of their own: tools of the task, users who answer, new tools, worlds that block and that die."""

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gtpo.chat import Chat
from gtpo.config import RolloutConfig
from gtpo.environments import (
    Environment,
    EnvironmentFault,
    Episode,
    EpisodeLost,
    FunctionEpisode,
    Grade,
    Reply,
)
from gtpo.policy import Policy
from gtpo.sandbox import SandboxPool
from gtpo.tools import RunTools
from gtpo.types import Message, StopReason, Task, ToolResult, ToolStatus, Trajectory, Turn
from tests.trainer.conftest import make_rollout, policy, python, script  # noqa: F401

TASK = Task(id="t", environment="till", prompt="Put 4 coins in.", answer="4")


class Till(FunctionEpisode):
    """A till that must hold 4; its tools are those of the task."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.prompt, system="Use the till.", functions=[self.put, self.look])
        self.total = 0
        self.threads: list[int] = [threading.get_ident()]
        self.closed = False

    def put(self, coins: int) -> str:
        """Puts coins in.

        Args:
            coins: How many.
        """
        self.threads.append(threading.get_ident())
        if coins < 0:
            raise ValueError("no coins to take")
        self.total += coins
        self.reward("useful", 1.0 if self.total <= 4 else -1.0)
        if self.total > 9:
            self.finish()
        return f"{self.total} inside"

    def look(self) -> int:
        """How many coins are inside."""
        return self.total

    def grade(self, trajectory: Trajectory) -> Grade:
        self.threads.append(threading.get_ident())
        return Grade(min(self.total / 4, 1.0) if self.total <= 4 else 0.0, {"total": self.total})

    def close(self) -> None:
        self.threads.append(threading.get_ident())
        self.closed = True


class TillEnvironment(Environment):
    name = "till"

    def __init__(self, make: Callable[[Task], Any] = Till, **attributes: Any) -> None:
        self.opened: list[Any] = []
        self._make = make
        vars(self).update(attributes)

    def tasks(self, split: str, num: int, seed: int) -> list[Task]:
        return [TASK] * num

    def open(self, task: Task, *, sample: int, tools: RunTools) -> Any:
        self.opened.append(self._make(task))
        return self.opened[-1]


def played(policy: Policy, environment: Environment, *scripts: Sequence[str], **config: Any) -> list[Trajectory]:  # noqa: F811
    rollout_config = RolloutConfig(
        **({"max_trajectory_tokens": 6000, "max_completion_tokens": 500, "call_format": "json"} | config)
    )
    chat = Chat(policy.tokenizer, call_format=rollout_config.call_format)

    async def run(sandbox: SandboxPool | None) -> list[Trajectory]:
        rollout = make_rollout(environment, chat, sandbox, rollout_config)
        plays = [rollout.play(TASK, sample, script(chat, texts)) for sample, texts in enumerate(scripts)]
        return await asyncio.gather(*plays)

    async def with_sandbox() -> list[Trajectory]:
        async with SandboxPool(min_tier="landlock") as pool:
            return await run(pool)

    return asyncio.run(with_sandbox() if rollout_config.call_format == "code" else run(None))


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_a_world_with_tools_of_its_own_keeps_its_state(policy: Policy) -> None:  # noqa: F811
    environment = TillEnvironment()
    texts = [call("put", coins=1), call("put", coins="x") + call("take"), call("put", coins=2), "answer: done"]
    (trajectory,) = played(policy, environment, texts)
    assert "put" in (shown := policy.tokenizer.decode(trajectory.prompt_ids)) and "python" not in shown
    assert [[result.text for result in turn.results] for turn in trajectory.turns] == [
        ["1 inside"],
        [
            "put: argument 'coins': input should be a valid integer, got 'x'",
            "Unknown tool 'take'. Known tools: put, look.",
        ],
        ["3 inside"],
        [],
    ]
    assert [dict(turn.rewards) for turn in trajectory.turns] == [{"useful": 1.0}, {}, {"useful": 1.0}, {}]
    assert (trajectory.outcome, dict(trajectory.measures), trajectory.stop) == (
        0.75,
        {"total": 3.0},
        StopReason.FINISHED,
    )
    assert trajectory.num_invalid_calls == 1


def test_two_trajectories_do_not_see_each_other(policy: Policy) -> None:  # noqa: F811
    texts = [call("put", coins=2), call("look"), "answer: done"]
    both = played(policy, TillEnvironment(), texts, texts)
    assert [[turn.results[0].text for turn in one.turns[:2]] for one in both] == [["2 inside", "2"]] * 2


def test_a_world_that_ends_itself_ends_the_trajectory(policy: Policy) -> None:  # noqa: F811
    (trajectory,) = played(policy, TillEnvironment(), [call("put", coins=99)])
    assert (trajectory.stop, len(trajectory.turns), trajectory.outcome) == (StopReason.FINISHED, 1, 0.0)
    assert trajectory.turns[0].tool_ids == []


def test_a_blocking_world_has_one_thread_which_is_not_the_loops(policy: Policy) -> None:  # noqa: F811
    environment = TillEnvironment()
    played(policy, environment, [call("put", coins=1), "answer: done"], [call("put", coins=1), "answer: done"])
    threads = [set(episode.threads) for episode in environment.opened]
    assert all(len(found) == 1 for found in threads) and threads[0] != threads[1]
    assert threading.get_ident() not in threads[0] | threads[1]
    assert all(len(episode.threads) == 4 and episode.closed for episode in environment.opened)


def test_code_calls_the_tools_of_the_task(policy: Policy) -> None:  # noqa: F811
    texts = [
        python("for n in (1, 2):\n    print(put(n))"),
        python("try:\n    put(-1)\nexcept ToolError as error:\n    print(error)"),
        python("print(put(99)); look()"),
    ]
    environment = TillEnvironment()
    (trajectory,) = played(policy, environment, texts, call_format="code")
    shown = policy.tokenizer.decode(trajectory.prompt_ids)
    assert "- put(coins: integer): Puts coins in." in shown and "- look(): How many coins are inside." in shown
    first, second, third = (turn.results[0] for turn in trajectory.turns)
    assert first.text == "1 inside\n3 inside" and [name for name, _ in first.calls] == ["put", "put"]
    assert second.text == "ValueError: no coins to take"
    assert (third.status, third.text.splitlines()[-1]) == (ToolStatus.ERROR, "ToolError: look: the task is over")
    assert dict(trajectory.turns[0].rewards) == {"useful": 2.0}
    assert (trajectory.stop, environment.opened[0].total) == (StopReason.FINISHED, 102)


SCHEMA = {
    "type": "function",
    "function": {"name": "open_box", "description": "Opens it.", "parameters": {"type": "object", "properties": {}}},
}


class Talk:
    """A user who answers twice, and hands over a tool with the first word."""

    messages = (Message("user", "Hello"),)
    tools: Sequence[Any] = ()

    def __init__(self, task: Task) -> None:
        self.heard: list[str] = []

    async def step(self, turn: Turn) -> Reply:
        self.heard.append(turn.text)
        if turn.calls:
            return Reply(
                results=[ToolResult(ToolStatus.OK, f"{call.name} is open") for call in turn.calls],
                messages=[Message("user", "Well?")],
            )
        if len(self.heard) == 1:
            return Reply(messages=[Message("user", "Here is a key.")], tools=[SCHEMA])
        return Reply(done=True)

    async def grade(self, trajectory: Trajectory) -> Grade:
        return Grade(float(len(self.heard) == 3))

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("call_format", ["json", "code"])
def test_a_user_answers_and_tools_appear_as_text(policy: Policy, call_format: str) -> None:  # noqa: F811
    opened = call("open_box") if call_format == "json" else python("print(open_box())")
    environment = TillEnvironment(Talk, blocks=False)
    (trajectory,) = played(policy, environment, ["Hi", opened, "Fine"], call_format=call_format)
    first = policy.tokenizer.decode(trajectory.turns[0].tool_ids)
    assert "Here is a key." in first and "New tools:" in first and "open_box" in first
    second = policy.tokenizer.decode(trajectory.turns[1].tool_ids)
    assert second.index("open_box is open") < second.index("Well?")
    assert (trajectory.stop, trajectory.outcome, len(trajectory.turns)) == (StopReason.FINISHED, 1.0, 3)


class Dying(Till):
    def __init__(self, task: Task, death: BaseException, where: str) -> None:
        super().__init__(task)
        self.death, self.where = death, where

    def step(self, turn: Turn) -> Reply:
        if self.where == "step" and self.total:
            raise self.death
        return super().step(turn)

    def grade(self, trajectory: Trajectory) -> Grade:
        if self.where == "grade":
            raise self.death
        return super().grade(trajectory)

    def close(self) -> None:
        if self.where == "close":
            raise self.death


DEATHS = [EpisodeLost("the JVM is gone"), BrokenPipeError(32, "Broken pipe"), EOFError("no more lines")]


@pytest.mark.parametrize("where", ["step", "grade"])
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
def test_a_world_that_dies_loses_its_trajectory_alone(policy: Policy, death: Exception, where: str) -> None:  # noqa: F811
    worlds = iter([lambda task: Dying(task, death, where), Till])
    environment = TillEnvironment(lambda task: next(worlds)(task))
    texts = [call("put", coins=4), call("look"), "answer: done"]
    # which of the two opens first is not said
    lost, other = sorted(played(policy, environment, texts, texts), key=lambda one: one.stop is not StopReason.LOST)
    assert lost.stop is StopReason.LOST and str(death) in lost.lost_because and "till" in lost.lost_because
    assert (other.stop, other.outcome) == (StopReason.FINISHED, 1.0)


def test_a_world_that_dies_as_it_is_closed_keeps_its_grade(policy: Policy) -> None:  # noqa: F811
    environment = TillEnvironment(lambda task: Dying(task, BrokenPipeError("gone"), "close"))
    (trajectory,) = played(policy, environment, [call("put", coins=4), "answer: done"])
    assert (trajectory.stop, trajectory.outcome) == (StopReason.FINISHED, 1.0)


def test_a_world_that_hangs_loses_its_trajectory_and_holds_nobody_up(policy: Policy) -> None:  # noqa: F811
    never = threading.Event()

    class Hanging(Till):
        def step(self, turn: Turn) -> Reply:
            never.wait()
            raise AssertionError

    worlds = iter([Hanging, Till])
    environment = TillEnvironment(lambda task: next(worlds)(task), timeout_s=0.2)
    both = played(policy, environment, *[[call("put", coins=4), "answer: done"]] * 2)
    lost, other = sorted(both, key=lambda one: one.stop is not StopReason.LOST)
    never.set()
    assert lost.stop is StopReason.LOST and "step: took longer than 0.2 seconds" in lost.lost_because
    assert (other.stop, other.outcome) == (StopReason.FINISHED, 1.0)


def test_no_more_worlds_are_open_than_allowed(policy: Policy) -> None:  # noqa: F811
    counts: list[int] = []

    class Counted(Till):
        num_open = 0

        def __init__(self, task: Task) -> None:
            super().__init__(task)
            Counted.num_open += 1
            counts.append(Counted.num_open)

        def close(self) -> None:
            Counted.num_open -= 1

    played(policy, TillEnvironment(Counted, max_open=2), *[[call("put", coins=1), "answer: done"]] * 6)
    assert len(counts) == 6 and max(counts) <= 2


class Wrong(Till):
    def __init__(self, task: Task, **gives: Any) -> None:
        super().__init__(task)
        self.gives = gives

    def step(self, turn: Turn) -> Any:
        return self.gives.get("step", super().step(turn))

    def grade(self, trajectory: Trajectory) -> Any:
        return self.gives.get("grade", super().grade(trajectory))


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ({"grade": None}, "grade must return a Grade, got None"),
        ({"grade": Grade(float("nan"))}, r"grade must give an outcome in \[0, 1\], got nan"),
        ({"grade": Grade(1.5)}, r"grade must give an outcome in \[0, 1\], got 1.5"),
        ({"grade": Grade("1")}, r"grade must give an outcome in \[0, 1\], got '1'"),  # type: ignore[arg-type]
        ({"grade": Grade(1.0, {"x": float("inf")})}, "grade must give finite numbers as measures, got x = inf"),
        ({"step": None}, "step must return a Reply, got None"),
        ({"step": Reply()}, "step must give a result for each of 1 calls, got 0"),
        ({"step": Reply(calls=())}, "step must be done or give the model something to read, got an empty Reply"),
        ({"step": Reply(calls=(), done=True, rewards={"x": None})}, "step must give finite numbers as rewards, got x"),
    ],
)
def test_what_an_environment_must_not_give_is_named(policy: Policy, gives: dict[str, Any], message: str) -> None:  # noqa: F811
    environment = TillEnvironment(lambda task: Wrong(task, **gives))
    with pytest.raises(EnvironmentFault, match=f"environment 'till', task 't': {message}"):
        played(policy, environment, [call("put", coins=1), "answer: done"])


def test_a_bug_of_an_environment_ends_the_run(policy: Policy) -> None:  # noqa: F811
    for bug in (KeyError("price"), StopIteration("no more")):
        environment = TillEnvironment(lambda task, bug=bug: Dying(task, bug, "grade"))
        with pytest.raises(EnvironmentFault, match="environment 'till', task 't': grade raised"):
            played(policy, environment, ["answer: done"])


def test_the_talk_is_an_episode() -> None:
    assert isinstance(Talk(TASK), Episode)
