"""The example of docs/library.md runs, beside a loop that runs already as in a notebook."""

import asyncio
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "library.md"


def test_the_guides_example_runs_inside_a_running_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)

    async def notebook() -> None:
        exec(source, {})

    asyncio.run(notebook())
    assert re.search(r"success \d+% -> \d+%, in runs/library", capsys.readouterr().out)
    assert (tmp_path / "runs" / "library" / "metrics.jsonl").exists()
