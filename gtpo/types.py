"""The records handed from one stage of a step to the next: Task -> Trajectory[Turn] -> rewards -> batch.

A trajectory is token-in, token-out: `prompt_ids`, then for each turn the sampled `completion_ids` and the inserted
`tool_ids`. Ids are only ever appended, and what was sampled is what is trained on.

>>> turn = Turn(completion_ids=[5, 6], rollout_logprobs=[-0.1, -0.2], text="hi", tool_ids=[9])
>>> trajectory = Trajectory(task=Task(id="t0", environment="demo", prompt="?", answer="4"), sample=0, prompt_ids=[1, 2])
>>> trajectory.turns.append(turn)
>>> trajectory.token_ids(), trajectory.turn_index_of_tokens()
([1, 2, 5, 6, 9], [-1, -1, 0, 0, -1])
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

# what a chat template takes: {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}
ToolSchema = Mapping[str, Any]


class RunFault(RuntimeError):
    """What ends a run through no fault of the trainer's own code: said in one line, without a traceback."""


class ToolStatus(Enum):
    """How a tool call ended. Every value but `INFRA_ERROR` is an observation for the model."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    MALFORMED = "malformed"
    UNKNOWN_TOOL = "unknown_tool"
    OVER_QUOTA = "over_quota"
    INFRA_ERROR = "infra_error"


class StopReason(Enum):
    """Why a trajectory ended."""

    FINISHED = "finished"
    MAX_TURNS = "max_turns"
    TRUNCATED = "truncated"
    LOST = "lost"


@dataclass(frozen=True)
class Message:
    """Something that the model reads and did not sample: of the prompt, or in answer to a turn."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Task:
    """One problem. `data` is what its environment needs to open and to grade it, and is JSON-serialisable.

    prompt: what is asked; the messages that the model reads are the episode's.
    """

    id: str
    environment: str
    prompt: str
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote. `error` is the parser's message when no tool is to be asked, else None; `fault` is
    then how the call ends. is_text: its form writes every value as text, whatever the tool takes."""

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None
    fault: ToolStatus = ToolStatus.MALFORMED
    is_text: bool = False

    @property
    def code(self) -> str:
        """The Python source that the call carries; empty for a call that carries none."""
        code = self.arguments.get("code", "") if self.error is None else ""
        return code if isinstance(code, str) else ""


@dataclass(frozen=True)
class ToolResult:
    """What a call gave back. `text` is what the model reads; `seconds` is wall time of the work, over all its attempts.

    queue_seconds: what the call waited beside that, for a slot, a process or its next attempt. num_retries: attempts
    after the first; only faults of the infrastructure are tried again. calls: the tools that the code of the call
    called in turn, with their results.
    """

    status: ToolStatus
    text: str
    seconds: float = 0.0
    queue_seconds: float = 0.0
    num_retries: int = 0
    calls: tuple[tuple[str, "ToolResult"], ...] = ()

    @property
    def is_invalid_call(self) -> bool:
        """The call itself was at fault: no tool ran. This is the format fault of the turn reward."""
        return self.status in (ToolStatus.MALFORMED, ToolStatus.UNKNOWN_TOOL)


@dataclass
class Turn:
    """One completion and the tool output that it caused.

    completion_ids: sampled ids, the end-of-turn id included when it was sampled. tool_ids: inserted ids, template glue
    included; empty on the last turn. rollout_logprobs: one for each completion id, after temperature. answer: what the
    turn gives as the answer, None where it gives none. as_expected: whether the tools printed what the task expects;
    None where the task does not say. rewards: the named terms that the episode gave for the turn. said: its text
    without the reasoning; empty where it was cut short. policy_version: the number of training steps that the weights
    which sampled it had taken; None where no policy sampled it.
    """

    completion_ids: list[int]
    rollout_logprobs: list[float]
    text: str
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    tool_ids: list[int] = field(default_factory=list)
    as_expected: bool | None = None
    seconds: float = 0.0
    answer: str | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    said: str = ""
    policy_version: int | None = None

    @property
    def num_invalid_calls(self) -> int:
        return sum(result.is_invalid_call for result in self.results)


@dataclass
class Trajectory:
    """All turns of one attempt at a task. `sample`: its index in the group. `outcome`: unshaped success in [0, 1].

    measures: what else the episode's grade measured, by name. lost_because: the fault that lost it, empty otherwise.
    """

    task: Task
    sample: int
    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    stop: StopReason = StopReason.FINISHED
    answer: str | None = None
    outcome: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)
    lost_because: str = ""

    def token_ids(self) -> list[int]:
        ids = list(self.prompt_ids)
        for turn in self.turns:
            ids += turn.completion_ids
            ids += turn.tool_ids
        return ids

    def turn_index_of_tokens(self) -> list[int]:
        """For each token the index of the turn that sampled it; -1 for prompt and tool tokens."""
        index = [-1] * len(self.prompt_ids)
        for number, turn in enumerate(self.turns):
            index += [number] * len(turn.completion_ids)
            index += [-1] * len(turn.tool_ids)
        return index

    @property
    def is_success(self) -> bool:
        """An outcome of 1 and nothing less: what the success rate counts and the similarity credit learns from."""
        return self.outcome == 1.0

    @property
    def cells(self) -> list[str]:
        """The code of each call, in order: what the similarity credit compares."""
        return [call.code for turn in self.turns for call in turn.calls if call.code]

    @property
    def num_calls(self) -> int:
        return sum(len(turn.calls) for turn in self.turns)

    @property
    def num_invalid_calls(self) -> int:
        return sum(turn.num_invalid_calls for turn in self.turns)
