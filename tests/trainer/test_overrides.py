"""Every key of a method's three tables can be overridden, in a file and by a word, and changes what is computed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gtpo.batch import pack
from gtpo.config import Config, config_from_dict, load_config
from gtpo.credit import Credit, to_sequence
from gtpo.learner import Learner
from gtpo.methods import METHODS, CreditSum, Method, PolicyLoss, RewardRule, Term
from gtpo.rewards import turn_rewards
from gtpo.types import StopReason, ToolResult, ToolStatus
from tests.trainer.conftest import make_trajectory, make_turn, tiny_policy
from tests.trainer.method_formulas import by_credit, random_trial
from tests.trainer.test_losses import sequences_of_turns
from tests.trainer.test_trainer import make_trainer

CORRECTED = {"rollout_correction": "truncated", "rollout_correction_high": 1.05}
MASKED = {"rollout_correction": "masked", "rollout_correction_low": 0.9, "rollout_correction_high": 1.1}
TWO_TERMS = [{"scope": "batch"}, {"scope": "group_turn"}]
# table: key: (what stands beside it in the table, another value than GTPO's)
OVERRIDES: dict[str, dict[str, tuple[dict[str, Any], Any]]] = {
    "reward": {
        "format_faults": ({}, ["invalid_call"]),
        "outcome_needs_format": ({}, True),
        "format_penalty": ({}, 0.3),
        "similarity_alpha": ({}, 0.25),
        "execution_bonus": ({}, 0.05),
        "execution_penalty": ({}, 0.2),
    },
    "credit": {"terms": ({}, [{"scope": "batch"}]), "whiten": ({}, True), "average": ({"terms": TWO_TERMS}, True)},
    "credit.terms.0": {
        "turns": ({}, "with_calls"),
        "others": ({"turns": "with_calls"}, "zero"),
        "reward": ({}, "format"),
        "context": ({"scope": "group_anchor"}, 1),
        "quantity": ({}, "trajectory_return"),
        "gamma": ({}, 0.5),
        "order": ({}, "normalise_first"),
        "scope": ({}, "batch"),
        "population": ({}, "tokens"),
        "centre": ({}, "leave_one_out"),
        "scale": ({}, "none"),
        "ddof": ({}, 0),
        "eps": ({}, 0.1),
        "singleton": ({}, "keep"),
        "weight": ({}, 0.5),
    },
    "loss": {
        "ratio_level": ({}, "turn"),
        "ratio_to": ({}, "sampler"),
        "surrogate": ({}, "cispo"),
        "gate": ({"surrogate": "sapo", "gate": [1.0, 1.05]}, [3.0, 0.5]),
        "clip_low": ({}, 0.01),
        "clip_high": ({}, 0.01),
        "dual_clip": ({}, 1.05),
        "aggregation": ({}, "seq-mean-token-mean"),
        "aggregation_constant": ({"aggregation": "constant"}, 7.0),
        "kl": ({"kl": "k2", "kl_coef": 0.1}, "k3"),
        "kl_reference": ({"kl": "k2", "kl_coef": 0.1}, "sampler"),
        "kl_coef": ({"kl": "k2", "kl_coef": 0.1}, 0.5),
        "entropy_coef": ({}, 0.1),
        "rollout_correction": ({}, "truncated"),
        "rollout_correction_level": (CORRECTED, "turn"),
        "rollout_correction_low": (MASKED, 0.99),
        "rollout_correction_high": (CORRECTED, 1.01),
        "mask_truncated": ({}, True),
        "mask_void_turns": ({}, True),
    },
}
# the one way of comparing code has no other
ONLY_ONE_VALUE = {"similarity"}

Effect = Callable[[Method], list[float]]


@pytest.fixture(scope="module")
def effect(tmp_path_factory: pytest.TempPathFactory) -> Effect:
    """Rewards, advantages, masks, loss and gradient of a method."""
    with make_trainer(tmp_path_factory.mktemp("run")) as trainer:
        config = trainer.config
    policy, before = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    batch = pack(sequences_of_turns(5))
    now, then = (Learner(p, config).with_old_logprobs(batch).old_logprobs for p in (policy, before))
    assert now is not None and then is not None
    old = 0.5 * (now + then)
    noise = 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
    batch = dataclasses.replace(batch, old_logprobs=old, rollout_logprobs=old + noise)
    invalid = make_turn(code="x")
    invalid.results = [ToolResult(ToolStatus.MALFORMED, "")]
    group = [
        make_trajectory(make_turn(code="print(gcd(4, 6))", as_expected=True), make_turn(), outcome=1.0),
        make_trajectory(make_turn(code="print(gcd(4, 8))", as_expected=False), make_turn()),
        make_trajectory(make_turn(), invalid, outcome=1.0),
        make_trajectory(make_turn(code="1"), make_turn(code="2"), stop=StopReason.TRUNCATED, answer=None),
    ]
    trials = [random_trial(seed) for seed in range(3)]
    alone = dataclasses.replace(trials[0], groups=list(range(len(trials[0].groups))))

    def of(method: Method) -> list[float]:
        values = [x for reward in turn_rewards(group, method.reward) for x in reward.rewards]
        values += [x for trial in (*trials, alone) for turns in by_credit(method.credit, trial) for x in turns]
        masks = {"mask_truncated": method.loss.mask_truncated, "mask_void_turns": method.loss.mask_void_turns}
        for trajectory in group:
            credit = Credit([0.0] * len(trajectory.turns), [1.0] * len(trajectory.turns))
            values.append(sum(to_sequence(trajectory, credit, **masks).loss_mask))
        learner = Learner(policy, dataclasses.replace(config, loss=method.loss))
        scored = dataclasses.replace(batch, ref_logprobs=then) if learner.has_reference else batch
        policy.model.zero_grad()
        count = float(learner.mean_of(batch).num_loss_tokens)
        values.append(learner.accumulate_gradient(scored, num_loss_tokens=count)[0])
        assert policy.head.weight.grad is not None
        return [*values, float(policy.head.weight.grad.abs().sum())]

    return of


def test_every_key_is_here() -> None:
    records = {"reward": RewardRule, "credit": CreditSum, "credit.terms.0": Term, "loss": PolicyLoss}
    assert records.keys() == OVERRIDES.keys()
    for table, record in records.items():
        names = {field.name for field in dataclasses.fields(record)}
        assert OVERRIDES[table].keys() | (ONLY_ONE_VALUE & names) == names


def method_of(config: Config) -> Method:
    return Method(config.reward, config.credit, config.loss)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, keys in OVERRIDES.items() for name in keys])
def test_an_override_is_taken_and_has_an_effect(table: str, name: str, effect: Effect, tmp_path: Path) -> None:
    beside, value = OVERRIDES[table][name]
    given = {**beside, name: value}
    nested = {"credit": {"terms": {"0": given}}} if table == "credit.terms.0" else {table: given}
    found = method_of(config_from_dict({"method": "gtpo", **nested}))
    record: Any = found.credit.terms[0] if table == "credit.terms.0" else getattr(found, table)
    as_fields = {key: tuple(setting) if isinstance(setting, list) else setting for key, setting in given.items()}
    if "terms" in given:
        as_fields["terms"] = tuple(Term(**term) for term in given["terms"])
    assert record == dataclasses.replace(type(record)(), **as_fields)
    # nothing else is another than GTPO's
    others = {"reward", "credit", "loss"} - {table.partition(".")[0]}
    assert all(getattr(found, other) == getattr(METHODS["gtpo"], other) for other in others)
    path = tmp_path / "run.toml"
    path.write_text('method = "gtpo"\n')
    words = [
        word
        for key, setting in given.items()
        for word in (f"--{table}.{key}", setting if isinstance(setting, str) else json.dumps(setting))
        if key != "terms"
    ]
    for term in given.get("terms", ()):
        path.write_text(f'{path.read_text()}[[credit.terms]]\nscope = "{term["scope"]}"\n')
    assert method_of(load_config(path, words)) == found
    of_beside = {"credit": {"terms": {"0": beside}}} if table == "credit.terms.0" else {table: beside}
    before = effect(method_of(config_from_dict({"method": "gtpo", **of_beside})))
    after = effect(found)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-5
