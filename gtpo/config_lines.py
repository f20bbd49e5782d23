"""Where in its TOML file a key stands, so that what is wrong with it can be found."""

import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

# lines times characters: of a longer file nothing is said, since each line costs a reading of those before it
_MOST_WORK = 4_000_000


def place_of(message: str, path: Path, overridden: Collection[str] = ()) -> str:
    """The file and the line of the key that a refusal is about, as " (FILE, line N)"; empty where it names none.

    overridden: keys whose value is not the file's.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
    for key in _keys_in(message):
        line = None if key in overridden else line_of(text, key)
        if line is not None:
            return f" ({path}, line {line})"
    return ""


def line_of(text: str, key: str) -> int | None:
    """The line, from 1, at which the value of a dotted key begins; entries of a list count from 0.

    >>> text = 'seed = 1\\n[train]\\n# how long\\nsteps = [\\n 2,\\n]\\n[[environments]]\\nname = "a"\\n'
    >>> line_of(text, "train.steps"), line_of(text, "environments.0.name"), line_of(text, "train.rate")
    (4, 8, None)
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) * len(text) > _MOST_WORK or not _holds(_parsed(text), key):
        return None
    begin = 0
    for number in range(1, len(lines) + 1):
        # no prefix that ends within a value is TOML
        tables = _parsed("\n".join(lines[:number]))
        if tables is None:
            continue
        if _holds(tables, key):
            return 1 + next(i for i in range(begin, number) if not _is_blank(lines[i]))
        begin = number
    return None


def _keys_in(message: str) -> list[str]:
    """What a refusal may be about: the key that it begins with, then each dotted one."""
    begin = re.match(r"(?:(?:unknown )?config key )?['\"]?([\w-]+(?:\.[\w-]+)*)", message)
    return ([begin[1]] if begin else []) + re.findall(r"\b[\w-]+(?:\.[\w-]+)+\b", message)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _holds(tables: Any, key: str) -> bool:
    if tables is None:
        return False
    for name in key.split("."):
        if isinstance(tables, list) and name.isdecimal() and len(name) < 10 and int(name) < len(tables):
            tables = tables[int(name)]
        elif isinstance(tables, dict) and name in tables:
            tables = tables[name]
        else:
            return False
    return True


def _is_blank(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")
