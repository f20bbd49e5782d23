"""A completion cut into prose, reasoning, fenced blocks and tagged calls: one pass from left to right.

What stands inside one of them is not looked at again: a `<think>` in a program opens no thought, and a fence drafted in
a thought is no block.
"""

import enum
import json
import re
from dataclasses import dataclass

from gtpo.parsing.calls import OWN_OPENING, read_own
from gtpo.parsing.fences import Fence, closing_line, content, is_python, language
from gtpo.types import ToolCall

OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"
# in a block they make it a frame around calls
_OPENINGS = (OPEN_CALL, "[TOOL_CALLS]", "<function=")

_NAMES = r"(?i:think|thinking|thought|reasoning|seed:think)"
_OPEN_THOUGHT = rf"(?<![`'\"])(?:<{_NAMES}>|\[THINK\]|◁think▷)"
_CLOSE_THOUGHT = rf"<(?:/{_NAMES})>|\[/THINK\]|◁/think▷"
# the start of a line, or the end of a thought
_LINE = r"(?:^|(?<=[kgt]>))(?P<lead>[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)?+)"
_FENCE = r"(?P<fence>`{3,}+(?=[^`\n]*+$)|~{3,}+)(?P<info>[^\n]*+)$"
# CommonMark wants a fence at the start of its line; models write prose before it
_LATE_FENCE = r"(?<!`)(?P<late>`{3,}+)[ \t]*+(?i:py(?:thon)?3?)[ \t\r]*+$"
_EVENT, _EVENT_WITH_CALLS = (
    re.compile(
        rf"(?P<open>{_OPEN_THOUGHT})|(?P<close>{_CLOSE_THOUGHT})|(?P<call>{OPEN_CALL})|(?P<own>{own})"
        rf"|{_LINE}{_FENCE}|{_LATE_FENCE}",
        re.MULTILINE,
    )
    for own in (r"(?!)", OWN_OPENING)
)
_THOUGHT_END = re.compile(_CLOSE_THOUGHT)
_OPEN_AT_END = re.compile(rf"(?:{_OPEN_THOUGHT})\s*\Z")
_BLANK = re.compile(r"\s*+")
_CALL_END = re.compile(rf"\s*+{_CLOSE_CALL}")
_DECODER = json.JSONDecoder(strict=False)

# Blocks whose end is found by reading what is in them: each can take a pass over the rest of the text.
_MAX_READ = 16
_MAX_INDENT = 80


class Kind(enum.Enum):
    PROSE = enum.auto()
    REASONING = enum.auto()
    BLOCK = enum.auto()
    CALL = enum.auto()


@dataclass(frozen=True)
class Piece:
    """One stretch of a completion, as it stands there. tag: the language of a block, in lower case. body: what a
    block, a thought or a call holds. is_closed: whether its end was there too. calls: those of a form without tags."""

    kind: Kind
    text: str
    tag: str = ""
    body: str = ""
    is_closed: bool = True
    calls: tuple[ToolCall, ...] = ()


def cut(text: str, *, is_thinking: bool = False, tagged_calls: bool = False, has_thoughts: bool = True) -> list[Piece]:
    """The pieces of `text`, in their order; together they are `text`.

    is_thinking: the text goes on a thought, which the prompt opened. tagged_calls: `<tool_call>` opens a call, in a
    block too, and so do the forms of `gtpo.parsing.calls`. has_thoughts: tags of thoughts mean something. What stands
    before the end of a thought that nobody opened is one, unless nothing follows.

    >>> [(piece.kind.name, piece.body) for piece in cut("<think>so?</think>\\n~~~py\\nprint(1)\\n~~~")]
    [('REASONING', 'so?'), ('PROSE', ''), ('BLOCK', 'print(1)\\n')]
    """
    return _Cutter(text, tagged_calls=tagged_calls, has_thoughts=has_thoughts).run(is_thinking=is_thinking)


def opens_thought(prompt: str) -> bool:
    """Whether what is written behind `prompt` begins inside a thought.

    >>> opens_thought("<|assistant|><think>\\n"), opens_thought("<think></think>\\n")
    (True, False)
    """
    return _OPEN_AT_END.search(prompt[-_MAX_INDENT:]) is not None


class _Cutter:
    def __init__(self, text: str, *, tagged_calls: bool, has_thoughts: bool) -> None:
        self.text = text
        self.tagged_calls = tagged_calls
        self.has_thoughts = has_thoughts
        self.pieces: list[Piece] = []
        self.thought_end = (0, 0)
        self.prose_from = 0
        self.position = 0
        self.num_read = 0
        self.content_end = _content_end(text)
        self.last_thought_end = max((match.end() for match in _THOUGHT_END.finditer(text)), default=-1)
        self.passed_fences: set[int] = set()

    def run(self, *, is_thinking: bool) -> list[Piece]:
        if is_thinking:
            self._think(0, 0)
        events = _EVENT_WITH_CALLS if self.tagged_calls else _EVENT
        while event := events.search(self.text, self.position):
            if event["open"]:
                self._open_thought(event)
            elif event["close"]:
                self._close_thought(event)
            elif event["call"]:
                self._call(event)
            elif event["own"] is not None:
                self._own_calls(event)
            else:
                self._block(event)
        self._prose(len(self.text))
        stop, after = self.thought_end
        thought = [Piece(Kind.REASONING, self.text[:after], body=self.text[:stop])] if after else []
        return thought + self.pieces

    def _add(self, piece: Piece, start: int, end: int) -> None:
        self._prose(start)
        self.pieces.append(piece)
        self.prose_from = self.position = end

    def _prose(self, end: int) -> None:
        if end > self.prose_from:
            self.pieces.append(Piece(Kind.PROSE, self.text[self.prose_from : end]))
            self.prose_from = end

    def _open_thought(self, event: re.Match[str]) -> None:
        start, end = event.span()
        before = self.text[max(self.prose_from, start - _MAX_INDENT) : start].rstrip(" \t")
        begins_line = not before or before[-1] == "\n"
        if self.has_thoughts and (begins_line or self.last_thought_end > end):
            self._think(start, end)
        else:
            # a word of the prose
            self.position = end

    def _think(self, start: int, body: int) -> None:
        end = _THOUGHT_END.search(self.text, body)
        stop, after = end.span() if end else (len(self.text), len(self.text))
        raw = self.text[start:after]
        self._add(Piece(Kind.REASONING, raw, body=self.text[body:stop], is_closed=end is not None), start, after)

    def _close_thought(self, event: re.Match[str]) -> None:
        self.position = event.end()
        if self.has_thoughts and event.end() < self.content_end:
            self.pieces = []
            self.thought_end = event.span()
            self.prose_from = event.end()

    def _may_read(self) -> bool:
        self.num_read += 1
        return self.num_read <= _MAX_READ

    def _call(self, event: re.Match[str]) -> None:
        if not self.tagged_calls:
            self.position = event.end()
            return
        found = self._json_body(event.end()) if self._may_read() else None
        if found is None:
            stop = self.text.find(_CLOSE_CALL, event.end())
            found = (stop, stop + len(_CLOSE_CALL)) if stop >= 0 else (len(self.text), -1)
        stop, after = found
        end = after if after >= 0 else len(self.text)
        raw, body = self.text[event.start() : end], self.text[event.end() : stop]
        self._add(Piece(Kind.CALL, raw, body=body, is_closed=after >= 0), event.start(), end)

    def _own_calls(self, event: re.Match[str]) -> None:
        found = read_own(self.text, event.start()) if self.num_read < _MAX_READ else None
        if found is None or any(call.error for call in found.calls):
            # this may have taken a pass over the rest of the text
            self.num_read += 1
        if found is None:
            self.position = event.end()
            return
        end = max(found.end, event.end())
        self._add(Piece(Kind.CALL, self.text[event.start() : end], calls=found.calls), event.start(), end)

    def _json_body(self, start: int) -> tuple[int, int] | None:
        """Where the value of a call ends, and where its tag does: a string in it may hold the tag. None if neither."""
        blank = _BLANK.match(self.text, start)
        assert blank is not None
        try:
            _, stop = _DECODER.raw_decode(self.text, blank.end())
        except (ValueError, RecursionError):
            return None
        end = _CALL_END.match(self.text, stop)
        return None if end is None else (stop, end.end())

    def _block(self, event: re.Match[str]) -> None:
        if event.start() in self.passed_fences:
            self.position = event.end()
            return
        late = event["late"] is not None
        marks, info = (event["late"], "python") if late else (event["fence"], event["info"])
        fence = Fence(marks, "" if late else event["lead"], language(info))
        body = min(event.end() + 1, len(self.text))
        reads = is_python(fence.tag) and self._may_read()
        stop, after = closing_line(self.text, body, fence, read=reads)
        if self.tagged_calls and any(self.text.find(opening, body, stop) >= 0 for opening in _OPENINGS):
            # no block but a frame around calls
            self.position = body
            self.passed_fences.add(stop)
            return
        is_closed = after >= 0
        end = after if is_closed else len(self.text)
        raw = self.text[event.start() : end]
        block = Piece(Kind.BLOCK, raw, fence.tag, content(self.text[body:stop], fence), is_closed)
        self._add(block, event.start(), end)


def _content_end(text: str) -> int:
    """Where `text` ends but for blanks and ends of thoughts."""
    end = len(text)
    while end:
        if text[end - 1].isspace():
            end -= 1
        elif text[end - 1] in ">]▷" and (last := _last_thought_end(text, end)) is not None:
            end = last
        else:
            break
    return end


def _last_thought_end(text: str, end: int) -> int | None:
    start = max(text.rfind(mark, max(0, end - 20), end) for mark in ("</", "[/", "◁/"))
    return start if start >= 0 and _THOUGHT_END.fullmatch(text, start, end) else None
