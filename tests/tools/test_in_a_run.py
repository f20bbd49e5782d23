"""Tools of a configuration in a run: offered, called, counted, closed; a fault in a table ends it before any work."""

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest

from gtpo.__main__ import main
from gtpo.metrics import tool_metrics
from gtpo.run_folder import read_rows
from gtpo.types import ToolStatus
from tests.tools.test_sql import children
from tests.trainer.conftest import script
from tests.trainer.test_trainer import make_trainer, write_config


def overrides(folder: Path) -> list[str]:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "ulm.txt").write_text("The minster of Ulm has the tallest steeple.")
    with contextlib.closing(sqlite3.connect(folder / "cities.db")) as connection:
        connection.executescript(
            "CREATE TABLE city (name TEXT, people INTEGER); INSERT INTO city VALUES ('Ulm', 128928)"
        )
    pairs = {
        "sft.steps": "0",
        "rollout.max_trajectory_tokens": "2000",
        "rollout.max_completion_tokens": "300",
        "rollout.call_format": "json",
        "rollout.tools": '["search", "cities"]',
        "tools.search.corpus": f"{folder}/corpus",
        "tools.cities.kind": "sql",
        "tools.cities.database": f"{folder}/cities.db",
        "tools.cities.max_calls": "1",
    }
    return [word for key, value in pairs.items() for word in (f"--{key}", value)]


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_a_run_offers_calls_counts_and_closes_its_tools(tmp_path: Path) -> None:
    others = children()
    with make_trainer(tmp_path, *overrides(tmp_path)) as trainer:
        # no tool runs code, so no sandbox was started
        assert trainer.sandbox is None and len(children() - others) == 1
        texts = [
            call("search", query="steeple") + call("cities", query="SELECT name FROM city"),
            call("cities", query="SELECT 1") + call("python", code="1"),
            "answer: 4",
        ]
        task = trainer.train_tasks[0]
        played = trainer._loop.run(trainer.rollout.play(task, 0, script(trainer.chat, texts)))
        trainer.step(0)
    assert children() == others
    assert [[(result.status, result.text) for result in turn.results] for turn in played.turns] == [
        [(ToolStatus.OK, "[1] ulm.txt\nThe minster of Ulm has the tallest steeple."), (ToolStatus.OK, "name\nUlm")],
        [
            (ToolStatus.OVER_QUOTA, "cities: no call is left, all 1 of this task are used. Go on without it."),
            (ToolStatus.UNKNOWN_TOOL, "Unknown tool 'python'. Known tools: search, cities."),
        ],
        [],
    ]
    counted = tool_metrics([played], ["search", "cities"])
    assert (counted["tools/search/calls"], counted["tools/cities/calls"], counted["tools/cities/failures"]) == (1, 2, 1)
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert counted.keys() <= row.keys()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["tools"]["cities"] == {"kind": "sql", "database": f"{tmp_path}/cities.db", "max_calls": 1}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tools.search.top_k", "5"], "tools.search: unexpected option 'top_k', known are corpus, description, "),
        (["--tools.cities.database", "none.db"], "tools.cities: database must be a file, got none.db"),
        (["--rollout.tools", '["search"]'], "tools.cities is not offered: rollout.tools must hold 'cities'"),
        # a fault behind the tools: what they hold is given back
        (["--rollout.max_trajectory_tokens", "1"], "prompts too long for rollout.max_trajectory_tokens = 1; "),
    ],
)
def test_a_fault_ends_the_run_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    others = children()
    assert main(["train", str(write_config(tmp_path)), *overrides(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists() and children() == others
