"""The `cuda` backend of turn credit: returns, statistics and lookup in one launch, statistics in float64."""

import torch
from torch import Tensor

from gtpo_kernels import _cuda
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.cuda_launch import address, dtype_of, launch
from gtpo_kernels.turn_advantages.compiled import compiled_rule
from gtpo_kernels.turn_advantages.reference import CreditRule, TurnAdvantages


def turn_returns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """[K] float64; see `gtpo_kernels.turn_returns`."""
    turn_rewards, cu_turns = turn_rewards.contiguous(), cu_turns.contiguous()
    returns = turn_rewards.new_empty(turn_rewards.shape, dtype=torch.float64)
    launch(_cuda.turn_returns, returns.device, _turns(turn_rewards, cu_turns), gamma=gamma, returns=address(returns))
    return returns


def turn_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    anchor_ids: Tensor | None,
    rule: CreditRule,
) -> TurnAdvantages:
    """One rule; for quantity="outcome", turn_rewards has the outcome at each trajectory's first turn."""
    turn_rewards, cu_turns = turn_rewards.contiguous(), cu_turns.contiguous()
    group_ids, turn_ids = group_ids.contiguous(), turn_ids.contiguous()
    anchor_ids = turn_ids.new_empty(0) if anchor_ids is None else anchor_ids.contiguous()
    dtype = accumulator_dtype(turn_rewards.dtype)
    of_tokens, of_turns, returns = (
        turn_rewards.new_empty(like.shape, dtype=dtype) for like in (turn_ids, turn_rewards, turn_rewards)
    )
    token_counts = turn_rewards.new_empty(turn_rewards.shape, dtype=torch.int32)
    exact_returns, exact_advantages = turn_rewards.new_empty(2, *turn_rewards.shape, dtype=torch.float64)
    launch(
        _cuda.turn_advantages,
        turn_rewards.device,
        _turns(turn_rewards, cu_turns),
        group_ids=_ids(group_ids),
        turn_ids=_ids(turn_ids),
        anchor_ids=_ids(anchor_ids),
        num_tokens=turn_ids.shape[0],
        rule=compiled_rule(_cuda, rule),
        token_counts=address(token_counts),
        exact_returns=address(exact_returns),
        exact_advantages=address(exact_advantages),
        wide_results=dtype == torch.float64,
        returns=address(returns),
        turn_advantages=address(of_turns),
        token_advantages=address(of_tokens),
    )
    return TurnAdvantages(of_tokens, of_turns, returns)


def _ids(ids: Tensor) -> _cuda.Ids:
    return _cuda.Ids(address(ids), ids.dtype == torch.int64)


def _turns(turn_rewards: Tensor, cu_turns: Tensor) -> _cuda.Turns:
    return _cuda.Turns(
        turn_rewards=address(turn_rewards),
        dtype=dtype_of(turn_rewards),
        cu_turns=_ids(cu_turns),
        num_turns=turn_rewards.shape[0],
        num_trajectories=cu_turns.shape[0] - 1,
    )
