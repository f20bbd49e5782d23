"""The configuration of a run: frozen dataclasses, read from TOML, overridden by `--key value`, unknown keys refused.

Units are in the names (`_s`, `_bytes`, `num_`, `max_`). `method` names a preset of `Method`; the keys of the table
`[credit]` override single fields of it.

>>> config = config_from_dict({"method": "grpo", "credit": {"eps": 1e-4}})
>>> config.credit.gamma, config.credit.population, config.credit.eps
(1.0, 'trajectories', 0.0001)
>>> config_from_dict({"rolout": {}})
Traceback (most recent call last):
    ...
ValueError: unknown config key 'rolout'; did you mean 'rollout'?
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """What a method of the family does, as data. Source of the presets: arXiv 2511.14846, read as docs/log.md says.

    reward: "turn" gives r_ij = outcome or similarity credit on the last turn + format and execution terms of the turn;
    "outcome" gives one terminal reward, 1 if the answer is right and no turn has a format fault, else 0.
    scope and population: which turn returns share a mean and a standard deviation, and whether every turn or every
    trajectory is one entry of them.
    """

    reward: Literal["turn", "outcome"] = "turn"
    gamma: float = 0.9
    scope: Literal["group", "batch", "group_turn"] = "group"
    population: Literal["turns", "trajectories"] = "turns"
    ddof: int = 1
    eps: float = 1e-6
    format_penalty: float = 0.1
    similarity_alpha: float = 0.5
    similarity: str = "ngram"
    execution_bonus: float = 0.0
    execution_penalty: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28


METHODS: dict[str, Method] = {
    "gtpo": Method(),
    "gtpo_dense": Method(execution_bonus=0.05, execution_penalty=0.05),
    "grpo": Method(reward="outcome", gamma=1.0, population="trajectories", format_penalty=0.0, similarity_alpha=0.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """`source`: "tiny" builds a small random Qwen3-style model with its own tokenizer; "package:NAME" takes the GGUF
    file that a Python package carries; anything else is a folder that `from_pretrained` reads."""

    source: str = "tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 384
    vocab_size: int = 320
    initializer_range: float = 0.02
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    freeze_head: bool = False
    lora_rank: int = 0
    lora_alpha: int = 16
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class EnvironmentConfig:
    """One environment of the mixture; `options` go to its constructor, `weight` is its share of the tasks."""

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TasksConfig:
    """Sizes of the two disjoint splits. Training tasks are visited in a seeded order, epoch after epoch."""

    num_train: int = 2000
    num_eval: int = 200


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts. A tool's result joins its trajectory `tool_join_steps` decoding steps after the call, whenever it came:
    so the schedule, and with it every bit of the run, does not depend on how fast the tools were. -1 joins at once."""

    tasks_per_step: int = 16
    group_size: int = 8
    temperature: float = 1.0
    max_turns: int = 6
    max_completion_tokens: int = 96
    max_trajectory_tokens: int = 512
    max_concurrent: int = 128
    call_format: Literal["code", "json"] = "code"
    tools: tuple[str, ...] = ("python",)
    tool_role: str = "tool"
    tool_join_steps: int = 4
    mask_truncated: bool = False
    mask_void_turns: bool = False


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of one session of model-written code; `min_tier` is the least isolation that the run accepts."""

    min_tier: Literal["none", "rlimits", "landlock", "namespaces"] = "landlock"
    cpu_time_s: float = 2.0
    wall_time_s: float = 30.0
    memory_bytes: int = 512 * 1024 * 1024
    output_bytes: int = 4096
    max_concurrent: int = 8


@dataclass(frozen=True)
class TrainConfig:
    """The policy-gradient phase. `micro_batch_tokens` bounds one forward pass; gradients accumulate over the
    micro-batches of an optimizer step under one denominator. `updates_per_rollout` above 1 splits a rollout into as
    many optimizer steps."""

    steps: int = 100
    learning_rate: float = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 8192
    updates_per_rollout: int = 1
    eval_every: int = 0
    checkpoint_every: int = 20


@dataclass(frozen=True)
class SftConfig:
    """The warm-up on demonstrations. `steps = 0` leaves it out. `only_successful = false` keeps those that ran out of
    turns too: the lucky guesses of a blind demonstrator, taken alone, would teach what it does not know.
    `optimizer`: "muon" for a model that starts from random weights learns to copy in half the steps; "adamw" otherwise.
    """

    steps: int = 0
    batch_size: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    num_demonstrations: int = 1000
    only_successful: bool = True


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out split with `samples` attempts a task, at the training temperature unless set."""

    samples: int = 1
    temperature: float | None = None


@dataclass(frozen=True)
class Config:
    """One run. Everything random derives from `seed`; `num_threads = 0` keeps PyTorch's own choice."""

    method: str = "gtpo"
    seed: int = 0
    output_dir: str = "runs/run"
    num_threads: int = 0
    credit: Method = field(default_factory=Method)
    model: ModelConfig = field(default_factory=ModelConfig)
    environments: tuple[EnvironmentConfig, ...] = (EnvironmentConfig(name="retry"),)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Config) -> None:
    at_least = {
        "rollout.group_size": (config.rollout.group_size, 2, "a group of one has no one to be compared with"),
        "rollout.tasks_per_step": (config.rollout.tasks_per_step, 1, "a step needs a task"),
        "rollout.max_turns": (config.rollout.max_turns, 1, "a trajectory needs a turn"),
        "rollout.max_completion_tokens": (config.rollout.max_completion_tokens, 1, "a turn needs a token"),
        "rollout.max_concurrent": (config.rollout.max_concurrent, 1, "one trajectory must be able to run"),
        "tasks.num_train": (config.tasks.num_train, 1, "there must be something to train on"),
        "eval.samples": (config.eval.samples, 1, "avg@k needs a sample"),
        "train.updates_per_rollout": (config.train.updates_per_rollout, 1, "a rollout gives at least one update"),
        "train.micro_batch_tokens": (config.train.micro_batch_tokens, 1, "a micro-batch needs a token"),
        "train.checkpoint_every": (config.train.checkpoint_every, 1, "a run must be resumable"),
    }
    for key, (value, least, why) in at_least.items():
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}: {why}")
    if config.rollout.temperature <= 0:
        raise ValueError(f"rollout.temperature must be above 0, got {config.rollout.temperature}")
    if config.eval.temperature is not None and config.eval.temperature <= 0:
        raise ValueError(f"eval.temperature must be above 0, or left out, got {config.eval.temperature}")
    if config.rollout.call_format == "code" and "python" not in config.rollout.tools:
        raise ValueError(
            f'rollout.tools must hold "python", which call_format = "code" calls; got {list(config.rollout.tools)}'
        )
    if not 0 <= config.credit.gamma <= 1:
        raise ValueError(f"credit.gamma must be in [0, 1], got {config.credit.gamma}")
    if not config.environments:
        raise ValueError("environments must name at least one environment, got none")
    names = [environment.name for environment in config.environments]
    if any(environment.weight <= 0 for environment in config.environments):
        raise ValueError(
            f"every environment's weight must be above 0, got {dict(zip(names, config.environments, strict=True))}"
        )


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """Validates nested tables into a `Config`. Raises ValueError naming the key, what was expected and what came."""
    import pydantic

    raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    _refuse_unknown_keys(raw, Config, prefix="")
    method = raw.get("method", "gtpo")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    raw["credit"] = dataclasses.asdict(METHODS[method]) | raw.get("credit", {})
    try:
        return pydantic.TypeAdapter(Config).validate_python(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        where = f"config key {key!r}: " if key else ""
        raise ValueError(f"{where}{message}" + (f", got {first['input']!r}" if key else "")) from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies `--table.key value` pairs (`--table.key=value` works too)."""
    with open(path, "rb") as file:
        try:
            raw = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
    for key, value in _override_pairs(overrides):
        table = raw
        *tables, last = key.split(".")
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"--{key}: {name!r} is not a table of the config")
        table[last] = _toml_literal(value)
    return config_from_dict(raw)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data; `config_from_dict` of it gives an equal configuration."""
    return dataclasses.asdict(config)


def describe_keys() -> Iterator[tuple[str, Any, str]]:
    """Every scalar key with its default and the purpose of its table, for `gtpo config`."""
    default = Config()
    for entry in dataclasses.fields(Config):
        value = getattr(default, entry.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for sub in dataclasses.fields(value):
                yield (
                    f"{entry.name}.{sub.name}",
                    getattr(value, sub.name),
                    " ".join((type(value).__doc__ or "").split()),
                )
        else:
            yield entry.name, value, " ".join((Config.__doc__ or "").split())


def _refuse_unknown_keys(raw: Mapping[str, Any], cls: type, *, prefix: str) -> None:
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    tables = {
        "credit": Method,
        "model": ModelConfig,
        "tasks": TasksConfig,
        "rollout": RolloutConfig,
        "sandbox": SandboxConfig,
        "sft": SftConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
    }
    for key, value in raw.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix + close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"unknown config key {prefix + key!r}; {hint}")
        if not prefix and key in tables:
            if not isinstance(value, Mapping):
                raise ValueError(f"config key {key!r} must be a table, got {value!r}")
            _refuse_unknown_keys(value, tables[key], prefix=f"{key}.")
        if not prefix and key == "environments":
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    _refuse_unknown_keys(item, EnvironmentConfig, prefix=f"environments.{number}.")


def _override_pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            try:
                value = next(words)
            except StopIteration:
                raise ValueError(f"--{key} needs a value") from None
        yield key.replace("-", "_"), value


def _toml_literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
