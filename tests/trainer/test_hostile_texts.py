"""Nothing that a model, a tool or a data set writes raises in the trainer: from a completion to the row of a log."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gtpo.chat import Chat
from gtpo.credit import assign_credit, to_sequences
from gtpo.environments import ReasoningGymEnvironment, RetryEnvironment
from gtpo.environments.jsonl import JsonlEnvironment
from gtpo.evaluation import evaluate_groups
from gtpo.methods import METHODS
from gtpo.metrics import lost_turn_rows, rollout_metrics, tool_metrics, turn_rows
from gtpo.policy import Policy
from gtpo.rewards import ngram_similarity, turn_rewards
from gtpo.sandbox import CellResult, CellStatus
from gtpo.tools import FunctionTool, PythonTool, Toolbox
from gtpo.tools.arithmetic import calculator
from gtpo.types import StopReason, Task, Trajectory, Turn
from tests.trainer.conftest import TASK

HUGE_NUMBERS = ["0x" + "f" * 3600, "0b" + "1" * 15_000, "0o" + "7" * 5000, "9" * 5000, "1e" + "9" * 400, "1" * 4300]
DEEP = ["(" * 5000, "[" * 5000 + "]" * 5000, "-" * 5000 + "1", "a" + ".b" * 5000, "f" + "()" * 5000, "not " * 5000]
ODD = ["x" * 50_000, "'\\d'", "a\0b", "1 if x else " * 3000 + "1", "f'{" * 50, "1_000j", "print(1)", "b'\\xff'", "..."]
ODD += ["True", "1e999", "x: int", "global y", "'''", "lambda: 0", "{**a}", "\f\x1a", "\r"]
CODES = st.text(max_size=20) | st.sampled_from([*(f"n = {number}" for number in HUGE_NUMBERS), *DEEP, *ODD])
NAMES = st.text(st.characters(), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6) | CODES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=5,
)
CALLS = st.fixed_dictionaries(
    {"name": st.sampled_from(["python", "say", "calculator", "", "\ud800"]), "arguments": VALUES},
).map(lambda call: f"<tool_call>{json.dumps(call)}</tool_call>")
GOOD_CALLS = st.one_of(
    VALUES.map(lambda value: {"name": "say", "arguments": {"value": value}}),
    CODES.map(lambda code: {"name": "python", "arguments": {"code": code}}),
    CODES.map(lambda code: {"name": "calculator", "arguments": {"expression": code}}),
).map(lambda call: f"<tool_call>{json.dumps(call)}</tool_call>")
PIECES = st.one_of(
    st.text(max_size=8),
    CALLS,
    GOOD_CALLS,
    CODES.map(lambda code: f"```python\n{code}\n```\n"),
    CODES.map(lambda code: f"answer: {code}\n"),
    st.sampled_from(["<think>", "</think>", "```", "~~~", "answer:", "<tool_call>", "<|im_end|>", "<|im_start|>"]),
)
# what a tokenizer gives back: whole characters
COMPLETIONS = st.lists(PIECES, max_size=4).map(lambda pieces: "".join(pieces).encode("utf-8", "replace").decode())


def say(value: Any) -> Any:
    """Give it back.

    Args:
        value: Anything.
    """
    return value


class Session:
    """Runs nothing, and prints the code."""

    async def run(self, code: str) -> CellResult:
        return CellResult(CellStatus.OK, stdout=code[:4096].encode("utf-8", "backslashreplace").decode())

    async def close(self) -> None:
        """Holds nothing."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def play(chat: Chat, runner: asyncio.Runner, texts: Sequence[str], *, outcome: float) -> Trajectory:
    """As a rollout does it: a completion is read, its calls are made, and their results become ids."""
    toolbox = Toolbox(
        [PythonTool(Session()), FunctionTool(say, timeout_s=60.0), FunctionTool(calculator, timeout_s=60.0)]
    )
    trajectory = Trajectory(TASK, 0, [1], outcome=outcome)
    for text in texts:
        turn = Turn([10, 11], [-1.0, -1.0], text=text)
        parsed = chat.parse(text)
        turn.calls, turn.answer, turn.said = list(parsed.calls), parsed.answer, parsed.said
        trajectory.turns.append(turn)
        if turn.calls:
            turn.results = runner.run(toolbox.execute(turn.calls))
            turn.tool_ids = chat.reply_ids([result.text for result in turn.results])
    trajectory.answer = trajectory.turns[-1].answer
    return trajectory


def log(rows: Iterator[Mapping[str, Any]]) -> None:
    for row in rows:
        # as the run folder writes it, and a reader reads it
        assert json.loads(json.dumps(row).encode()) is not None


@pytest.mark.parametrize("call_format", ["code", "json"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(COMPLETIONS, min_size=1, max_size=3), other=COMPLETIONS)
def test_from_a_completion_to_the_row_of_a_log(
    policy: Policy, runner: asyncio.Runner, call_format: Any, texts: list[str], other: str
) -> None:
    chat = Chat(policy.tokenizer, call_format=call_format)
    group = [play(chat, runner, texts, outcome=0.0), play(chat, runner, [*texts, other], outcome=1.0)]
    for method in METHODS.values():
        rewards = [turn_rewards(group, method.reward)]
        scored = assign_credit([group], rewards, method.credit)
        log(turn_rows(1, scored))
        log(iter([rollout_metrics(scored) | tool_metrics(group, ["say", "python"])]))
        to_sequences(scored, mask_truncated=True, mask_void_turns=True)
    evaluate_groups([group])
    group[0].stop = StopReason.LOST
    log(lost_turn_rows(1, group[:1]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cells=st.lists(CODES, max_size=3), others=st.lists(CODES, max_size=3))
def test_the_similarity_of_any_cells_is_one(cells: list[str], others: list[str]) -> None:
    assert 0 <= ngram_similarity(cells, others) <= 1
    assert ngram_similarity(cells, others) == pytest.approx(ngram_similarity(others, cells))


ANSWERS = CODES | st.text(st.characters()) | st.sampled_from(["1/" + "0" * 400, "\ud800", "\0", "½", "²", "١٢", "nan"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(answer=ANSWERS)
@example("9" * 5000)
@example("1e999999999")
@example("0x" + "f" * 3600)
def test_no_answer_raises_in_a_grade(answer: str) -> None:
    for environment, tasks in GRADERS:
        for task in tasks:
            assert 0 <= environment.grade(task, answer) <= 1
            environment.expected_output(task, answer, answer)


GRADERS = [
    (environment, environment.tasks("train", 5, seed=0))
    for environment in (
        RetryEnvironment(),
        ReasoningGymEnvironment(["chain_sum", "products", "lcm", "gcd", "base_conversion"]),
    )
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expected=ANSWERS, answer=ANSWERS)
def test_no_answer_in_a_data_set_raises_in_a_grade(expected: str, answer: str) -> None:
    environment = JsonlEnvironment.__new__(JsonlEnvironment)
    task = Task(id="t", environment="jsonl", prompt="?", answer=expected)
    assert environment.grade(task, answer) in (0.0, 1.0)
    assert environment.grade(task, expected) == 1.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(VALUES | st.fixed_dictionaries({"prompt": VALUES, "answer": VALUES}), min_size=2, max_size=4))
def test_a_data_set_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        environment = JsonlEnvironment(str(path))
    except ValueError as refused:
        assert path.name in str(refused) and "\n" not in str(refused)
    else:
        (task,) = environment.tasks("train", 1, seed=0)
        log(iter([{"prompt": task.prompt, "answer": task.answer}]))
        (task.prompt + task.answer).encode()
