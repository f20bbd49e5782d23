"""Fenced blocks of code: where one ends, what its tag means, and what it holds.

CommonMark's rules: three or more backticks or tildes open a block, and a line of as many or more of the same, alone,
closes it. Beyond them: a line inside of a string of Python closes nothing, since docstrings have fences too.
Source: https://spec.commonmark.org/0.31.2/#fenced-code-blocks
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_PYTHON = frozenset({"py", "py3", "python", "python3"})
# what is quoted and calls nothing
_QUOTES = frozenset({"console", "csv", "html", "json", "latex", "log", "markdown", "md", "out", "output", "plain"})
_QUOTES |= {"plaintext", "stderr", "stdout", "text", "txt", "xml", "yaml"}
_TAG = re.compile(r"[\s{.]*+([\w+#-]*+)")
_CLOSING = re.compile(r"^(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)[ \t\r]*+$", re.MULTILINE)
_MAX_MORE_INDENT = 3
# of what stands behind a fence in a string, until that ends
_MAX_STRING_CHARS = 10_000

# the tokens of Python in which a quotation mark can stand
_TOKEN = re.compile(
    r"""#[^\n]*+|(?P<quotes>\"{3}|'{3})|"(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?""",
    re.DOTALL,
)
_STRING_END = {quotes: re.compile(rf"\\.|{quotes}", re.DOTALL) for quotes in ('"""', "'''")}


class Fence(NamedTuple):
    """The line that opens a block. marks: its backticks or tildes. lead: the indent, or list marker, before them."""

    marks: str
    lead: str
    tag: str


def language(info: str) -> str:
    """The language that the text behind a fence names.

    >>> [language(info) for info in (" Python", "{.py .wide}", "python:main.py", "c++ x", "")]
    ['python', 'py', 'python', 'c++', '']
    """
    found = _TAG.match(info)
    return found[1].lower() if found else ""


def is_python(tag: str) -> bool:
    return tag in _PYTHON


def is_quote(tag: str) -> bool:
    """Whether a block of this language is shown and not meant to be run."""
    return tag in _QUOTES


def closing_line(text: str, start: int, fence: Fence, *, read: bool) -> tuple[int, int]:
    """(where the body that begins at `start` ends, where the closing fence does); -1 where none closes the block.

    read: whether the body is Python and its strings are to be told from its code.
    """
    lines = (line for line in _CLOSING.finditer(text, start) if line["fence"].startswith(fence.marks))
    if is_python(fence.tag):
        closing = _outside_of_strings(text, start, lines) if read else next(lines, None)
    else:
        most = len(fence.lead) + _MAX_MORE_INDENT
        closing = next((line for line in lines if len(line["indent"]) <= most), None)
    if closing is not None:
        return closing.span()
    end = len(text.rstrip())
    last = text[max(start, text.rfind("\n", start, end) + 1) : end]
    # some close it behind the last line of code; in a quotation that is no code
    if last.endswith(fence.marks) and last.strip("> `~"):
        return end - len(fence.marks), end
    return len(text), -1


def _outside_of_strings(text: str, start: int, lines: Iterator[re.Match[str]]) -> re.Match[str] | None:
    """The first of `lines` that is not inside a string; the first of all where there is none near it, since a string
    that nothing closes breaks the program wherever it ends."""
    strings, first = _Strings(text, start), None
    for line in lines:
        if not strings.reach(line.start()):
            return line
        first = first or line
        if line.start() - first.start() > _MAX_STRING_CHARS:
            break
    return first


class _Strings:
    """Follows a program's text, and tells whether a place is inside a string of several lines."""

    def __init__(self, text: str, start: int) -> None:
        self._text = text
        self._position = start
        self._quotes: str | None = None

    def reach(self, place: int) -> bool:
        while True:
            pattern = _TOKEN if self._quotes is None else _STRING_END[self._quotes]
            token = pattern.search(self._text, self._position, place)
            if token is None:
                self._position = place
                return self._quotes is not None
            self._position = token.end()
            if self._quotes is None:
                self._quotes = token["quotes"]
            elif token[0] == self._quotes:
                self._quotes = None


def content(body: str, fence: Fence) -> str:
    """The body without the indent of its fence.

    >>> content("  if x:\\n    f()\\n g()\\n", Fence("```", "- ", "py"))
    'if x:\\n  f()\\ng()\\n'
    """
    if not fence.lead:
        return body
    lead = re.sub(r"\S", " ", fence.lead)
    spaces = re.compile(rf" {{0,{len(lead)}}}")
    return "".join(
        line.removeprefix(lead) if line.startswith(lead) else spaces.sub("", line, count=1)
        for line in body.splitlines(keepends=True)
    )
