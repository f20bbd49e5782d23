"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

from gtpo.__main__ import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        scope: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), scope)
        assert scope["head"].grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_make_targets_and_subcommands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z0-9-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert all(command in usage for command in set(re.findall(r"^gtpo (\w+)", README, re.MULTILINE)))


def test_both_other_algorithms_of_the_name_are_named() -> None:
    assert all(number in README for number in ("2511.14846", "2508.03772", "2508.04349"))
