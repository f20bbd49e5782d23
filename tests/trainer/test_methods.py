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
from gtpo.credit import anchor_ids, assign_credit, check_credit, credit_advantages, credit_rules, group_advantages
from gtpo.methods import (
    METHODS,
    PRESETS,
    CreditSum,
    Method,
    PolicyLoss,
    RewardRule,
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
    formats: list[list[float]]

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
        formats=[[generator.choice([0.0, -0.1, -0.3]) for _ in range(n)] for n in lengths],
    )


def by_credit(credit: CreditSum, trial: Trial) -> list[list[float]]:
    lengths = [len(turns) for turns in trial.rewards]
    num_tokens = [n for turns in trial.num_tokens for n in turns]
    names = ("rewards", "anchors", "calls", "formats")
    flat = {name: [x for turns in getattr(trial, name) for x in turns] for name in names}
    rewards, formats = (torch.tensor(flat[name], dtype=torch.float64) for name in ("rewards", "formats"))
    found = credit_advantages(
        credit,
        rewards,
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(trial.groups),
        torch.arange(len(num_tokens)).repeat_interleave(torch.tensor(num_tokens)),
        outcomes=torch.tensor(trial.outcomes, dtype=torch.float64),
        anchor_ids=torch.tensor(flat["anchors"]),
        turns_with_calls=torch.tensor(flat["calls"]),
        named_rewards={"outcome": rewards - formats, "format": formats},
    )
    return [part.tolist() for part in found.turn_advantages.split(lengths)]


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


def gtpo_batch(trial: Trial, i: int, j: int) -> float:
    pool = [x for rewards in trial.rewards for x in returns(rewards, 0.9)]
    return normalised(returns(trial.rewards[i], 0.9)[j], pool)


def kevin(trial: Trial, i: int, j: int) -> float:
    pool = [x for p in trial.peers(i) for x in returns(trial.rewards[p], 0.4)]
    return normalised(returns(trial.rewards[i], 0.4)[j], pool)


def maxrl(trial: Trial, i: int, j: int) -> float:
    expected = mean([sum(trial.rewards[p]) for p in trial.peers(i)])
    return (sum(trial.rewards[i]) - expected) / (expected + 1e-6) if expected > 0 else 0.0


def gdpo(trial: Trial, i: int, j: int) -> float:
    def summed(p: int) -> float:
        formats, totals = ([sum(turns) for turns in rows] for rows in (trial.formats, trial.rewards))
        kinds = [formats, [total - form for total, form in zip(totals, formats, strict=True)]]
        return sum(normalised(kind[p], [kind[q] for q in trial.peers(p)]) for kind in kinds)

    tokens = [summed(p) for p, n in enumerate(trial.num_tokens) for _ in range(sum(n))]
    return (summed(i) - mean(tokens)) / (std(tokens) + 1e-8)


def hgpo(trial: Trial, i: int, j: int) -> float:
    """As its authors have it: groups of turns by their last 1, 2, 3 states weigh 2, 3, 4; what is 0 is left out."""
    found = []
    for length in (1, 2, 3):
        if j + 1 < length:
            continue
        history = trial.anchors[i][j + 1 - length : j + 1]
        same = [
            returns(trial.rewards[p], 0.95)[t]
            for p in trial.peers(i)
            for t in range(length - 1, len(trial.rewards[p]))
            if trial.anchors[p][t + 1 - length : t + 1] == history
        ]
        found.append((length + 1.0, normalised(returns(trial.rewards[i], 0.95)[j], same, ddof=0)))
    weights = sum(weight for weight, value in found if value != 0)
    return sum(weight * value for weight, value in found) / weights if weights else 0.0


FORMULAS: dict[str, Formula] = {
    "gtpo": gtpo,
    "gtpo_dense": gtpo,
    "grpo": grpo,
    "deepseek_grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": grpo,
    "rloo": rloo,
    "turn_rloo": turn_rloo,
    "gtpo_batch": gtpo_batch,
    "kevin": kevin,
    "maxrl": maxrl,
    "gdpo": gdpo,
    "hgpo": hgpo,
    "sapo": grpo,
    "vespo": grpo,
    "dppo": grpo,
    "ipo": dr_grpo,
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
