"""The `triton` backend of turn credit: a scan per trajectory, two passes per scope, a look-up per token, in float64.

Which turns share a scope is found by sorting, with the library's sort; no program waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.triton_math import INF, LAUNCH, device_of, scalar
from gtpo_kernels.turn_advantages.kernel_torch import first_with_tokens, scope_of_turn, trajectory_of_turn
from gtpo_kernels.turn_advantages.reference import CreditRule, TurnAdvantages

SCAN_TURNS = 64
SCOPE_TURNS = 128
BLOCK = 1024
# Sorts behind every scope.
NO_SCOPE = tl.constexpr(2**63 - 1)


@triton.jit
def later_then_earlier(decay_late, return_late, decay, reward):
    """Two neighbouring spans of turns as one: R = reward + decay * (return of what follows)."""
    return decay_late * decay, reward + decay * return_late


@triton.jit
def returns_kernel(turn_rewards_ptr, cu_turns_ptr, gamma: tl.float64, returns_ptr, BLOCK_K: tl.constexpr):
    """Program b: R_k = r_k + gamma R_{k+1} of trajectory b, blocks of turns from its end."""
    first = tl.load(cu_turns_ptr + tl.program_id(0)).to(tl.int64)
    end = tl.load(cu_turns_ptr + tl.program_id(0) + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    decay = tl.zeros((BLOCK_K,), tl.float64) + scalar(gamma, tl.float64)
    following = tl.full((), 0.0, tl.float64)
    blocks = tl.cdiv(end - first, BLOCK_K)
    for block in range(blocks):
        turn = first + (blocks - 1 - block) * BLOCK_K + lanes
        mask = turn < end
        reward = tl.load(turn_rewards_ptr + turn, mask=mask, other=0.0).to(tl.float64)
        decays, returns = tl.associative_scan((decay, reward), 0, later_then_earlier, reverse=True)
        returns += decays * following
        tl.store(returns_ptr + turn, returns, mask=mask)
        following = tl.sum(tl.where(lanes == 0, returns, 0.0), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def mark_kernel(turn_ids_ptr, has_tokens_ptr, num_tokens, BLOCK_N: tl.constexpr):
    """1 for every turn that has a token; all who write there write the same."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    turn = tl.load(turn_ids_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
    tl.store(has_tokens_ptr + turn, tl.full((BLOCK_N,), 1, tl.int8), mask=turn >= 0)


@triton.jit
def statistics_kernel(
    scopes_ptr, ends_ptr, order_ptr, returns_ptr, mean_ptr, divisor_ptr, ddof, eps: tl.float64, BLOCK_K: tl.constexpr
):
    """Program p, where a scope starts at p among the sorted turns: its mean, and std + eps, or 0 without a spread."""
    start = tl.program_id(0).to(tl.int64)
    scope = tl.load(scopes_ptr + start)
    before = tl.load(scopes_ptr + start - 1, mask=start > 0, other=-1)
    if (scope != NO_SCOPE) & (scope != before):
        end = tl.load(ends_ptr + start)
        lanes = tl.arange(0, BLOCK_K)
        sums = tl.zeros((BLOCK_K,), tl.float64)
        highest = tl.full((BLOCK_K,), -INF, tl.float64)
        lowest = tl.full((BLOCK_K,), INF, tl.float64)
        for first in range(start, end, BLOCK_K):
            mask = first + lanes < end
            value = tl.load(returns_ptr + tl.load(order_ptr + first + lanes, mask=mask, other=0), mask=mask, other=0.0)
            sums += value
            highest = tl.maximum(highest, tl.where(mask, value, -INF))
            lowest = tl.minimum(lowest, tl.where(mask, value, INF))
        count = (end - start).to(tl.float64)
        mean = tl.sum(sums, 0) / count
        squares = tl.zeros((BLOCK_K,), tl.float64)
        for first in range(start, end, BLOCK_K):
            mask = first + lanes < end
            value = tl.load(returns_ptr + tl.load(order_ptr + first + lanes, mask=mask, other=0), mask=mask, other=0.0)
            deviation = tl.where(mask, value - mean, 0.0)
            squares += deviation * deviation
        std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(count - ddof, 1.0))
        spread = tl.max(highest, 0) > tl.min(lowest, 0)
        tl.store(mean_ptr + start, mean)
        tl.store(divisor_ptr + start, tl.where(spread, std + scalar(eps, tl.float64), 0.0))


@triton.jit(do_not_specialize=["num_turns"])
def normalise_kernel(
    returns_ptr,
    has_tokens_ptr,
    starts_ptr,
    mean_ptr,
    divisor_ptr,
    advantages_ptr,
    rounded_returns_ptr,
    num_turns,
    BLOCK_K: tl.constexpr,
):
    """Advantages and returns of BLOCK_K turns, in the output dtype.  starts_ptr: None where they are the same."""
    OUT: tl.constexpr = advantages_ptr.dtype.element_ty
    turn = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = turn < num_turns
    returns = tl.load(returns_ptr + turn, mask=mask, other=0.0)
    has_tokens = tl.load(has_tokens_ptr + turn, mask=mask, other=0) != 0
    advantage = returns
    if starts_ptr is not None:
        start = tl.load(starts_ptr + turn, mask=has_tokens, other=0)
        divisor = tl.load(divisor_ptr + start, mask=has_tokens, other=0.0)
        deviation = returns - tl.load(mean_ptr + start, mask=has_tokens, other=0.0)
        advantage = tl.where(divisor > 0.0, deviation / tl.where(divisor > 0.0, divisor, 1.0), 0.0)
    tl.store(advantages_ptr + turn, tl.where(has_tokens, advantage, 0.0).to(OUT), mask=mask)
    tl.store(rounded_returns_ptr + turn, returns.to(OUT), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def look_up_kernel(turn_ids_ptr, turn_advantages_ptr, advantages_ptr, num_tokens, BLOCK_N: tl.constexpr):
    """The advantage of every token's turn, 0 where it has none."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = token < num_tokens
    turn = tl.load(turn_ids_ptr + token, mask=mask, other=-1).to(tl.int64)
    tl.store(advantages_ptr + token, tl.load(turn_advantages_ptr + turn, mask=turn >= 0, other=0.0), mask=mask)


def turn_returns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> Tensor:
    """[K] float64; see `gtpo_kernels.turn_returns`."""
    returns = torch.empty(turn_rewards.shape, dtype=torch.float64, device=turn_rewards.device)
    with device_of(turn_rewards):
        returns_kernel[(cu_turns.shape[0] - 1,)](
            turn_rewards.contiguous(),
            cu_turns.contiguous(),
            gamma,
            returns,
            BLOCK_K=SCAN_TURNS,
            num_warps=1,
            **LAUNCH,
        )
    return returns


def turn_advantages(
    turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, rule: CreditRule
) -> TurnAdvantages:
    """See `gtpo_kernels.turn_advantages`."""
    num_turns, num_tokens = turn_rewards.shape[0], turn_ids.shape[0]
    dtype = accumulator_dtype(turn_rewards.dtype)
    turn_ids = turn_ids.contiguous()
    returns = turn_returns(turn_rewards, cu_turns, rule.gamma)
    has_tokens = torch.zeros(num_turns, dtype=torch.int8, device=turn_ids.device)
    by_token = torch.empty(turn_ids.shape, dtype=dtype, device=turn_ids.device)
    by_turn, rounded_returns = torch.empty_like(returns, dtype=dtype), torch.empty_like(returns, dtype=dtype)
    token_blocks = (triton.cdiv(num_tokens, BLOCK),)
    with device_of(turn_ids):
        mark_kernel[token_blocks](turn_ids, has_tokens, num_tokens, BLOCK_N=BLOCK, **LAUNCH)
        scopes: tuple[Tensor | None, ...] = (None, None, None)
        if rule.scope != "none":
            scopes = scope_statistics(returns, cu_turns, group_ids, has_tokens.bool(), rule)
        normalise_kernel[(triton.cdiv(num_turns, BLOCK),)](
            returns, has_tokens, *scopes, by_turn, rounded_returns, num_turns, BLOCK_K=BLOCK, **LAUNCH
        )
        look_up_kernel[token_blocks](turn_ids, by_turn, by_token, num_tokens, BLOCK_N=BLOCK, **LAUNCH)
    return TurnAdvantages(by_token, by_turn, rounded_returns)


def scope_statistics(
    returns: Tensor, cu_turns: Tensor, group_ids: Tensor, has_tokens: Tensor, rule: CreditRule
) -> tuple[Tensor, Tensor, Tensor]:
    """(start, mean, divisor), each [K]: turn k is normalised by mean[start[k]] and divisor[start[k]]."""
    turn = torch.arange(len(returns), device=returns.device)
    trajectory = trajectory_of_turn(cu_turns, turn)
    first = cu_turns.long()[trajectory]
    scope = scope_of_turn(group_ids, trajectory, turn - first, rule.scope)
    in_population = first_with_tokens(has_tokens, first) if rule.population == "trajectories" else has_tokens
    scopes, order = scope.masked_fill(~in_population, NO_SCOPE.value).sort(stable=True)
    ends = torch.searchsorted(scopes, scopes, right=True)
    mean, divisor = torch.empty_like(returns), torch.empty_like(returns)
    statistics_kernel[(len(returns),)](
        scopes, ends, order, returns, mean, divisor, rule.ddof, rule.eps, BLOCK_K=SCOPE_TURNS, num_warps=1, **LAUNCH
    )
    return torch.searchsorted(scopes, scope), mean, divisor
