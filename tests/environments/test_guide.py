"""The examples of docs/adding_an_environment.md work as they stand."""

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gtpo.chat import Chat
from gtpo.config import RolloutConfig
from gtpo.policy import Policy
from gtpo.sft import demonstrate_one
from gtpo.types import StopReason, ToolStatus
from tests.trainer.conftest import make_rollout, policy  # noqa: F401

GUIDE = Path(__file__).parents[2] / "docs" / "adding_an_environment.md"


def test_example_of_the_guide(play: Callable, run_cells: Callable) -> None:
    source, _ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    environment = namespace["LedgerEnvironment"]()
    tasks = environment.tasks("eval", 20, seed=0)
    for episode in play(environment, tasks):
        assert environment.grade(episode.task, episode.answer) == 1.0
        assert environment.expected_output(episode.task, episode.codes[0], episode.results[0].text) is True
    (result,) = run_cells(environment, tasks[0], ["print(page(1), page(2))"])
    assert (result.status, result.text) == (ToolStatus.ERROR, "RuntimeError: one page a cell")


def test_the_world_of_the_guide(policy: Policy) -> None:  # noqa: F811
    _, source = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    environment = namespace["ShopEnvironment"]()
    config = RolloutConfig(call_format="json", max_trajectory_tokens=4000, max_completion_tokens=500)
    rollout = make_rollout(environment, Chat(policy.tokenizer, call_format="json"), None, config)
    for task in environment.tasks("eval", 3, seed=0):
        oracle = environment.oracle(task, random.Random(0))
        trajectory = asyncio.run(demonstrate_one(rollout, oracle, task))
        assert (trajectory.stop, trajectory.outcome) == (StopReason.FINISHED, 1.0)
        assert dict(trajectory.measures) == {"over": 0.0} and dict(trajectory.turns[0].rewards) == {"progress": 0.1}
