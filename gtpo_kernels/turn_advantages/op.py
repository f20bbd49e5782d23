"""`turn_returns`, `turn_advantages` and `TurnCredit`: the public functions, and their registration."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.backend import run_kernel, select_backend
from gtpo_kernels.checks import accumulator_dtype, check_choice, check_tensor, check_values
from gtpo_kernels.turn_advantages.reference import (
    CreditRule,
    TurnAdvantages,
    turn_advantages_reference,
    turn_returns_reference,
)

FAMILY = "turn_advantages"
Scope = Literal["group", "batch", "group_turn", "none"]
Population = Literal["turns", "trajectories"]


def turn_returns(turn_rewards: Tensor, cu_turns: Tensor, *, gamma: float = 0.9, backend: str | None = None) -> Tensor:
    """Discounted return of every turn: R_k = r_k + gamma * R_{k+1}, restarting at each trajectory.

    turn_rewards: [K] float.  cu_turns: [B+1] int32 or int64 prefix sums of turns a trajectory, cu_turns[-1] == K.
    gamma: in [0, 1], a discount per turn, never per token.
    Returns [K] float32 (float64 for float64 rewards), accumulated in float64.
    Raises ValueError for a NaN reward, for cu_turns that decrease, and for other shapes, dtypes or devices.
    Source: arXiv 2511.14846.

    >>> turn_returns(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 3]), gamma=0.5).tolist()
    [1.5, 1.0, 2.0]
    """
    check_turns(turn_rewards, cu_turns, gamma)
    name = select_backend(FAMILY, backend, turn_rewards.device)
    if name == "reference":
        check_turn_values(turn_rewards, cu_turns)
        return turn_returns_reference(turn_rewards, cu_turns, gamma).to(accumulator_dtype(turn_rewards.dtype))
    return _turn_returns(turn_rewards, cu_turns, gamma, name)


def turn_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    *,
    gamma: float = 0.9,
    scope: Scope = "group",
    population: Population = "turns",
    ddof: int = 1,
    eps: float = 1e-6,
    backend: str | None = None,
) -> TurnAdvantages:
    """Advantage of every turn, and of every token by its turn: A_k = (R_k - mean) / (std + eps).

    R_k are the returns of `turn_returns`; mean and std are those of the population of the turn's scope.
    turn_rewards: [K] float.  cu_turns: [B+1] int32 or int64.  group_ids: [B] int, equal for trajectories of one task.
    turn_ids: [N] int, the turn that each token was sampled in, -1 for prompt and tool tokens.
    scope: "group", "batch", "group_turn" (same group and same position in the trajectory), or "none" (A_k = R_k).
    population: "turns" (every turn with tokens), or "trajectories" (the return at each trajectory's first turn with
        tokens; the statistics then apply to all its turns; with gamma=1 and a terminal reward this is GRPO).
    ddof: 0 or 1.
    Turns without tokens pass rewards back through the returns, but leave the statistics; their own advantage is 0.
    Statistics are in float64.  A scope without spread (max == min; a single entry) has advantages of exactly 0.
    Give it whole groups, before any split into micro-batches.  No gradient flows.
    Returns (advantages [N], turn_advantages [K], returns [K]), float32 (float64 for float64 rewards).
    Raises ValueError for a NaN reward, for ids out of range, and for other shapes, dtypes, devices or choices.
    Source: arXiv 2511.14846; arXiv 2402.03300 for population="trajectories".

    >>> credit = turn_advantages(
    ...     torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 3]), torch.tensor([7, 7]),
    ...     torch.tensor([-1, 0, 1, 1, -1, 2]), gamma=1.0)
    >>> [round(a, 3) for a in credit.advantages.tolist()]
    [0.0, 0.577, 0.577, 0.577, 0.0, -1.155]
    """
    check_turns(turn_rewards, cu_turns, gamma)
    device = turn_rewards.device
    num_trajectories = cu_turns.shape[0] - 1
    check_tensor("group_ids", group_ids, layout="[B]", shape=(num_trajectories,), kind="int", device=device)
    check_tensor("turn_ids", turn_ids, layout="[N]", shape=(None,), kind="int", device=device)
    check_choice("scope", scope, ("group", "batch", "group_turn", "none"))
    check_choice("population", population, ("turns", "trajectories"))
    if scope == "group_turn" and population == "trajectories":
        raise ValueError("scope must be 'group', 'batch' or 'none' with population='trajectories', got 'group_turn'")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps >= 0.0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    name = select_backend(FAMILY, backend, device)
    if name == "reference":
        check_turn_values(turn_rewards, cu_turns)
        check_turn_ids(turn_ids, turn_rewards.shape[0])
        rule = CreditRule(gamma, scope, population, ddof, eps)
        return turn_advantages_reference(turn_rewards, cu_turns, group_ids, turn_ids, rule)
    outputs = _turn_advantages(turn_rewards, cu_turns, group_ids, turn_ids, gamma, scope, population, ddof, eps, name)
    return TurnAdvantages(*outputs)


class TurnCredit(NamedTuple):
    """Credit in turn form, which the fused losses take for per-token advantages; see `turn_advantages` for the fields.

    >>> cu_turns, group_ids, turn_ids = torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.tensor([0, 1, -1])
    >>> credit = TurnCredit(torch.tensor([1.0, 0.0]), cu_turns, group_ids, turn_ids)
    >>> [round(a, 4) for a in credit.advantages().tolist()]
    [0.7071, -0.7071, 0.0]
    """

    turn_rewards: Tensor
    cu_turns: Tensor
    group_ids: Tensor
    turn_ids: Tensor
    gamma: float = 0.9
    scope: Scope = "group"
    population: Population = "turns"
    ddof: int = 1
    eps: float = 1e-6

    def advantages(self, *, backend: str | None = None) -> Tensor:
        """[N]: `turn_advantages` of this credit, one value a token."""
        return turn_advantages(
            self.turn_rewards,
            self.cu_turns,
            self.group_ids,
            self.turn_ids,
            gamma=self.gamma,
            scope=self.scope,
            population=self.population,
            ddof=self.ddof,
            eps=self.eps,
            backend=backend,
        ).advantages


def check_turns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> None:
    """Refuse rewards, prefix sums and a discount of the wrong form."""
    check_tensor("turn_rewards", turn_rewards, layout="[K]", shape=(None,), kind="float")
    check_tensor("cu_turns", cu_turns, layout="[B+1]", shape=(None,), kind="int", device=turn_rewards.device)
    if cu_turns.shape[0] < 1:
        raise ValueError("cu_turns must be [B+1], got shape (0,)")
    if turn_rewards.requires_grad:
        raise ValueError("turn_rewards must not require grad: credit passes no gradient")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")


def check_turn_values(turn_rewards: Tensor, cu_turns: Tensor) -> None:
    """Refuse rewards that are not finite, and prefix sums that do not cover the turns in order."""
    check_values(turn_rewards.isfinite().all(), "turn_rewards must be finite, got NaN or infinite rewards")
    num_turns = turn_rewards.shape[0]
    covers = (cu_turns[0] == 0) & (cu_turns[-1] == num_turns) & (cu_turns.diff() >= 0).all()
    shown = cu_turns.tolist() if cu_turns.device.type == "cpu" and cu_turns.numel() <= 16 else "other values"
    check_values(covers, f"cu_turns must rise from 0 to K = {num_turns} without decreasing, got {shown}")


def check_turn_ids(turn_ids: Tensor, num_turns: int) -> None:
    """Refuse turn ids outside [-1, K)."""
    inside = ((turn_ids >= -1) & (turn_ids < num_turns)).all()
    check_values(inside, f"turn_ids must lie in [-1, {num_turns}), got a value outside")


@torch.library.custom_op("gtpo_kernels::turn_returns", mutates_args=())
def _turn_returns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float, backend: str) -> Tensor:
    check_turn_values(turn_rewards, cu_turns)
    returns: Tensor = run_kernel(FAMILY, backend, "turn_returns", turn_rewards.device, turn_rewards, cu_turns, gamma)
    return returns.to(accumulator_dtype(turn_rewards.dtype), copy=True)


@_turn_returns.register_fake
def _(turn_rewards: Tensor, cu_turns: Tensor, gamma: float, backend: str) -> Tensor:
    return turn_rewards.new_empty(turn_rewards.shape, dtype=accumulator_dtype(turn_rewards.dtype))


@torch.library.custom_op("gtpo_kernels::turn_advantages", mutates_args=())
def _turn_advantages(
    turn_rewards: Tensor,
    cu_turns: Tensor,
    group_ids: Tensor,
    turn_ids: Tensor,
    gamma: float,
    scope: str,
    population: str,
    ddof: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_turn_values(turn_rewards, cu_turns)
    if backend != "cpp":  # which refuses the same as it reads them
        check_turn_ids(turn_ids, turn_rewards.shape[0])
    rule = CreditRule(gamma, scope, population, ddof, eps)
    outputs = run_kernel(
        FAMILY, backend, "turn_advantages", turn_rewards.device, turn_rewards, cu_turns, group_ids, turn_ids, rule
    )
    return tuple(outputs)


@_turn_advantages.register_fake
def _(turn_rewards: Tensor, cu_turns: Tensor, group_ids: Tensor, turn_ids: Tensor, *rest: object) -> tuple[Tensor, ...]:
    dtype = accumulator_dtype(turn_rewards.dtype)
    return tuple(turn_rewards.new_empty(like.shape, dtype=dtype) for like in (turn_ids, turn_rewards, turn_rewards))
