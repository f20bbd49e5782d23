"""The options of a credit, checked before there is a batch: one form for all adapters."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gtpo.credit import check_credit, credit_rules
from gtpo.methods import (
    METHODS,
    CreditSum,
    PolicyLoss,
    RewardRule,
    Term,
    check_credit_fields,
    overridden_credit,
)

PER_BATCH = ("outcomes", "anchor_ids", "turns_with_calls", "named_rewards")
TERM_FIELDS = tuple(Term.__dataclass_fields__)
CREDIT_FIELDS = frozenset(CreditSum.__dataclass_fields__)
DISCOUNTED = ("turn_return", "trajectory_return")
OF_TRAINER = frozenset(RewardRule.__dataclass_fields__) | frozenset(PolicyLoss.__dataclass_fields__)


class CreditSettings(NamedTuple):
    """credit: what is computed; rewards and loss are the trainer's.  backend: as for `turn_advantages`."""

    credit: CreditSum
    backend: str | None = None

    @property
    def needs(self) -> set[str]:
        """Which of `PER_BATCH` the credit cannot be computed without.

        >>> sorted(credit_settings({"method": "mt_grpo"}).needs)
        ['outcomes', 'turns_with_calls']
        """
        terms = self.credit.terms
        found = {
            "outcomes": any(term.quantity == "outcome" for term in terms),
            "anchor_ids": any(term.scope == "group_anchor" for term in terms),
            "turns_with_calls": any(term.turns == "with_calls" for term in terms),
            "named_rewards": any(term.reward for term in terms),
        }
        return {name for name, needed in found.items() if needed}

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how many tokens a turn has, beyond whether it has any."""
        return any(rule.population == "tokens" for rule in credit_rules(self.credit))


def credit_settings(options: Mapping[str, Any], *, given: Collection[str] = PER_BATCH) -> CreditSettings:
    """A credit: GTPO's, or that of the preset that `method` names, with other fields.

    options: `method`, `backend`, and fields of `gtpo.methods.CreditSum`: `whiten`, `average` and `terms`, a list of
        `Term`s or mappings, which replaces the preset's, or a mapping from numbers to fields, which changes single
        ones.  The fields of a `Term` beside these (gamma, scope, ...) are short for {0: ...} where there is one term.
    given: which of `PER_BATCH` comes with each batch.
    Raises ValueError for fields of the rewards or of the loss, which are the trainer's; for unknown names, fields that
    contradict one another or have no effect beside the others, and credits that need what is not given.

    >>> credit_settings({"method": "rloo"}).credit.terms[0].centre
    'leave_one_out'
    >>> credit_settings({"method": "matchtir", "terms": {1: {"gamma": 1.0}}}).credit.terms[1].gamma
    1.0
    >>> credit_settings({"clip_low": 0.1})
    Traceback (most recent call last):
    ...
    ValueError: a credit has no clip_low: rewards and loss are the trainer's here, and set there
    """
    fields = dict(options)
    name, backend = fields.pop("method", None), fields.pop("backend", None)
    if name is not None and name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    _refuse_unknown(fields)
    preset = METHODS[name or "gtpo"].credit
    of_term = {field: fields.pop(field) for field in TERM_FIELDS if field in fields}
    if of_term:
        if "terms" in fields:
            raise ValueError(f"{', '.join(of_term)} must stand in terms where these are given")
        if len(preset.terms) != 1:
            raise ValueError(
                f"the credit of method={name!r} has {len(preset.terms)} terms: say of which {', '.join(of_term)} is, "
                "as in terms={0: {...}}"
            )
        fields["terms"] = {0: of_term}
    if "terms" in fields:
        fields["terms"] = _plain_terms(fields["terms"])
    settled = overridden_credit(preset, fields)
    terms = tuple(Term(**{str(field): value for field, value in term.items()}) for term in settled["terms"])
    settings = CreditSettings(CreditSum(**{**settled, "terms": terms}), backend)
    check_credit(settings.credit)
    check_credit_fields(settings.credit, rewards=None)
    missing = sorted(settings.needs - set(given))
    if missing:
        of = "this credit" if name is None else f"the credit of method={name!r}"
        raise ValueError(f"{of} needs {', '.join(missing)}, which is not given here")
    return settings


def with_discount(options: Mapping[str, Any], gamma: float | None, *, key: str) -> dict[str, Any]:
    """Options under the trainer's own discount from turn to turn, its setting `key`; what they say themselves wins.

    A preset and a list of terms have discounts of their own.  1.0, which trainers have by default, says nothing of
    them.  Raises ValueError for another that is none of theirs.

    >>> with_discount({"eps": 0.1}, 0.95, key="algorithm.gamma")
    {'eps': 0.1, 'gamma': 0.95}
    >>> with_discount({"method": "gtpo"}, 0.95, key="algorithm.gamma")
    Traceback (most recent call last):
    ...
    ValueError: algorithm.gamma=0.95 is no discount of the credit, which has 0.9: change it in the options of the credit
    """
    changed = dict(options)
    if gamma is None or "gamma" in changed:
        return changed
    if not {"method", "terms"} & changed.keys():
        if changed.get("quantity", Term.quantity) in DISCOUNTED:
            changed["gamma"] = float(gamma)
        return changed
    found = {term.gamma for term in credit_settings(changed).credit.terms if term.quantity in DISCOUNTED}
    if gamma not in {1.0, *found}:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(
            f"{key}={gamma} is no discount of the credit, which has {known}: change it in the options of the credit"
        )
    return changed


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    if "extra_terms" in fields:
        raise ValueError("extra_terms is now terms, which holds the first term too")
    unknown = fields.keys() - CREDIT_FIELDS - set(TERM_FIELDS)
    of_trainer = sorted(unknown & OF_TRAINER)
    if of_trainer:
        raise ValueError(
            f"a credit has no {', '.join(of_trainer)}: rewards and loss are the trainer's here, and set there"
        )
    if unknown:
        known = ", ".join(sorted({*CREDIT_FIELDS, *TERM_FIELDS}))
        raise ValueError(f"a credit has no field {', '.join(sorted(map(str, unknown)))}: it has {known}")


def _plain_terms(terms: Any) -> Any:
    """Terms as mappings of known fields, in a list or by number."""
    if isinstance(terms, Mapping):
        return {number: _plain_term(number, term) for number, term in terms.items()}
    if isinstance(terms, str) or not hasattr(terms, "__iter__"):
        raise ValueError(f"terms must be a list of Terms or mappings, or a mapping from numbers, got {terms!r}")
    return [_plain_term(number, term) for number, term in enumerate(terms)]


def _plain_term(number: Any, term: Any) -> Mapping[str, Any]:
    if isinstance(term, Term):
        return dataclasses.asdict(term)
    if not isinstance(term, Mapping):
        raise ValueError(f"terms must hold Terms or mappings of their fields, entry {number} is {term!r}")
    unknown = sorted(map(str, term.keys() - set(TERM_FIELDS)))
    if unknown:
        raise ValueError(f"terms.{number} has no field {', '.join(unknown)}")
    return term
