"""The `cpp` backend of turn credit: compiled loops over turns and tokens, float64 throughout, on the CPU."""

import numpy as np
import torch
from torch import Tensor

from gtpo_kernels import _cpu
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.turn_advantages.compiled import compiled_rule
from gtpo_kernels.turn_advantages.reference import CreditRule, TurnAdvantages


def turn_returns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """[K] float64; see `gtpo_kernels.turn_returns`."""
    returns = _cpu.turn_returns(buffer(turn_rewards, torch.float64), buffer(cu_turns, torch.int64), gamma)
    return torch.from_numpy(returns)


def turn_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    anchor_ids: Tensor | None,
    rule: CreditRule,
) -> TurnAdvantages:
    """One rule; for quantity="outcome", turn_rewards has the outcome at each trajectory's first turn."""
    dtype = accumulator_dtype(turn_rewards.dtype)
    compiled = _cpu.turn_advantages if dtype == torch.float64 else _cpu.turn_advantages_float32
    outputs = compiled(
        buffer(turn_rewards, torch.float64),
        buffer(cu_turns, torch.int64),
        buffer(group_ids, torch.int64),
        buffer(turn_ids, torch.int64),
        buffer_or_none(anchor_ids, torch.int64),
        compiled_rule(_cpu, rule),
    )
    advantages, turn_level, returns = (torch.from_numpy(output).to(dtype) for output in outputs)
    return TurnAdvantages(advantages, turn_level, returns)


def buffer(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The tensor's memory where dtype and layout already fit, else a converted copy."""
    return tensor.detach().to(dtype).contiguous().numpy()


def buffer_or_none(tensor: Tensor | None, dtype: torch.dtype) -> np.ndarray | None:
    """`buffer`, or None for None."""
    return None if tensor is None else buffer(tensor, dtype)
