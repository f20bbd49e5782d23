"""What a configuration is read from: its TOML file, and values of the types that its keys have."""

import dataclasses
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

_PLAIN: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a text", (str,)),
}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of the file. Raises ValueError with the file, and the line where there is one."""
    try:
        # a byte-order mark, which some editors write, is no part of the text
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"CONFIG.toml must be a file that can be read, got {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ValueError(f"{path}, line {line}: expected text in UTF-8, got the byte {byte:#x}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def refuse_wrong_types(raw: Mapping[str, Any], cls: type, *, prefix: str = "") -> None:
    """Raises ValueError for a value of another type than its key has in the dataclass `cls`, at any depth.

    To Python `true` is a number and pydantic reads "8" as one, so that a slip would go unseen. Keys that `cls` has not
    are not looked at.

    >>> from gtpo.config import Config
    >>> refuse_wrong_types({"train": {"learning_rate": True}}, Config)
    Traceback (most recent call last):
    ValueError: config key 'train.learning_rate': expected a number, got True
    """
    for key, kind in get_type_hints(cls).items():
        if key in raw:
            _refuse_wrong_type(f"{prefix}{key}", raw[key], kind)


def _refuse_wrong_type(name: str, value: Any, kind: Any) -> None:
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        if isinstance(value, kind):
            return
        if not isinstance(value, Mapping):
            raise ValueError(f"config key {name!r} must be a table, got {shortened(value)}")
        refuse_wrong_types(value, kind, prefix=f"{name}.")
    elif get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
        if not isinstance(value, Mapping | list | tuple):
            raise ValueError(f"config key {name!r} must be a list of tables, got {shortened(value)}")
        # as a table {"0": {...}} it changes entries of a list that is there
        for number, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _refuse_wrong_type(f"{name}.{number}", item, get_args(kind)[0])
    else:
        refuse_wrong_plain(name, value, kind)


def refuse_wrong_plain(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where `kind` is a plain type and `value` is of another one; other kinds are left alone."""
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if kinds[0] not in _PLAIN or (value is None and types.NoneType in kinds):
        return
    expected, accepted = _PLAIN[kinds[0]]
    if type(value) not in accepted:
        raise ValueError(f"config key {name!r}: expected {expected}, got {shortened(value)}")
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"config key {name!r}: expected a number below 2**63, got {shortened(value)}")
    if type(value) is str and (flaw := broken_text(value)):
        raise ValueError(f"config key {name!r}: expected a text of whole characters, got {flaw}")


def broken_text(text: str) -> str:
    """What is wrong with a text that no file and no tokenizer takes; empty for all others.

    >>> broken_text("naïve 😀"), broken_text(chr(0xD83D))
    ('', 'half a surrogate pair at character 0')
    """
    place = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    return "" if place is None else f"half a surrogate pair at character {place}"


def shortened(value: Any) -> str:
    """`repr`, in at most 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}..."
