"""A user's own data set."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo.environments import JsonlEnvironment

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: object, name: str = "tasks.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def numbered(num: int) -> list[dict[str, object]]:
    return [{"question": f"question {n}", "answer": n} for n in range(num)]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "2 + 2?", "answer": "4"}, "2 + 2?", "4"),
        ({"question": "2 + 2?", "ground_truth": 4, "level": 1}, "2 + 2?", "4"),
        ({"messages": [{"role": "user", "content": "2 + 2?"}], "answer": 0.5}, "2 + 2?", "0.5"),
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
                "answer": "yes",
            },
            "Be brief.\n\nHi",
            "yes",
        ),
    ],
)
def test_columns(write: Write, row: object, prompt: str, answer: str) -> None:
    environment = JsonlEnvironment(write(row), eval_path=write({"prompt": "x", "answer": "y"}, name="eval.jsonl"))
    (task,) = environment.tasks("train", 1, seed=0)
    assert (task.prompt, task.answer, task.environment) == (prompt, answer, "jsonl")
    assert [task.prompt for task in environment.tasks("eval", 1, seed=0)] == ["x"]


def test_a_fifth_of_the_prompts_is_held_out(write: Write) -> None:
    environment = JsonlEnvironment(write(*numbered(50)))
    held_out = environment.tasks("eval", 10, seed=0)
    train = environment.tasks("train", 40, seed=0)
    assert {task.prompt for task in held_out} | {task.prompt for task in train} == {f"question {n}" for n in range(50)}
    with pytest.raises(
        ValueError, match=r"tasks\.num_eval .* most the 10 rows that are held out for evaluation, got 11"
    ):
        environment.tasks("eval", 11, seed=0)


def test_split_does_not_depend_on_the_order_of_the_file(write: Write) -> None:
    forward = JsonlEnvironment(write(*numbered(20))).tasks("eval", 4, seed=0)
    backward = JsonlEnvironment(write(*reversed(numbered(20)))).tasks("eval", 4, seed=0)
    assert {task.prompt for task in forward} == {task.prompt for task in backward}


def test_repeated_prompts_stay_on_one_side(write: Write) -> None:
    rows = [{"question": f"question {n % 10}", "answer": n % 10} for n in range(20)]
    environment = JsonlEnvironment(write(*rows, *rows))
    held_out = environment.tasks("eval", 2, seed=0)
    train = environment.tasks("train", 8, seed=0)
    assert {task.prompt for task in train} | {task.prompt for task in held_out} == {f"question {n}" for n in range(10)}
    with pytest.raises(ValueError, match="at most the 2 rows"):
        environment.tasks("eval", 3, seed=0)


def test_a_second_answer_to_a_prompt_is_refused_unless_it_is_the_same(write: Write) -> None:
    rows = [{"question": "a", "answer": "4"}, {"question": "b", "answer": "x"}, {"question": "a", "answer": "4.0"}]
    assert len(JsonlEnvironment(write(*rows)).tasks("train", 1, seed=0)) == 1
    with pytest.raises(ValueError, match=r"line 4: expected one answer to a prompt, got '5' here and '4' in line 1"):
        JsonlEnvironment(write(*rows, {"question": "a", "answer": 5}))


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("She sells 16 - 3 = 13.\nThat makes 13 + 3 = <<13+3=16>>16.\n#### 16", "16"),
        ("#### 1,200\n", "1,200"),
        ("One ####\n#### 7 ", "7"),
        ("no mark", "no mark"),
        ("a ####", "a ####"),
    ],
)
def test_of_a_worked_solution_the_answer_is_read(write: Write, answer: str, read: str) -> None:
    path = write({"question": "a", "answer": answer}, {"question": "b", "answer": answer})
    (task,) = JsonlEnvironment(path).tasks("eval", 1, seed=0)
    assert task.answer == read


def test_a_mark_and_line_ends_of_another_system_are_no_fault(write: Write) -> None:
    path = Path(write(*numbered(4)))
    expected = JsonlEnvironment(str(path)).tasks("train", 3, seed=0)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert JsonlEnvironment(str(path)).tasks("train", 3, seed=0) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "caf\xe9", "answer": "b"}', "expected text in UTF-8, got the byte 0xe9; save the file as UTF-8"),
        (b'\xff\xfe{"prompt": "a", "answer": "b"}', "expected text in UTF-8, got the byte 0xff"),
        (b'{"prompt": "a\\ud83d", "answer": "b"}', "whole characters, got half a surrogate pair at character 1 of 'a"),
        (b'{"prompt": "a", "answer": "\\udc00"}', "whole characters, got half a surrogate pair at character 0"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}], "answer": "b"}', "got half a surrogate pair"),
        (b'{"prompt": "a", "answer": NaN}', "got NaN, which is no answer"),
        (b'{"prompt": "a", "answer": -Infinity}', "got -Infinity, which is no answer"),
        (b'{"prompt": "a", "answer": 1e999}', "expected an answer that is a text or a number, got inf"),
        (b'{"prompt": "a", "answer": 4, "answer": 5}', "got the key 'answer' twice"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "expected one JSON object a line, got Exceeds"),
        (b"[" * 100_000, "expected one JSON object a line, got"),
        (b"\0" * 40, "expected one JSON object a line, got"),
        (b'{"prompt": "a", "ans', "expected one JSON object a line, got"),
        (b'{"prompt": "a", "answer": "one\\ntwo"}', "expected an answer of one line, .* got 'one"),
        (b'{"prompt": "a", "answer": "answer: 4"}', "of a line 'answer: answer: 4' '4' is read; write the bare answer"),
        (b'{"prompt": "a", "answer": "**"}', "an answer that a model can give, but of a line"),
        (b'{"prompt": "a", "answer": "<think>4</think>"}', "an answer that a model can give"),
        (b'{"prompt": "a", "answer": "so ####\\n"}{', "expected one JSON object a line, got Extra data"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b'{"prompt": "first", "answer": "1"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"tasks\.jsonl, line 3: .*{message}") as refused:
        JsonlEnvironment(str(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_training_goes_through_the_file_again_in_a_new_order(write: Write) -> None:
    tasks = JsonlEnvironment(write(*numbered(10))).tasks("train", 24, seed=0)
    epochs = [[task.prompt for task in tasks[start : start + 8]] for start in (0, 8, 16)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len(set(epochs[0])) == 8
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row, got an empty data set"),
        (["\n\n"], "at least one row, got an empty data set"),
        ([{"prompt": "a", "answer": "b"}], "at least two different prompts to be split, got one"),
        (
            [{"prompt": "a", "answer": "b"}, {"text": "a", "label": "b"}],
            "line 2: expected a column among prompt, question, messages, found text, label",
        ),
        ([{"question": "a", "label": 1}], "expected a column among answer, ground_truth, found question, label"),
        ([{}], "found none"),
        (["{\n"], "line 1: expected one JSON object a line, got"),
        (["[1]\n"], "expected a JSON object, got list"),
        ([{"prompt": " ", "answer": "b"}], "expected a prompt that is a text or a list of messages, got ' '"),
        ([{"prompt": 3, "answer": "b"}], "expected a prompt that is a text or a list of messages, got 3"),
        ([{"prompt": "a", "answer": None}], "expected an answer that is a text or a number, got None"),
        ([{"prompt": "a", "answer": ["b"]}], r"expected an answer that is a text or a number, got \['b'\]"),
        ([{"prompt": "a", "answer": ""}], "expected an answer that is a text or a number, got ''"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "b"}],
            r"expected one user message, .* got roles \['user', 'assistant'\]",
        ),
        ([{"messages": ["a"], "answer": "b"}], r"got roles \[None\]"),
        ([{"messages": [{"role": "user"}], "answer": "b"}], "expected messages whose content is a text"),
    ],
)
def test_bad_files(write: Write, rows: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JsonlEnvironment(write(*rows))


def test_training_prompt_in_the_evaluation_file(write: Write) -> None:
    path = write(*numbered(5))
    with pytest.raises(ValueError, match="eval_path must share no prompt with path, got 2 in both"):
        JsonlEnvironment(path, eval_path=write(*numbered(2), name="eval.jsonl"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JsonlEnvironment(str(tmp_path / "none.jsonl"))


def test_the_protocol_is_left_to_the_chat(write: Write) -> None:
    own = JsonlEnvironment(write(*numbered(2)), system_prompt="Be brief.")
    assert own.explain_protocol and own.system_prompt == "Be brief."
    # a model that is told to give the answer alone would leave out the words by which it is found
    assert "only" not in JsonlEnvironment(write(*numbered(2))).system_prompt
