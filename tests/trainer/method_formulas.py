"""What each method gives a turn, by the formula of its source, in float64 loops over random groups."""

import dataclasses
import math
import random
from collections.abc import Callable

import torch

from gtpo.credit import credit_advantages
from gtpo.methods import (
    CreditSum,
)


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
