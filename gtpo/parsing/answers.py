"""The answer in what a completion says, without the Markdown, LaTeX and tags that models put around it."""

import re
from collections import deque

_MARK = r"(?<![^\W_])answer(?:[ \t*_`\"'”’})\]]|</?\w{1,9}>){0,12}[:：﹕∶]"
# a line of its own says so too, as a heading or in bold
_HEADING = r"^[ \t]{0,3}(?:#{1,6}[ \t]+[*_]*|[*_]{2,3})(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*$"
_MARKER = re.compile(rf"{_MARK}|<answer>|{_HEADING}", re.IGNORECASE | re.MULTILINE)
_ANSWER_LINE = re.compile(rf"[\s>#*_`\"'“‘({{\[-]*+{_MARK}", re.IGNORECASE)

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_BLANKS = " \t\r\n\f\v\xa0\u2009\u202f\u3000" + _INVISIBLE
_TAG = re.compile(
    r"</?(?:think|thinking|thought|reasoning|seed:think|answer|b|strong|i|em|code)>|\[/?THINK\]|◁/?think▷|<\|[^|<>\n]{1,40}\|>",
    re.IGNORECASE,
)
_MAX_TAG_CHARS = 44
_BOXED = re.compile(r"\\f?boxed\s*\{")
_STYLED = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathtt|emph)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MATHS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_QUOTES = dict(zip("\"'“‘«„「『", "\"'”’»“」』", strict=True))
_OPENERS, _CLOSERS = "([{", ")]}"
# a full stop behind one of these ends the sentence, not the answer
_BEFORE_STOP = frozenset("*_`\"'”’»」』)]}>$%0123456789")

# what opens or closes emphasis, code and a quotation; the _ of a name does not
_RUNS = {
    "*": re.compile(r"\*+"),
    "_": re.compile(r"(?<![^\W_])_+|_+(?![^\W_])"),
    "`": re.compile("`+"),
    '"': re.compile('"'),
    "”": re.compile("“"),
}

# How many wrappers are taken off, and how far back on its line an answer's emphasis may have been opened.
_MAX_LAYERS = 12
_MAX_BEFORE = 200
_MAX_LINES = 4
# of the places where an answer may stand: one behind which nothing does, as often as this, is no slip
_MAX_MARKERS = 32


def last_answer(text: str) -> str | None:
    """What follows the last "answer:" that something follows: the rest of its line, or else the next line.

    >>> last_answer("answer: 7? No.\\n## Answer\\n**Answer:** \\\\boxed{4}."), last_answer("**Answer**:\\n\\n4 apples")
    ('4', '4 apples')
    >>> last_answer("4"), last_answer("answer:")
    (None, None)
    """
    end = len(text)
    for marker in reversed(deque(_MARKER.finditer(text), maxlen=_MAX_MARKERS)):
        before = text[max(0, marker.start() - _MAX_BEFORE) : marker.end() - 1].rpartition("\n")[2]
        lines = text[marker.end() : end].lstrip().split("\n", _MAX_LINES)[:_MAX_LINES]
        for line in filter(None, lines):
            if answer := bare_answer(line, before):
                return answer
        end = marker.start()
    return None


def has_answer(line: str) -> bool:
    return _MARKER.search(line) is not None


def answer_line(line: str) -> str | None:
    """The answer of a line that begins with "answer:"; None for another."""
    return last_answer(line) if _ANSWER_LINE.match(line) else None


def bare_answer(answer: str, before: str = "") -> str:
    """The answer without what stands around it: emphasis, quotes, code marks, LaTeX, ends of thoughts, a full stop.

    before: what stands before it on its line, where its emphasis may have been opened.

    >>> [bare_answer(text) for text in (" **4**. ", "`x = 1`", "$\\\\boxed{4}$", '"4"', "4 </think>", "2**3", "[0, 1)")]
    ['4', 'x = 1', '4', '4', '4', '2**3', '[0, 1)']
    """
    opened = "".join(mark for mark, runs in _RUNS.items() if len(runs.findall(before)) % 2)
    head = answer.lstrip(_BLANKS)
    if opened and head[:1] and head[0] in opened:
        # it is closed before the answer
        answer, opened = head.lstrip(head[0]), opened.replace(head[0], "")
    for _ in range(_MAX_LAYERS):
        peeled = answer.strip(_BLANKS)
        for peel in (_without_tags, _without_maths, _without_quotes, _without_closers):
            peeled = peel(peeled)
        peeled = _without_stop(_without_code_marks(_without_emphasis(peeled, opened), opened))
        if peeled == answer:
            break
        answer = peeled
    return answer


def _without_tags(text: str) -> str:
    if (first := _TAG.match(text)) is not None:
        text = text[first.end() :]
    last = max(text.rfind(mark, max(0, len(text) - _MAX_TAG_CHARS)) for mark in "<[◁")
    return text[:last] if last >= 0 and _TAG.fullmatch(text, last) else text


def _without_maths(text: str) -> str:
    """What is boxed, wherever it stands; else the inside of a wrapper around the whole."""
    boxes = list(_BOXED.finditer(text))
    if boxes and (end := _matching_brace(text, boxes[-1].end())) is not None:
        return text[boxes[-1].end() : end]
    if (styled := _STYLED.match(text)) and _matching_brace(text, styled.end()) == len(text) - 1:
        return text[styled.end() : -1]
    for opening, closing in _MATHS:
        inner = text[len(opening) : len(text) - len(closing)]
        if text == opening and opening != "$":
            return ""
        whole = len(text) >= len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)
        if whole and opening not in inner and closing not in inner:
            return inner
    return text


def _matching_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def _without_quotes(text: str) -> str:
    inner, closing = text[1:-1], _QUOTES.get(text[:1])
    return inner if len(text) > 1 and text[-1] == closing and not {text[0], closing} & set(inner) else text


def _without_emphasis(text: str, opened: str) -> str:
    """Runs of * and _ that open or close emphasis. One that stands alone on one side is a part of the answer, as in
    `a*`, unless it closes what was `opened` before."""
    for mark in "*_":
        core = text.strip(mark)
        if not core:
            return "" if len(text) > 1 else text
        num_open, num_close = len(text) - len(text.lstrip(mark)), len(text) - len(text.rstrip(mark))
        pairs = min(num_open, num_close)
        is_whole = mark not in core
        first = num_open if is_whole and num_open - pairs > 1 else pairs
        last = num_close if (is_whole and num_close - pairs > 1) or mark in opened else pairs
        text = text[first : len(text) - last]
    return text


def _without_closers(text: str) -> str:
    """Brackets that close what was opened before the answer. A half-open interval is balanced."""
    excess = sum(map(text.count, _CLOSERS)) - sum(map(text.count, _OPENERS))
    while excess > 0 and text and (text[-1] in _CLOSERS or text[0] in ")}"):
        text = text[:-1] if text[-1] in _CLOSERS else text[1:]
        excess -= 1
    return text


def _without_code_marks(text: str, opened: str) -> str:
    """Backticks around the whole; a last one, or a last quotation mark, that closes what was `opened` before."""
    core = text.strip("`")
    num_open, num_close = len(text) - len(text.lstrip("`")), len(text) - len(text.rstrip("`"))
    if core != text and "`" not in core and (num_open == num_close or max(num_open, num_close) > 2 or "`" in opened):
        return core
    is_closer = text[-1:] in ('"', "”") and text[-1] in opened
    return text[:-1] if is_closer and text.count(text[-1]) == 1 else text


def _without_stop(text: str) -> str:
    ends = len(text) > 1 and (text[-1] == "。" or (text[-1] == "." and text[-2] in _BEFORE_STOP))
    return text[:-1] if ends else text
