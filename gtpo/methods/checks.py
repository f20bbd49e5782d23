"""What the records of a method may hold: ranges of numbers, and fields that would be without effect beside others."""

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gtpo.methods.records import REWARD_TERMS, CreditSum, Method, PolicyLoss, RewardRule, Term

Record = RewardRule | Term | PolicyLoss
Idle = tuple[str, tuple[Any, ...], str]
GREATEST = sys.float_info.max
LEAST_ABOVE_0 = math.ulp(0.0)
# What the numbers of a gate are, and which are published.
GATES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "sapo": (("tau where the advantage is positive", "tau elsewhere"), (1.0, 1.05)),
    "vespo": (("k where the advantage is not negative", "lambda there", "k elsewhere", "lambda there"), (2, 3, 3, 2)),
}
# What is said of a number, least, greatest, the fields; None stands for a field left out.
_RANGES: dict[type, tuple[tuple[str, float, float, str], ...]] = {
    RewardRule: (("at least 0", 0, GREATEST, "format_penalty similarity_alpha execution_bonus execution_penalty"),),
    Term: (
        ("a finite number", -GREATEST, GREATEST, "weight"),
        ("in [0, 1]", 0, 1, "gamma ddof"),
        ("at least 0", 0, GREATEST, "eps context"),
    ),
    PolicyLoss: (
        ("in [0, 1]", 0, 1, "clip_low"),
        ("above 0", LEAST_ABOVE_0, GREATEST, "aggregation_constant"),
        ("above 1", 1 + sys.float_info.epsilon, GREATEST, "dual_clip"),
        (
            "at least 0",
            0,
            GREATEST,
            "clip_high kl_coef entropy_coef rollout_correction_low rollout_correction_high",
        ),
    ),
}
# Where a field has one of these values, those named after it have no effect.
_IDLE: dict[type, tuple[Idle, ...]] = {
    RewardRule: (("format_faults", ((),), "format_penalty outcome_needs_format"),),
    Term: (
        ("turns", ("all",), "others"),
        ("quantity", ("outcome", "turn_reward"), "gamma"),
        ("quantity", ("outcome",), "reward"),
        ("scope", ("group", "batch", "group_turn", "none"), "context"),
        ("scope", ("none",), "population centre scale ddof eps singleton"),
        ("scale", ("none",), "ddof eps"),
        ("scale", ("mean",), "ddof"),
    ),
    PolicyLoss: (
        ("kl", ("none",), "kl_coef kl_reference"),
        ("surrogate", ("reinforce",), "ratio_level ratio_to clip_low clip_high"),
        ("surrogate", ("sapo", "vespo"), "clip_low clip_high"),
        ("surrogate", ("reinforce", "cispo", "sapo", "vespo", "dppo", "ipo"), "dual_clip"),
        ("surrogate", ("ppo", "cispo", "reinforce", "dppo", "ipo"), "gate"),
        ("aggregation", ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"), "aggregation_constant"),
        ("rollout_correction", ("none",), "rollout_correction_level rollout_correction_low rollout_correction_high"),
        ("rollout_correction", ("truncated",), "rollout_correction_low"),
    ),
}


def check_method(method: Method, *, own_rewards: Collection[str] = ()) -> None:
    """Raises ValueError for a number out of its range, fields that contradict one another, or one that is ignored.

    A field without effect must have its default, or be "none". own_rewards: names of the user's reward terms, which
    terms of the credit may be about, too.

    >>> check_method(Method(loss=PolicyLoss(kl_coef=0.1)))
    Traceback (most recent call last):
        ...
    ValueError: loss.kl_coef has no effect with loss.kl = 'none': it must be 0.0, got 0.1
    """
    check_credit_fields(method.credit, rewards=(*REWARD_TERMS, *own_rewards))
    for record, where in ((method.reward, "reward"), (method.loss, "loss")):
        _check_ranges(record, where)
        _check_idle(record, where)
    _check_loss(method.loss)


def _check_loss(loss: PolicyLoss) -> None:
    numbers, published = GATES.get(loss.surrogate, ((), ()))
    if len(loss.gate) != len(numbers) or not all(0 < x < GREATEST for x in loss.gate):
        raise ValueError(
            f"loss.gate must be {len(numbers)} numbers above 0 with loss.surrogate = {loss.surrogate!r}: "
            f"{', '.join(numbers)}, such as {list(published)}, got {list(loss.gate)}"
        )
    if loss.ratio_to == "sampler" and loss.rollout_correction != "none":
        raise ValueError(
            'loss.rollout_correction must be "none" with loss.ratio_to = "sampler", whose ratio corrects for the '
            f"sampler, got {loss.rollout_correction!r}"
        )
    if loss.kl != "none" and loss.kl_coef == 0:
        raise ValueError(f"loss.kl_coef must be above 0 with loss.kl = {loss.kl!r}, got {loss.kl_coef}")
    if loss.rollout_correction == "masked" and loss.rollout_correction_low > loss.rollout_correction_high:
        raise ValueError(
            "loss.rollout_correction_low must be at most loss.rollout_correction_high, "
            f"got {loss.rollout_correction_low} and {loss.rollout_correction_high}"
        )


def check_credit_fields(credit: CreditSum, *, rewards: Collection[str] | None = REWARD_TERMS) -> None:
    """The part of `check_method` that is about the credit. rewards: names that a term may have; None for any."""
    if not credit.terms:
        raise ValueError("credit.terms must hold at least one term, got none")
    for number, term in enumerate(credit.terms):
        _check_ranges(term, f"credit.terms.{number}")
        _check_idle(term, f"credit.terms.{number}")
        if term.reward and rewards is not None and term.reward not in rewards:
            raise ValueError(f"credit.terms.{number}.reward must be one of {_listed(rewards)}, got {term.reward!r}")
        if term.context and term.turns != "all":
            raise ValueError(
                f'credit.terms.{number}.turns must be "all" with credit.terms.{number}.context = {term.context}, '
                f"got {term.turns!r}"
            )
    if credit.average and len(credit.terms) == 1:
        raise ValueError("credit.average must be false where credit.terms has one term only, got True")
    first = credit.terms[0]
    if credit.whiten and len(credit.terms) == 1 and first.weight > 0 and first.weight != 1:
        raise ValueError(
            "credit.terms.0.weight has no effect with credit.whiten = True and no other term: "
            f"it must be 1.0, got {first.weight}"
        )


def ranges_of(record: type) -> dict[str, str]:
    """What the numbers of a record may be, in words.

    >>> ranges_of(Term)["gamma"]
    'in [0, 1]'
    """
    return {name: expected for expected, _, _, names in _RANGES.get(record, ()) for name in names.split()}


def drop_idle(fields: Mapping[str, Any], given: Collection[str], record: type) -> dict[str, Any]:
    """Fields of a preset, some of them overridden (`given`): what these leave without effect is back at its default.

    >>> drop_idle({**vars(PolicyLoss(kl="k3", kl_coef=0.1)), "kl": "none"}, {"kl"}, PolicyLoss)["kl_coef"]
    0.0
    """
    settled = dict(fields)
    for cause, values, names in _IDLE.get(record, ()):
        if _is_one_of(settled[cause], values):
            for name in names.split():
                if name not in given and settled[name] != "none":
                    settled[name] = getattr(record, name)
    return settled


def _check_ranges(record: Record, where: str) -> None:
    for expected, least, greatest, names in _RANGES[type(record)]:
        for name in names.split():
            value = getattr(record, name)
            # written so that NaN is refused too
            if value is not None and not least <= value <= greatest:
                raise ValueError(f"{where}.{name} must be {expected}, got {value}")


def _check_idle(record: Record, where: str) -> None:
    for cause, values, names in _IDLE[type(record)]:
        if not _is_one_of(getattr(record, cause), values):
            continue
        idle = [name for name in names.split() if not _is_off(record, name)]
        if idle:
            raise ValueError(
                f"{_listed(f'{where}.{name}' for name in idle)} has no effect with "
                f"{where}.{cause} = {getattr(record, cause)!r}: it must be "
                f"{_listed(repr(getattr(type(record), name)) for name in idle)}, "
                f"got {_listed(repr(getattr(record, name)) for name in idle)}"
            )


def _is_off(record: Record, name: str) -> bool:
    value = getattr(record, name)
    return value in (getattr(type(record), name), "none") or (isinstance(record, RewardRule) and not value)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # what comes from TOML has lists for tuples
    return (tuple(value) if isinstance(value, list) else value) in values


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)
