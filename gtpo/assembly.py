"""Building the parts of a run from its configuration: environments, chat, sandbox, the text of a tiny tokenizer."""

import contextlib
import importlib.util
import random
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import torch

from gtpo.chat import Chat
from gtpo.config import Config, ModelConfig, RolloutConfig
from gtpo.config_values import refuse_wrong_plain
from gtpo.environments import (
    ENVIRONMENTS,
    Answer,
    Environment,
    EnvironmentFault,
    EpisodeHost,
    Mixture,
    make_environment,
    written,
)
from gtpo.environments.base import refuse_leaks
from gtpo.environments.checked import cut
from gtpo.loading import load_object
from gtpo.local_sampler import LocalSampler
from gtpo.methods import REWARD_TERMS
from gtpo.policy import Policy, load_policy
from gtpo.reward_functions import load_reward_function
from gtpo.rewards import OwnTerms
from gtpo.rollout import Rollout
from gtpo.sampler import Sampler
from gtpo.sandbox import Sandbox, SandboxLimits, SandboxPool
from gtpo.tools import RunTools, ToolSet
from gtpo.types import Task

# roles of the chat template and the head of the commonest error message: a token each
_PROTOCOL_WORDS = ("system\n", "user\n", "assistant\n", "tool\n", "LookupError: ", " is in ")


def refuse_unusable_model(config: Config) -> None:
    """Raises ValueError where `[model]` asks for what is not here, or for training whose updates would round away."""
    model = config.model
    if model.dtype == "bfloat16" and model.compute_dtype == "float32":
        raise ValueError('model.compute_dtype must be "bfloat16" with model.dtype = "bfloat16", got "float32"')
    if model.dtype == "bfloat16" and not model.lora_rank and (config.sft.steps or config.train.steps):
        raise ValueError(
            'model.dtype = "bfloat16" can train adapters only (model.lora_rank of at least 1; they are float32): '
            'most updates of a bfloat16 weight would round to nothing. Use "float32" to train all weights, with '
            'model.compute_dtype = "bfloat16" to compute in it'
        )
    try:
        device = torch.empty(0, device=None if model.device == "auto" else model.device).device
    # AssertionError is how a build of PyTorch without CUDA says so
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"model.device must be one that PyTorch has here, got {model.device!r}: {reason}") from error
    if model.attention == "flash" and model.computes_in != "bfloat16":
        raise ValueError(f'model.attention = "flash" needs model.compute_dtype = "bfloat16", got "{model.computes_in}"')
    has_gpu = device.type == "cuda" or (model.device == "auto" and torch.cuda.is_available())
    if model.attention == "flash" and not (has_gpu and importlib.util.find_spec("flash_attn")):
        raise ValueError('model.attention = "flash" needs a GPU and the package flash-attn; "auto" takes what is here')


def load_model(model: ModelConfig, *, corpus: Sequence[str], seed: int, max_tokens: int) -> Policy:
    """`load_policy`, whose faults name the model: a library's words for a broken file seldom do."""
    try:
        # a limit below the trial's own few tokens is refused by the prompts that do not fit it
        return load_policy(model, corpus=corpus, seed=seed, max_tokens=max(max_tokens, 16))
    except ImportError:
        raise
    except Exception as error:
        if model.source == "tiny":
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"model.source = {model.source!r}: {kind}{cut(' '.join(str(error).split()))}") from error


def make_mixture(config: Config) -> Mixture:
    """The environments of the configuration as one. Raises ValueError for an unknown name, option or type of option."""
    made = []
    for number, item in enumerate(config.environments):
        where = f"environments.{number} ({item.name!r})"
        for option, kind in _option_types(item.name).items():
            if option in item.options:
                refuse_wrong_plain(f"environments.{number}.options.{option}", item.options[option], kind)
        try:
            made.append(make_environment(item.name, **item.options))
        except OSError as error:
            path = str(error.filename)
            option = next((f".options.{key}" for key, value in item.options.items() if str(value) == path), "")
            raise ValueError(
                f"environments.{number}{option} must be a file that can be read, got {path!r}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        except TypeError as error:
            raise ValueError(
                f"{where}: options of environment '{item.name}': {error}, got {dict(item.options)}"
            ) from error
        except (EnvironmentFault, ImportError):
            raise
        except Exception as error:
            raise EnvironmentFault(f"{where} raised {type(error).__name__}: {error}") from error
    return Mixture(made, [item.weight for item in config.environments])


def make_tasks(config: Config, mixture: Mixture) -> tuple[list[Task], list[Task], list[Task]]:
    """The tasks of training, of evaluation and of the demonstrations. Raises ValueError where a task of evaluation is
    trained on, or where an environment has no demonstration of one."""
    training = mixture.tasks("train", config.tasks.num_train, config.seed)
    evaluation = mixture.tasks("eval", config.tasks.num_eval, config.seed)
    demonstrated: list[Task] = []
    if config.sft.steps:
        demonstrated = mixture.tasks("train", config.sft.num_demonstrations, config.seed + 1)
    refuse_leaks([*training, *demonstrated], evaluation)
    for task in demonstrated:
        # an environment without demonstrations raises here
        mixture.oracle(task, random.Random(0))
    return training, evaluation, demonstrated


def make_own_terms(config: Config) -> OwnTerms:
    """The reward terms of `[[rewards]]`. Raises ValueError that names the entry."""
    functions, weights = [], {}
    for number, item in enumerate(config.rewards):
        try:
            if item.function:
                functions.append(
                    load_reward_function(item.function, name=item.term, weight=item.weight, options=item.options)
                )
            elif item.options:
                raise ValueError("options need a function")
            else:
                weights[item.name] = item.weight
        except ValueError as error:
            raise ValueError(f"rewards.{number}: {error}") from error
    names = [item.term for item in config.rewards]
    for number, name in enumerate(names):
        if name in REWARD_TERMS or name in names[:number]:
            whose = "a term of [reward]" if name in REWARD_TERMS else f"rewards.{names.index(name)}"
            raise ValueError(f"rewards.{number} must have a name of its own, got {name!r}, which is that of {whose}")
    return OwnTerms(functions, weights)


def _option_types(name: str) -> dict[str, Any]:
    """The annotations of an environment's options; none for a name that there is not."""
    factory: Any = ENVIRONMENTS.get(name)
    if factory is None:
        return {}
    return get_type_hints(vars(factory).get("__init__", object) if isinstance(factory, type) else factory)


def make_chat(policy: Policy, config: Config) -> Chat:
    rollout = config.rollout
    return Chat(
        policy.tokenizer,
        call_format=rollout.call_format,
        tool_role=rollout.tool_role,
        stop_ids=policy.stop_ids,
        max_calls_per_turn=rollout.max_calls_per_turn,
        reasoning_may_call=rollout.reasoning_may_call,
        template_kwargs=config.chat.template_kwargs,
    )


def make_sampler(policy: Policy, chat: Chat, config: RolloutConfig) -> Sampler:
    """The sampler of all rollouts and evaluations of a run."""
    return LocalSampler(
        policy,
        num_slots=config.max_concurrent,
        max_tokens=config.max_trajectory_tokens,
        stop_ids=chat.stop_ids,
        join_steps=config.tool_join_steps,
        prefill_tokens_per_step=config.prefill_tokens_per_step,
    )


def make_run_tools(config: Config, environments: Mapping[str, Environment]) -> RunTools:
    """The tools of `rollout.tools`, with the sandbox that their code needs: None where nothing runs code.

    In the format "code" the model's code calls all other tools.
    """
    rollout = config.rollout
    options = {name: dict(table) for name, table in config.tools.items()}
    from_code = rollout.call_format == "code" and len(rollout.tools) > 1
    if from_code and not options.setdefault("python", {}).setdefault("code_mode", True):
        raise ValueError(
            'tools.python.code_mode must be true with rollout.call_format = "code", where only code can call '
            f"the other tools of rollout.tools, got {[*rollout.tools]}"
        )
    tools = ToolSet(rollout.tools, options)
    try:
        used = rollout.call_format == "code" or any(e.offers_run_tools for e in environments.values())
        return RunTools(tools, make_sandbox(config, tools) if used else None, rollout.call_format)
    except BaseException:
        tools.stop()
        raise


async def leave_out_overlong(rollout: Rollout, lists: Mapping[str, list[Task]], *, refuse: bool) -> list[str]:
    """Takes the tasks whose prompt leaves no room for a turn out of the named lists, and says how many there were.

    Raises ValueError where there are some and `refuse` is set, and where no task of a list is left.
    """
    limit, notes = rollout.config.max_trajectory_tokens, []
    for name, tasks in lists.items():
        overlong = await rollout.overlong(tasks)
        if not overlong:
            continue
        said = (
            f"{len(overlong)} of {len(tasks)} {name} tasks have prompts too long for "
            f"rollout.max_trajectory_tokens = {limit}; the prompt of task {next(iter(overlong))!r} has "
            f"{next(iter(overlong.values()))} tokens, the longest {max(overlong.values())}"
        )
        if refuse or len(overlong) == len(tasks):
            raise ValueError(f'{said}; raise it, or set tasks.overlong_prompts = "leave_out"')
        notes.append(f"left out: {said}")
        tasks[:] = [task for task in tasks if task.id not in overlong]
    return notes


def make_sandbox(config: Config, tools: ToolSet) -> Sandbox | None:
    """The sandbox that the tools need; None where none of them runs code."""
    if not tools.needs_session:
        return None
    asked = config.sandbox
    try:
        limits = SandboxLimits(
            cpu_time_s=asked.cpu_time_s,
            wall_time_s=asked.wall_time_s,
            memory_bytes=asked.memory_bytes,
            output_bytes=asked.output_bytes,
        )
    except ValueError as error:
        raise ValueError(f"sandbox.{error}") from None
    if asked.adapter:
        if tools.code_mode:
            raise ValueError("tools.python.code_mode needs the sandbox of gtpo, so sandbox.adapter must be empty")
        return _adapted_sandbox(asked.adapter, limits, asked.max_concurrent)
    return SandboxPool(
        limits,
        min_tier=asked.min_tier,
        unsafe_no_isolation=asked.unsafe_no_isolation,
        profile=asked.profile,
        snapshots=asked.snapshots,
        max_concurrent=asked.max_concurrent,
    )


def _adapted_sandbox(adapter: str, limits: SandboxLimits, max_concurrent: int) -> Sandbox:
    make = load_object(adapter, what="sandbox.adapter")
    try:
        sandbox: Sandbox = make(limits, max_concurrent=max_concurrent)
    except ValueError as error:
        raise ValueError(f"sandbox.adapter: {error}") from error
    return sandbox


def describe_sandbox(sandbox: Sandbox | None) -> str:
    """What a run says of its sandbox before it starts."""
    if sandbox is None:
        return "sandbox: none, no tool runs code"
    if isinstance(sandbox, SandboxPool):
        return f"sandbox tier: {sandbox.tier.name.lower()}"
    return f"sandbox: {type(sandbox).__name__}, whose isolation is not tested here"


async def tokenizer_corpus(mixture: Mixture, tasks: Sequence[Task], tools: RunTools) -> list[str]:
    """What a tiny model's tokenizer is trained on: prompts, and demonstrated turns with "0" for every tool output."""
    host = EpisodeHost(mixture.of, tools)
    texts: list[str] = []
    for task in tasks:
        async with host.open(task, sample=0) as episode:
            texts += [*(message.content for message in episode.messages), *_PROTOCOL_WORDS]
        with contextlib.suppress(ValueError):
            oracle = mixture.oracle(task, random.Random(task.id))
            step = next(oracle)
            for _ in range(8):
                texts.append(written(step, tools.call_format))
                if isinstance(step, Answer):
                    break
                step = oracle.send("0")
    return texts
