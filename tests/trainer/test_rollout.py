"""Trajectories, played by a script in the model's place against the real tools in the real sandbox."""

import asyncio
import json

import pytest

from gtpo.chat import Chat
from gtpo.config import RolloutConfig
from gtpo.environments import EnvironmentFault
from gtpo.policy import Policy
from gtpo.sampler import Completion
from gtpo.sandbox import SandboxLimits, SandboxPool, SandboxSession, SandboxUnavailable
from gtpo.tools import PythonTool, ToolSet
from gtpo.types import StopReason, Task, ToolStatus, Trajectory
from tests.trainer.conftest import (
    TASK,
    SumEnvironment,
    make_chat,
    make_rollout,
    make_sampler,
    play_all,
    prompt,
    python,
    script,
)

QUICK = SandboxLimits(cpu_time_s=0.2, wall_time_s=5.0)


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_ids_are_prompt_completions_and_tool_ids(policy: Policy) -> None:
    config = RolloutConfig(max_trajectory_tokens=2000)
    chat = make_chat(policy, config)
    texts = [python("x = 2 + 2"), python("print(x)"), "answer: 4"]
    (trajectory,) = play_all(policy, [texts])
    first, second, third = (chat.completion_ids(text) for text in texts)
    glue = chat.reply_ids(["(no output)"]), chat.reply_ids(["4"])
    prompt_ids = chat.prompt_ids(prompt(SumEnvironment.system_prompt, TASK.prompt))
    assert trajectory.token_ids() == [*prompt_ids, *first, *glue[0], *second, *glue[1], *third]
    index = [-1] * len(prompt_ids) + [0] * len(first) + [-1] * len(glue[0]) + [1] * len(second)
    assert trajectory.turn_index_of_tokens() == index + [-1] * len(glue[1]) + [2] * len(third)
    assert (trajectory.outcome, trajectory.answer, trajectory.stop) == (1.0, "4", StopReason.FINISHED)
    assert [turn.as_expected for turn in trajectory.turns] == [False, True, None]


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("```python\nprint(1)", ToolStatus.MALFORMED, "a code block must open with"),
        (python("print(1); 1 / 0"), ToolStatus.ERROR, "1\nZeroDivisionError: division by zero"),
        (python("while True: pass"), ToolStatus.TIMEOUT, ""),
        (python("import os; os._exit(3)"), ToolStatus.CRASH, ""),
    ],
)
def test_what_goes_wrong_comes_back_as_a_message(policy: Policy, text: str, status: ToolStatus, message: str) -> None:
    (trajectory,) = play_all(policy, [[text, python("print(4)"), "answer: 4"]], limits=QUICK)
    (result,) = trajectory.turns[0].results
    assert result.status is status and result.text.startswith(message) and result.text
    shown = policy.tokenizer.decode(trajectory.turns[0].tool_ids)
    assert result.text in shown
    # and the run goes on, with a fresh interpreter where the old one died
    assert trajectory.turns[1].results[0].text == "4" and trajectory.outcome == 1.0
    assert trajectory.num_invalid_calls == (status is ToolStatus.MALFORMED) and trajectory.num_calls == 2


def test_json_calls_of_two_tools_and_of_an_unknown_one(policy: Policy) -> None:
    texts = [
        call("search", query="4"),
        call("calculator", expression="2 + 2") + call("python", code="print(2 * 2)"),
        call("calculator", wrong=1),
        "answer: 4",
    ]
    (trajectory,) = play_all(policy, [texts], call_format="json", tools=("python", "calculator"))
    results = [[(result.status, result.text) for result in turn.results] for turn in trajectory.turns]
    assert results[0] == [(ToolStatus.UNKNOWN_TOOL, "Unknown tool 'search'. Known tools: python, calculator.")]
    assert results[1] == [(ToolStatus.OK, "4"), (ToolStatus.OK, "4")]
    assert results[2][0][0] is ToolStatus.ERROR and "missing argument 'expression'" in results[2][0][1]
    assert (trajectory.outcome, trajectory.num_invalid_calls, trajectory.num_calls) == (1.0, 1, 4)


def test_calls_of_a_turn_are_bounded_and_the_model_reads_so(policy: Policy) -> None:
    """Twelve blocks in 290 characters cost what eight do, and the ninth result is for the model, not a fault."""
    blocks = "".join(f"```py\nprint({number})\n```\n" for number in range(12))
    (trajectory,) = play_all(policy, [[blocks, "answer: 4"]])
    *made, told = trajectory.turns[0].results
    assert [result.text for result in made] == [str(number) for number in range(8)]
    assert told.status is ToolStatus.OVER_QUOTA and "those after the first 8 were not made" in told.text
    assert trajectory.num_invalid_calls == 0 and trajectory.outcome == 1.0
    assert told.text in policy.tokenizer.decode(trajectory.turns[0].tool_ids)


def test_a_call_drafted_in_a_thought_is_not_made(policy: Policy) -> None:
    draft = f"<think>{python('print(1)')}\nanswer: 5</think>"
    (trajectory,) = play_all(policy, [[f"{draft}\n{python('print(4)')}", f"{draft}answer: 4"]])
    assert [[result.text for result in turn.results] for turn in trajectory.turns] == [["4"], []]
    assert (trajectory.answer, trajectory.outcome) == ("4", 1.0)


def test_a_trajectory_ends_at_max_turns(policy: Policy) -> None:
    (trajectory,) = play_all(policy, [[python("print(4)")]], max_turns=2)
    assert trajectory.stop is StopReason.MAX_TURNS and len(trajectory.turns) == 2
    assert trajectory.turns[-1].tool_ids == [] and trajectory.turns[-1].results[0].text == "4"
    assert (trajectory.answer, trajectory.outcome) == (None, 0.0)


def test_a_completion_cut_at_its_budget_is_truncated(policy: Policy) -> None:
    (trajectory,) = play_all(policy, [[python("print(4)"), "answer: 4 " + "x" * 99]], max_completion_tokens=40)
    assert trajectory.stop is StopReason.TRUNCATED and len(trajectory.turns[1].completion_ids) == 40
    # what it wrote before the cut is not read
    assert (trajectory.answer, trajectory.outcome) == (None, 0.0)


def test_tool_output_that_does_not_fit_truncates(policy: Policy) -> None:
    (trajectory,) = play_all(policy, [[python("print('y' * 900)"), "answer: 4"]], max_trajectory_tokens=400)
    assert trajectory.stop is StopReason.TRUNCATED and len(trajectory.turns) == 1
    assert trajectory.turns[0].tool_ids == [] and len(trajectory.token_ids()) <= 400


def test_tool_output_that_no_token_limit_could_hold_is_not_tokenized(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> list[int]:
        raise AssertionError("the output was tokenized")

    monkeypatch.setattr(Chat, "reply_ids", refuse)
    # no cell prints as much as no limit could hold, but a tool of another kind may
    monkeypatch.setattr("gtpo.rollout._MAX_CHARS_PER_TOKEN", 10)
    (trajectory,) = play_all(
        policy,
        [[python("print('y' * 15_000)"), "answer: 4"]],
        limits=SandboxLimits(output_bytes=16_000),
        max_trajectory_tokens=1000,
    )
    assert trajectory.stop is StopReason.TRUNCATED and trajectory.turns[0].tool_ids == []


def test_a_prompt_that_does_not_fit_is_an_error(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"prompt of task 't' has \d+ tokens; rollout\.max_trajectory_tokens"):
        play_all(policy, [["answer: 4"]], max_trajectory_tokens=20)


def test_a_fault_of_the_sandbox_costs_no_trajectory(policy: Policy) -> None:
    config = RolloutConfig(max_trajectory_tokens=2000)
    chat = make_chat(policy, config)

    async def run() -> list[Trajectory]:
        async with SandboxPool(min_tier="landlock") as pool:
            rollout = make_rollout(SumEnvironment(), chat, pool, config)
            inner = script(chat, [python("print(1)\nx = 4"), python("print(x)"), "answer: 4"])

            async def write(new_ids: list[int], observation: str, room: int) -> Completion:
                if observation == "1":
                    assert pool._server is not None
                    pool._server.process.kill()
                    (session,) = pool._sessions
                    assert session._stream is not None
                    # the kernel ends the server's children one after another: until then a cell may still be served
                    while not session._stream[0].at_eof():
                        await asyncio.sleep(0.005)
                return await inner(new_ids, observation, room)

            played = await rollout.play(TASK, 0, write)
            assert pool.metrics()["sandbox/restarts"] == 1
            return [played, await rollout.play(TASK, 1, script(chat, [python("print(4)"), "answer: 4"]))]

    played, after = asyncio.run(run())
    assert [turn.results[0].text for turn in played.turns if turn.results] == ["1", "4"]
    assert [(t.stop, t.outcome) for t in (played, after)] == [(StopReason.FINISHED, 1.0)] * 2


@pytest.mark.parametrize("fault", [SandboxUnavailable("the keeper was killed"), OSError("no more processes")])
def test_a_session_that_cannot_be_opened_loses_only_its_trajectory(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    opened = SandboxPool.open
    faults = iter([fault])

    class WithSetup(SumEnvironment):
        def setup_code(self, task: Task) -> str:
            return "four = 4"

    async def open_second(self: SandboxPool, setup_code: str = "") -> SandboxSession:
        # the sandbox's own test opens a session without
        for error in faults if setup_code else ():
            raise error
        return await opened(self, setup_code)

    monkeypatch.setattr(SandboxPool, "open", open_second)
    lost, played = play_all(policy, [[python("print(four)"), "answer: 4"]] * 2, environment=WithSetup())
    assert (lost.stop, lost.outcome, len(lost.turns)) == (StopReason.LOST, 0.0, 1)
    (result,) = lost.turns[0].results
    assert result.status is ToolStatus.INFRA_ERROR and result.text == f"sandbox failure: {fault}"
    assert (played.stop, played.outcome) == (StopReason.FINISHED, 1.0)


def test_setup_code_that_fails_ends_the_run(policy: Policy) -> None:
    class Broken(SumEnvironment):
        def setup_code(self, task: Task) -> str:
            return "1 / 0"

    with pytest.raises(RuntimeError, match="setup_code: ZeroDivisionError"):
        play_all(policy, [[python("print(4)")]], environment=Broken())


def test_a_grade_that_fails_ends_the_run(policy: Policy) -> None:
    class Broken(SumEnvironment):
        def grade(self, task: Task, answer: str | None) -> float:
            raise FileNotFoundError("answers.csv")

    with pytest.raises(EnvironmentFault, match=r"'sum', task 't': grade raised FileNotFoundError: answers\.csv"):
        play_all(policy, [["answer: 4"]], environment=Broken())


def test_tools_of_different_trajectories_run_at_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call waits inside its tool until all three trajectories are there: one after another would never end."""
    arrived = 0
    everybody = asyncio.Event()
    run_cell = PythonTool.call

    async def meet(self, arguments):  # type: ignore[no-untyped-def]
        nonlocal arrived
        arrived += 1
        if arrived == 3:
            everybody.set()
        await asyncio.wait_for(everybody.wait(), timeout=60)
        return await run_cell(self, arguments)

    monkeypatch.setattr(PythonTool, "call", meet)
    trajectories = play_all(policy, [[python(f"print({i})"), "answer: 4"] for i in range(3)])
    assert arrived == 3 and [t.turns[0].results[0].text for t in trajectories] == ["0", "1", "2"]


def test_groups_come_in_order_and_repeat(policy: Policy) -> None:
    config = RolloutConfig(max_turns=2, max_completion_tokens=6, max_trajectory_tokens=400)
    chat = make_chat(policy, config)
    tasks = [Task(id=f"t{i}", environment="sum", prompt=f"{i} + 2?", answer="4") for i in range(3)]

    async def run() -> list[list[Trajectory]]:
        async with SandboxPool(min_tier="landlock") as pool:
            sampler = make_sampler(policy, num_slots=4, max_tokens=400, stop_ids=chat.stop_ids, join_steps=2)
            rollout = make_rollout(SumEnvironment(), chat, pool, config)
            return await rollout.sample_groups(sampler, tasks, group_size=2, temperature=1.0, seed=[5])

    groups = asyncio.run(run())
    assert [[(t.task.id, t.sample) for t in group] for group in groups] == [
        [(task.id, 0), (task.id, 1)] for task in tasks
    ]
    assert groups[0][0].turns[0].completion_ids != groups[0][1].turns[0].completion_ids
    again = asyncio.run(run())
    for group, repeat in zip(groups, again, strict=True):
        for one, two in zip(group, repeat, strict=True):
            assert one.token_ids() == two.token_ids()
            assert [t.rollout_logprobs for t in one.turns] == [t.rollout_logprobs for t in two.turns]


def test_unknown_tools_of_the_config_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.tools must be among python, calculator, .*; got 'shell'"):
        ToolSet(["python", "shell"])
