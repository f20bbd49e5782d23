"""The example of docs/adding_an_environment.md works as it stands."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gtpo.types import ToolStatus

GUIDE = Path(__file__).parents[2] / "docs" / "adding_an_environment.md"


def test_example_of_the_guide(play: Callable, run_cells: Callable) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    environment = namespace["LedgerEnvironment"]()
    tasks = environment.tasks("eval", 20, seed=0)
    for episode in play(environment, tasks):
        assert environment.grade(episode.task, episode.answer) == 1.0
        assert environment.expected_output(episode.task, episode.codes[0], episode.results[0].text) is True
    (result,) = run_cells(environment, tasks[0], ["print(page(1), page(2))"])
    assert (result.status, result.text) == (ToolStatus.ERROR, "RuntimeError: one page a cell")
