"""Rewards of three papers as functions of `[[rewards]]`: MT-GRPO, MatchTIR, GiGPO. See docs/paper_rewards.md.

The presets `mt_grpo`, `matchtir` and `gigpo` are the credit and the loss of their papers; these are the rewards.
Run as a program, this file prints what each pays for the turns of a small example.
"""

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from gtpo import Task, ToolCall, ToolResult, ToolStatus, Trajectory, Turn


def mt_grpo_turn(
    trajectory: Trajectory,
    execution: float = 0.2,
    presence: float = 0.5,
    form: float = 0.0,
    answers: str = "",
    whole_words: bool = False,
) -> list[float]:
    """The turn rewards of MT-GRPO (arXiv 2505.11821), on turns that call a tool; 0 on the others.

    execution: times the share of the turn's calls that went well (ToolStatus.OK).
    presence: added where an accepted answer stands in the text of a result that went well, in any case of letters.
    form: added where no call of the turn was malformed or of an unknown tool.
    answers: the key of `task.data` with the list of accepted answers; "": `task.answer` is the only one.
    whole_words: the answer must stand there as words of its own: 4 is then not in 14.

    Sources, of github.com/SiliangZeng/Multi-Turn-RL-Agent: 0.2 and the share of successes are of
    verifiers/rubrics/tool_rubric.py, 0.5 and the substring in any case of verifiers/rubrics/triviaqa_rubric.py.
    Decided here: there a rollout has one call; here each turn is paid for its own. A failed call shows no answer, since
    its error may repeat what the model wrote. Form is 0: there it is part of the outcome (0.2 twice, by
    verifiers/parsers/xml_parser.py), which here is the grade of the environment.
    Raises ValueError where `task.data` has no such list of texts.

    >>> _rounded(mt_grpo_turn(EXAMPLE))  # 0.2 * 1/2; 0.2 + 0.5
    [0.1, 0.7, 0.0]
    """
    accepted = _accepted_answers(trajectory.task, answers)
    return [
        execution * _share_of_successes(turn)
        + presence * any(_stands_in(answer, text, whole_words) for answer in accepted for text in _texts(turn))
        + form * (turn.num_invalid_calls == 0)
        if turn.calls
        else 0.0
        for turn in trajectory.turns
    ]


def matchtir(
    trajectory: Trajectory, calls: str = "expected_calls", unmatched: float = 0.0, answer_f1: bool = False
) -> list[float]:
    """The turn rewards of MatchTIR (arXiv 2601.10712), hard assignment: how well calls match the expected ones.

    calls: the key of `task.data` with the expected calls, a list of {"name": ..., "arguments": {...}}.
    Calls of all turns are assigned to expected ones, each to one at most, such that the sum of `call_similarity` is
    greatest. A call earns its similarity, one without a partner `unmatched`; a turn is paid the mean of its calls.
    answer_f1: the last turn is worth the F1 of the words of answer and truth. The environment's outcome, which the
    built-in term pays on that turn, is then taken off.

    Sources, of github.com/quchangle1/MatchTIR: Code/verl/utils/reward_score/tool.py, compute_process_KM, which
    Scripts/run.sh trains with: the mean over a turn, 0 for a call without a partner, F1 of an answer's set of words in
    small letters without punctuation.
    Decided here: the assignment is exact, by the Kuhn-Munkres algorithm that the name KM is of; that code takes pairs
    greedily. Of equal matchings the earlier calls get more. A malformed call is one without a partner; that code
    leaves it out of the mean. Soft assignment, by optimal transport, is not here.
    Raises ValueError where `task.data` has no such list.

    >>> _rounded(matchtir(EXAMPLE))  # (4/4 + 0) / 2; 2/3
    [0.5, 0.667, 0.0]
    """
    expected = _expected_calls(trajectory.task, calls)
    made = [(number, call) for number, turn in enumerate(trajectory.turns) for call in turn.calls]
    partners = best_assignment([[call_similarity(call, *wanted) for wanted in expected] for _, call in made])
    paid: list[list[float]] = [[] for _ in trajectory.turns]
    for (number, call), partner in zip(made, partners, strict=True):
        paid[number].append(unmatched if partner is None else call_similarity(call, *expected[partner]))
    rewards = [sum(values) / len(values) if values else 0.0 for values in paid]
    if answer_f1:
        rewards[-1] += _word_f1(trajectory.answer or "", trajectory.task.answer) - trajectory.outcome
    return rewards


def gigpo(
    trajectory: Trajectory, success: float = 10.0, invalid: float = 0.1, void_is_invalid: bool = True
) -> list[float]:
    """The rewards of GiGPO (arXiv 2505.10978): `success` for a solved task, minus `invalid` for each invalid action.

    On the last turn the outcome, which the built-in term pays, is taken off: both terms together are the paper's.
    Invalid is a turn with a malformed call or one of an unknown tool and, with `void_is_invalid`, one that neither
    calls nor answers; say false where the environment's actions are plain text.

    Sources, of the authors' github.com/langfengQ/AgentOCR, which carries their gigpo/: 10 for success and 0 otherwise
    are of agent_system/environments/env_package/alfworld/envs.py and webshop/envs.py, where a score below 1 is none;
    0.1 for a turn is of verl/trainer/config/ppo_trainer.yaml and examples/gigpo_trainer (0.01 in run_search.sh); an
    action without its tags is invalid in alfworld/projection.py.
    Decided here: their tags stand for our calls and answers; which language a turn is in does not count.

    >>> _rounded(gigpo(EXAMPLE))  # an unknown tool; the built-in term adds 1 to the 9
    [-0.1, 0.0, 9.0]
    """
    rewards = [
        0.0 - invalid * (turn.num_invalid_calls > 0 or (void_is_invalid and not turn.calls and turn.answer is None))
        for turn in trajectory.turns
    ]
    rewards[-1] += success * trajectory.is_success - trajectory.outcome
    return rewards


def call_similarity(call: ToolCall, name: str, arguments: Mapping[str, Any]) -> float:
    """How alike a call is to an expected one, in [0, 1]: (1 + Jaccard of parameter names + equal values) / (2 + number
    of expected parameters); 0 for another tool.

    Names count as they stand. Two calls without parameters have Jaccard 1. True is not 1. Where the form of the call
    writes every value as text, texts are compared.
    Source: tool_similarity of Code/verl/utils/reward_score/tool.py (github.com/quchangle1/MatchTIR), which takes
    names of tools in any case of letters.

    >>> call_similarity(ToolCall("add", {"x": 1}), "add", {"x": 1, "y": 2})  # (1 + 1/2 + 1) / 4
    0.625
    """
    if call.error is not None or call.name != name:
        return 0.0
    either = call.arguments.keys() | arguments.keys()
    both = call.arguments.keys() & arguments.keys()
    equal = sum(_is_equal(call.arguments[key], arguments[key], call.is_text) for key in both)
    return (1 + (len(both) / len(either) if either else 1) + equal) / (2 + len(arguments))


def best_assignment(scores: Sequence[Sequence[float]]) -> list[int | None]:
    """For each row its column, no column twice, such that the sum of scores is greatest; None where it has none.

    scores: at least 0; a pair of score 0 is none. Of equal sums the one that gives more to earlier rows.

    The Kuhn-Munkres algorithm, exact: time is columns² * (rows + columns).

    >>> best_assignment([[0.9, 0.8], [0.8, 0.0]])  # 1.6, where the best pair first would give 0.9
    [1, 0]
    """
    num_rows, num_columns = len(scores), len(scores[0]) if scores else 0
    # a column may stay alone: each has a partner of score 0 of its own behind the rows
    num_places = num_rows + num_columns
    prices, discounts = [0.0] * num_columns, [0.0] * num_places
    holder = [-1] * num_places

    def cost(column: int, row: int) -> float:
        # far less off than the scores of two matchings differ by
        return -scores[row][column] * (1 - 1e-12 * row) if row < num_rows else 0.0

    for column in range(num_columns):
        slack, before, tree = [math.inf] * num_places, [-1] * num_places, set[int]()
        asking, place = column, -1
        while asking >= 0:
            for other in range(num_places):
                gap = cost(asking, other) - prices[asking] - discounts[other]
                if other not in tree and gap < slack[other]:
                    slack[other], before[other] = gap, place
            place = min((other for other in range(num_places) if other not in tree), key=slack.__getitem__)
            step = slack[place]
            prices[column] += step
            for other in range(num_places):
                if other in tree:
                    prices[holder[other]] += step
                    discounts[other] -= step
                else:
                    slack[other] -= step
            tree.add(place)
            asking = holder[place]
        while place >= 0:
            previous = before[place]
            holder[place] = column if previous < 0 else holder[previous]
            place = previous
    return [held if held >= 0 and scores[row][held] > 0 else None for row, held in enumerate(holder[:num_rows])]


def _accepted_answers(task: Task, key: str) -> list[str]:
    if not key:
        return [task.answer]
    found = _listed(task, key, "accepted answers")
    if not all(isinstance(answer, str) for answer in found):
        raise ValueError(f"task.data[{key!r}] must be a list of texts, got {found!r:.200}")
    return list(found)


def _expected_calls(task: Task, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = _listed(task, key, "expected calls")
    for number, call in enumerate(found):
        name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError(
                f'task.data[{key!r}][{number}] must be {{"name": TEXT, "arguments": {{...}}}}, got {call!r:.200}'
            )
    return [(call["name"], call["arguments"]) for call in found]


def _listed(task: Task, key: str, what: str) -> Sequence[Any]:
    if key not in task.data:
        known = ", ".join(map(repr, task.data)) or "nothing"
        raise ValueError(f"task.data must hold the {what} under {key!r}, got {known}")
    found = task.data[key]
    if not isinstance(found, list | tuple):
        raise ValueError(f"task.data[{key!r}] must be a list of {what}, got {found!r:.200}")
    return found


def _share_of_successes(turn: Turn) -> float:
    return sum(result.status is ToolStatus.OK for result in turn.results) / len(turn.calls)


def _texts(turn: Turn) -> list[str]:
    return [result.text for result in turn.results if result.status is ToolStatus.OK]


def _stands_in(answer: str, text: str, whole_words: bool) -> bool:
    answer, text = answer.strip().lower(), text.lower()
    if not answer:
        return False
    return bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)) if whole_words else answer in text


def _is_equal(value: Any, expected: Any, is_text: bool) -> bool:
    if is_text and not isinstance(expected, str):
        return bool(value == json.dumps(expected))
    return bool(value == expected) and isinstance(value, bool) == isinstance(expected, bool)


def _word_f1(answer: str, truth: str) -> float:
    blanks = str.maketrans(string.punctuation, " " * len(string.punctuation))
    given, wanted = (set(text.lower().translate(blanks).split()) for text in (answer, truth))
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given and wanted else 0.0


def _example() -> Trajectory:
    """Who wrote Faust? A good search beside a tool that is not there, a search of another name, the answer."""
    expected = [
        {"name": "search", "arguments": {"query": "Faust", "top": 3}},
        {"name": "open", "arguments": {"page": "Goethe"}},
    ]
    task = Task("faust", "library", "Who wrote Faust?", "Goethe", data={"expected_calls": expected})
    turns = [
        Turn([1], [-0.5], "search", calls=[ToolCall("search", {"query": "Faust", "top": 3}), ToolCall("look", {})]),
        Turn([2], [-0.5], "open", calls=[ToolCall("open", {"page": "Faust"})]),
        Turn([3], [-0.5], "answer: Goethe", answer="Goethe"),
    ]
    turns[0].results = [
        ToolResult(ToolStatus.OK, "Faust, a play"),
        ToolResult(ToolStatus.UNKNOWN_TOOL, "Unknown tool 'look'."),
    ]
    turns[1].results = [ToolResult(ToolStatus.OK, "Faust is a play by GOETHE.")]
    return Trajectory(task, 0, [0], turns, answer="Goethe", outcome=1.0)


EXAMPLE = _example()


def _rounded(rewards: Sequence[float]) -> list[float]:
    return [round(reward, 3) for reward in rewards]


def main() -> None:
    print("Rewards of the turns of one example, beside the built-in outcome of 1 on the last turn:")
    for function in (mt_grpo_turn, matchtir, gigpo):
        print(f"  {function.__name__:14}", _rounded(function(EXAMPLE)))


if __name__ == "__main__":
    main()
