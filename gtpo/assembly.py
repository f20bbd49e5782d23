"""Building the parts of a run from its configuration: environments, chat, sandbox, the text of a tiny tokenizer."""

import contextlib
import random
from collections.abc import Iterator, Sequence

from gtpo.chat import Chat
from gtpo.config import Config
from gtpo.environments import Answer, Environment, Mixture, make_environment
from gtpo.policy import Policy
from gtpo.rollout import offered_schemas
from gtpo.sandbox import SandboxLimits, SandboxPool
from gtpo.types import Task

# roles of the chat template and the head of the commonest error message: a token each
_PROTOCOL_WORDS = ("system\n", "user\n", "assistant\n", "tool\n", "LookupError: ", " is in ")


def make_mixture(config: Config) -> Environment:
    """The environments of the configuration as one. Raises ValueError for an unknown name or option."""
    made = [make_environment(item.name, **item.options) for item in config.environments]
    return made[0] if len(made) == 1 else Mixture(made, [item.weight for item in config.environments])


def make_chat(policy: Policy, config: Config) -> Chat:
    rollout = config.rollout
    return Chat(
        policy.tokenizer,
        call_format=rollout.call_format,
        tool_role=rollout.tool_role,
        schemas=offered_schemas(rollout.tools),
    )


def make_sandbox(config: Config) -> SandboxPool | None:
    """The sandbox that the configured tools need; None where none of them runs code."""
    if "python" not in config.rollout.tools:
        return None
    limits = config.sandbox
    return SandboxPool(
        SandboxLimits(
            cpu_time_s=limits.cpu_time_s,
            wall_time_s=limits.wall_time_s,
            memory_bytes=limits.memory_bytes,
            output_bytes=limits.output_bytes,
        ),
        min_tier=limits.min_tier,
        max_concurrent=limits.max_concurrent,
    )


def tokenizer_corpus(environment: Environment, tasks: Sequence[Task]) -> Iterator[str]:
    """What a tiny model's tokenizer is trained on: prompts, and demonstrated turns with "0" for every tool output."""
    for task in tasks:
        yield from (f"{environment.system_prompt}", task.prompt, *_PROTOCOL_WORDS)
        with contextlib.suppress(ValueError):
            oracle = environment.oracle(task, random.Random(task.id))
            step = next(oracle)
            for _ in range(8):
                if isinstance(step, Answer):
                    yield f"answer: {step.text}"
                    break
                yield f"```python\n{step.code}\n```"
                step = oracle.send("0")
