"""A preset, and the parts that several have in common."""

from dataclasses import dataclass
from typing import Any

from gtpo.methods.records import CreditSum, Method, RewardRule, Term


@dataclass(frozen=True)
class Preset:
    """A method under its published name. source: where its formula is from. notes: what is ours, and the example."""

    method: Method
    source: str
    notes: str


# One terminal reward, that of the outcome: what GRPO and its kin compare.
OUTCOME = RewardRule(format_penalty=0.0, outcome_needs_format=True, similarity_alpha=0.0)
# Rewards of single turns: the outcome, format, and execution, without GTPO's similarity credit.
TURNS = RewardRule(similarity_alpha=0.0, execution_bonus=0.05, execution_penalty=0.05)
DENSE = RewardRule(execution_bonus=0.05, execution_penalty=0.05)

TRAJECTORY: dict[str, Any] = {"quantity": "trajectory_return", "gamma": 1.0, "population": "trajectories"}
# One value a trajectory, normalised in its group, or less the group's mean.
GRPO = CreditSum((Term(**TRAJECTORY),))
CENTRED = CreditSum((Term(**TRAJECTORY, scale="none"),))

# Loss of the methods that state no other than PPO's: the symmetric clip of the paper.
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
# What trainers made from verl add to it where they do not say otherwise.
VERL: dict[str, Any] = {**CLIP, "dual_clip": 3.0, "kl": "k3", "kl_coef": 0.001, "entropy_coef": 0.001}
