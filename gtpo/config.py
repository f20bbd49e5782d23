"""The configuration of a run: frozen dataclasses, read from TOML, overridden by `--key value`, unknown keys refused.

Units are in the names (`_s`, `_bytes`, `num_`, `max_`). `method` names a preset of `gtpo.methods`; the keys of
the tables `[reward]`, `[credit]` and `[loss]` override single fields of it, `--credit.terms.0.gamma 1` one of a term.

>>> config = config_from_dict({"method": "grpo", "credit": {"terms": {"0": {"eps": 1e-4}}}})
>>> config.credit.terms[0].population, config.credit.terms[0].eps
('trajectories', 0.0001)
>>> config_from_dict({"rolout": {}})
Traceback (most recent call last):
    ...
ValueError: unknown config key 'rolout'; did you mean 'rollout'?
"""

import dataclasses
import difflib
import math
import operator
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from gtpo.config_values import read_toml, refuse_wrong_types, shortened
from gtpo.methods import (
    METHODS,
    TABLES,
    CreditSum,
    Method,
    PolicyLoss,
    RewardRule,
    Term,
    check_method,
    elsewhere,
    moved,
    overridden,
    ranges_of,
)


@dataclass(frozen=True)
class ModelConfig:
    """`source`: "tiny" builds a small random Qwen3-style model with its own tokenizer; "package:NAME" takes the GGUF
    file that a Python package carries; anything else is a folder that `from_pretrained` reads or, where there is no
    such folder, a model of the Hugging Face hub, which it fetches."""

    source: Annotated[str, '"tiny", "package:NAME", a folder, or a hub id: "org/name"'] = "tiny"
    dtype: Annotated[Literal["float32", "bfloat16"], "of the weights; bfloat16 trains adapters only"] = "float32"
    compute_dtype: Annotated[Literal["auto", "float32", "bfloat16"], "of all forward passes; auto: dtype"] = "auto"
    head_dtype: Annotated[Literal["auto", "float32"], "of the output embeddings; auto: compute_dtype"] = "auto"
    device: Annotated[str, '"auto" takes a GPU where there is one'] = "auto"
    hidden_size: Annotated[int, "of a tiny model"] = 128
    num_layers: Annotated[int, "of a tiny model"] = 4
    num_heads: Annotated[int, "of a tiny model, a multiple of num_kv_heads"] = 2
    num_kv_heads: Annotated[int, "of a tiny model"] = 1
    head_dim: Annotated[int, "of a tiny model"] = 64
    intermediate_size: Annotated[int, "of a tiny model"] = 384
    vocab_size: Annotated[int, "of a tiny model's tokenizer"] = 320
    initializer_range: Annotated[float, "deviation of a tiny model's first weights"] = 0.02
    attention: Annotated[Literal["auto", "sdpa", "flash"], "in training; flash: GPU, flash-attn, bfloat16"] = "auto"
    freeze_head: Annotated[bool, "leave the output embeddings as they are"] = False
    lora_rank: Annotated[int, "of adapters on all linear layers; 0: all weights train"] = 0
    lora_alpha: Annotated[int, "scale of the adapters times lora_rank"] = 16
    gradient_checkpointing: Annotated[bool, "compute activations twice to save memory"] = False
    reference_device: Annotated[Literal["auto", "cpu"], "where a KL term's reference waits; auto: device"] = "auto"

    @property
    def computes_in(self) -> Literal["float32", "bfloat16"]:
        """The dtype of forward passes."""
        return self.dtype if self.compute_dtype == "auto" else self.compute_dtype


@dataclass(frozen=True)
class EnvironmentConfig:
    """One environment of the mixture; `options` go to its constructor, `weight` is its share of the tasks."""

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TasksConfig:
    """Sizes of the two disjoint splits. Training tasks are visited in a seeded order, epoch after epoch. A prompt that
    leaves no room in `rollout.max_trajectory_tokens` is refused at the start, or left out and counted."""

    num_train: Annotated[int, "size of the training split"] = 2000
    num_eval: Annotated[int, "size of the held-out split"] = 200
    overlong_prompts: Annotated[Literal["refuse", "leave_out"], "what becomes of tasks of such prompts"] = "refuse"


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts. A tool's result joins its trajectory in the next decoding step, so that what is sampled beside what
    depends on how fast the tools were, and with it rounding. With `tool_join_steps` of at least 0 it joins that many
    decoding steps after the call, whenever it came: then the schedule, and every bit of the run, repeats."""

    tasks_per_step: Annotated[int, "tasks of one step"] = 16
    group_size: Annotated[int, "trajectories for each task"] = 8
    temperature: Annotated[float, "of sampling and of the log-probs trained on"] = 1.0
    max_turns: Annotated[int, "completions of a trajectory at most"] = 6
    max_completion_tokens: Annotated[int, "sampled tokens of a turn at most"] = 96
    max_trajectory_tokens: Annotated[int, "prompt, completions and tool output at most"] = 512
    max_concurrent: Annotated[int, "trajectories sampled at once"] = 128
    call_format: Annotated[Literal["code", "json"], "fenced Python, or JSON in <tool_call> tags"] = "code"
    tools: Annotated[tuple[str, ...], "offered tools: kinds, or names of tables [tools.NAME]"] = ("python",)
    max_calls_per_turn: Annotated[int, "calls that one completion can make; of the rest the model is told"] = 8
    reasoning_may_call: Annotated[bool, "make the calls that stand in a <think> block too"] = False
    tool_role: Annotated[str, "role of tool output in the model's chat template"] = "tool"
    tool_join_steps: Annotated[int, "decoding steps from a call to its result; -1: at once, not repeatable"] = -1
    prefill_tokens_per_step: Annotated[int, "of prompts and tool output in a decoding step at most"] = 2048
    max_logprob_gap: Annotated[
        float | None, "nats a token between sampler and trainer, in the mean; left out: 1e-3, in bfloat16 0.1"
    ] = None


@dataclass(frozen=True)
class ChatConfig:
    """How conversations are rendered; docs/models.md says what is found of a chat template without being told."""

    template_kwargs: Annotated[Mapping[str, Any], "variables of the chat template"] = field(default_factory=dict)


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of one session of model-written code; `min_tier` is the least isolation that the run accepts."""

    adapter: Annotated[str, 'another sandbox, "module:name", as docs/sandbox_adapters.md says; "": our own'] = ""
    min_tier: Annotated[Literal["landlock", "namespaces"], "least isolation that is accepted"] = "landlock"
    unsafe_no_isolation: Annotated[bool, "accept none: model-written code can do what you can"] = False
    profile: Annotated[Literal["plain", "math", "data"], "libraries: none, numpy + sympy, + pandas + scipy"] = "plain"
    snapshots: Annotated[bool, "clone before each cell; else a failed one's session is rebuilt from its cells"] = True
    cpu_time_s: Annotated[float, "of a cell"] = 2.0
    wall_time_s: Annotated[float, "of a cell"] = 30.0
    memory_bytes: Annotated[int, "address space of a session"] = 512 * 1024 * 1024
    output_bytes: Annotated[int, "of a cell; the rest is cut off"] = 4096
    max_concurrent: Annotated[int, "cells that run at once, without those that wait"] = 8


@dataclass(frozen=True)
class TrainConfig:
    """The policy-gradient phase. `micro_batch_tokens` bounds one forward pass; gradients accumulate over the
    micro-batches of an optimizer step under one denominator. `updates_per_rollout` above 1 splits a rollout into as
    many optimizer steps."""

    steps: Annotated[int, "rollouts that are trained on"] = 100
    learning_rate: Annotated[float, "after the rise, before the fall"] = 2e-4
    schedule: Annotated[Literal["linear", "cosine", "constant"], "fall of the learning rate to 0"] = "linear"
    warmup_steps: Annotated[int, "rise of the learning rate from 0"] = 5
    weight_decay: Annotated[float, "AdamW's"] = 0.0
    max_grad_norm: Annotated[float, "longer gradients are shortened, in the warm-up too"] = 1.0
    micro_batch_tokens: Annotated[int, "tokens of one forward pass at most"] = 8192
    updates_per_rollout: Annotated[int, "optimizer steps on one rollout"] = 1
    eval_every: Annotated[int, "steps between evaluations; 0: only before and after"] = 0
    checkpoint_every: Annotated[int, "steps between checkpoints"] = 20


@dataclass(frozen=True)
class SftConfig:
    """The warm-up on demonstrations. `steps = 0` leaves it out. `only_successful = false` keeps those that ran out of
    turns too: the lucky guesses of a blind demonstrator, taken alone, would teach what it does not know.
    `optimizer`: "muon" for a model that starts from random weights learns to copy in half the steps; "adamw" otherwise.
    """

    steps: Annotated[int, "optimizer steps of the warm-up; 0: none"] = 0
    batch_size: Annotated[int, "demonstrations of one step"] = 32
    optimizer: Annotated[Literal["adamw", "muon"], "muon learns faster from random weights"] = "adamw"
    learning_rate: Annotated[float, "after the rise, before a linear fall"] = 1e-3
    warmup_steps: Annotated[int, "rise of the learning rate from 0"] = 10
    num_demonstrations: Annotated[int, "tasks that the scripted demonstrator plays"] = 1000
    only_successful: Annotated[bool, "learn from right answers only"] = True


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out split with `samples` attempts a task, at the training temperature unless set."""

    samples: Annotated[int, "attempts at each task, the k of avg@k"] = 1
    temperature: Annotated[float | None, "of evaluation, 0 is greedy; left out: rollout.temperature"] = None


@dataclass(frozen=True)
class RewardConfig:
    """One more term of the turn rewards: `function` of a trajectory or of a group, or, without one, the weight of the
    term `name` that an environment's episodes give (1 where nothing is said)."""

    function: Annotated[str, '"file.py:name" or "package.module:name"'] = ""
    name: Annotated[str, "of the term; left out: that of the function"] = ""
    weight: Annotated[float, "the term is multiplied by it"] = 1.0
    options: Annotated[Mapping[str, Any], "further arguments of the function"] = field(default_factory=dict)

    @property
    def term(self) -> str:
        """The name of its term."""
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True)
class Config:
    """One run. Everything random derives from `seed`; `num_threads = 0` keeps PyTorch's own choice."""

    method: Annotated[str, "preset of [reward], [credit], [loss]; `gtpo methods` lists them"] = "gtpo"
    seed: Annotated[int, "all that is random derives from it"] = 0
    output_dir: Annotated[str, "the run's folder"] = "runs/run"
    num_threads: Annotated[int, "of PyTorch; 0: its own choice"] = 0
    reward: RewardRule = field(default_factory=RewardRule)
    rewards: Annotated[tuple[RewardConfig, ...], "terms of your own, added to those of [reward]"] = ()
    credit: CreditSum = field(default_factory=CreditSum)
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    model: ModelConfig = field(default_factory=ModelConfig)
    environments: Annotated[tuple[EnvironmentConfig, ...], "where the tasks come from"] = (
        EnvironmentConfig(name="retry"),
    )
    tasks: TasksConfig = field(default_factory=TasksConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    tools: Annotated[Mapping[str, Mapping[str, Any]], "options of a tool: docs/tools.md"] = field(default_factory=dict)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def eval_temperature(self) -> float:
        """That of the training rollouts unless [eval] says another; 0 is greedy."""
        return self.rollout.temperature if self.eval.temperature is None else self.eval.temperature


# Which numbers the keys may have: what is said of them, least, greatest, keys. None stands for a key left out.
_GREATEST, _LEAST_ABOVE_0 = sys.float_info.max, math.ulp(0.0)
_MOST_THREADS = 4096
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("at least 2", 2, _GREATEST, "rollout.group_size"),
    (
        "at least 1",
        1,
        _GREATEST,
        "model.hidden_size model.num_layers model.num_heads model.num_kv_heads model.head_dim model.intermediate_size "
        "model.vocab_size model.lora_alpha tasks.num_train tasks.num_eval rollout.tasks_per_step rollout.max_turns "
        "rollout.max_calls_per_turn rollout.max_completion_tokens rollout.max_trajectory_tokens rollout.max_concurrent "
        "rollout.prefill_tokens_per_step sandbox.max_concurrent "
        "sft.batch_size sft.num_demonstrations train.updates_per_rollout train.micro_batch_tokens "
        "train.checkpoint_every eval.samples",
    ),
    (
        "above 0",
        _LEAST_ABOVE_0,
        _GREATEST,
        "model.initializer_range rollout.temperature rollout.max_logprob_gap train.max_grad_norm "
        "sandbox.cpu_time_s sandbox.wall_time_s sandbox.memory_bytes sandbox.output_bytes",
    ),
    (
        "at least 0",
        0,
        _GREATEST,
        "seed num_threads model.lora_rank eval.temperature sft.steps sft.learning_rate sft.warmup_steps "
        "train.steps train.learning_rate train.warmup_steps train.weight_decay train.eval_every",
    ),
    ("at least -1", -1, _GREATEST, "rollout.tool_join_steps"),
)


def _check(config: Config) -> None:
    for expected, least, greatest, keys in _RANGES:
        for key in keys.split():
            value = operator.attrgetter(key)(config)
            # written so that NaN is refused too
            if value is not None and not least <= value <= greatest:
                raise ValueError(f"{key} must be {expected}, got {value}")
    if config.num_threads > _MOST_THREADS:
        raise ValueError(f"num_threads must be at most {_MOST_THREADS}, got {config.num_threads}")
    if "\0" in config.output_dir or not config.output_dir.strip():
        raise ValueError(f"output_dir must be the path of a folder, got {config.output_dir!r}")
    if config.model.num_heads % config.model.num_kv_heads:
        raise ValueError(
            f"model.num_heads must be a multiple of model.num_kv_heads = {config.model.num_kv_heads}, "
            f"got {config.model.num_heads}"
        )
    if config.model.head_dim % 2:
        raise ValueError(f"model.head_dim must be even, got {config.model.head_dim}: positions rotate pairs")
    tools = list(config.rollout.tools)
    if not tools or len(set(tools)) < len(tools):
        raise ValueError(f"rollout.tools must name at least one tool, and each once; got {tools}")
    if config.rollout.call_format == "code" and "python" not in tools:
        raise ValueError(f'rollout.tools must hold "python", which call_format = "code" calls; got {tools}')
    if not config.environments:
        raise ValueError("environments must name at least one environment, got none")
    for number, environment in enumerate(config.environments):
        if not 0 < environment.weight < math.inf:
            raise ValueError(f"environments.{number}.weight must be above 0, got {environment.weight}")
    for number, reward in enumerate(config.rewards):
        if not (reward.function or reward.name):
            raise ValueError(
                f"rewards.{number} must have a function, or the name of an environment's term; got neither"
            )
        if not math.isfinite(reward.weight):
            raise ValueError(f"rewards.{number}.weight must be a finite number, got {reward.weight}")
    check_method(Method(config.reward, config.credit, config.loss), own_rewards=[own.term for own in config.rewards])
    if config.loss.surrogate == "reinforce" and config.train.updates_per_rollout > 1:
        raise ValueError(
            'train.updates_per_rollout must be 1 with loss.surrogate = "reinforce", which has no ratio to correct '
            f"later updates by, got {config.train.updates_per_rollout}"
        )


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """Validates nested tables into a `Config`. Raises ValueError naming the key, what was expected and what came."""
    import pydantic

    raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    refuse_wrong_types(raw, Config)
    _refuse_unknown_keys(raw, Config, prefix="")
    method = raw.get("method", "gtpo")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    raw |= overridden(METHODS[method], {name: raw[name] for name in TABLES if name in raw})
    try:
        return pydantic.TypeAdapter(Config).validate_python(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        where = f"config key {key!r}: " if key else ""
        raise ValueError(f"{where}{message}" + (f", got {shortened(first['input'])}" if key else "")) from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies `--table.key value` pairs (`--table.key=value` works too)."""
    raw = read_toml(path)
    for key, value in _override_pairs(overrides):
        *tables, last = key.split(".")
        table: Any = raw
        for name in tables:
            table = table.setdefault(name, {}) if isinstance(table, dict) else _entry(table, name, key)
        if not isinstance(table, dict):
            raise ValueError(f"--{key}: {tables[-1]!r} is not a table of the config")
        literal = _toml_literal(value)
        table[last] = value if _is_text(key) and not isinstance(literal, str) else literal
    return config_from_dict(raw)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data; `config_from_dict` of it gives an equal configuration."""
    return dataclasses.asdict(config)


def describe_keys() -> Iterator[tuple[str, Any, str, str, str]]:
    """Every key with its default, its meaning and what it may be, and the purpose of its table, for `gtpo config`."""
    yield from _describe(Config(), prefix="")


def _describe(table: Any, *, prefix: str) -> Iterator[tuple[str, Any, str, str, str]]:
    ranges = {key: expected for expected, _, _, keys in _RANGES for key in keys.split()}
    ranges |= {prefix + name: expected for name, expected in ranges_of(type(table)).items()}
    types = get_type_hints(type(table), include_extras=True)
    # as in TOML, what a table holds itself stands before the tables in it
    for entry in sorted(dataclasses.fields(table), key=lambda entry: entry.name == "terms"):
        key, value = prefix + entry.name, getattr(table, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _describe(value, prefix=f"{key}.")
            continue
        if key == "credit.terms":
            for number, term in enumerate(value):
                yield from _describe(term, prefix=f"{key}.{number}.")
            continue
        kind, meaning = get_args(types[entry.name])
        allowed = re.sub(r"(gtpo\.[a-z_.]+|typing)\.", "", str(kind)) if get_args(kind) else kind.__name__
        if get_origin(kind) is Literal:
            allowed = "one of " + ", ".join(get_args(kind))
        if key == "method":
            allowed = "one of " + ", ".join(METHODS)
        if key in ranges:
            allowed += f" {ranges[key]}"
        yield key, value, meaning, allowed, " ".join((type(table).__doc__ or "").split())


def _refuse_unknown_keys(raw: Mapping[str, Any], cls: type, *, prefix: str) -> None:
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    tables = {
        **TABLES,
        "model": ModelConfig,
        "tasks": TasksConfig,
        "rollout": RolloutConfig,
        "chat": ChatConfig,
        "sandbox": SandboxConfig,
        "sft": SftConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
    }
    for key, value in raw.items():
        if key not in known:
            if place := moved(prefix + key):
                raise ValueError(f"{prefix}{key} is now {place}")
            close = elsewhere(prefix + key) or next(iter(difflib.get_close_matches(key, known, n=1)), None)
            close = prefix + close if close in known else close
            hint = f"did you mean {close!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"unknown config key {prefix + key!r}; {hint}")
        if not prefix and key in tables:
            if not isinstance(value, Mapping):
                raise ValueError(f"config key {key!r} must be a table, got {value!r}")
            _refuse_unknown_keys(value, tables[key], prefix=f"{key}.")
        if not prefix and key in ("environments", "rewards"):
            entry = EnvironmentConfig if key == "environments" else RewardConfig
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    _refuse_unknown_keys(item, entry, prefix=f"{key}.{number}.")
        if prefix == "credit." and key == "terms":
            for number, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                if isinstance(item, Mapping):
                    _refuse_unknown_keys(item, Term, prefix=f"credit.terms.{number}.")


def _override_pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"--{key} needs a value")
        yield key.replace("-", "_"), value


def _entry(tables: Any, number: str, key: str) -> Any:
    """Entry `number` of a list of tables such as `environments`, for the override `--key`."""
    if not isinstance(tables, list):
        raise ValueError(f"--{key}: what stands before {number!r} is not a table of the config")
    if not (number.isdecimal() and int(number) < len(tables)):
        raise ValueError(f"--{key}: expected the number of one of {len(tables)} entries, from 0, got {number!r}")
    return tables[int(number)]


def _is_text(key: str) -> bool:
    """Whether `key` holds a text, for which 7 or 2026-11-23 need no quotes."""
    kind: Any = Config
    for name in key.split("."):
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        else:
            kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind is str


def _toml_literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
