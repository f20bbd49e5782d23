"""The examples of docs/library.md run one after another, beside a loop that runs already as in a notebook."""

import asyncio
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "library.md"


def test_the_guides_examples_run_inside_a_running_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL))
    monkeypatch.chdir(tmp_path)

    async def notebook() -> None:
        exec(source, {})

    asyncio.run(notebook())
    printed = capsys.readouterr().out
    assert re.search(r"success \d+% -> \d+%, in runs/library", printed)
    # of the callback: step, text and reward of a turn
    assert re.search(r"^1 '.*' -?\d+\.\d+$", printed, re.MULTILINE), printed
    assert (tmp_path / "runs" / "library" / "metrics.jsonl").exists()
