"""A completion as a turn: the calls that it makes, or else the answer that it gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from gtpo.parsing.answers import answer_line, has_answer, last_answer
from gtpo.parsing.calls import CALL_BLOCKS, USE_TAGS, block_calls, call_in_tags, is_unread, malformed
from gtpo.parsing.fences import is_python, is_quote
from gtpo.parsing.pieces import Kind, Piece, cut
from gtpo.types import ToolCall, ToolStatus

CallFormat = Literal["code", "json"]

_BAD_BLOCK = "a code block must open with ```python and close with ```"
_UNCLOSED_CALL = "a call must be closed with </tool_call>"


@dataclass(frozen=True)
class ParsedTurn:
    """What a completion asks for: calls (malformed ones included), else an answer, else neither (a void turn).

    said: the text without its reasoning.
    """

    calls: tuple[ToolCall, ...]
    answer: str | None
    said: str = field(default="", compare=False, repr=False)


def parse_turn(
    text: str,
    *,
    call_format: CallFormat,
    max_calls: int,
    is_thinking: bool = False,
    reasoning_may_call: bool = False,
) -> ParsedTurn:
    """Reads the calls, or else the answer, out of a completion. Never raises: a malformed call has its error.

    max_calls: calls that are made; a further entry tells the model that the others are not. is_thinking: the prompt has
    opened a thought. reasoning_may_call: calls in a thought are made too; an answer in one never counts.

    >>> parse_turn("<think>answer: 5?</think>**Answer:** 4", call_format="code", max_calls=8)
    ParsedTurn(calls=(), answer='4')
    """
    pieces = cut(text, is_thinking=is_thinking, tagged_calls=call_format == "json")
    said = [piece for piece in pieces if piece.kind is not Kind.REASONING]
    calls = list(islice(_calls(pieces if reasoning_may_call else said, call_format), max_calls + 1))
    if len(calls) > max_calls:
        calls[max_calls:] = [_surplus(max_calls)]
    answer = _answer(said)
    if fault := _fault(said, call_format, has_calls=bool(calls), answers=answer is not None):
        calls.append(malformed(fault))
    return ParsedTurn(tuple(calls), None if calls else answer, "".join(piece.text for piece in said))


def _calls(pieces: Sequence[Piece], call_format: CallFormat) -> Iterator[ToolCall]:
    before = ""
    for piece in pieces:
        if piece.kind is Kind.REASONING:
            yield from _calls(cut(piece.body, tagged_calls=call_format == "json", has_thoughts=False), call_format)
        elif piece.kind is Kind.BLOCK and call_format == "code" and is_python(piece.tag) and piece.is_closed:
            yield ToolCall(name="python", arguments={"code": piece.body.strip("\r\n")})
        elif piece.kind is Kind.BLOCK and call_format == "json" and piece.tag in CALL_BLOCKS:
            # a block below "answer:" is the answer
            yield from () if has_answer(before.rstrip().rpartition("\n")[2]) else block_calls(piece.body)
        elif piece.kind is Kind.CALL and piece.is_closed:
            yield from piece.calls or [call_in_tags(piece.body)]
        before = piece.text if piece.kind is Kind.PROSE else ""


def _fault(said: Sequence[Piece], call_format: CallFormat, *, has_calls: bool, answers: bool) -> str | None:
    """What was meant as a call and is none. In a turn that answers, a block of another language is a quote."""
    if call_format == "json":
        if any(piece.kind is Kind.CALL and not piece.is_closed for piece in said):
            return _UNCLOSED_CALL
        if has_calls or answers:
            return None
        return USE_TAGS if any(is_unread(piece.text) for piece in said if piece.kind is not Kind.CALL) else None
    blocks = [piece for piece in said if piece.kind is Kind.BLOCK]
    if any(is_python(block.tag) and not block.is_closed for block in blocks):
        return _BAD_BLOCK
    if answers and not has_calls:
        return None
    stray = any("```" in piece.text for piece in said if piece.kind is Kind.PROSE)
    foreign = any(not block.is_closed or not (is_python(block.tag) or is_quote(block.tag)) for block in blocks)
    return _BAD_BLOCK if stray or foreign else None


def _answer(said: Sequence[Piece]) -> str | None:
    """The last answer outside of blocks; where there is none, that of a quoted block which holds nothing else."""
    prose, quoted = [], None
    for piece in said:
        line = piece.body.strip() if piece.kind is Kind.BLOCK and not is_python(piece.tag) else ""
        if piece.kind is Kind.PROSE:
            prose.append(piece.text)
        elif line and "\n" not in line:
            # a result in a block below "answer:" stands there like a line
            prose.append("\n" if has_answer(line) else f"\n{line}\n")
            quoted = answer_line(line) or quoted
        else:
            prose.append("\n")
    return last_answer("".join(prose)) or quoted


def _surplus(max_calls: int) -> ToolCall:
    text = f"a turn may make {max_calls} calls; those after the first {max_calls} were not made"
    return ToolCall(name="", arguments={}, error=text, fault=ToolStatus.OVER_QUOTA)
