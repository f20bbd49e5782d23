"""What a method of the family can be: what a turn is credited with, and what the loss makes of it, as one record."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Quantity = Literal["turn_return", "trajectory_return", "outcome", "turn_reward"]
Order = Literal["discount_first", "normalise_first"]
Scope = Literal["group", "batch", "group_turn", "group_anchor", "none"]
Population = Literal["turns", "trajectories", "tokens"]
Centre = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "none"]
Singleton = Literal["zero", "keep"]
Turns = Literal["all", "with_calls"]
Others = Literal["leave", "zero"]


@dataclass(frozen=True)
class Term:
    """A further term of a credit: its weight, which turns get it, and the fields of `gtpo_kernels.CreditRule`.

    others: the turns that do not get it "leave" its statistics, or stay there with a reward of "zero".
    """

    weight: float = 1.0
    turns: Turns = "all"
    others: Others = "leave"
    quantity: Quantity = "turn_return"
    gamma: float = 0.9
    order: Order = "discount_first"
    scope: Scope = "group"
    population: Population = "turns"
    centre: Centre = "mean"
    scale: Scale = "std"
    ddof: int = 1
    eps: float = 1e-6
    singleton: Singleton = "zero"


@dataclass(frozen=True)
class Method:
    """What a method of the family does, as data; the defaults are GTPO, arXiv 2511.14846, read as docs/log.md says.

    reward: "turn" gives r_ij = outcome or similarity credit on the last turn + format and execution terms of the turn;
    "outcome" gives one terminal reward, 1 if the answer is right and no turn has a format fault, else 0.
    `quantity` to `singleton` are the first term of the credit (`gtpo_kernels.CreditRule`), `extra_terms` are added to
    it, and `whiten` then normalises the sum over all tokens of the batch. From `ratio_level` on it is the loss.
    """

    reward: Annotated[Literal["turn", "outcome"], "rewards of single turns, or one of the outcome"] = "turn"
    quantity: Annotated[Quantity, "what is normalised"] = "turn_return"
    gamma: Annotated[float, "discount from a turn to the one before it"] = 0.9
    order: Annotated[Order, "returns of rewards, or of normalised rewards"] = "discount_first"
    scope: Annotated[Scope, "whose values are normalised together"] = "group"
    population: Annotated[Population, "what is one entry of mean and deviation"] = "turns"
    centre: Annotated[Centre, "what is taken off"] = "mean"
    scale: Annotated[Scale, "what it is divided by"] = "std"
    ddof: Annotated[int, "degrees of freedom taken off the deviation"] = 1
    eps: Annotated[float, "added to the deviation"] = 1e-6
    singleton: Annotated[Singleton, "advantage where there is nothing to compare with"] = "zero"
    weight: Annotated[float, "of this first term"] = 1.0
    extra_terms: Annotated[tuple[Term, ...], "further terms, added to the first"] = ()
    whiten: Annotated[bool, "normalise the sum over all tokens of the batch"] = False
    format_penalty: Annotated[float, "taken off a turn with a format fault"] = 0.1
    similarity_alpha: Annotated[float, "most credit for code like that of a success"] = 0.5
    similarity: Annotated[Literal["ngram"], "how code is compared"] = "ngram"
    execution_bonus: Annotated[float, "paid once, for output as expected"] = 0.0
    execution_penalty: Annotated[float, "taken off a turn whose tool failed"] = 0.0
    ratio_level: Annotated[Literal["token", "turn", "sequence"], "over what the ratio is taken"] = "token"
    surrogate: Annotated[Literal["ppo", "cispo", "reinforce"], "what is maximised"] = "ppo"
    clip_low: Annotated[float, "least ratio is 1 minus this"] = 0.2
    clip_high: Annotated[float, "greatest ratio is 1 plus this"] = 0.28
    dual_clip: Annotated[float | None, "bound of the ratio where the advantage is negative"] = None
    aggregation: Annotated[
        Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"], "of tokens to one number"
    ] = "token-mean"
    aggregation_constant: Annotated[float | None, 'divisor of "constant"; left out: rollout.max_trajectory_tokens'] = (
        None
    )
    kl: Annotated[Literal["none", "k1", "k2", "k3", "rho_k3"], "penalty on leaving the reference policy"] = "none"
    kl_coef: Annotated[float, "weight of that penalty"] = 0.0
    entropy_coef: Annotated[float, "weight of the entropy bonus"] = 0.0
    rollout_correction: Annotated[Literal["none", "truncated", "masked"], "of the sampler's log-probs"] = "none"
    rollout_correction_level: Annotated[Literal["token", "turn", "sequence"], "over what its weight is taken"] = "token"
    rollout_correction_low: Annotated[float, "least weight that is not masked"] = 0.5
    rollout_correction_high: Annotated[float, "greatest weight"] = 2.0
    mask_truncated: Annotated[bool, "keep truncated trajectories out of the loss"] = False
    mask_void_turns: Annotated[bool, "keep those with a void turn out of the loss"] = False


# Rewards of turns, which an outcome has none of.
_SHAPING = ("format_penalty", "similarity_alpha", "execution_bonus", "execution_penalty")
# Where a field has one of these values, the fields named after it have no effect.
_IDLE_IN_LOSS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("kl", ("none",), "kl_coef"),
    ("surrogate", ("reinforce",), "ratio_level clip_low clip_high"),
    ("surrogate", ("reinforce", "cispo"), "dual_clip"),
    ("aggregation", ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"), "aggregation_constant"),
    (
        "rollout_correction",
        ("none",),
        "rollout_correction_level rollout_correction_low rollout_correction_high",
    ),
    ("rollout_correction", ("truncated",), "rollout_correction_low"),
)
_IDLE_IN_TERM: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("quantity", ("outcome", "turn_reward"), "gamma"),
    ("scope", ("none",), "population centre scale ddof eps singleton"),
    ("scale", ("none",), "ddof eps"),
)
_IDLE_IN_FURTHER_TERM = (("turns", ("all",), "others"), *_IDLE_IN_TERM)


def check_method(method: Method) -> None:
    """Raises ValueError for a field that would be ignored: one without effect must have its default, or be "none".

    >>> check_method(Method(kl_coef=0.1))
    Traceback (most recent call last):
        ...
    ValueError: credit.kl_coef has no effect with credit.kl = 'none': it must be 0.0, got 0.1
    """
    _check_idle(method, "credit")
    for number, term in enumerate(method.extra_terms):
        _check_idle(term, f"credit.extra_terms.{number}")
    if method.whiten and not method.extra_terms and method.weight > 0 and method.weight != 1:
        raise ValueError(
            "credit.weight has no effect with credit.whiten = True and no further term: "
            f"it must be 1.0, got {method.weight}"
        )
    unused = {name: value for name in _SHAPING if (value := getattr(method, name)) != 0}
    if method.reward == "outcome" and unused:
        raise ValueError(
            'credit.reward = "outcome" pays no term of a turn, so these must be 0: '
            + ", ".join(f"credit.{name}, got {value}" for name, value in unused.items())
        )
    if method.kl != "none" and method.kl_coef == 0:
        raise ValueError(f"credit.kl_coef must be above 0 with credit.kl = {method.kl!r}, got {method.kl_coef}")
    if method.rollout_correction == "masked" and method.rollout_correction_low > method.rollout_correction_high:
        raise ValueError(
            "credit.rollout_correction_low must be at most credit.rollout_correction_high, "
            f"got {method.rollout_correction_low} and {method.rollout_correction_high}"
        )


def drop_idle(fields: Mapping[str, Any], given: Collection[str], record: type[Method] | type[Term]) -> dict[str, Any]:
    """Fields of a preset, some of them overridden (`given`): what these leave without effect is back at its default.

    >>> drop_idle({**vars(Method(kl="k3", kl_coef=0.1)), "kl": "none"}, {"kl"}, Method)["kl_coef"]
    0.0
    """
    settled = dict(fields)
    for cause, values, names in _idle_tables(record):
        if settled[cause] in values:
            for name in names.split():
                if name not in given and settled[name] != "none":
                    settled[name] = getattr(record, name)
    return settled


def _idle_tables(record: type[Method] | type[Term]) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    return (*_IDLE_IN_LOSS, *_IDLE_IN_TERM) if record is Method else _IDLE_IN_FURTHER_TERM


def _check_idle(record: Method | Term, where: str) -> None:
    for cause, values, names in _idle_tables(type(record)):
        if getattr(record, cause) not in values:
            continue
        idle = [name for name in names.split() if getattr(record, name) not in (getattr(type(record), name), "none")]
        if idle:
            raise ValueError(
                f"{', '.join(f'{where}.{name}' for name in idle)} has no effect with "
                f"{where}.{cause} = {getattr(record, cause)!r}: it must be "
                f"{', '.join(repr(getattr(type(record), name)) for name in idle)}, "
                f"got {', '.join(repr(getattr(record, name)) for name in idle)}"
            )
