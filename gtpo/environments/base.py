"""What an environment is: tasks, an episode for each attempt at one, and a scripted demonstrator.

An environment never runs a model. It says what is asked; its episodes answer what the model writes (see `episode`).
"""

import functools
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gtpo.chat import written_answer, written_call
from gtpo.environments.episode import BlockingEpisode, Episode
from gtpo.parsing import CallFormat
from gtpo.tools import RunTools
from gtpo.types import Task, ToolCall

Split = Literal["train", "eval"]

# One line for every demo environment, so that they can be mixed: a tiny model reads it on each task.
DEMO_SYSTEM_PROMPT = "Call tools in python. Then answer."

# draws in a row that give no new task, after which a family has no more
_MOST_IN_VAIN = 20_000
_EVAL_BYTES = 51  # of the 256 values of a digest's first byte: 20 % of all contents are held out


@dataclass(frozen=True)
class Call:
    """A demonstrator's turn that runs `code` with the python tool."""

    code: str


@dataclass(frozen=True)
class Use:
    """A demonstrator's turn that calls the tool `name` of its task."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Say:
    """A demonstrator's turn of plain text: an action of the environment's own format, a word to the user."""

    text: str


@dataclass(frozen=True)
class Answer:
    """A demonstrator's last turn: its final answer."""

    text: str


# Yields the next turn, is sent the text that the model would read, ends with its Answer at the latest.
Demonstration = Generator[Call | Use | Say | Answer, str, None]


def written(
    step: Call | Use | Say | Answer, call_format: CallFormat, write_call: Callable[[ToolCall], str] | None = None
) -> str:
    """What a demonstrator's turn reads. write_call: how a call is written, if not as `call_format` says."""
    write_call = write_call or functools.partial(written_call, call_format=call_format)
    match step:
        case Answer(text=text):
            return written_answer(text)
        case Call(code=code):
            return write_call(ToolCall("python", {"code": code}))
        case Use(name=name, arguments=arguments):
            return write_call(ToolCall(name, arguments))
        case Say(text=text):
            return text


class Environment(ABC):
    """A family of tasks. `name` is what `Task.environment` holds.

    blocks: whether its episodes are `BlockingEpisode`s, which then run in a thread of their own, `open` included, each
    always in the same one. max_open: how many of them may be open at once; more wait for their turn; None: no bound.
    timeout_s: seconds after which an `open`, `step` or `grade` has hung: its trajectory is lost. None: never.
    explain_protocol: whether the chat tells the model in the system prompt how to call a tool and how to answer. The
    demo environments say False: a tiny model reads short prompts, and learns the protocol in its warm-up.
    offers_run_tools: whether its episodes use the tools that the configuration names in `rollout.tools`.
    """

    name: str
    blocks: bool = True
    max_open: int | None = None
    timeout_s: float | None = 120.0
    explain_protocol: bool = True
    offers_run_tools: bool = False

    @abstractmethod
    def tasks(self, split: Split, num: int, seed: int) -> list[Task]:
        """`num` tasks with unique ids, a function of (options, split, num, seed) only.

        No task of split "train" has the (prompt, data) of one of split "eval", whatever the seeds are. Those of "eval"
        are all different; those of "train" may repeat. The tasks of a smaller `num` are a prefix of those of a larger
        one. Raises ValueError for an unknown split, a negative `num`, or when the split has too few different tasks.
        """

    @abstractmethod
    def open(self, task: Task, *, sample: int, tools: RunTools) -> Episode | BlockingEpisode:
        """The world of one trajectory: attempt `sample` at `task`.

        Called for every task before a run starts too, to see that its prompt fits, so it should be cheap: what is large
        is better made in the first `step`. tools: what `rollout.tools` names, to offer or to leave.
        """

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        """A scripted demonstration of `task`, for the supervised warm-up. It sees only what the model would see.

        Raises ValueError where the environment has none.
        """
        raise ValueError(f"environment '{self.name}' has no scripted demonstrations, so it cannot warm a model up")


class GeneratedEnvironment(Environment):
    """An environment that draws its tasks at random. Subclasses implement `draw`; the splits and ids come from here."""

    @abstractmethod
    def draw(self, rng: random.Random, position: int) -> tuple[str, str, dict[str, Any]]:
        """One task's (prompt, answer, data). `position` is its place in the list, for families that take turns.

        `data` must be JSON-serialisable and, with the prompt, must hold everything that makes two tasks different.
        """

    def tasks(self, split: Split, num: int, seed: int) -> list[Task]:
        check_request(split, num)
        rng = random.Random(f"{self.name}/{split}/{seed}")
        tasks: list[Task] = []
        seen: set[bytes] = set()
        num_in_vain = 0
        while num_in_vain < _MOST_IN_VAIN:
            if len(tasks) == num:
                return tasks
            num_in_vain += 1
            prompt, answer, data = self.draw(rng, len(tasks))
            if split_of(prompt, data) == split:
                if split == "eval":
                    # a repeated task would count more than the others
                    digest = content_digest(prompt, data)
                    if digest in seen:
                        continue
                    seen.add(digest)
                num_in_vain = 0
                task_id = f"{self.name}-{split}-{seed}-{len(tasks)}"
                tasks.append(Task(id=task_id, environment=self.name, prompt=prompt, answer=answer, data=data))
        raise ValueError(
            f"environment '{self.name}' must have enough different tasks for {num} of split '{split}', "
            f"got {len(tasks)}: widen its options or lower tasks.num_{split}"
        )


def split_of(prompt: str, data: Mapping[str, Any]) -> Split:
    """The split that a task's content belongs to: a hash of it, so that the splits are disjoint for all seeds.

    >>> split_of("get pen", {"value": 1}), split_of("get pen", {"value": 6})
    ('train', 'eval')
    """
    return "eval" if content_digest(prompt, data)[0] < _EVAL_BYTES else "train"


def content_digest(prompt: str, data: Mapping[str, Any]) -> bytes:
    """SHA-256 of a task's content, the same for equal contents in any key order."""
    return hashlib.sha256(json.dumps([prompt, dict(data)], sort_keys=True).encode()).digest()


def refuse_leaks(training: Sequence[Task], held_out: Sequence[Task]) -> None:
    """Raise ValueError where a task is in both, as two environments of a mixture can bring about."""
    kept = {content_digest(task.prompt, task.data) for task in held_out}
    if leaked := [task for task in training if content_digest(task.prompt, task.data) in kept]:
        raise ValueError(
            f"environments must train on no task that is held out for evaluation, got {len(leaked)}, "
            f"the first is {leaked[0].id}: {leaked[0].prompt!r}"
        )


def check_request(split: str, num: int) -> None:
    """Raise ValueError unless `split` and `num` are what `Environment.tasks` takes."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if num < 0:
        raise ValueError(f"num must be at least 0, got {num}")
