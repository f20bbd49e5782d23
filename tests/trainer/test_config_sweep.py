"""Every key of the configuration under values that it cannot have: one clear line for each, and nothing else."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gtpo.config import config_from_dict, describe_keys, load_config

BAD: dict[str, list[Any]] = {
    "int": [True, 1.0, "1", None, [], {}, math.nan, math.inf, -(10**30), 10**30, 10**400, -2, [1], "\ud83d"],
    "float": [True, "1", [], {}, math.nan, math.inf, -math.inf, 10**400, -(10**400), [1.0], "nan"],
    "bool": [1, 0, 1.0, "true", None, [], {}, math.nan],
    "str": [1, True, 1.5, None, [], {}, math.nan, ["a"], "\ud83d"],
    "one of": [1, True, None, [], {}, math.nan, "", "nothing", ["gtpo"], "\ud83d"],
}
CONTAINERS: list[Any] = [1, True, 1.5, None, "text", math.nan, [1], [[]], [None], {"0": 1}]


def keys() -> Iterator[tuple[str, str]]:
    for key, value, _, allowed, _ in describe_keys():
        # `float | None` may be left out, and None says so
        kind = "one of" if allowed.startswith("one of") else type(value).__name__
        if value is None or kind == "NoneType":
            kind = "float"
        if kind in BAD:
            yield key, kind


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def assert_one_line(error: ValueError, key: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 600 and key.rpartition(".")[2] in text, text


def test_the_sweep_sees_every_kind_of_key() -> None:
    found = list(keys())
    assert {kind for _, kind in found} == set(BAD) and len(found) > 60


@pytest.mark.parametrize(("key", "kind"), list(keys()))
def test_no_key_takes_a_value_of_another_type_or_beyond_all_bounds(key: str, kind: str) -> None:
    for value in BAD[kind]:
        with pytest.raises(ValueError) as refused:
            config_from_dict(nested(key, value))
        assert_one_line(refused.value, key)


@pytest.mark.parametrize(
    "key", ["environments", "rollout.tools", "tools", "credit", "model", "train", "environments.0", "sandbox"]
)
def test_no_table_and_no_list_takes_something_else(key: str) -> None:
    for value in CONTAINERS:
        raw: Any = {"environments": [value]} if key == "environments.0" else nested(key, value)
        with pytest.raises(ValueError) as refused:
            config_from_dict(raw)
        assert_one_line(refused.value, key if key != "environments.0" else "environments")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = 1\nname\xe9 = 2\n", "line 2: expected text in UTF-8, got the byte 0xe9"),
        (b"seed = 1\nseed = 2\n", "is not valid TOML: Cannot overwrite a value (at line 2"),
        (b"\0" * 100, "is not valid TOML"),
        (b'[train]\nschedule = "lin', "is not valid TOML"),
        (b'output_dir = "\\uD83D"\n', "is not valid TOML"),
        (b"seed = " + b"9" * 5000, "is not valid TOML"),
        (b"tools = " + b"[" * 3000, "is not valid TOML"),
        (b"seed = " + b"9" * 300, "config key 'seed': expected a number below 2**63"),
        (b"\xff\xfes\0e\0e\0d\0", "line 1: expected text in UTF-8, got the byte 0xff"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        load_config(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    if "seed'" not in message:
        assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfseed = 3\n", b"seed = 3\r\n[train]\r\nsteps = 2\r\n"])
def test_a_mark_and_line_ends_of_another_system_are_no_fault(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert load_config(path).seed == 3


def test_a_path_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none.toml", "No such file")):
        with pytest.raises(ValueError, match=f"CONFIG.toml must be a file that can be read, got .*: {reason}"):
            load_config(path)


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "true"],
        ["--seed", "1.0"],
        ["--seed", "9" * 5000],
        ["--seed", "[" * 3000],
        ["--train.learning_rate", "true"],
        ["--train.learning_rate", "nan"],
        ["--rollout.group_size", "1e8"],
        ["--train", "3"],
        ["--train.steps.more", "3"],
        ["--environments", "5"],
        ["--environments.0", "5"],
        ["--environments.x.name", "retry"],
        ["--environments.9.name", "retry"],
        ["--tools.python", "5"],
        ["--tools", "[1]"],
        ["--=5"],
        ["--", "5"],
        ["--.", "5"],
        ["--credit.extra_terms", "3"],
        ["--credit.extra_terms.0.weight", "true"],
        ["--output_dir", ""],
        ["--output_dir", "a\0b"],
    ],
)
def test_overrides_are_refused_in_one_line(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    with pytest.raises(ValueError) as refused:
        load_config(path, words)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
