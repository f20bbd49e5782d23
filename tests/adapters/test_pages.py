"""The Python in the pages of trainers that are not installed here, with the names that it imports put in their place.

`foreign/test_pages.py` runs the pages of those that can be installed.
"""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gtpo.adapters.nemo_rl import GTPOAdvantageEstimator
from gtpo.adapters.rllm import gtpo_advantages
from tests.adapters.attempts import by_the_formula
from tests.adapters.conftest import ROOT, run_python_blocks

PAGES = ROOT / "docs" / "adapters"


@pytest.fixture(autouse=True)
def no_module_stays() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("nemo_rl", "prime_rl", "rllm"):
            del sys.modules[name]


def put(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    """A module of that name, and the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end])) or ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    vars(module).update(names)
    return module


def test_nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    grpo = put(monkeypatch, "nemo_rl.algorithms.grpo", _create_advantage_estimator=None)
    run_python_blocks(PAGES / "nemo_rl.md")
    estimator = grpo._create_advantage_estimator({"grpo": {}})
    assert isinstance(estimator, GTPOAdvantageEstimator)
    mask = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]])
    found = estimator.compute_advantage(torch.zeros(2, 3), torch.tensor([1.0, 0.0]), mask)
    expected = by_the_formula([[0.0, 1.0], [0.0]], "aa", gamma=0.9)
    assert found[0, [1, 3]].tolist() == pytest.approx(expected[0], rel=1e-5)


def test_prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    assigned: list[list[float]] = []
    put(
        monkeypatch,
        "prime_rl.orchestrator.algo.base",
        Algorithm=object,
        iter_trainable_traces=lambda episodes: ((episode, episode.trace) for episode in episodes),
    )
    put(
        monkeypatch,
        "prime_rl.orchestrator.algo.routing",
        assign_advantages=lambda trace, values: assigned.append(values),
    )
    scope = run_python_blocks(PAGES / "prime_rl.md")
    turn, tool = SimpleNamespace(mask=[True]), SimpleNamespace(mask=[False])
    episodes = [
        SimpleNamespace(trace=SimpleNamespace(nodes=nodes, info={}, reward=reward))
        for nodes, reward in (([turn, tool, turn], 1.0), ([turn], 0.0))
    ]
    asyncio.run(scope["GTPOAlgorithm"]().score_group(episodes))
    assert assigned == [pytest.approx(row, rel=1e-5) for row in by_the_formula([[0.0, 1.0], [0.0]], "aa", gamma=0.9)]


@pytest.mark.parametrize("keeps_steps", [True, False])
def test_rllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keeps_steps: bool) -> None:
    """With a file, for `register` reads the source."""
    package = tmp_path / "rllm" / "trainer" / "algorithms"
    package.mkdir(parents=True)
    lines = ["REGISTRY = {}", "def register_adv_estimator(name):", "    return lambda f: REGISTRY.setdefault(name, f)"]
    lines += ["# if not f.writes_step_advantages: overwrite them"] * keeps_steps
    (package / "advantage.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    if not keeps_steps:
        with pytest.raises(ImportError, match=r"this rLLM overwrites step\.advantage"):
            run_python_blocks(PAGES / "rllm.md")
        return
    run_python_blocks(PAGES / "rllm.md")
    advantage = importlib.import_module("rllm.trainer.algorithms.advantage")
    assert {"gtpo": gtpo_advantages} == advantage.REGISTRY


@pytest.mark.parametrize("page", ["areal", "openrlhf", "skyrl", "slime"])
def test_pages_that_need_no_trainer(page: str) -> None:
    run_python_blocks(PAGES / f"{page}.md")
