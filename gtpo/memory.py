"""What a configuration would take at the least, held against what the machine has: too much is refused at the start.

Lower bounds of single things that are held at one time. What fits by them may still run out; what does not cannot run.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from gtpo.config import Config
from gtpo.policy import Policy

# of a task without its texts, and of one that a rollout has begun
_TASK_BYTES, _TRAJECTORY_BYTES = 500, 1000
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# control tokens and all bytes: the least that a tokenizer has
_LEAST_VOCAB = 259


def refuse_unaffordable(config: Config) -> None:
    """Raises ValueError, with the keys and the bytes, for what cannot be held whatever the model is."""
    available = _machine_bytes()
    for keys, num_bytes in _of_rollouts(config):
        _refuse(config, keys, num_bytes, available)
    if config.model.source == "tiny":
        keys = "model.num_layers model.hidden_size model.num_heads model.head_dim model.intermediate_size"
        weights = _tiny_weights(config)
        _refuse(config, keys, _trained_bytes(config, weights, trains=not config.model.lora_rank), available)
        # of rank r beside each of a layer's seven matrices, whose sides have one row at the least
        adapters = config.model.lora_rank * config.model.num_layers * 7 * 2
        _refuse(config, "model.lora_rank", _trained_bytes(config, adapters, trains=True), available)


def refuse_unaffordable_cache(config: Config, policy: Policy) -> None:
    """Raises ValueError where the keys and values of the trajectories sampled at once have no room on the device."""
    text = policy.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_token = 2 * text.num_hidden_layers * heads * head_dim * _DTYPE_BYTES[config.model.computes_in]
    rollout = config.rollout
    slots = min(rollout.max_concurrent, rollout.tasks_per_step * rollout.group_size)
    is_gpu = policy.device.type == "cuda"
    available = torch.cuda.mem_get_info(policy.device)[1] if is_gpu else _machine_bytes()
    keys = "rollout.max_concurrent rollout.max_trajectory_tokens"
    _refuse(config, keys, slots * rollout.max_trajectory_tokens * of_token, available)


def _of_rollouts(config: Config) -> Iterator[tuple[str, int]]:
    tasks, rollout = config.tasks, config.rollout
    yield "tasks.num_train", tasks.num_train * _TASK_BYTES
    yield "tasks.num_eval", tasks.num_eval * _TASK_BYTES
    if config.sft.steps:
        yield "sft.num_demonstrations", config.sft.num_demonstrations * _TASK_BYTES
    # a uniform of 8 bytes for every token that a trajectory may have, drawn at its start
    of_trajectory = _TRAJECTORY_BYTES + 8 * rollout.max_trajectory_tokens
    yield (
        "rollout.tasks_per_step rollout.group_size rollout.max_trajectory_tokens",
        rollout.tasks_per_step * rollout.group_size * of_trajectory,
    )
    yield (
        "tasks.num_eval eval.samples rollout.max_trajectory_tokens",
        tasks.num_eval * config.eval.samples * of_trajectory,
    )


def _tiny_weights(config: Config) -> int:
    model = config.model
    attention = 2 * model.head_dim * (model.num_heads + model.num_kv_heads) * model.hidden_size
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * layer + 2 * _LEAST_VOCAB * model.hidden_size


def _trained_bytes(config: Config, num_weights: int, *, trains: bool) -> int:
    # in training, gradients and AdamW's two moments stand beside the weights
    copies = 4 if trains and (config.sft.steps or config.train.steps) else 1
    of_weight = _DTYPE_BYTES[config.model.dtype] * copies
    if config.model.computes_in != config.model.dtype:
        of_weight += _DTYPE_BYTES[config.model.computes_in]
    return of_weight * num_weights


def _refuse(config: Config, keys: str, num_bytes: int, available: int) -> None:
    if num_bytes > available:
        named = []
        for key in keys.split():
            table, name = key.split(".")
            named.append(f"{key} = {getattr(getattr(config, table), name)}")
        raise ValueError(
            f"{', '.join(named)} would take at least {_gigabytes(num_bytes)} of memory, "
            f"there are {_gigabytes(available)}"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _machine_bytes() -> int:
    """The memory of the machine, or of the container that we are in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit.isdecimal() else total
    except OSError:
        return total
