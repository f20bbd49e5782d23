"""The examples of docs/tools.md work as they stand, and its tables name every option."""

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gtpo.tools import TOOL_KINDS, CallLimits

GUIDE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()


def test_the_examples_print_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEATHER_TOKEN", "secret")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    # the page registers a kind, which is taken back at the end
    monkeypatch.setitem(TOOL_KINDS, "dice", TOOL_KINDS["calculator"])
    blocks = re.findall(r"```(toml|python)\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 5
    for _, block in blocks:
        # a block that begins with a file's name is that file
        if named := re.match(r"# (\S+\.(?:py|toml))\n", block):
            Path(named[1]).write_text(block)
        else:
            exec(compile(block, "docs/tools.md", "exec"), {})
    names, _, printed = capsys.readouterr().out.partition("\n")
    assert re.search(r"prints the names (.*?), and then", GUIDE)[1].replace("`", "'") == names.strip("[]")  # type: ignore[index]
    (expected,) = re.findall(r"```text\n(.*?)```", GUIDE, re.DOTALL)
    assert printed == expected


def test_every_option_is_in_its_table() -> None:
    sections = dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##|\Z)", GUIDE, re.DOTALL | re.MULTILINE))
    pages: dict[str, Callable[..., object]] = {
        kind: build for kind, build in TOOL_KINDS.items() if kind != "calculator"
    }
    pages["Limits that every tool takes"] = CallLimits
    for title, build in pages.items():
        rows = [line.split("|") for line in sections[title].splitlines() if line.startswith("| `")]
        documented = [name for row in rows for name in re.findall("`(\\w+)`", row[1])]
        parameters = {name: p for name, p in inspect.signature(build).parameters.items() if name != "name"}
        assert sorted(documented) == sorted(parameters), title
        for row in rows:
            defaults = [parameters[name].default for name in re.findall("`(\\w+)`", row[1])]
            assert ("required" in row[2]) == (inspect.Parameter.empty in defaults), row[1]
            if all(type(default) in (float, int) and default < 1e5 for default in defaults):
                assert row[2].strip() == ", ".join(f"{default:g}" for default in defaults), row[1]
