"""What the arguments of the turn ops may be: each function refuses what is not, by name."""

from typing import get_args

from torch import Tensor

from gtpo_kernels.checks import check_choice, check_no_tangent, check_tensor, check_values
from gtpo_kernels.turn_advantages.reference import (
    Centre,
    CreditRule,
    Order,
    Population,
    Quantity,
    Scale,
    Scope,
    Singleton,
)

CHOICES = {
    name: get_args(kind)
    for name, kind in (
        ("quantity", Quantity),
        ("order", Order),
        ("scope", Scope),
        ("population", Population),
        ("centre", Centre),
        ("scale", Scale),
        ("singleton", Singleton),
    )
}


def check_turns(turn_rewards: Tensor, cu_turns: Tensor, gamma: float) -> None:
    """Refuse rewards, prefix sums and a discount of the wrong form."""
    check_tensor("turn_rewards", turn_rewards, layout="[K]", shape=(None,), kind="float")
    check_tensor("cu_turns", cu_turns, layout="[B+1]", shape=(None,), kind="int", device=turn_rewards.device)
    if cu_turns.shape[0] < 1:
        raise ValueError("cu_turns must be [B+1], got shape (0,)")
    check_no_tangent(turn_rewards=turn_rewards)
    if turn_rewards.requires_grad:
        raise ValueError("turn_rewards must not require grad: credit passes no gradient")
    check_gamma(gamma)


def check_gamma(gamma: float) -> None:
    """Refuse a discount outside [0, 1]."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")


def check_rule(rule: CreditRule) -> None:
    """Refuse fields that have other values than they may, or that contradict one another."""
    check_gamma(rule.gamma)
    for name, choices in CHOICES.items():
        check_choice(name, getattr(rule, name), choices)
    if rule.ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {rule.ddof}")
    if not rule.eps >= 0.0:
        raise ValueError(f"eps must be 0 or more, got {rule.eps}")
    if rule.scope in ("group_turn", "group_anchor") and rule.population == "trajectories":
        allowed = "'group', 'batch' or 'none'"
        raise ValueError(f"scope must be {allowed} with population='trajectories', got {rule.scope!r}")
    if rule.order == "normalise_first" and rule.quantity != "turn_return":
        raise ValueError(f"quantity must be 'turn_return' with order='normalise_first', got {rule.quantity!r}")
    if rule.scale == "mean" and (rule.centre != "mean" or rule.singleton != "zero" or rule.order != "discount_first"):
        raise ValueError(
            "scale='mean' must stand with centre='mean', singleton='zero' and order='discount_first', "
            f"got {rule.centre!r}, {rule.singleton!r} and {rule.order!r}"
        )
    if rule.scope != "none" and rule.centre == rule.scale == "none":
        raise ValueError(f"scope must be 'none' where neither centre nor scale is taken, got {rule.scope!r}")


def check_outcomes(outcomes: Tensor, turn_rewards: Tensor, cu_turns: Tensor) -> None:
    """Refuse outcomes that are not one a trajectory, in the dtype of the rewards."""
    shape = (cu_turns.shape[0] - 1,)
    check_tensor("outcomes", outcomes, layout="[B]", shape=shape, kind="float", device=turn_rewards.device)
    if outcomes.dtype != turn_rewards.dtype:
        ours, theirs = (str(tensor.dtype).removeprefix("torch.") for tensor in (outcomes, turn_rewards))
        raise ValueError(f"outcomes must be {theirs} as turn_rewards are, got {ours}")
    check_no_tangent(outcomes=outcomes)
    if outcomes.requires_grad:
        raise ValueError("outcomes must not require grad: credit passes no gradient")


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
