"""Turn rewards: the outcome, the format and execution terms, and the similarity credit of failed trajectories.

Pure functions of trajectories. Source: arXiv 2511.14846; what it leaves open is decided here and said in docs/log.md.
"""

import ast
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gtpo.methods import REWARD_TERMS, RewardRule
from gtpo.reward_functions import RewardFault, RewardFunction
from gtpo.types import StopReason, ToolStatus, Trajectory

# of two trajectories' cells, in [0, 1]
Similarity = Callable[[Sequence[str], Sequence[str]], float]
_FAILURES = (ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.CRASH, ToolStatus.OUT_OF_MEMORY)


@dataclass(frozen=True)
class TurnRewards:
    """For one trajectory: named terms, each one float a turn, and which turns have a format fault.

    >>> TurnRewards({"outcome": [0.0, 1.0], "format": [-0.1, 0.0]}, faults=[True, False]).rewards
    [-0.1, 1.0]
    """

    terms: Mapping[str, Sequence[float]]
    faults: Sequence[bool]

    @functools.cached_property
    def rewards(self) -> list[float]:
        """One a turn: the sum of the terms, which does not depend on their order."""
        return [math.fsum(values) for values in zip(*self.terms.values(), strict=True)]


@dataclass(frozen=True)
class OwnTerms:
    """Terms of the user's own. functions: each gives a term of a group. weights: of the terms that episodes give by
    name, 1 where a name is not among them."""

    functions: Sequence[RewardFunction] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def not_given(self, trajectories: Sequence[Trajectory]) -> str:
        """What to say of weights for terms that no episode gave; empty where each was."""
        given = {name for trajectory in trajectories for turn in trajectory.turns for name in turn.rewards}
        if missing := sorted(self.weights.keys() - given):
            return (
                f"no turn gave the reward term {', '.join(missing)}; given were: {', '.join(sorted(given)) or 'none'}"
            )
        return ""

    def of(self, group: Sequence[Trajectory]) -> list[dict[str, list[float]]]:
        """For each trajectory its terms, one float a turn."""
        given = {name for trajectory in group for turn in trajectory.turns for name in turn.rewards}
        found: list[dict[str, list[float]]] = [
            {
                name: [self.weights.get(name, 1.0) * turn.rewards.get(name, 0.0) for turn in trajectory.turns]
                for name in sorted(given | self.weights.keys())
            }
            for trajectory in group
        ]
        for function in self.functions:
            for terms, values in zip(found, function(group), strict=True):
                if function.name in terms:
                    raise RewardFault(f"reward {function.name!r}: an environment gives a term of this name already")
                terms[function.name] = values
        return found


def turn_rewards(group: Sequence[Trajectory], rule: RewardRule, own: OwnTerms | None = None) -> list[TurnRewards]:
    """Rewards of every trajectory of one group (the attempts at one task; lost ones are left out by the caller).

    The terms, which add up to r_ij:
        "outcome": on the last turn; with `outcome_needs_format` 0 where any turn has a format fault;
        "similarity": on the last turn of a trajectory whose outcome is 0, see `similarity_credits`;
        "format": minus the penalty on a turn with a format fault;
        "execution": the bonus once a trajectory, on the first turn whose tools printed what the task expects; minus
            the penalty on every turn whose tool failed or printed something else.
    Of two penalties on one turn the greater alone is taken, and a faulty turn earns no bonus.
    own: the user's terms, and the weights of those that the episodes gave (`Turn.rewards`); they are added.

    Raises ValueError if a trajectory has no turn, is lost, or its outcome is not a number in [0, 1].
    """
    for trajectory in group:
        _check(trajectory)
    credits = similarity_credits(group, alpha=rule.similarity_alpha, similarity=SIMILARITIES[rule.similarity])
    further = (own or OwnTerms()).of(group)
    return [
        _rewards_of(trajectory, credit, rule, terms)
        for trajectory, credit, terms in zip(group, credits, further, strict=True)
    ]


def _rewards_of(
    trajectory: Trajectory, credit: float, rule: RewardRule, further: Mapping[str, list[float]]
) -> TurnRewards:
    num_turns = len(trajectory.turns)
    faults = [has_format_fault(trajectory, turn, rule) for turn in range(num_turns)]
    form = [0.0 - rule.format_penalty * fault for fault in faults]
    execution = _execution_terms(trajectory, rule)
    for turn, fault in enumerate(form):
        if fault < 0 and execution[turn] < fault:
            form[turn] = 0.0
        elif fault < 0:
            execution[turn] = 0.0
    is_paid = not (rule.outcome_needs_format and any(faults))
    outcome = trajectory.outcome if is_paid else 0.0
    similarity = credit if is_paid and outcome == 0 else 0.0
    values = (_on_last_turn(outcome, num_turns), _on_last_turn(similarity, num_turns), form, execution)
    if taken := sorted(further.keys() & set(REWARD_TERMS)):
        raise RewardFault(f"reward {taken[0]!r}: [reward] has a term of this name already")
    return TurnRewards({**dict(zip(REWARD_TERMS, values, strict=True)), **further}, faults)


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


def has_format_fault(trajectory: Trajectory, turn: int, rule: RewardRule) -> bool:
    """A turn with one of the rule's faults: an invalid tool call, or a first turn that calls no tool."""
    found = trajectory.turns[turn]
    return ("invalid_call" in rule.format_faults and found.num_invalid_calls > 0) or (
        "no_first_call" in rule.format_faults and turn == 0 and not found.calls
    )


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


def _on_last_turn(value: float, num_turns: int) -> list[float]:
    return [0.0] * (num_turns - 1) + [value]


def _execution_terms(trajectory: Trajectory, rule: RewardRule) -> list[float]:
    terms = [0.0] * len(trajectory.turns)
    earned = False
    for number, turn in enumerate(trajectory.turns):
        if any(result.status in _FAILURES for result in turn.results) or turn.as_expected is False:
            terms[number] = 0.0 - rule.execution_penalty
        elif turn.as_expected and not earned:
            terms[number] = rule.execution_bonus
            earned = True
    return terms


def _tokens(cells: Sequence[str]) -> Iterator[list[str]]:
    """The words of each cell that does not parse, then the tokens of all those that do."""
    program = ast.Module(body=[], type_ignores=[])
    for cell in cells:
        try:
            # what the parser thinks of a model's escape sequences is nobody's concern
            with warnings.catch_warnings(action="ignore"):
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
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            # hexadecimal, since Python refuses to write an int of more than 4,300 digits in decimal
            return [hex(value)]
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
