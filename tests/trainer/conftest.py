"""A tiny policy, hand-made trajectories, and a scripted writer in the model's place."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from gtpo.batch import PackedSequence
from gtpo.chat import Chat
from gtpo.config import ModelConfig, RolloutConfig, SandboxConfig
from gtpo.environments import CodeEnvironment, Environment
from gtpo.local_sampler import LocalSampler
from gtpo.policy import Policy, load_policy
from gtpo.rollout import Rollout
from gtpo.sampler import Completion
from gtpo.sandbox import Sandbox, SandboxLimits, SandboxPool
from gtpo.tools import RunTools, ToolSet
from gtpo.types import Message, StopReason, Task, ToolCall, ToolResult, ToolStatus, Trajectory, Turn

TINY = ModelConfig(
    device="cpu", hidden_size=32, num_layers=2, num_heads=2, head_dim=16, intermediate_size=48, vocab_size=300
)
CORPUS = ["system user assistant tool ```python\nprint(1)\n``` answer: 2"] * 4
TASK = Task(id="t", environment="sum", prompt="2 + 2?", answer="4")


class SumEnvironment(CodeEnvironment):
    """One task, right if the answer is; a printed output is as expected if it is the answer."""

    name = "sum"
    system_prompt = "Call tools in python. Then answer."
    explain_protocol = False

    def tasks(self, split: str, num: int, seed: int) -> list[Task]:
        return [TASK] * num

    def grade(self, task: Task, answer: str | None) -> float:
        return float(answer == task.answer)

    def expected_output(self, task: Task, code: str, output: str) -> bool | None:
        return output == task.answer


def tiny_policy(**changes: Any) -> Policy:
    return load_policy(ModelConfig(**(vars(TINY) | changes)), corpus=CORPUS, seed=0)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of a test draws its plot, a third of what the smallest takes, but the one that test_cli looks at."""
    monkeypatch.setattr("gtpo.report.plot.plot_run", lambda rows, path: path.touch())


@pytest.fixture(scope="session")
def policy() -> Policy:
    """Shared by all tests: none of them may change it."""
    return tiny_policy()


def make_sampler(policy: Policy, **changes: Any) -> LocalSampler:
    options = {"num_slots": 3, "max_tokens": 64, "stop_ids": [], "join_steps": 0, "prefill_tokens_per_step": 2048}
    return LocalSampler(policy, **(options | changes))


def make_turn(
    num_tokens: int = 2,
    *,
    code: str | None = None,
    status: ToolStatus = ToolStatus.OK,
    output: str = "1",
    num_tool_tokens: int = 0,
    as_expected: bool | None = None,
    logprob: float = -1.0,
) -> Turn:
    """A turn that calls python with `code`, or calls nothing."""
    turn = Turn(list(range(10, 10 + num_tokens)), [logprob] * num_tokens, text="text", as_expected=as_expected)
    turn.tool_ids = list(range(200, 200 + num_tool_tokens))
    if code is not None:
        turn.calls = [ToolCall("python", {"code": code})]
        turn.results = [ToolResult(status, output)]
    return turn


def make_trajectory(
    *turns: Turn,
    outcome: float = 0.0,
    sample: int = 0,
    stop: StopReason = StopReason.FINISHED,
    answer: str | None = "1",
) -> Trajectory:
    return Trajectory(TASK, sample, [1, 2, 3], list(turns), stop=stop, answer=answer, outcome=outcome)


def make_sequence(token_ids: Sequence[int], *, num_prompt: int = 1) -> PackedSequence:
    """A sequence with one turn, from token `num_prompt` on."""
    sampled = [i >= num_prompt for i in range(len(token_ids))]
    return PackedSequence(
        list(token_ids),
        [1.0 if is_sampled else 0.0 for is_sampled in sampled],
        sampled,
        [-1.0 if is_sampled else 0.0 for is_sampled in sampled],
    )


Writer = Callable[[list[int], str, int], Awaitable[Completion]]


def script(chat: Chat, texts: Sequence[str]) -> Writer:
    """Writes these completions in turn, each cut to its budget; the last one again and again."""
    left = list(texts)

    async def write(new_ids: list[int], observation: str, max_new_tokens: int) -> Completion:
        ids = chat.completion_ids(left.pop(0) if len(left) > 1 else left[0])
        cut = ids[:max_new_tokens]
        return Completion(cut, [-0.5] * len(cut), finished=len(cut) == len(ids))

    return write


def make_chat(policy: Policy, config: RolloutConfig) -> Chat:
    return Chat(policy.tokenizer, call_format=config.call_format)


def prompt(system: str, user: str) -> list[Message]:
    return [Message("system", system), Message("user", user)]


def make_rollout(environment: Environment, chat: Chat, sandbox: Sandbox | None, config: RolloutConfig) -> Rollout:
    tools = RunTools(ToolSet(config.tools), sandbox, config.call_format)
    return Rollout(lambda task: environment, chat, tools, config)


def play_all(
    policy: Policy,
    scripts: Sequence[Sequence[str]],
    *,
    limits: SandboxLimits | None = None,
    environment: Environment | None = None,
    **config: Any,
) -> list[Trajectory]:
    """One trajectory a script, all at once, with the real tools in the real sandbox."""
    rollout_config = RolloutConfig(**({"max_trajectory_tokens": 2000, "max_completion_tokens": 500} | config))
    chat = make_chat(policy, rollout_config)

    async def run() -> list[Trajectory]:
        async with SandboxPool(limits or SandboxLimits(), min_tier=SandboxConfig().min_tier) as pool:
            rollout = make_rollout(environment or SumEnvironment(), chat, pool, rollout_config)
            plays = [rollout.play(TASK, sample, script(chat, texts)) for sample, texts in enumerate(scripts)]
            return await asyncio.gather(*plays)

    return asyncio.run(run())


def python(code: str) -> str:
    return f"```python\n{code}\n```"
