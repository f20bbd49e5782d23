"""The words of a text in any script, for search."""

import functools
import re
import unicodedata

from gtpo.normal_form import normal_form

# Scripts that are written without spaces, or with endings that hang on the word: Chinese, Japanese, Korean, Thai, Lao,
# Burmese and Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)


def words_of(text: str) -> list[str]:
    """The words of `text`, in one Unicode form and case; single letters and digits are words.

    In a script without spaces each letter is a word, and each pair of neighbours is one more: that finds what stands
    inside of a longer run, and ranks those passages first that hold the letters side by side.

    >>> words_of("Ｃafé, 7 km: don't"), words_of("東京タ")
    (['café', '7', 'km', 'don', 't'], ['東', '東京', '京', '京タ', 'タ'])
    """
    words = []
    for run in _pattern().finditer(normal_form("NFKC", text).casefold()):
        if run["unspaced"] is None:
            words.append(run[0])
            continue
        letters = _letter().findall(run[0])
        for place, letter in enumerate(letters):
            words.append(letter)
            if place + 1 < len(letters):
                words.append(letter + letters[place + 1])
    return words


@functools.cache
def _marks() -> str:
    # vowel signs and accents, which \w leaves out: without them a word of Hindi falls to pieces. Of the first plane
    # only: beyond it, `re` would look through them one by one for each letter
    return "".join(character for character in map(chr, range(0x10000)) if unicodedata.category(character)[0] == "M")


@functools.cache
def _pattern() -> re.Pattern[str]:
    marks = _marks()
    unspaced = rf"[{_UNSPACED}](?<=\w)"
    spaced = rf"[^\W{_UNSPACED}]"
    return re.compile(rf"(?P<unspaced>{unspaced}(?:{unspaced}|[{marks}])*+)|{spaced}(?:{spaced}|[{marks}])*+")


@functools.cache
def _letter() -> re.Pattern[str]:
    return re.compile(rf"[^{_marks()}][{_marks()}]*")
