"""What is wrong in a file is refused with the file and the line, whatever key it is and however it was written."""

from pathlib import Path

import pytest

from gtpo.__main__ import main
from gtpo.config import describe_keys
from gtpo.config_lines import line_of, place_of

NUMBERS = [key for key, value, *_ in describe_keys() if type(value) in (int, float) and not key.startswith("credit.")]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_wrong_value_of_each_key_is_refused_with_its_line(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, _, name = key.rpartition(".")
    lines = ["# a run", 'output_dir = "runs/of a test"', f"[{table}]" if table else "", "", f'{name} = "many"']
    config = tmp_path / "config.toml"
    config.write_text("\n".join(lines) + "\n")
    assert main(["train", str(config)]) == 2
    error = capsys.readouterr().err
    assert key in error and error.endswith(f" ({config}, line 5)\n") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("[a]\nb = 1\n[c]\nb = 2", "c.b", 4),
        ("a.b.c = 1", "a.b.c", 1),
        ("[a]\nx = 1\n[a.b]\nc = 1", "a.b.c", 4),
        ('text = """\nb = 1\n"""\nb = 2', "b", 4),
        ("list = [\n  1,\n  2,\n]\nb = 2", "list", 1),
        ("list = [\n  1,\n  2,\n]\n\n# next\nb = 2", "b", 7),
        ("a = { b = 1, c = 2 }", "a.c", 1),
        ("[[a]]\nn = 1\n[[a]]\nn = 2\n[[a]]", "a.1.n", 4),
        ("[[a]]\n[a.options]\npath = 1", "a.0.options.path", 3),
        ('"quoted key" = 1\r\nb = 1\r\n', "b", 2),
        ("b = 1", "c", None),
        ("b = 1", "b.c", None),
        ("a = [1]", "a.1", None),
        ("not TOML", "not", None),
        ("", "a", None),
    ],
)
def test_the_line_of_a_key(text: str, key: str, line: int | None) -> None:
    assert line_of(text, key) == line


def test_a_value_of_the_command_line_has_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text("seed = -1\n[train]\nsteps = -1\n")
    for words in (["--seed", "-2"], ["--seed=-2"]):
        assert main(["train", str(config), *words]) == 2
        assert capsys.readouterr().err == "gtpo: seed must be at least 0, got -2\n"
    assert main(["train", str(config), "--seed=2"]) == 2
    assert capsys.readouterr().err == f"gtpo: train.steps must be at least 0, got -1 ({config}, line 3)\n"


def test_a_refusal_that_names_no_key_has_no_place(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("seed = 1\n")
    assert place_of("expected --key value, got 'x'", config) == ""
    assert place_of("seed must be at least 2", tmp_path / "absent.toml") == ""
    config.write_bytes(b"\xff\xfe")
    assert place_of("seed must be at least 2", config) == ""
    config.write_text("seed = 1\n" * 5000)
    assert place_of("seed must be at least 2", config) == ""
