"""Turn rewards: the outcome, the format and execution terms, and the similarity credit of failed trajectories.

Pure functions of trajectories. Source: arXiv 2511.14846; what it leaves open is decided here and said in docs/log.md.
"""

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gtpo.methods import Method
from gtpo.types import StopReason, ToolStatus, Trajectory

# of two trajectories' cells, in [0, 1]
Similarity = Callable[[Sequence[str], Sequence[str]], float]


@dataclass(frozen=True)
class TurnRewards:
    """For one trajectory: `rewards`, one a turn, and their parts, which add up to them."""

    rewards: list[float]
    outcome: float
    similarity: float
    format: list[float]
    execution: list[float]


def turn_rewards(group: Sequence[Trajectory], method: Method) -> list[TurnRewards]:
    """Rewards of every trajectory of one group (the attempts at one task; lost ones are left out by the caller).

    r_ij = (on the last turn: the outcome, or the similarity credit where that is 0)
    + (min(format_ij, execution_ij) where either is negative, else execution_ij).

    The positive execution term is paid once a trajectory, for the first turn whose tools printed what the task expects;
    the negative one for every turn whose tool failed or printed something else. Success is an unshaped outcome of 1.

    Raises ValueError if a trajectory has no turn, is lost, or its outcome is not a number in [0, 1].
    """
    for trajectory in group:
        _check(trajectory)
    if method.reward == "outcome":
        return [_outcome_reward(trajectory) for trajectory in group]
    credits = similarity_credits(group, alpha=method.similarity_alpha, similarity=SIMILARITIES[method.similarity])
    rewards = []
    for trajectory, credit in zip(group, credits, strict=True):
        format_terms = [
            _format_term(trajectory, turn, penalty=method.format_penalty) for turn in range(len(trajectory.turns))
        ]
        execution_terms = _execution_terms(trajectory, method)
        totals = [
            min(form, run) if min(form, run) < 0 else run
            for form, run in zip(format_terms, execution_terms, strict=True)
        ]
        totals[-1] += trajectory.outcome or credit
        rewards.append(TurnRewards(totals, trajectory.outcome, credit, format_terms, execution_terms))
    return rewards


def similarity_credits(group: Sequence[Trajectory], *, alpha: float, similarity: Similarity) -> list[float]:
    """alpha / |P| * sum over the successes p of the group of sim(code_i, code_p), for each failed trajectory i.

    0 for a success, where nothing in the group succeeded, and for a trajectory that wrote no code.
    """
    if alpha == 0:
        return [0.0] * len(group)
    successes = [trajectory.cells for trajectory in group if trajectory.is_success]
    credits = []
    for trajectory in group:
        if trajectory.is_success or not successes or not trajectory.cells:
            credits.append(0.0)
        else:
            credits.append(alpha * sum(similarity(trajectory.cells, cells) for cells in successes) / len(successes))
    return credits


def has_format_fault(trajectory: Trajectory, turn: int) -> bool:
    """A turn with an invalid tool call, or a first turn that calls no tool."""
    return trajectory.turns[turn].num_invalid_calls > 0 or (turn == 0 and not trajectory.turns[0].calls)


def is_void_turn(trajectory: Trajectory, turn: int) -> bool:
    """A turn that neither calls a tool nor answers (arXiv 2509.02479)."""
    is_last = turn == len(trajectory.turns) - 1
    return not trajectory.turns[turn].calls and not (is_last and trajectory.answer is not None)


def ngram_similarity(cells_a: Sequence[str], cells_b: Sequence[str], *, order: int = 3) -> float:
    """Cosine of the counts of token n-grams of length 1 to `order`; literals and names count as they stand.

    A cell that does not parse is split at white space instead. In [0, 1]; 0 if either has no token.

    >>> ngram_similarity(["print(1 + 2)"], ["print(1 + 2)"])
    1.0
    >>> 0 < ngram_similarity(["print(gcd(4, 6))"], ["print(gcd(4, 8))"]) < 1
    True
    >>> ngram_similarity([], ["print(1)"])
    0.0
    """
    counts_a, counts_b = (_ngrams(cells, order) for cells in (cells_a, cells_b))
    if not counts_a or not counts_b:
        return 0.0
    if counts_a == counts_b:
        return 1.0
    dot = sum(count * counts_b[gram] for gram, count in counts_a.items())
    norms = math.sqrt(sum(c * c for c in counts_a.values()) * sum(c * c for c in counts_b.values()))
    return min(dot / norms, 1.0)


SIMILARITIES: dict[str, Similarity] = {"ngram": ngram_similarity}


def _check(trajectory: Trajectory) -> None:
    where = f"trajectory {trajectory.sample} of task {trajectory.task.id!r}"
    if trajectory.stop is StopReason.LOST:
        raise ValueError(f"{where} is lost and has no reward; leave it out of its group")
    if not trajectory.turns:
        raise ValueError(f"{where} must have at least one turn, got none")
    if not 0 <= trajectory.outcome <= 1:
        raise ValueError(f"the outcome of {where} must be in [0, 1], got {trajectory.outcome}")


def _outcome_reward(trajectory: Trajectory) -> TurnRewards:
    clean = not any(has_format_fault(trajectory, turn) for turn in range(len(trajectory.turns)))
    reward = 1.0 if trajectory.is_success and clean else 0.0
    zeros = [0.0] * len(trajectory.turns)
    return TurnRewards([*zeros[:-1], reward], trajectory.outcome, 0.0, zeros, zeros)


def _format_term(trajectory: Trajectory, turn: int, *, penalty: float) -> float:
    return -penalty if has_format_fault(trajectory, turn) else 0.0


def _execution_terms(trajectory: Trajectory, method: Method) -> list[float]:
    terms = [0.0] * len(trajectory.turns)
    if method.execution_bonus == 0 and method.execution_penalty == 0:
        return terms
    failures = (ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.CRASH, ToolStatus.OUT_OF_MEMORY)
    earned = False
    for number, turn in enumerate(trajectory.turns):
        if any(result.status in failures for result in turn.results) or turn.as_expected is False:
            terms[number] = -method.execution_penalty
        elif turn.as_expected and not earned:
            terms[number] = method.execution_bonus
            earned = True
    return terms


def _tokens(cells: Sequence[str]) -> Iterator[list[str]]:
    """The words of each cell that does not parse, then the tokens of all those that do."""
    program = ast.Module(body=[], type_ignores=[])
    for cell in cells:
        try:
            program.body += ast.parse(cell).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            yield cell.split()
    # of the tree and not of the text, so that layout and comments do not count
    yield [token for node in ast.walk(program) for token in _node_tokens(node)]


def _node_tokens(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Attribute(attr=name):
            return [name]
        case ast.Constant(value=value):
            return [repr(value)]
        case ast.expr_context() | ast.Module():
            return []
        case _:
            return [type(node).__name__]


def _ngrams(cells: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(tokens[start : start + length])
        for tokens in _tokens(cells)
        for length in range(1, order + 1)
        for start in range(len(tokens) - length + 1)
    )
