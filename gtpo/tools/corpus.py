"""Passages of a local corpus: a JSON Lines file, a JSON list, or a folder of text files."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TEXT_SUFFIXES = (".txt", ".md", ".rst")


def read_passages(corpus: Path, *, fields: Sequence[str], max_chars: int) -> list[str]:
    """The corpus as passages of at most `max_chars` characters, in an order that depends on its content only.

    corpus: a `.jsonl` or `.json` file (also `.gz`) of objects, or a folder whose `.txt`, `.md` and `.rst` files are
    read at any depth. fields: what is kept of an object, in this order; one field as it is, several as "field: value"
    lines. An object that lacks all of them is an error, one that lacks some is not. Each passage begins with the path
    of its file, or with the first of several fields.
    Raises ValueError with file and line, and for a corpus without text; OSError.
    """
    documents = _folder(corpus) if corpus.is_dir() else _objects(corpus, fields)
    passages = [passage for head, text in documents for passage in _split(head, text, max_chars)]
    if not passages:
        raise ValueError(f"corpus must hold some text, got none in {corpus}")
    return passages


def _folder(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TEXT_SUFFIXES and path.is_file():
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            if text.strip():
                yield f"{path.relative_to(folder).as_posix()}\n", text


def _objects(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in (".json", ".jsonl"):
        raise ValueError(f"corpus must be a folder, or a .jsonl or .json file (.gz too), got {path}")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if suffixes[-1] == ".jsonl":
            for number, line in enumerate(_lines(file, path), start=1):
                if line.strip():
                    yield _text_of(_parsed(line, f"{path}:{number}"), fields, f"{path}:{number}")
            return
        rows = _parsed(b"".join(_lines(file, path)), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield _text_of(row, fields, f"{path}, object {number}")


def _lines(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file, without the mark that some editors put before the first."""
    try:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from None


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be text in UTF-8, got the byte {text[error.start]:#04x}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def _text_of(row: Any, fields: Sequence[str], place: str) -> tuple[str, str]:
    """What all passages of an object begin with, and the text that is divided into passages."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} must hold an object, got {type(row).__name__}")
    present = {field: _plain(row[field]) for field in fields if row.get(field) not in (None, "", [])}
    if not any(field in row for field in fields):
        raise ValueError(f"{place} must have one of the fields {', '.join(fields)}, got {', '.join(row) or 'none'}")
    if len(fields) == 1:
        return "", "".join(present.values())
    lines = [f"{field}: {value}\n" for field, value in present.items()]
    return ("".join(lines[:1]), "".join(lines[1:])) if fields[0] in present else ("", "".join(lines))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _split(head: str, text: str, max_chars: int) -> Iterator[str]:
    """`text` in pieces that with `head` are at most `max_chars` long, cut at a paragraph, a sentence or a word.

    >>> list(_split("", "one two. three four five", 12))
    ['one two.', 'three four', 'five']
    """
    text = text.strip()
    if len(head) > max_chars // 2:
        head = head[: max_chars // 2].rstrip() + "\n"
    if head and not text:
        yield head.rstrip()
    room = max_chars - len(head)
    while len(text) > room:
        piece = text[: room + 1]
        # a cut in the first half would give many short passages
        cuts = (piece.rfind(mark) + len(mark.rstrip()) for mark in ("\n\n", "\n", ". ", "。", " "))
        cut = next((cut for cut in cuts if room // 2 < cut <= room), room)
        yield head + text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield head + text
