"""Text to token ids and back for parts of a text, such that the parts' ids are those of the whole.

Tokenizers of the SentencePiece family put a space in front of a text, and take one off as they decode: right for a
whole text, but a stray space for a part in its middle, such as a tool's output. Text that must stay text never becomes
a control token, whichever model the tokenizer has: Unigram finds "</s>" among its pieces by itself.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

# A part is encoded behind one of these and their ids are taken off: the first one with which it does not merge.
_ANCHORS = ("\n", "a", ".", "0", "_", "\x00")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class TokenIds:
    """Encodes and decodes parts of a text with one tokenizer.

    control: whether the text of a special token becomes that token; an added token that is not special always does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_whole = any(self._plain(x + "a") == self._plain(x) + self._plain("a") for x in _ANCHORS)
        self._decode_anchor = self._plain("a")
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        pieces = {token for token in tokenizer.get_vocab() if _BYTE_PIECE.fullmatch(token)}
        self._ids_of = {text: tokenizer.convert_tokens_to_ids(text) for text in special | pieces if len(text) > 1}
        longest_first = sorted(self._ids_of, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def whole(self, text: str) -> list[int]:
        """The ids of a text, or of its beginning, with control tokens."""
        return self._plain(text)

    def behind(self, token: str, text: str) -> list[int]:
        """The ids of `text` right behind the special token `token`, with control tokens."""
        first, *rest = self._plain(token + text)
        return rest if first == self._tokenizer.convert_tokens_to_ids(token) else self.part(text, control=True)

    def part(self, text: str, *, control: bool) -> list[int]:
        """The ids of a part that stands in the middle of a text."""
        ids = self._continued(text, control=control)
        if control:
            return ids
        forbidden = {self._ids_of[found] for found in self._special.findall(text)}
        if forbidden.isdisjoint(ids):
            return ids
        # cut behind the first character of each, no part holds one as a whole
        cuts = [0, *(found.start() + 1 for found in re.finditer(f"(?=({self._special.pattern}))", text)), len(text)]
        parts = (text[start:end] for start, end in itertools.pairwise(cuts))
        return [token for part in parts for token in self._continued(part, control=False)]

    def has_control(self, text: str) -> bool:
        """Whether `text` holds what would become a control token, or a byte that it spells out."""
        return bool(self._special.search(text)) or self._plain(text) != self._plain(text, control=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a part, a space at its beginning included."""
        return self._text([*self._decode_anchor, *ids]).removeprefix(self._text(self._decode_anchor))

    def _continued(self, text: str, *, control: bool) -> list[int]:
        if self._is_whole:
            return self._plain(text, control=control)
        for anchor in _ANCHORS:
            before, together = self._plain(anchor, control=control), self._plain(anchor + text, control=control)
            if together[: len(before)] == before:
                return together[len(before) :]
        return self._plain(text, control=control)

    def _plain(self, text: str, *, control: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
