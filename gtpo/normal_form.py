"""Unicode normal forms of texts that nobody chose: in time that grows with their length alone."""

import unicodedata
from typing import Literal

# as many as Unicode's Stream-Safe Text Format lets stand together (UAX 15)
_MOST_MARKS = 30


def normal_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """The normal form of `text`, in which at most 30 combining marks follow one another: the others are left out.

    Marks of a run are sorted, which takes quadratic time in its length.

    >>> normal_form("NFC", "e\\u0301") == "\\u00e9", len(normal_form("NFC", "a" + "\\u0316" * 10**5))
    (True, 31)
    """
    if text.isascii():
        return text
    kept, run = [], 0
    for letter in text:
        run = run + 1 if unicodedata.combining(letter) else 0
        if run <= _MOST_MARKS:
            kept.append(letter)
    return unicodedata.normalize(form, "".join(kept))
