"""Keys of `[reward]`, `[credit]` and `[loss]` on top of a preset, as plain data, and where keys of old tables went."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gtpo.methods.checks import drop_idle
from gtpo.methods.records import ROLLOUT_CORRECTIONS, CreditSum, Method, PolicyLoss, RewardRule, Term

TABLES: dict[str, type] = {"reward": RewardRule, "credit": CreditSum, "loss": PolicyLoss}


def overridden(preset: Method, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The preset's tables under the fields given, less what these leave without effect.

    Raises ValueError for the number of a term that the preset does not have.

    >>> overridden(Method(), {"credit": {"terms": {"0": {"gamma": 1.0}}}})["credit"]["terms"][0]["gamma"]
    1.0
    """
    settled = {}
    for name, record in TABLES.items():
        of_preset, given = getattr(preset, name), tables.get(name, {})
        if record is CreditSum:
            settled[name] = overridden_credit(of_preset, given)
        else:
            given = _with_named_settings(given)
            settled[name] = drop_idle({**vars(of_preset), **given}, given, record)
    return settled


def _with_named_settings(loss: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rollout correction that is known by a name is what that stands for, under the other fields given."""
    name = loss.get("rollout_correction")
    if not isinstance(name, str) or name not in ROLLOUT_CORRECTIONS:
        return loss
    meant = ROLLOUT_CORRECTIONS[name]
    return {**meant, **loss, "rollout_correction": meant["rollout_correction"]}


def overridden_credit(preset: CreditSum, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a credit. `terms` is a list, which replaces the preset's, or {"0": {...}}: fields of single ones."""
    settled = {**dataclasses.asdict(preset), **given}
    if not isinstance(settled["terms"], Mapping):
        return settled
    terms = [dataclasses.asdict(term) for term in preset.terms]
    for number, fields in settled["terms"].items():
        key = f"credit.terms.{number}"
        if not (str(number).isdecimal() and int(number) < len(terms)):
            raise ValueError(f"{key}: expected the number of one of {len(terms)} terms, from 0, got {str(number)!r}")
        if not isinstance(fields, Mapping):
            raise ValueError(f"{key} must be a table, got {fields!r}")
        terms[int(number)] = drop_idle({**terms[int(number)], **fields}, fields, Term)
    return {**settled, "terms": terms}


_PLACES: dict[str, type] = {"reward": RewardRule, "credit": CreditSum, "credit.terms.0": Term, "loss": PolicyLoss}
_FIELDS = {place: {field.name for field in dataclasses.fields(record)} for place, record in _PLACES.items()}
# What has another name or shape than in the flat table [credit] that once held all of a method.
_RENAMED = {
    "credit.reward": 'reward.outcome_needs_format, true for what was "outcome"',
    "credit.extra_terms": "credit.terms, where entry 0 is the first term: extra_terms.0 is terms.1",
    "rollout.mask_truncated": "loss.mask_truncated",
    "rollout.mask_void_turns": "loss.mask_void_turns",
}


def moved(key: str) -> str | None:
    """Where a key went that `[credit]` or `[rollout]` once had; None for any other key.

    >>> moved("credit.clip_low"), moved("credit.gamma"), moved("credit.whiten")
    ('loss.clip_low', 'credit.terms.0.gamma', None)
    """
    return _RENAMED.get(key) or (elsewhere(key) if key.startswith("credit.") else None)


def elsewhere(key: str) -> str | None:
    """The key of the same name in another of the tables of a method; None where there is none, or no other.

    >>> elsewhere("loss.gamma"), elsewhere("reward.whiten"), elsewhere("loss.kl")
    ('credit.terms.0.gamma', 'credit.whiten', None)
    """
    table, _, name = key.rpartition(".")
    if table not in _PLACES or name in _FIELDS[table]:
        return None
    return next((f"{place}.{name}" for place, fields in _FIELDS.items() if name in fields), None)
