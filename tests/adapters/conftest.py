"""Tests of the adapters.  Those in `foreign/` need trainers that `make test-adapters` installs in a venv of its own."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Not a skip: `make test` runs everything that it collects.
collect_ignore = [] if os.environ.get("GTPO_TEST_FOREIGN") == "1" else ["foreign"]


class Attempts(NamedTuple):
    """Trajectories as plain lists: rewards and sampled tokens of each turn, tool tokens after it, and the group."""

    rewards: list[list[float]]
    num_tokens: list[list[int]]
    num_tool_tokens: list[list[int]]
    groups: list[str]


ATTEMPTS = Attempts(
    rewards=[[0.0, -0.1, 1.0], [0.0], [0.5, 0.0], [-0.1, 0.0, 0.0, 1.0], [0.0, 1.0], [0.25, 0.0]],
    num_tokens=[[2, 1, 3], [4], [1, 2], [1, 1, 2, 1], [3, 2], [2, 2]],
    num_tool_tokens=[[1, 2, 0], [0], [3, 0], [1, 1, 1, 0], [2, 0], [1, 0]],
    groups=["a", "a", "b", "a", "b", "b"],
)


def by_the_formula(
    rewards: Sequence[Sequence[float]], groups: Sequence[object], *, gamma: float = 0.9, eps: float = 1e-6
) -> list[list[float]]:
    """GTPO's advantages: A = (R - mean) / (std + eps) over all turns of a group, every turn with tokens, ddof 1."""
    returns = []
    for row in rewards:
        values = list(row)
        for j in range(len(values) - 2, -1, -1):
            values[j] += gamma * values[j + 1]
        returns.append(values)
    pools = {g: [r for row, h in zip(returns, groups, strict=True) if h == g for r in row] for g in groups}
    return [
        [(r - mean(pools[g])) / (stdev(pools[g]) + eps) if max(pools[g]) > min(pools[g]) else 0.0 for r in row]
        for row, g in zip(returns, groups, strict=True)
    ]


def turn_ids_of(attempts: Attempts) -> list[list[int]]:
    """Of each trajectory's tokens after the prompt."""
    return [
        [
            turn
            for number, (sampled, inserted) in enumerate(zip(*lengths, strict=True))
            for turn in [number] * sampled + [-1] * inserted
        ]
        for lengths in zip(attempts.num_tokens, attempts.num_tool_tokens, strict=True)
    ]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python_blocks(page: Path) -> int:
    """Execute the Python of a page from top to bottom in one scope, and count the blocks."""
    blocks = page.read_text().split("```python\n")[1:]
    scope: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block.split("```")[0], str(page), "exec"), scope)
    return len(blocks)
