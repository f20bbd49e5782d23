"""The `triton` backend of turn credit: a scan per trajectory, two passes per scope, a look-up per token, in float64.

Which turns share a scope is found by sorting, with the library's sort; no program waits for another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.triton_math import INF, LAUNCH, device_of, scalar
from gtpo_kernels.turn_advantages.kernel_torch import exact_advantages
from gtpo_kernels.turn_advantages.reference import CreditRule, TurnAdvantages

SCAN_TURNS = 64
SCOPE_TURNS = 128
BLOCK = 1024
# Sorts behind every scope.
NO_SCOPE = tl.constexpr(2**63 - 1)


class Statistics(NamedTuple):
    """Of a scope's population, a row of float64.  mean: the lowest value where there is no spread."""

    num_entries: float
    total_mass: float
    weighted_sum: float
    mean: float
    std: float
    has_spread: float


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
def count_kernel(turn_ids_ptr, num_tokens_ptr, num_tokens, BLOCK_N: tl.constexpr):
    """How many tokens every turn has; whole numbers, so the order of the additions does not matter."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    turn = tl.load(turn_ids_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
    tl.atomic_add(num_tokens_ptr + turn, tl.full((BLOCK_N,), 1, tl.int32), mask=turn >= 0, sem="relaxed")


@triton.jit
def statistics_kernel(
    scopes_ptr, ends_ptr, order_ptr, x_ptr, mass_ptr, statistics_ptr, ddof, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Program p, where a scope starts at p among the sorted turns: `Statistics` in row p of [K, WIDTH]."""
    start = tl.program_id(0).to(tl.int64)
    scope = tl.load(scopes_ptr + start)
    before = tl.load(scopes_ptr + start - 1, mask=start > 0, other=-1)
    if (scope != NO_SCOPE) & (scope != before):
        end = tl.load(ends_ptr + start)
        lanes = tl.arange(0, BLOCK_K)
        sums, masses = tl.zeros((BLOCK_K,), tl.float64), tl.zeros((BLOCK_K,), tl.float64)
        highest = tl.full((BLOCK_K,), -INF, tl.float64)
        lowest = tl.full((BLOCK_K,), INF, tl.float64)
        for first in range(start, end, BLOCK_K):
            mask = first + lanes < end
            turn = tl.load(order_ptr + first + lanes, mask=mask, other=0)
            value = tl.load(x_ptr + turn, mask=mask, other=0.0)
            mass = tl.load(mass_ptr + turn, mask=mask, other=0.0)
            masses += mass
            sums += mass * value
            highest = tl.maximum(highest, tl.where(mask, value, -INF))
            lowest = tl.minimum(lowest, tl.where(mask, value, INF))
        total, weighted, low = tl.sum(masses, 0), tl.sum(sums, 0), tl.min(lowest, 0)
        spread = tl.max(highest, 0) > low
        # the mean of equal numbers may differ from them by rounding
        mean = tl.where(spread, weighted / total, low)
        squares = tl.zeros((BLOCK_K,), tl.float64)
        for first in range(start, end, BLOCK_K):
            mask = first + lanes < end
            turn = tl.load(order_ptr + first + lanes, mask=mask, other=0)
            deviation = tl.load(x_ptr + turn, mask=mask, other=0.0) - mean
            squares += tl.load(mass_ptr + turn, mask=mask, other=0.0) * deviation * deviation
        row = statistics_ptr + start * WIDTH
        tl.store(row, (end - start).to(tl.float64))
        tl.store(row + 1, total)
        tl.store(row + 2, weighted)
        tl.store(row + 3, mean)
        tl.store(row + 4, tl.sqrt(tl.sum(squares, 0) / tl.maximum(total - ddof, 1.0)))
        tl.store(row + 5, spread.to(tl.float64))


@triton.jit(do_not_specialize=["num_turns", "centre", "divides", "keeps_alone"])
def normalise_kernel(
    x_ptr,
    entries_ptr,
    starts_ptr,
    mass_ptr,
    statistics_ptr,
    normalised_ptr,
    num_turns,
    centre,
    divides,
    keeps_alone,
    eps: tl.float64,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K turns by the statistics of their scopes, 0 where a scope has none (start -1)."""
    turn = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = turn < num_turns
    x = tl.load(x_ptr + turn, mask=mask, other=0.0)
    start = tl.load(starts_ptr + turn, mask=mask, other=-1)
    mask_known = start >= 0
    row = statistics_ptr + start * WIDTH
    count = tl.load(row, mask=mask_known, other=0.0)
    total = tl.load(row + 1, mask=mask_known, other=1.0)
    weighted = tl.load(row + 2, mask=mask_known, other=0.0)
    baseline = tl.load(row + 3, mask=mask_known, other=0.0)
    std = tl.load(row + 4, mask=mask_known, other=1.0)
    has_spread = tl.load(row + 5, mask=mask_known, other=0.0) > 0.0
    if centre == 1:
        entry = tl.load(entries_ptr + turn, mask=mask, other=-1)
        own_mass = tl.load(mass_ptr + entry, mask=entry >= 0, other=0.0)
        own = tl.load(x_ptr + entry, mask=entry >= 0, other=0.0)
        others = (weighted - own_mass * own) / tl.maximum(total - own_mass, 1.0)
        baseline = tl.where(has_spread, others, baseline)
    if centre == 2:
        baseline = tl.zeros_like(baseline)
    small = scalar(eps, tl.float64)
    normalised, alone = x - baseline, x
    if divides != 0:
        divisor = tl.where(has_spread, std + small, 1.0)
        normalised = tl.where(has_spread, normalised / divisor, 0.0)
        alone = x / (1.0 + small)
    normalised = tl.where(count == 1.0, tl.where(keeps_alone != 0, alone, 0.0), normalised)
    tl.store(normalised_ptr + turn, tl.where(mask_known, normalised, 0.0), mask=mask)


@triton.jit(do_not_specialize=["num_turns"])
def round_kernel(
    normalised_ptr, x_ptr, num_tokens_ptr, advantages_ptr, rounded_x_ptr, num_turns, BLOCK_K: tl.constexpr
):
    """Advantages, 0 for turns without tokens, and x of BLOCK_K turns, in the output dtype."""
    OUT: tl.constexpr = advantages_ptr.dtype.element_ty
    turn = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = turn < num_turns
    has_tokens = tl.load(num_tokens_ptr + turn, mask=mask, other=0) > 0
    advantage = tl.load(normalised_ptr + turn, mask=mask, other=0.0)
    tl.store(advantages_ptr + turn, tl.where(has_tokens, advantage, 0.0).to(OUT), mask=mask)
    tl.store(rounded_x_ptr + turn, tl.load(x_ptr + turn, mask=mask, other=0.0).to(OUT), mask=mask)


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
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    anchor_ids: Tensor | None,
    rule: CreditRule,
) -> TurnAdvantages:
    """One rule; for quantity="outcome", turn_rewards has the outcome at each trajectory's first turn."""
    num_turns, tokens = turn_rewards.shape[0], turn_ids.shape[0]
    dtype = accumulator_dtype(turn_rewards.dtype)
    turn_ids = turn_ids.contiguous()
    num_tokens = torch.zeros(num_turns, dtype=torch.int32, device=turn_ids.device)
    by_token = torch.empty(turn_ids.shape, dtype=dtype, device=turn_ids.device)
    by_turn, rounded_x = (torch.empty(num_turns, dtype=dtype, device=turn_ids.device) for _ in range(2))
    token_blocks, turn_blocks = (triton.cdiv(tokens, BLOCK),), (triton.cdiv(num_turns, BLOCK),)
    with device_of(turn_ids):
        count_kernel[token_blocks](turn_ids, num_tokens, tokens, BLOCK_N=BLOCK, **LAUNCH)
        x, advantages = exact_advantages(
            turn_rewards, cu_turns, group_ids, num_tokens, anchor_ids, rule, turn_returns, normalise
        )
        round_kernel[turn_blocks](advantages, x, num_tokens, by_turn, rounded_x, num_turns, BLOCK_K=BLOCK, **LAUNCH)
        look_up_kernel[token_blocks](turn_ids, by_turn, by_token, tokens, BLOCK_N=BLOCK, **LAUNCH)
    return TurnAdvantages(by_token, by_turn, rounded_x)


def normalise(x: Tensor, scope: Tensor, entry: Tensor, mass: Tensor, rule: CreditRule) -> Tensor:
    """[K] float64: x by the statistics of its scope; mass: [K], what turn k weighs where it is an entry."""
    num_turns = x.shape[0]
    outside = entry != torch.arange(num_turns, device=x.device)
    scopes, order = scope.masked_fill(outside, NO_SCOPE.value).sort(stable=True)
    ends = torch.searchsorted(scopes, scopes, right=True)
    # a scope without an entry is not among them
    starts = torch.searchsorted(scopes, scope).clamp(max=max(num_turns - 1, 0))
    starts = starts.masked_fill(scopes[starts] != scope, -1)
    statistics = x.new_empty(num_turns, len(Statistics._fields))
    normalised = torch.empty_like(x)
    width = {"WIDTH": len(Statistics._fields), **LAUNCH}
    statistics_kernel[(num_turns,)](
        scopes, ends, order, x, mass, statistics, rule.ddof, BLOCK_K=SCOPE_TURNS, num_warps=1, **width
    )
    normalise_kernel[(triton.cdiv(num_turns, BLOCK),)](
        x,
        entry,
        starts,
        mass,
        statistics,
        normalised,
        num_turns,
        ("mean", "leave_one_out", "none").index(rule.centre),
        int(rule.scale == "std"),
        int(rule.singleton == "keep"),
        rule.eps,
        BLOCK_K=BLOCK,
        **width,
    )
    return normalised
