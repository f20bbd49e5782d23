"""Credits against TRL's own lines, taken from the installed package and run; verl's are in tests/adapters/foreign."""

import ast
import dataclasses
import importlib.util
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo.credit import credit_advantages, credit_rules
from gtpo.methods import METHODS, CreditSum
from gtpo_kernels import CreditTerm, combined_advantages

TRL_EPS = 1e-4


@cache
def trl_code(
    file: str, first: Callable[[str], bool], last: Callable[[str], bool], function: str | None = None
) -> CodeType:
    """Consecutive statements of a file of TRL, or of one function in it, by the texts that they start with.

    The file is read and not imported, which would take seconds.
    """
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "trainer" / file
    body = ast.parse(path.read_text()).body
    if function is not None:
        found = [n for node in body for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n.name == function]
        body = found[0].body
    texts = [ast.unparse(node) for node in body]
    start = next(i for i, text in enumerate(texts) if first(text))
    end = next(i for i, text in enumerate(texts) if i >= start and last(text))
    return compile("\n".join(texts[start : end + 1]), str(path), "exec")


def is_nanstd(text: str) -> bool:
    return text.startswith("def nanstd(")


def is_end(text: str) -> bool:
    return text.startswith("advantages = torch.nan_to_num(")


def is_grpo(text: str) -> bool:
    return text.startswith("if self.multi_objective_aggregation ==")


def is_rloo(text: str) -> bool:
    return text.startswith("grouped_rewards = ")


def trl_advantages(file: str, first: Callable[[str], bool], outcomes: Tensor, size: int, **settings: Any) -> Tensor:
    """[B]: what TRL makes of one reward a completion, completions of a prompt in a row."""
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1), **settings
    )
    names: dict[str, Any] = {"torch": torch, "self": trainer, "device": "cpu", "num_generations": size}
    names |= {"rewards": outcomes, "rewards_per_func": outcomes[:, None]}
    names["unscorable_mask"] = torch.zeros(len(outcomes), dtype=torch.bool)
    exec(trl_code("utils.py", is_nanstd, is_nanstd), names)
    exec(trl_code(file, first, is_end, "_generate_and_score_completions"), names)
    advantages: Tensor = names["advantages"]
    return advantages


def ours(credit: CreditSum, outcomes: Tensor, size: int, generator: random.Random) -> Tensor:
    """[B], the same for a batch of ragged multi-turn trajectories that the outcomes end."""
    lengths = torch.tensor([generator.randint(1, 5) for _ in outcomes])
    cu_turns = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    rewards = torch.zeros(int(cu_turns[-1]), dtype=outcomes.dtype)
    rewards[cu_turns[1:] - 1] = outcomes
    num_tokens = torch.tensor([generator.randint(1, 3) for _ in rewards])
    turn_ids = torch.arange(len(rewards)).repeat_interleave(num_tokens)
    found = credit_advantages(credit, rewards, cu_turns, torch.arange(len(outcomes)) // size, turn_ids)
    by_turn = found.turn_advantages
    assert torch.equal(by_turn, by_turn[cu_turns[:-1]].repeat_interleave(lengths))
    return by_turn[cu_turns[:-1]]


@pytest.mark.parametrize(
    ("name", "file", "first", "settings"),
    [
        *[
            (name, "grpo_trainer.py", is_grpo, {"scale_rewards": "group"})
            for name in ("grpo", "deepseek_grpo", "dapo", "gspo", "cispo", "sapo", "vespo", "dppo", "simpletir")
        ],
        *[(name, "grpo_trainer.py", is_grpo, {"scale_rewards": "none"}) for name in ("dr_grpo", "ipo")],
        ("rloo", "rloo_trainer.py", is_rloo, {"normalize_advantages": False}),
    ],
)
def test_trl(name: str, file: str, first: Callable[[str], bool], settings: dict[str, Any]) -> None:
    (term,) = METHODS[name].credit.terms
    credit = CreditSum((dataclasses.replace(term, eps=TRL_EPS),))
    for seed in range(100):
        generator = random.Random(seed)
        size = generator.randint(2, 6)
        choices: list[Callable[[], float]] = [lambda: 0.0, lambda: 1.0, generator.random]
        outcomes = [generator.choice(choices)() for _ in range(size * generator.randint(1, 4))]
        exact = torch.tensor(outcomes, dtype=torch.float64)
        theirs = trl_advantages(file, first, exact.clone(), size, **settings)
        torch.testing.assert_close(ours(credit, exact, size, generator), theirs, atol=1e-6, rtol=1e-6)


def test_gdpo_is_trls_normalize_then_sum() -> None:
    """TRL whitens over completions, and adds 1e-4 to both deviations; a token a trajectory makes them tokens."""
    of_preset = METHODS["gdpo"].credit
    terms = tuple(dataclasses.replace(term, eps=TRL_EPS) for term in of_preset.terms)
    rules = credit_rules(dataclasses.replace(of_preset, terms=terms))
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        size, groups = 2 + seed % 5, 1 + seed % 4
        kinds = torch.rand(size * groups, 2, generator=generator, dtype=torch.float64).round(decimals=seed % 2)
        trainer = SimpleNamespace(multi_objective_aggregation="normalize_then_sum", reward_weights=torch.ones(2))
        trainer.reward_funcs = [None, None]
        names: dict[str, Any] = {"torch": torch, "self": trainer, "device": "cpu", "num_generations": size}
        names |= {"rewards_per_func": kinds, "unscorable_mask": torch.zeros(len(kinds), dtype=torch.bool)}
        exec(trl_code("utils.py", is_nanstd, is_nanstd), names)
        exec(trl_code("grpo_trainer.py", is_grpo, is_end, "_generate_and_score_completions"), names)
        turns = torch.arange(len(kinds))
        found = combined_advantages(
            kinds.sum(dim=1),
            torch.arange(len(kinds) + 1),
            turns // size,
            turns,
            [CreditTerm(rule, rewards=kind) for rule, kind in zip(rules, kinds.unbind(1), strict=False)],
            then=rules[-1]._replace(eps=TRL_EPS),
        )
        torch.testing.assert_close(found.turn_advantages, names["advantages"], atol=1e-6, rtol=1e-6)


def test_trl_has_other_advantages_for_other_settings() -> None:
    outcomes = torch.tensor([0.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    found = [
        trl_advantages("grpo_trainer.py", is_grpo, outcomes.clone(), 4, scale_rewards=scale)
        for scale in ("group", "none")
    ]
    assert (found[0] - found[1]).abs().max() > 0.1
