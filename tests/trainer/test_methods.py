"""Every preset's credit against a loop written from its formula; presets in training, in the config, in the listing."""

import dataclasses
import doctest
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch

from gtpo.__main__ import main
from gtpo.config import config_from_dict, load_config
from gtpo.credit import anchor_ids, assign_credit, check_credit, credit_rules, group_advantages, method_advantages
from gtpo.methods import (
    METHODS,
    PRESETS,
    Method,
    Term,
    check_method,
    describe_credit,
    describe_loss,
    describe_reward,
    presets,
)
from gtpo.rewards import turn_rewards
from gtpo.types import ToolResult, ToolStatus
from gtpo_kernels import CreditRule, turn_advantages
from tests.trainer.conftest import make_trajectory, make_turn


@dataclasses.dataclass(frozen=True)
class Trial:
    """A ragged batch as plain lists: by trajectory its group and outcome, by turn its reward, tokens, state, a call."""

    groups: list[int]
    outcomes: list[float]
    rewards: list[list[float]]
    num_tokens: list[list[int]]
    anchors: list[list[int]]
    calls: list[list[bool]]

    def peers(self, i: int) -> list[int]:
        return [j for j, group in enumerate(self.groups) if group == self.groups[i]]


def random_trial(seed: int) -> Trial:
    """2 or 3 groups of at least two trajectories of 1 to 5 turns of 1 to 4 tokens."""
    generator = random.Random(seed)
    groups = [g for g in range(generator.randint(2, 3)) for _ in range(generator.randint(2, 5))]
    generator.shuffle(groups)
    lengths = [generator.randint(1, 5) for _ in groups]
    return Trial(
        groups=groups,
        outcomes=[generator.choice([0.0, 1.0, round(generator.random(), 2)]) for _ in groups],
        rewards=[[generator.choice([0.0, 1.0, -0.1, generator.gauss(0, 1)]) for _ in range(n)] for n in lengths],
        num_tokens=[[generator.randint(1, 4) for _ in range(n)] for n in lengths],
        anchors=[[generator.randint(0, 2) for _ in range(n)] for n in lengths],
        calls=[[j < n - 1 for j in range(n)] for n in lengths],
    )


def by_method(method: Method, trial: Trial) -> list[list[float]]:
    lengths = [len(turns) for turns in trial.rewards]
    num_tokens = [n for turns in trial.num_tokens for n in turns]
    flat = {name: [x for turns in getattr(trial, name) for x in turns] for name in ("rewards", "anchors", "calls")}
    credit = method_advantages(
        method,
        torch.tensor(flat["rewards"], dtype=torch.float64),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(trial.groups),
        torch.arange(len(num_tokens)).repeat_interleave(torch.tensor(num_tokens)),
        outcomes=torch.tensor(trial.outcomes, dtype=torch.float64),
        anchor_ids=torch.tensor(flat["anchors"]),
        turns_with_calls=torch.tensor(flat["calls"]),
    )
    return [part.tolist() for part in credit.turn_advantages.split(lengths)]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: list[float], ddof: int = 1) -> float:
    squares = math.fsum((x - mean(values)) ** 2 for x in values)
    return math.sqrt(squares / (len(values) - ddof)) if len(values) > 1 else 0.0


def normalised(x: float, values: list[float], eps: float = 1e-6, ddof: int = 1) -> float:
    return 0.0 if max(values) == min(values) else (x - mean(values)) / (std(values, ddof) + eps)


def returns(rewards: list[float], gamma: float) -> list[float]:
    return [math.fsum(gamma ** (m - j) * rewards[m] for m in range(j, len(rewards))) for j in range(len(rewards))]


Formula = Callable[[Trial, int, int], float]


def gtpo(trial: Trial, i: int, j: int) -> float:
    pool = [x for p in trial.peers(i) for x in returns(trial.rewards[p], 0.9)]
    return normalised(returns(trial.rewards[i], 0.9)[j], pool)


def grpo(trial: Trial, i: int, j: int) -> float:
    return normalised(sum(trial.rewards[i]), [sum(trial.rewards[p]) for p in trial.peers(i)])


def dr_grpo(trial: Trial, i: int, j: int) -> float:
    return sum(trial.rewards[i]) - mean([sum(trial.rewards[p]) for p in trial.peers(i)])


def rloo(trial: Trial, i: int, j: int) -> float:
    return sum(trial.rewards[i]) - mean([sum(trial.rewards[p]) for p in trial.peers(i) if p != i])


def turn_rloo(trial: Trial, i: int, j: int) -> float:
    others = [sum(trial.rewards[p][j:]) for p in trial.peers(i) if p != i and len(trial.rewards[p]) > j]
    return sum(trial.rewards[i][j:]) - (mean(others) if others else 0.0)


def reinforce_pp(trial: Trial, i: int, j: int) -> float:
    centred = [dr_grpo(trial, p, 0) for p in range(len(trial.groups))]
    tokens = [x for x, n in zip(centred, trial.num_tokens, strict=True) for _ in range(sum(n))]
    return (centred[i] - mean(tokens)) / (std(tokens) + 1e-8)


def mt_grpo(trial: Trial, i: int, j: int) -> float:
    peers = trial.peers(i)
    outcome = normalised(trial.outcomes[i], [trial.outcomes[p] for p in peers], eps=1e-4)
    if not trial.calls[i][j]:
        return outcome
    same_turn = [trial.rewards[p][j] * trial.calls[p][j] for p in peers if len(trial.rewards[p]) > j]
    return outcome + normalised(trial.rewards[i][j], same_turn, eps=1e-4)


def matchtir(trial: Trial, i: int, j: int) -> float:
    same_turn = [returns(trial.rewards[p], 0.9)[j] for p in trial.peers(i) if len(trial.rewards[p]) > j]
    return 0.5 * grpo(trial, i, j) + 0.5 * normalised(returns(trial.rewards[i], 0.9)[j], same_turn)


def gigpo(trial: Trial, i: int, j: int) -> float:
    same_state = [
        value
        for p in trial.peers(i)
        for value, anchor in zip(returns(trial.rewards[p], 0.95), trial.anchors[p], strict=True)
        if anchor == trial.anchors[i][j]
    ]
    return grpo(trial, i, j) + normalised(returns(trial.rewards[i], 0.95)[j], same_state)


def igpo(trial: Trial, i: int, j: int) -> float:
    pool = [x for p in trial.peers(i) for x in trial.rewards[p]]
    return math.fsum(normalised(x, pool, ddof=0) for x in trial.rewards[i][j:])


FORMULAS: dict[str, Formula] = {
    "gtpo": gtpo,
    "gtpo_dense": gtpo,
    "grpo": grpo,
    "deepseek_grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": grpo,
    "rloo": rloo,
    "turn_rloo": turn_rloo,
    "reinforce_pp": reinforce_pp,
    "gspo": grpo,
    "cispo": grpo,
    "mt_grpo": mt_grpo,
    "matchtir": matchtir,
    "gigpo": gigpo,
    "igpo": igpo,
    "simpletir": grpo,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_its_formula(name: str) -> None:
    for seed in range(100):
        trial = random_trial(seed)
        expected = [[FORMULAS[name](trial, i, j) for j in range(len(turns))] for i, turns in enumerate(trial.rewards)]
        for ours, theirs in zip(by_method(METHODS[name], trial), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)


def test_mt_grpo_gives_the_authors_credit_to_whoever_calls() -> None:
    """Restated from SiliangZeng/Multi-Turn-RL-Agent, mt_grpo_env_trainer.py, `_assign_advantages` ("aae"): a call, its
    result and an answer, where statistics run over all rollouts of the group and TRL's eps is 1e-4."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        outcome, turn = torch.rand(2, 8, generator=generator, dtype=torch.float64)
        calls = torch.rand(8, generator=generator) < 0.7
        turn = turn * calls
        outcome_advantage, turn_advantage = ((x - x.mean()) / (x.std() + 1e-4) for x in (outcome, turn))
        rewards = [[value, 0.0] if called else [0.0] for value, called in zip(turn.tolist(), calls, strict=True)]
        found = group_advantages(
            METHODS["mt_grpo"],
            rewards,
            outcomes=outcome.tolist(),
            calls=[[True, False] if called else [False] for called in calls],
            digits=12,
        )
        for i, row in enumerate(found):
            if calls[i]:
                expected = [outcome_advantage[i] + turn_advantage[i], outcome_advantage[i]]
                assert row == pytest.approx([value.item() for value in expected], rel=1e-9)


class Loss(NamedTuple):
    """The loss half of a preset, as its source has it; what no row names is off."""

    aggregation: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    surrogate: str = "ppo"
    ratio_level: str = "token"
    dual_clip: float | None = None
    kl: str = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    mask_void_turns: bool = False
    rollout_correction: str = "none"


# of the paper that the preset names where nothing else is said
LOSSES = {
    # no source has a loss for arXiv 2511.14846: that of DAPO, for the baseline of its paper too
    "gtpo": Loss("token-mean", 0.2, 0.28),
    "gtpo_dense": Loss("token-mean", 0.2, 0.28),
    # ours: free of lengths, so that all of it is unbiased (docs/credit.md)
    "turn_rloo": Loss("constant", 0.2, 0.28),
    "grpo": Loss("token-mean", 0.2, 0.28),
    # the paper gives no clip
    "deepseek_grpo": Loss("seq-mean-token-mean", kl="k3", kl_coef=0.04),
    "dr_grpo": Loss("constant"),
    # clip-higher, token-level loss, no KL, overlong filtering
    "dapo": Loss("token-mean", 0.2, 0.28, mask_truncated=True),
    # without a ratio nothing is clipped: the clips are the defaults
    "rloo": Loss("seq-mean-token-sum", 0.2, 0.28, "reinforce"),
    # OpenRLHF, examples/scripts/train_reinforce_baseline_llama_ray_agent_async.sh
    "reinforce_pp": Loss("token-mean", kl="k2", kl_coef=1e-3),
    # section 5.1; no KL, as in TRL's paper index (huggingface.co/docs/trl/paper_index)
    "gspo": Loss("seq-mean-token-mean", 3e-4, 4e-4, ratio_level="sequence"),
    # no lower bound; the number of the upper one is ours
    "cispo": Loss("token-mean", 1.0, 4.0, "cispo"),
    # SiliangZeng/Multi-Turn-RL-Agent, mt_grpo_env_trainer.py and run_mt_grpo.sh (BETA 0)
    "mt_grpo": Loss("token-mean"),
    # CyberSculptor96/MatchTIR, Scripts/run.sh and ppo_trainer.yaml
    "matchtir": Loss("seq-mean-token-mean", dual_clip=3.0, kl="k3", kl_coef=1e-3, entropy_coef=1e-3),
    # langfengQ/DrMAS, examples/gigpo_trainer/run_alfworld.sh and ppo_trainer.yaml
    "gigpo": Loss("token-mean", dual_clip=3.0, kl="k3", kl_coef=0.01, entropy_coef=1e-3),
    # GuoqingWang1/IGPO, ppo_trainer.yaml and core_algos.py
    "igpo": Loss("token-mean", dual_clip=3.0, kl="k3", kl_coef=1e-3, entropy_coef=1e-3),
    # ltzheng/SimpleTIR, simpletir_trainer.yaml; the aggregation is GRPO's
    "simpletir": Loss("seq-mean-token-mean", 0.2, 0.28, dual_clip=3.0, mask_void_turns=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_preset_is_that_of_its_source(name: str) -> None:
    assert Loss(*(getattr(METHODS[name], field) for field in Loss._fields)) == LOSSES[name]


def test_gtpo_and_grpo_are_the_short_call_bit_for_bit() -> None:
    for seed in range(20):
        trial = random_trial(seed)
        rewards = torch.tensor([x for turns in trial.rewards for x in turns])
        cu_turns = torch.tensor([0, *(len(turns) for turns in trial.rewards)]).cumsum(0)
        terminal = torch.zeros_like(rewards)
        terminal[cu_turns[1:] - 1] = torch.tensor(trial.outcomes)
        rest = (cu_turns, torch.tensor(trial.groups), torch.arange(len(rewards)).repeat_interleave(2))
        for name in ("gtpo", "gtpo_dense"):
            for ours, short in zip(
                method_advantages(METHODS[name], rewards, *rest),
                turn_advantages(rewards, *rest, gamma=0.9),
                strict=True,
            ):
                assert torch.equal(ours, short)
        short = turn_advantages(terminal, *rest, gamma=1.0, population="trajectories")
        for ours, theirs in zip(method_advantages(METHODS["grpo"], terminal, *rest), short, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_chosen_by_name_and_any_field_overridden(name: str) -> None:
    config = config_from_dict({"method": name})
    assert config.credit == METHODS[name]
    check_credit(config.credit)
    changed = {"weight": -1.0, "aggregation": "constant", "kl": "k2", "kl_coef": 0.5, "mask_truncated": True}
    config = config_from_dict({"method": name, "credit": changed})
    assert config.credit == dataclasses.replace(METHODS[name], **changed)  # type: ignore[arg-type]


def test_a_further_term_is_overridden_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('method = "matchtir"\n')
    (term,) = METHODS["matchtir"].extra_terms
    (changed,) = load_config(path, ["--credit.extra_terms.0.weight", "0.3"]).credit.extra_terms
    assert changed == dataclasses.replace(term, weight=0.3)
    path.write_text('method = "matchtir"\n[[credit.extra_terms]]\nscope = "batch"\n')
    assert load_config(path).credit.extra_terms == (Term(scope="batch"),)
    assert load_config(path, ["--credit.extra_terms.0.gamma", "1.0"]).credit.extra_terms == (
        Term(scope="batch", gamma=1),
    )
    path.write_text('method = "matchtir"\n')
    with pytest.raises(ValueError, match=r"--credit.extra_terms.1: expected the number of one of 1 entries"):
        load_config(path, ["--credit.extra_terms.1.weight", "0.3"])
    with pytest.raises(ValueError, match=r"unknown config key 'credit.extra_terms.0.wieght'; did you mean"):
        load_config(path, ["--credit.extra_terms.0.wieght", "0.3"])


@pytest.mark.parametrize("record", [Method, Term])
def test_a_term_has_the_fields_choices_and_defaults_of_a_credit_rule(record: type) -> None:
    # gtpo.methods states them once more, because the command line reads it without loading torch
    types, defaults = get_type_hints(record), {field.name: field.default for field in dataclasses.fields(record)}
    assert {name: types[name] for name in CreditRule._fields} == get_type_hints(CreditRule)
    assert {name: defaults[name] for name in CreditRule._fields} == CreditRule._field_defaults


def test_a_credit_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"credit\.scope must be 'none' where neither centre nor scale is taken"):
        check_credit(Method(centre="none", scale="none"))
    with pytest.raises(ValueError, match=r"credit\.extra_terms\.0\.ddof must be 0 or 1, got 3"):
        check_credit(Method(extra_terms=(Term(ddof=3),)))
    with pytest.raises(ValueError, match=r"credit\.extra_terms\.1\.gamma must lie in \[0, 1\], got 2"):
        check_credit(Method(extra_terms=(Term(), Term(gamma=2.0))))


def test_what_a_credit_needs_and_lacks_is_named() -> None:
    batch = [torch.tensor([1.0, 0.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.arange(2)]
    with pytest.raises(ValueError, match=r"outcomes must be \[B\] for quantity='outcome', got None"):
        method_advantages(METHODS["mt_grpo"], *batch, turns_with_calls=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"turns_with_calls must be \[K\] for a term of turns='with_calls', got None"):
        method_advantages(METHODS["mt_grpo"], *batch, outcomes=torch.ones(2))
    with pytest.raises(ValueError, match=r"turns must be \[K\] = \[2\], got shape \(1,\)"):
        method_advantages(METHODS["mt_grpo"], *batch, outcomes=torch.ones(2), turns_with_calls=torch.ones(1).bool())
    with pytest.raises(ValueError, match=r"anchor_ids must be \[K\]"):
        method_advantages(METHODS["gigpo"], *batch)


@pytest.mark.parametrize("outcomes", [(1.0, 0.0), (0.0, 1.0)])
def test_the_trainer_gives_every_method_what_it_needs(outcomes: tuple[float, float]) -> None:
    seen, other = (ToolResult(ToolStatus.OK, text) for text in ("seen", "other"))
    first = make_trajectory(make_turn(code="a"), make_turn(code="b"), make_turn(), outcome=outcomes[0])
    second = make_trajectory(make_turn(code="a"), make_turn(), outcome=outcomes[1])
    for trajectory, results in ((first, (seen, other)), (second, (seen,))):
        for turn, result in zip(trajectory.turns, results, strict=False):
            turn.results = [result]
    assert anchor_ids([first, second]) == [0, 1, 2, 0, 1]
    for name, method in METHODS.items():
        rewards = [turn_rewards([first, second], method)]
        (credit,) = assign_credit([[first, second]], rewards, method)
        trial = Trial(
            groups=[0, 0],
            outcomes=list(outcomes),
            rewards=[reward.rewards for reward in rewards[0]],
            num_tokens=[[len(turn.completion_ids) for turn in t.turns] for t in (first, second)],
            anchors=[[0, 1, 2], [0, 1]],
            calls=[[True, True, False], [True, False]],
        )
        for i, assigned in enumerate(credit):
            expected = [FORMULAS[name](trial, i, j) for j in range(len(assigned.advantages))]
            assert assigned.advantages == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_coef": 0.1}, "credit.kl_coef has no effect with credit.kl = 'none': it must be 0.0, got 0.1"),
        ({"kl": "k3"}, "credit.kl_coef must be above 0 with credit.kl = 'k3', got 0.0"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "credit.dual_clip has no effect with credit.surrogate = 'cispo'"),
        ({"surrogate": "reinforce", "dual_clip": 3.0}, "credit.dual_clip has no effect with"),
        ({"surrogate": "reinforce", "ratio_level": "turn"}, "credit.ratio_level has no effect with"),
        (
            {"surrogate": "reinforce", "clip_low": 0.5, "clip_high": 0.3},
            "credit.clip_low, credit.clip_high has no effect .*: it must be 0.2, 0.28, got 0.5, 0.3",
        ),
        ({"aggregation_constant": 9.0}, "credit.aggregation_constant has no effect with credit.aggregation = 'token"),
        ({"rollout_correction_low": 0.1}, "credit.rollout_correction_low has no effect with"),
        ({"rollout_correction_high": 3.0}, "credit.rollout_correction_high has no effect with"),
        ({"rollout_correction_level": "turn"}, "credit.rollout_correction_level has no effect with"),
        (
            {"rollout_correction": "truncated", "rollout_correction_low": 0.1},
            "credit.rollout_correction_low has no effect with credit.rollout_correction = 'truncated'",
        ),
        (
            {"rollout_correction": "masked", "rollout_correction_low": 3.0},
            "credit.rollout_correction_low must be at most .*, got 3.0 and 2.0",
        ),
        ({"scale": "none", "eps": 0.1}, "credit.eps has no effect with credit.scale = 'none'"),
        ({"scale": "none", "ddof": 0}, "credit.ddof has no effect with"),
        ({"scope": "none", "centre": "leave_one_out"}, "credit.centre has no effect with credit.scope = 'none'"),
        ({"scope": "none", "population": "tokens"}, "credit.population has no effect with"),
        ({"scope": "none", "singleton": "keep"}, "credit.singleton has no effect with"),
        ({"quantity": "outcome", "gamma": 0.5}, "credit.gamma has no effect with credit.quantity = 'outcome'"),
        (
            {"whiten": True, "weight": 0.5},
            "credit.weight has no effect with credit.whiten = True and no further term: it must be 1.0, got 0.5",
        ),
        ({"reward": "outcome"}, "pays no term of a turn, so these must be 0: credit.format_penalty, got 0.1"),
        (
            {"extra_terms": (Term(), Term(quantity="turn_reward", gamma=0.5))},
            "credit.extra_terms.1.gamma has no effect with credit.extra_terms.1.quantity = 'turn_reward'",
        ),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(dataclasses.replace(METHODS["gtpo"], **fields))
    with pytest.raises(ValueError, match=message):
        config_from_dict({"method": "gtpo", "credit": dataclasses.asdict(Method(**fields))})


@pytest.mark.parametrize(
    ("method", "given", "back_at_default"),
    [
        ("deepseek_grpo", {"kl": "none"}, "kl_coef"),
        ("deepseek_grpo", {"surrogate": "reinforce"}, "clip_high"),
        ("matchtir", {"surrogate": "cispo"}, "dual_clip"),
        ("gspo", {"surrogate": "reinforce"}, "ratio_level clip_low clip_high"),
        ("mt_grpo", {"scale": "none"}, "eps"),
        ("grpo", {"quantity": "outcome"}, "gamma"),
        ("dr_grpo", {"scope": "none"}, "population"),
    ],
)
def test_what_an_override_leaves_without_effect_is_dropped_and_refused_where_it_is_given(
    method: str, given: dict[str, Any], back_at_default: str
) -> None:
    names = back_at_default.split()
    defaults = {name: getattr(Method, name) for name in names}
    assert defaults != {name: getattr(METHODS[method], name) for name in names}
    expected = dataclasses.replace(METHODS[method], **given, **defaults)
    assert config_from_dict({"method": method, "credit": given}).credit == expected
    kept = {name: getattr(METHODS[method], name) for name in names}
    with pytest.raises(ValueError, match=f"credit.{names[0]}.* has no effect with credit.{next(iter(given))} = "):
        config_from_dict({"method": method, "credit": {**given, **kept}})


def test_a_term_of_a_preset_drops_what_an_override_leaves_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('method = "mt_grpo"\n')
    (term,) = load_config(path, ["--credit.extra_terms.0.scale", "none"]).credit.extra_terms
    assert term == dataclasses.replace(METHODS["mt_grpo"].extra_terms[0], scale="none", eps=Term.eps)
    with pytest.raises(ValueError, match=r"credit\.extra_terms\.0\.eps has no effect"):
        load_config(path, ["--credit.extra_terms.0.scale", "none", "--credit.extra_terms.0.eps", "0.5"])


def test_a_field_that_has_an_effect_is_taken() -> None:
    for fields in (
        {"rollout_correction": "truncated", "rollout_correction_level": "turn", "rollout_correction_high": 0.3},
        {"scope": "none", "centre": "none", "scale": "none", "gamma": 0.5},
        {"scale": "none", "singleton": "keep", "population": "tokens"},
        {"order": "normalise_first", "gamma": 0.5},
    ):
        assert config_from_dict({"credit": fields}).credit == Method(**fields)  # type: ignore[arg-type]


def test_without_a_ratio_a_rollout_is_good_for_one_update() -> None:
    with pytest.raises(ValueError, match=r"train.updates_per_rollout must be 1 with credit.surrogate = .*, got 4"):
        config_from_dict({"method": "rloo", "train": {"updates_per_rollout": 4}})


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_has_an_example_that_is_run(name: str) -> None:
    """Tokens of the example are seen to be checked: with another weight it fails."""
    example = presets.__test__[name]
    assert example.count(">>> group_advantages(method, [") >= 1
    for method, is_failed in ((METHODS[name], False), (dataclasses.replace(METHODS[name], weight=-1.0), True)):
        runner = doctest.DocTestRunner(verbose=False)
        globs = {"METHODS": {name: method}}
        found = doctest.DocTestParser().get_doctest(example, globs, name, None, None)
        assert bool(runner.run(found, out=lambda text: None).failed) is is_failed


def test_methods_are_listed_with_formula_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listing = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"{name}  {preset.source}\n" in listing
        assert f"  reward  {describe_reward(preset.method)}\n" in listing
        assert f"  credit  {describe_credit(preset.method)}\n" in listing
        assert f"  loss    {describe_loss(preset.method)}\n" in listing
    told = {(describe_reward(m), describe_credit(m), describe_loss(m)) for m in METHODS.values()}
    assert len(told) == len(METHODS)
    assert "arXiv 2508.03772" in listing and "arXiv 2508.04349" in listing
    assert main(["methods", "--all", "1"]) == 2


@pytest.mark.parametrize("name", METHODS)
def test_the_description_tells_credits_apart(name: str) -> None:
    same = [other for other in METHODS if describe_credit(METHODS[other]) == describe_credit(METHODS[name])]
    assert {tuple(credit_rules(METHODS[other])) for other in same} == {tuple(credit_rules(METHODS[name]))}
