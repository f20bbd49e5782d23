"""A field of a method without effect is refused where it is given, and dropped where an override leaves it so."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gtpo.config import config_from_dict, load_config
from gtpo.methods import (
    METHODS,
    CreditSum,
    Method,
    PolicyLoss,
    RewardRule,
    Term,
    check_method,
)


def with_fields(table: str, fields: dict[str, Any]) -> Method:
    """GTPO with other fields of its reward, its one term or its loss."""
    if table == "term":
        return Method(credit=CreditSum((Term(**fields),)))
    return Method(**{table: {"reward": RewardRule, "credit": CreditSum, "loss": PolicyLoss}[table](**fields)})


@pytest.mark.parametrize(
    ("table", "fields", "message"),
    [
        ("loss", {"kl_coef": 0.1}, "loss.kl_coef has no effect with loss.kl = 'none': it must be 0.0, got 0.1"),
        ("loss", {"kl_reference": "sampler"}, "loss.kl_reference has no effect with loss.kl = 'none'"),
        (
            "loss",
            {"surrogate": "sapo"},
            r"loss.gate must be 2 numbers above 0 .*, such as \[1.0, 1.05\], got",
        ),
        ("loss", {"surrogate": "vespo", "gate": (2.0, 3.0)}, "loss.gate must be 4 numbers above 0 with"),
        ("loss", {"surrogate": "sapo", "gate": (1.0, float("nan"))}, "loss.gate must be 2 numbers above 0 with"),
        ("loss", {"gate": (1.0, 1.05)}, r"loss.gate has no effect with loss.surrogate = 'ppo': it must be \(\), got"),
        ("loss", {"surrogate": "vespo", "gate": (2.0, 3.0, 3.0, 2.0), "clip_low": 0.1}, "loss.clip_low has no effect"),
        ("loss", {"surrogate": "ipo", "dual_clip": 3.0}, "dual_clip has no effect with loss.surrogate = 'ipo'"),
        (
            "loss",
            {"ratio_to": "sampler", "rollout_correction": "truncated"},
            'loss.rollout_correction must be "none" with loss.ratio_to = "sampler"',
        ),
        ("term", {"scale": "mean", "ddof": 0}, "credit.terms.0.ddof has no effect with .*scale = 'mean'"),
        ("term", {"context": 1}, "credit.terms.0.context has no effect with credit.terms.0.scope = 'group'"),
        (
            "term",
            {"scope": "group_anchor", "context": 1, "turns": "with_calls"},
            'credit.terms.0.turns must be "all" with credit.terms.0.context = 1',
        ),
        ("term", {"quantity": "outcome", "reward": "format"}, "credit.terms.0.reward has no effect with"),
        ("term", {"reward": "fromat"}, "credit.terms.0.reward must be one of outcome, .*, execution, got 'fromat'"),
        ("credit", {"average": True}, "credit.average must be false where credit.terms has one term only"),
        ("loss", {"kl": "k3"}, "loss.kl_coef must be above 0 with loss.kl = 'k3', got 0.0"),
        (
            "loss",
            {"surrogate": "cispo", "dual_clip": 3.0},
            "loss.dual_clip has no effect with loss.surrogate = 'cispo'",
        ),
        ("loss", {"surrogate": "reinforce", "dual_clip": 3.0}, "loss.dual_clip has no effect with"),
        ("loss", {"surrogate": "reinforce", "ratio_level": "turn"}, "loss.ratio_level has no effect with"),
        (
            "loss",
            {"surrogate": "reinforce", "clip_low": 0.5, "clip_high": 0.3},
            "loss.clip_low, loss.clip_high has no effect .*: it must be 0.2, 0.28, got 0.5, 0.3",
        ),
        (
            "loss",
            {"aggregation_constant": 9.0},
            "loss.aggregation_constant has no effect with loss.aggregation = 'token",
        ),
        ("loss", {"rollout_correction_low": 0.1}, "loss.rollout_correction_low has no effect with"),
        ("loss", {"rollout_correction_high": 3.0}, "loss.rollout_correction_high has no effect with"),
        ("loss", {"rollout_correction_level": "turn"}, "loss.rollout_correction_level has no effect with"),
        (
            "loss",
            {"rollout_correction": "truncated", "rollout_correction_low": 0.1},
            "loss.rollout_correction_low has no effect with loss.rollout_correction = 'truncated'",
        ),
        (
            "loss",
            {"rollout_correction": "masked", "rollout_correction_low": 3.0},
            "loss.rollout_correction_low must be at most .*, got 3.0 and 2.0",
        ),
        ("term", {"scale": "none", "eps": 0.1}, "credit.terms.0.eps has no effect with credit.terms.0.scale = 'none'"),
        ("term", {"scale": "none", "ddof": 0}, "credit.terms.0.ddof has no effect with"),
        (
            "term",
            {"scope": "none", "centre": "leave_one_out"},
            "centre has no effect with credit.terms.0.scope = 'none'",
        ),
        ("term", {"scope": "none", "population": "tokens"}, "credit.terms.0.population has no effect with"),
        ("term", {"scope": "none", "singleton": "keep"}, "credit.terms.0.singleton has no effect with"),
        ("term", {"quantity": "outcome", "gamma": 0.5}, "gamma has no effect with credit.terms.0.quantity = 'outcome'"),
        ("term", {"others": "zero"}, "credit.terms.0.others has no effect with credit.terms.0.turns = 'all'"),
        (
            "credit",
            {"terms": (Term(weight=0.5),), "whiten": True},
            "credit.terms.0.weight has no effect with credit.whiten = True and no other term: it must be 1.0, got 0.5",
        ),
        (
            "credit",
            {"terms": (Term(), Term(quantity="turn_reward", gamma=0.5))},
            "credit.terms.1.gamma has no effect with credit.terms.1.quantity = 'turn_reward'",
        ),
        ("credit", {"terms": ()}, "credit.terms must hold at least one term, got none"),
        (
            "reward",
            {"format_faults": (), "format_penalty": 0.3},
            r"reward.format_penalty has no effect with reward.format_faults = \(\): it must be 0.1, got 0.3",
        ),
        (
            "reward",
            {"format_faults": (), "outcome_needs_format": True},
            r"reward.outcome_needs_format has no effect with reward.format_faults = \(\)",
        ),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(table: str, fields: dict[str, Any], message: str) -> None:
    method = with_fields(table, fields)
    with pytest.raises(ValueError, match=message):
        check_method(method)
    with pytest.raises(ValueError, match=message):
        config_from_dict({"method": "gtpo", **dataclasses.asdict(method)})


@pytest.mark.parametrize(
    ("method", "table", "given", "back_at_default"),
    [
        ("deepseek_grpo", "loss", {"kl": "none"}, "kl_coef"),
        ("deepseek_grpo", "loss", {"surrogate": "reinforce"}, "clip_high"),
        ("matchtir", "loss", {"surrogate": "cispo"}, "dual_clip"),
        ("gspo", "loss", {"surrogate": "reinforce"}, "ratio_level clip_low clip_high"),
        ("grpo", "reward", {"format_faults": []}, "outcome_needs_format format_penalty"),
    ],
)
def test_what_an_override_leaves_without_effect_is_dropped_and_refused_where_it_is_given(
    method: str, table: str, given: dict[str, Any], back_at_default: str
) -> None:
    names, preset = back_at_default.split(), getattr(METHODS[method], table)
    defaults = {name: getattr(type(preset), name) for name in names}
    kept = {name: getattr(preset, name) for name in names}
    assert defaults != kept
    as_fields = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    found = getattr(config_from_dict({"method": method, table: given}), table)
    assert found == dataclasses.replace(preset, **as_fields, **defaults)
    with pytest.raises(ValueError, match=f"{table}.{names[0]}.* has no effect with {table}.{next(iter(given))} = "):
        config_from_dict({"method": method, table: {**given, **kept}})


@pytest.mark.parametrize(
    ("method", "number", "given", "back_at_default"),
    [
        ("mt_grpo", 0, {"scale": "none"}, "eps"),
        ("mt_grpo", 1, {"turns": "all"}, "others"),
        ("grpo", 0, {"quantity": "outcome"}, "gamma"),
        ("dr_grpo", 0, {"scope": "none"}, "population scale"),
    ],
)
def test_a_term_of_a_preset_drops_what_an_override_leaves_without_effect(
    tmp_path: Path, method: str, number: int, given: dict[str, str], back_at_default: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'method = "{method}"\n')
    names, preset = back_at_default.split(), METHODS[method].credit.terms[number]
    defaults = {name: getattr(Term, name) for name in names if getattr(preset, name) != "none"}
    words = [word for name, value in given.items() for word in (f"--credit.terms.{number}.{name}", value)]
    found = load_config(path, words).credit.terms[number]
    assert found == dataclasses.replace(preset, **{**given, **defaults})  # type: ignore[arg-type]
    kept = getattr(preset, names[0])
    with pytest.raises(ValueError, match=rf"credit\.terms\.{number}\.{names[0]} has no effect"):
        load_config(path, [*words, f"--credit.terms.{number}.{names[0]}", str(kept)])


def test_a_field_that_has_an_effect_is_taken() -> None:
    rollout: dict[str, Any] = {"rollout_correction_level": "turn", "rollout_correction_high": 0.3}
    for table, fields in (
        ("loss", {"rollout_correction": "truncated", **rollout}),
        ("term", {"scope": "none", "centre": "none", "scale": "none", "gamma": 0.5}),
        ("term", {"scale": "none", "singleton": "keep", "population": "tokens"}),
        ("term", {"order": "normalise_first", "gamma": 0.5}),
        ("reward", {"format_faults": ("invalid_call",), "format_penalty": 0.0, "outcome_needs_format": True}),
    ):
        given = {"credit": {"terms": [fields]}} if table == "term" else {table: fields}
        config = config_from_dict(given)
        assert Method(config.reward, config.credit, config.loss) == with_fields(table, fields)


def test_without_a_ratio_a_rollout_is_good_for_one_update() -> None:
    with pytest.raises(ValueError, match=r"train.updates_per_rollout must be 1 with loss.surrogate = .*, got 4"):
        config_from_dict({"method": "rloo", "train": {"updates_per_rollout": 4}})
