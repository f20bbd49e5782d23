"""Whether two answers are the same: as numbers, exactly; as lists, item by item; else as texts.

Nothing is simplified or evaluated: `2 + 2` is not 4, and no answer takes long. A computer algebra system would find
more answers equal, and can be kept busy by what a model writes.
"""

import re
import unicodedata
from fractions import Fraction

from gtpo.normal_form import normal_form
from gtpo.parsing import bare_answer

_MAX_NUMBER_CHARS = 400
_MAX_EXPONENT = 4000
_MAX_DEPTH = 16

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
_MIXED = re.compile(r"(\d+) (?:and )?(\d+) ?/ ?(\d+)")
_QUOTIENT = re.compile(rf"({_DECIMAL})(?: ?/ ?({_DECIMAL}))?")
_POWER = re.compile(rf"(?:({_DECIMAL}) ?[x×*·⋅] ?)?10 ?(?:\^|\*\*) ?([-+]?\d+)")

_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2212\ufe63\uff0d"), "-")
_GROUPS = re.compile(r"(?<!\d)\d{1,3}(?:[\xa0\u2009\u202f]\d{3})+(?!\d)")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
# LaTeX as plain text, in this order
_LATEX = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)\\,(?=\d)", "\u2009"),
        (r"\\[,;: ]|~", " "),
        (r"\\([%${}#&_])", r"\1"),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\{([^{}]*)\}", r"\1"),
        (r"\\[dt]?frac\s*\{ ?-([\w.]+) ?\}\s*\{ ?-([\w.]+) ?\}", r" \1/\2 "),
        (r"\\[dt]?frac\s*\{ ?\+?([\w.]+) ?\}\s*\{ ?-([\w.]+) ?\}", r" -\1/\2 "),
        (r"\\[dt]?frac\s*(?:\{ ?(-?)\+?([\w.]+) ?\}\s*\{ ?\+?([\w.]+) ?\}|(\d)(\d))", r" \1\2\4/\3\5 "),
        (r"\\(?:times|cdot)(?![a-zA-Z])", "×"),
        (r"\^\{([-+\w]+)\}", r"^\1"),
    )
)
_BOLD = re.compile(r"(?<![\w*)])\*\*(?![\s*])([^*]+)(?<!\s)\*\*(?![\w*(])")
_AROUND_COMMA = re.compile(r" ?([,;]) ?")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are equal: as numbers, exactly; as lists, item by item; else as texts but for case, spaces
    and a full stop. What models put around an answer, LaTeX and Markdown, does not count.

    >>> same_answer(" $1,200.00. ", "1200"), same_answer("1/2", "0.5"), same_answer("New  York", "new york.")
    (True, True, True)
    >>> same_answer("1e-05", "0.00001"), same_answer("1 1/2", "1.5"), same_answer("(1,2)", "(1, 2.0)")
    (True, True, True)
    >>> same_answer("12", "120"), same_answer("", "0"), same_answer("1 1/2", "11/2"), same_answer("1 2", "12")
    (False, False, False, False)
    """
    return _equal(_plain(given), _plain(expected), depth=0)


def _equal(given: str, expected: str, *, depth: int) -> bool:
    if given == expected:
        return True
    if given.endswith("%") and expected.endswith("%"):
        given, expected = given[:-1].rstrip(), expected[:-1].rstrip()
    numbers = _number(given), _number(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    (kind, items), (other_kind, other_items) = _items(given), _items(expected)
    if numbers != (None, None) and len(items) > 1:
        # 1,200 is one number, and no list of two
        return False
    if depth == _MAX_DEPTH or len(items) != len(other_items):
        return False
    if kind != other_kind:
        # parentheses around one item say nothing
        comparable = {kind, other_kind} == {"", "("} and len(items) == 1 and bool(items[0].strip())
    else:
        comparable = kind != "" or len(items) > 1
    if not comparable:
        return _AROUND_COMMA.sub(r"\1", given) == _AROUND_COMMA.sub(r"\1", expected)
    return all(
        _equal(_stripped(item), _stripped(other), depth=depth + 1)
        for item, other in zip(items, other_items, strict=True)
    )


def _plain(text: str) -> str:
    """`text` in one notation: composed characters, lower case, plain minus signs and fractions, single spaces."""
    text = bare_answer(normal_form("NFC", text)).translate(_MINUS)
    text = _BOLD.sub(r"\1", text)
    for pattern, plain in _LATEX if "\\" in text or "{" in text else ():
        text = pattern.sub(plain, text)
    text = _GROUPS.sub(lambda groups: re.sub(r"\D", "", groups[0]), text)
    text = _VULGAR.sub(lambda sign: f" {unicodedata.normalize('NFKC', sign[0])} ", text).replace("\u2044", "/")
    return _stripped(" ".join(normal_form("NFC", text.casefold()).split()))


def _stripped(text: str) -> str:
    return bare_answer(text).rstrip(". ")


def _number(text: str) -> Fraction | None:
    """The number that `text` writes, or None where it writes none, or one with too many digits.

    >>> [str(_number(text)) for text in ("-$1,200.5", "1 1/2", "2.5e-7", "1.2 x 10^3", "1 2", "1/0", "1e99999")]
    ['-2401/2', '3/2', '1/4000000', '1200', 'None', 'None', 'None']
    """
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    signed = re.fullmatch(r"(?:\$ ?)?([-+]?) ?(?:\$ ?)?(.*?)(?: ?\$)?", text)
    if signed is None:
        return None
    sign, digits = (-1 if signed[1] == "-" else 1), signed[2]
    if mixed := _MIXED.fullmatch(digits):
        whole, numerator, denominator = map(int, mixed.groups())
        return sign * (whole + Fraction(numerator, denominator)) if denominator else None
    if power := _POWER.fullmatch(digits):
        factor, exponent = _decimal(power[1] or "1"), int(power[2])
        return None if factor is None or abs(exponent) > _MAX_EXPONENT else sign * factor * Fraction(10) ** exponent
    if quotient := _QUOTIENT.fullmatch(digits):
        above, below = _decimal(quotient[1]), _decimal(quotient[2] or "1")
        return sign * above / below if above is not None and below else None
    return None


def _decimal(digits: str) -> Fraction | None:
    _, _, exponent = digits.partition("e")
    return None if abs(int(exponent or 0)) > _MAX_EXPONENT else Fraction(digits.replace(",", ""))


def _items(text: str) -> tuple[str, list[str]]:
    """The bracket around a list, "" where there is none, and its items; a text without commas is one item.

    >>> _items("(1, (2,3))"), _items("(1,2), x"), _items("f(x)")
    (('(', ['1', ' (2,3)']), ('', ['(1,2)', ' x']), ('', ['f(x)']))
    """
    whole, items = _split(text)
    return (text[0], _split(text[1:-1])[1]) if whole else ("", items)


def _split(text: str) -> tuple[bool, list[str]]:
    """(whether one pair of brackets stands around all of `text`, what commas outside of brackets divide)."""
    depth, cuts, first_end = 0, [-1], -1
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0 and first_end < 0:
                first_end = place
        elif character in ",;" and depth == 0:
            cuts.append(place)
    is_whole = bool(text) and first_end == len(text) - 1 and _BRACKETS.get(text[0]) == text[-1]
    return is_whole, [text[start + 1 : end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
