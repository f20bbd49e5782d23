"""Every preset's credit against a loop written from its formula; presets in training, in the config, in the listing."""

import dataclasses
import doctest
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch

from gtpo.__main__ import main
from gtpo.config import config_from_dict, load_config
from gtpo.credit import anchor_ids, assign_credit, check_credit, credit_advantages, credit_rules, group_advantages
from gtpo.methods import (
    METHODS,
    PRESETS,
    CreditSum,
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
from tests.trainer.method_formulas import FORMULAS, Trial, by_credit, random_trial


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_its_formula(name: str) -> None:
    for seed in range(30):
        trial = random_trial(seed)
        expected = [[FORMULAS[name](trial, i, j) for j in range(len(turns))] for i, turns in enumerate(trial.rewards)]
        for ours, theirs in zip(by_credit(METHODS[name].credit, trial), expected, strict=True):
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
            METHODS["mt_grpo"].credit,
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
    gate: tuple[float, ...] = ()
    ratio_to: str = "old"
    kl_reference: str = "start"


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
    # that of gtpo, of which they have the credit with another scope, or another discount
    "gtpo_batch": Loss("token-mean", 0.2, 0.28),
    "kevin": Loss("token-mean", 0.2, 0.28),
    # PPO's, with verl's mean
    "maxrl": Loss("token-mean"),
    "gdpo": Loss("token-mean"),
    # that of gigpo, on whose code the authors' recipe stands
    "hgpo": Loss("token-mean", dual_clip=3.0, kl="k3", kl_coef=0.01, entropy_coef=1e-3),
    # TRL 1.16: loss types sapo and vespo, and the defaults of GRPOConfig; without a clip the clips are the defaults
    "sapo": Loss("seq-mean-token-mean", 0.2, 0.28, "sapo", gate=(1.0, 1.05)),
    "vespo": Loss("token-mean", 0.2, 0.28, "vespo", "sequence", gate=(2.0, 3.0, 3.0, 2.0)),
    # NovaSky-AI/SkyRL, DPPOConfig (binary_tv): delta_low, delta_high
    "dppo": Loss("token-mean", 0.2, 0.2, "dppo", ratio_to="sampler"),
    # PrimeIntellect-ai/prime-rl, IPOLossConfig: eps 0.1, kl_tau 1e-3 times the square, which is twice a k2
    "ipo": Loss("token-mean", 0.1, 0.1, "ipo", kl="k2", kl_coef=2e-3, ratio_to="sampler", kl_reference="sampler"),
    # ltzheng/SimpleTIR, simpletir_trainer.yaml; the aggregation is GRPO's
    "simpletir": Loss("seq-mean-token-mean", 0.2, 0.28, dual_clip=3.0, mask_void_turns=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_preset_is_that_of_its_source(name: str) -> None:
    assert Loss(*(getattr(METHODS[name].loss, field) for field in Loss._fields)) == LOSSES[name]


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
                credit_advantages(METHODS[name].credit, rewards, *rest),
                turn_advantages(rewards, *rest, gamma=0.9),
                strict=True,
            ):
                assert torch.equal(ours, short)
        short = turn_advantages(terminal, *rest, gamma=1.0, population="trajectories")
        for ours, theirs in zip(credit_advantages(METHODS["grpo"].credit, terminal, *rest), short, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_chosen_by_name_and_any_field_overridden(name: str) -> None:
    config = config_from_dict({"method": name})
    preset = METHODS[name]
    assert Method(config.reward, config.credit, config.loss) == preset
    check_credit(config.credit)
    check_method(preset)
    changed: dict[str, Any] = {"aggregation": "constant", "kl": "k2", "kl_coef": 0.5, "mask_truncated": True}
    given = {"loss": changed, "credit": {"terms": {"0": {"weight": -1.0}}}, "reward": {"execution_penalty": 0.3}}
    config = config_from_dict({"method": name, **given})
    assert config.loss == dataclasses.replace(preset.loss, **changed)
    first = dataclasses.replace(preset.credit.terms[0], weight=-1.0)
    assert config.credit.terms == (first, *preset.credit.terms[1:])
    assert config.reward == dataclasses.replace(preset.reward, execution_penalty=0.3)


def test_a_term_is_overridden_or_all_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('method = "matchtir"\n')
    first, second = METHODS["matchtir"].credit.terms
    changed = load_config(path, ["--credit.terms.1.weight", "0.3"]).credit.terms
    assert changed == (first, dataclasses.replace(second, weight=0.3))
    path.write_text('method = "matchtir"\n[[credit.terms]]\nscope = "batch"\n')
    assert load_config(path).credit.terms == (Term(scope="batch"),)
    assert load_config(path, ["--credit.terms.0.gamma", "1.0"]).credit.terms == (Term(scope="batch", gamma=1),)
    path.write_text('method = "matchtir"\n')
    with pytest.raises(ValueError, match=r"credit.terms.2: expected the number of one of 2 terms, from 0, got '2'"):
        load_config(path, ["--credit.terms.2.weight", "0.3"])
    with pytest.raises(ValueError, match=r"unknown config key 'credit.terms.0.wieght'; did you mean"):
        load_config(path, ["--credit.terms.0.wieght", "0.3"])


def test_a_term_has_the_fields_choices_and_defaults_of_a_credit_rule() -> None:
    # gtpo.methods states them once more, because the command line reads it without loading torch
    types, defaults = get_type_hints(Term), {field.name: field.default for field in dataclasses.fields(Term)}
    assert {name: types[name] for name in CreditRule._fields} == get_type_hints(CreditRule)
    assert {name: defaults[name] for name in CreditRule._fields} == CreditRule._field_defaults


def test_a_credit_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"credit\.terms\.0\.scope must be 'none' where neither centre nor scale is"):
        check_credit(CreditSum((Term(centre="none", scale="none"),)))
    with pytest.raises(ValueError, match=r"credit\.terms\.1\.ddof must be 0 or 1, got 3"):
        check_credit(CreditSum((Term(), Term(ddof=3))))
    with pytest.raises(ValueError, match=r"credit\.terms\.2\.gamma must lie in \[0, 1\], got 2"):
        check_credit(CreditSum((Term(), Term(), Term(gamma=2.0))))


def test_what_a_credit_needs_and_lacks_is_named() -> None:
    batch = [torch.tensor([1.0, 0.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.arange(2)]
    with pytest.raises(ValueError, match=r"outcomes must be \[B\] for quantity='outcome', got None"):
        credit_advantages(METHODS["mt_grpo"].credit, *batch, turns_with_calls=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"turns_with_calls must be \[K\] for a term of turns='with_calls', got None"):
        credit_advantages(METHODS["mt_grpo"].credit, *batch, outcomes=torch.ones(2))
    with pytest.raises(ValueError, match=r"turns must be \[K\] = \[2\], got shape \(1,\)"):
        credit_advantages(
            METHODS["mt_grpo"].credit, *batch, outcomes=torch.ones(2), turns_with_calls=torch.ones(1).bool()
        )
    with pytest.raises(ValueError, match=r"anchor_ids must be \[K\]"):
        credit_advantages(METHODS["gigpo"].credit, *batch)


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
        rewards = [turn_rewards([first, second], method.reward)]
        (scored,) = assign_credit([[first, second]], rewards, method.credit)
        trial = Trial(
            groups=[0, 0],
            outcomes=list(outcomes),
            rewards=[reward.rewards for reward in rewards[0]],
            num_tokens=[[len(turn.completion_ids) for turn in t.turns] for t in (first, second)],
            anchors=[[0, 1, 2], [0, 1]],
            calls=[[True, True, False], [True, False]],
            formats=[list(reward.terms["format"]) for reward in rewards[0]],
        )
        for i, (_, _, assigned) in enumerate(scored):
            expected = [FORMULAS[name](trial, i, j) for j in range(len(assigned.advantages))]
            assert assigned.advantages == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_has_an_example_that_is_run(name: str) -> None:
    """Tokens of the example are seen to be checked: with another weight it fails."""
    example = presets.__test__[name]
    assert example.count(">>> group_advantages(credit, [") >= 1
    method = METHODS[name]
    terms = tuple(dataclasses.replace(term, weight=-term.weight) for term in method.credit.terms)
    changed = dataclasses.replace(method, credit=CreditSum(terms, whiten=method.credit.whiten))
    for shown, is_failed in ((method, False), (changed, True)):
        runner = doctest.DocTestRunner(verbose=False)
        globs = {"METHODS": {name: shown}}
        found = doctest.DocTestParser().get_doctest(example, globs, name, None, None)
        assert bool(runner.run(found, out=lambda text: None).failed) is is_failed


def test_methods_are_listed_with_formula_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listing = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"{name}  {preset.source}\n" in listing
        assert f"  reward  {describe_reward(preset.method.reward)}\n" in listing
        assert f"  credit  {describe_credit(preset.method.credit)}\n" in listing
        assert f"  loss    {describe_loss(preset.method.loss)}\n" in listing
    told = {(describe_reward(m.reward), describe_credit(m.credit), describe_loss(m.loss)) for m in METHODS.values()}
    assert len(told) == len(METHODS)
    assert "arXiv 2508.03772" in listing and "arXiv 2508.04349" in listing
    assert main(["methods", "--all", "1"]) == 2


@pytest.mark.parametrize("name", METHODS)
def test_the_description_tells_credits_apart(name: str) -> None:
    credits = {other: method.credit for other, method in METHODS.items()}
    same = [other for other in credits if describe_credit(credits[other]) == describe_credit(credits[name])]
    assert {tuple(credit_rules(credits[other])) for other in same} == {tuple(credit_rules(credits[name]))}
