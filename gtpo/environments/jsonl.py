"""A user's own questions and answers, from a JSON Lines file."""

import codecs
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtpo.config_values import broken_text, shortened
from gtpo.environments.base import Split, check_request, content_digest
from gtpo.environments.code import CodeEnvironment
from gtpo.environments.equality import same_answer
from gtpo.parsing import parse_turn
from gtpo.types import Task

PROMPT_COLUMNS = ("prompt", "question", "messages")
ANSWER_COLUMNS = ("answer", "ground_truth")

_EVAL_SHARE = 0.2


class JsonlEnvironment(CodeEnvironment):
    """One task a line of `path`; the model has plain Python, and answers are compared by `same_answer`.

    path: a file with one JSON object a line: a prompt (column prompt, question or messages) and an answer (answer or
    ground_truth). A prompt is a text, or a list of chat messages: at most one system message, then one user message.
    An answer is a text of one line or a number. Of a worked solution that ends as those of GSM8K do, "#### 16", it is
    what stands behind the mark.
    eval_path: a second such file for the split "eval"; without it a fifth of the different prompts of `path` is held
    out, chosen by a hash. system_prompt: read by the model before each task. name: of the environment; two files in one
    mixture need two.
    Raises ValueError, with the file and line, for missing columns, for empty or malformed content and for a second,
    other answer to a prompt; for a single prompt without `eval_path`, and for prompts that are in both files. OSError.
    """

    name = "jsonl"

    def __init__(
        self,
        path: str,
        eval_path: str | None = None,
        system_prompt: str = "Solve the task. You can run Python.",
        name: str = name,
    ) -> None:
        self.name = name
        self.system_prompt = system_prompt
        rows = _read_rows(Path(path))
        if eval_path is None:
            # by prompt, so that two answers to one question are never on both sides
            prompts = sorted({prompt for prompt, _ in rows}, key=lambda prompt: content_digest(prompt, {}))
            if len(prompts) < 2:
                raise ValueError(f"path must hold at least two different prompts to be split, got one in {path}")
            held_out = set(prompts[: max(1, round(_EVAL_SHARE * len(prompts)))])
            eval_rows = [row for row in rows if row[0] in held_out]
            rows = [row for row in rows if row[0] not in held_out]
        else:
            eval_rows = _read_rows(Path(eval_path))
            if shared := {prompt for prompt, _ in rows} & {prompt for prompt, _ in eval_rows}:
                raise ValueError(f"eval_path must share no prompt with path, got {len(shared)} in both")
        self._rows: dict[Split, list[tuple[str, str]]] = {"train": rows, "eval": eval_rows}

    def tasks(self, split: Split, num: int, seed: int) -> list[Task]:
        """Shuffled rows. Training goes through the file again, in a new order, when it is used up; "eval" does not."""
        check_request(split, num)
        rows = self._rows[split]
        if split == "eval" and num > len(rows):
            raise ValueError(
                f"num (tasks.num_eval in a configuration) must be at most the {len(rows)} rows that are held out for "
                f"evaluation, got {num}"
            )
        rng = random.Random(f"{self.name}/{split}/{seed}")
        drawn: list[tuple[str, str]] = []
        while len(drawn) < num:
            drawn += rng.sample(rows, len(rows))
        return [
            Task(id=f"{self.name}-{split}-{seed}-{position}", environment=self.name, prompt=prompt, answer=answer)
            for position, (prompt, answer) in enumerate(drawn[:num])
        ]

    def grade(self, task: Task, answer: str | None) -> float:
        return float(answer is not None and same_answer(answer, task.answer))


def _read_rows(path: Path) -> list[tuple[str, str]]:
    """The different prompts with their answers, in the order of the file."""
    rows: dict[str, tuple[str, int]] = {}
    # a byte-order mark, which some editors write, is no part of the text
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        prompt, answer = _parse_row(line, f"{path}, line {number}")
        first, where = rows.setdefault(prompt, (answer, number))
        if not same_answer(answer, first):
            raise ValueError(
                f"{path}, line {number}: expected one answer to a prompt, got {answer!r} here and {first!r} in line "
                f"{where}; keep one of them"
            )
    if not rows:
        raise ValueError(f"path must hold at least one row, got an empty data set in {path}")
    return [(prompt, answer) for prompt, (answer, _) in rows.items()]


def _parse_row(line: bytes, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{where}: expected text in UTF-8, got the byte {byte:#x}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected one JSON object a line, got {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    prompt = _column(row, PROMPT_COLUMNS, where)
    answer = _column(row, ANSWER_COLUMNS, where)
    if isinstance(prompt, list):
        prompt = _prompt_of_messages(prompt, where)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: expected a prompt that is a text or a list of messages, got {shortened(prompt)}")
    if not isinstance(answer, str | int | float) or not str(answer).strip() or answer in (math.inf, -math.inf):
        raise ValueError(f"{where}: expected an answer that is a text or a number, got {shortened(answer)}")
    for text in (prompt, str(answer)):
        if flaw := broken_text(text):
            raise ValueError(f"{where}: expected whole characters, got {flaw} of {shortened(text)}; write it as UTF-8")
    return prompt, _givable(_one_line(str(answer), where), where)


def _one_line(answer: str, where: str) -> str:
    """The answer as a model can give it: in one line. Of a worked solution what stands behind its last "####"."""
    last = answer.rpartition("####")[2].strip()
    if "####" in answer and last:
        answer = last
    if len(answer.strip().splitlines()) > 1:
        raise ValueError(
            f"{where}: expected an answer of one line, since a model's is read from one line, or a solution that ends "
            f'with "#### ANSWER"; got {shortened(answer)}'
        )
    return answer


def _givable(answer: str, where: str) -> str:
    """The answer itself, if a model that writes it is right: from its line the same must be read."""
    read = parse_turn(f"answer: {answer}", call_format="code", max_calls=1).answer
    if read is None or not same_answer(read, answer):
        raise ValueError(
            f"{where}: expected an answer that a model can give, but of a line 'answer: {shortened(answer)[1:-1]}' "
            f"{'nothing' if read is None else shortened(read)} is read; write the bare answer"
        )
    return answer


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no answer; write a number, or a text in quotes")


def _column(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{where}: expected a column among {', '.join(names)}, found {', '.join(row)[:200] or 'none'}")


def _prompt_of_messages(messages: list[Any], where: str) -> str:
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"{where}: expected one user message, a system message before it at most, got roles {shortened(roles)}"
        )
    contents = [message.get("content") for message in messages]
    if not all(isinstance(content, str) for content in contents):
        raise ValueError(f"{where}: expected messages whose content is a text, got {shortened(contents)}")
    return "\n\n".join(contents)
