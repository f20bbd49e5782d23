"""What a method of the family is: three records, what a turn is paid, what it is credited with, what the loss does."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

Fault = Literal["invalid_call", "no_first_call"]
Quantity = Literal["turn_return", "trajectory_return", "outcome", "turn_reward"]
Order = Literal["discount_first", "normalise_first"]
Scope = Literal["group", "batch", "group_turn", "group_anchor", "none"]
Population = Literal["turns", "trajectories", "tokens"]
Centre = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "mean", "none"]
Singleton = Literal["zero", "keep"]
Turns = Literal["all", "with_calls"]
Others = Literal["leave", "zero"]
Surrogate = Literal["ppo", "cispo", "reinforce", "sapo", "vespo", "dppo", "ipo"]
Level = Literal["token", "turn", "sequence"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]

# The terms of a turn's reward, which a term of the credit can be about.
REWARD_TERMS = ("outcome", "similarity", "format", "execution")
# Names under which settings of the rollout correction are known.
ROLLOUT_CORRECTIONS: dict[str, dict[str, Any]] = {
    # truncated importance sampling: no token weighs more than this
    "tis": {"rollout_correction": "truncated", "rollout_correction_high": 2.0},
    # masked importance sampling: a token that would is left out
    "mis": {
        "rollout_correction": "masked",
        "rollout_correction_low": 0.0,
        "rollout_correction_high": 2.0,
    },
    # the bounds of Ring-1T, arXiv 2510.18855
    "icepop": {
        "rollout_correction": "masked",
        "rollout_correction_low": 0.5,
        "rollout_correction_high": 5.0,
    },
}


@dataclass(frozen=True)
class RewardRule:
    """What a turn is paid: the outcome on the last one, shaping on any; the terms are added up."""

    format_faults: Annotated[tuple[Fault, ...], "invalid calls; a first turn that calls no tool"] = (
        "invalid_call",
        "no_first_call",
    )
    format_penalty: Annotated[float, "taken off a turn with a format fault"] = 0.1
    outcome_needs_format: Annotated[bool, "pay no outcome where any turn has a format fault"] = False
    similarity_alpha: Annotated[float, "most credit for code like that of a success"] = 0.5
    similarity: Annotated[Literal["ngram"], "how code is compared"] = "ngram"
    execution_bonus: Annotated[float, "paid once, for output as expected"] = 0.0
    execution_penalty: Annotated[float, "taken off a turn whose tool failed"] = 0.0


@dataclass(frozen=True)
class Term:
    """A summand of the credit: its weight, the turns that get it, and the fields of a `gtpo_kernels.CreditRule`."""

    weight: Annotated[float, "of this term in the sum"] = 1.0
    turns: Annotated[Turns, "which turns get it"] = "all"
    others: Annotated[Others, "the rest leaves its statistics, or stays there with a reward of 0"] = "leave"
    reward: Annotated[str, 'which reward term it is about: "outcome", "format", one of your own; "": their sum'] = ""
    quantity: Annotated[Quantity, "what is normalised"] = "turn_return"
    gamma: Annotated[float, "discount from a turn to the one before it"] = 0.9
    order: Annotated[Order, "returns of rewards, or of normalised rewards"] = "discount_first"
    scope: Annotated[Scope, "whose values are normalised together"] = "group"
    context: Annotated[int, "states before a turn's own that must be the same too, with group_anchor"] = 0
    population: Annotated[Population, "what is one entry of mean and deviation"] = "turns"
    centre: Annotated[Centre, "what is taken off"] = "mean"
    scale: Annotated[Scale, "what it is divided by"] = "std"
    ddof: Annotated[int, "degrees of freedom taken off the deviation"] = 1
    eps: Annotated[float, "added to what it is divided by"] = 1e-6
    singleton: Annotated[Singleton, "advantage where there is nothing to compare with"] = "zero"


@dataclass(frozen=True)
class CreditSum:
    """What a turn is credited with: the sum of the terms, or their average."""

    terms: Annotated[tuple[Term, ...], "the summands"] = (Term(),)
    average: Annotated[bool, "divide by the weights of the terms that are not 0 at the turn"] = False
    whiten: Annotated[bool, "normalise the sum over all tokens of the batch"] = False


@dataclass(frozen=True)
class PolicyLoss:
    """What the loss makes of advantages, token by token, and how it adds tokens up."""

    ratio_level: Annotated[Level, "over what the ratio is taken"] = "token"
    ratio_to: Annotated[Literal["old", "sampler"], "log-probs below the ratio: the trainer's, or those sampled by"] = (
        "old"
    )
    surrogate: Annotated[Surrogate, "what is maximised"] = "ppo"
    clip_low: Annotated[float, "least ratio is 1 minus this; dppo, ipo: most that a probability may fall"] = 0.2
    clip_high: Annotated[float, "greatest ratio is 1 plus this; dppo, ipo: most that it may rise"] = 0.28
    gate: Annotated[
        tuple[float, ...], "of sapo: tau where advantages are positive, and else; of vespo: k and lambda"
    ] = ()
    dual_clip: Annotated[float | None, "bound of the ratio where the advantage is negative"] = None
    aggregation: Annotated[Aggregation, "of tokens to one number"] = "token-mean"
    aggregation_constant: Annotated[float | None, 'divisor of "constant"; left out: rollout.max_trajectory_tokens'] = (
        None
    )
    kl: Annotated[Literal["none", "k1", "k2", "k3", "rho_k3"], "penalty on leaving the reference policy"] = "none"
    kl_coef: Annotated[float, "weight of that penalty"] = 0.0
    kl_reference: Annotated[Literal["start", "sampler"], "the policy as training began, or as it sampled"] = "start"
    entropy_coef: Annotated[float, "weight of the entropy bonus"] = 0.0
    rollout_correction: Annotated[
        Literal["none", "truncated", "masked"], "for the sampler's log-probs; also tis, mis, icepop"
    ] = "none"
    rollout_correction_level: Annotated[Level, "over what its weight is taken"] = "token"
    rollout_correction_low: Annotated[float, "least weight that is not masked"] = 0.5
    rollout_correction_high: Annotated[float, "greatest weight"] = 2.0
    mask_truncated: Annotated[bool, "keep truncated trajectories out of the loss"] = False
    mask_void_turns: Annotated[bool, "keep those with a void turn out of the loss"] = False


@dataclass(frozen=True)
class Method:
    """A method of the family, as data; the defaults are GTPO, arXiv 2511.14846, read as docs/log.md says.

    The three tables of a configuration are these records: `[reward]`, `[credit]`, `[loss]`.
    """

    reward: RewardRule = field(default_factory=RewardRule)
    credit: CreditSum = field(default_factory=CreditSum)
    loss: PolicyLoss = field(default_factory=PolicyLoss)
