"""The options of a credit, checked before there is a batch: one form for all adapters."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gtpo.credit import check_credit, credit_rules
from gtpo.methods import METHODS, Method, Term, check_method, drop_idle

PER_BATCH = ("outcomes", "anchor_ids", "turns_with_calls")
METHOD_FIELDS = frozenset(Method.__dataclass_fields__)
CREDIT_FIELDS = (METHOD_FIELDS & Term.__dataclass_fields__.keys()) | {"extra_terms", "whiten"}


class CreditSettings(NamedTuple):
    """method: its credit is what is computed, its rewards and loss are not.  backend: as for `turn_advantages`."""

    method: Method
    backend: str | None = None

    @property
    def needs(self) -> set[str]:
        """Which of `PER_BATCH` the credit cannot be computed without.

        >>> sorted(credit_settings({"method": "mt_grpo"}).needs)
        ['outcomes', 'turns_with_calls']
        """
        rules = credit_rules(self.method)
        found = {
            "outcomes": any(rule.quantity == "outcome" for rule in rules),
            "anchor_ids": any(rule.scope == "group_anchor" for rule in rules),
            "turns_with_calls": any(term.turns == "with_calls" for term in self.method.extra_terms),
        }
        return {name for name, needed in found.items() if needed}

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how many tokens a turn has, beyond whether it has any."""
        return any(rule.population == "tokens" for rule in credit_rules(self.method))


def credit_settings(options: Mapping[str, Any], *, given: Collection[str] = PER_BATCH) -> CreditSettings:
    """Fields of a credit by name, on top of GTPO's, or of the preset that `method` names.

    options: the fields of `gtpo.methods.Method` from `quantity` to `whiten`, `method` and `backend`.  `extra_terms`
        may hold mappings in the place of `Term`s.
    given: which of `PER_BATCH` comes with each batch.
    Raises ValueError for fields of the rewards or of the loss, which are the trainer's; for unknown names, fields that
    contradict one another or have no effect beside the others, and credits that need what is not given.

    >>> credit_settings({"method": "rloo"}).method.centre
    'leave_one_out'
    >>> credit_settings({"clip_low": 0.1})
    Traceback (most recent call last):
    ...
    ValueError: a credit has no clip_low: rewards and loss are the trainer's here, and set there
    """
    fields = dict(options)
    name, backend = fields.pop("method", None), fields.pop("backend", None)
    if name is not None and name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    of_trainer = sorted(fields.keys() & (METHOD_FIELDS - CREDIT_FIELDS))
    if of_trainer:
        raise ValueError(
            f"a credit has no {', '.join(of_trainer)}: rewards and loss are the trainer's here, and set there"
        )
    unknown = sorted(map(str, fields.keys() - CREDIT_FIELDS))
    if unknown:
        raise ValueError(f"a credit has no field {', '.join(unknown)}: it has {', '.join(sorted(CREDIT_FIELDS))}")
    if "extra_terms" in fields:
        fields["extra_terms"] = tuple(_term(number, term) for number, term in enumerate(fields["extra_terms"]))
    preset = METHODS[name or "gtpo"]
    of_preset = {field.name: getattr(preset, field.name) for field in dataclasses.fields(Method)}
    settings = CreditSettings(Method(**drop_idle({**of_preset, **fields}, fields, Method)), backend)
    check_credit(settings.method)
    check_method(settings.method)
    missing = sorted(settings.needs - set(given))
    if missing:
        of = "this credit" if name is None else f"the credit of method={name!r}"
        raise ValueError(f"{of} needs {', '.join(missing)}, which is not given here")
    return settings


def _term(number: int, term: Any) -> Term:
    if isinstance(term, Term):
        return term
    if not isinstance(term, Mapping):
        raise ValueError(f"extra_terms must hold Terms or mappings of their fields, entry {number} is {term!r}")
    unknown = sorted(map(str, term.keys() - Term.__dataclass_fields__.keys()))
    if unknown:
        raise ValueError(f"extra_terms.{number} has no field {', '.join(unknown)}")
    return Term(**{str(name): value for name, value in term.items()})
