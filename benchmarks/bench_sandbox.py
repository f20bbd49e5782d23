"""With GTPO_BENCH_SMOKE=1: `make bench-sandbox` runs at tiny sizes and writes its rows; no figure is judged."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import sandbox
from benchmarks.sandbox_calls import CELLS, NOTES

pytestmark = pytest.mark.skipif(os.environ.get("GTPO_BENCH_SMOKE") != "1", reason="the command has true sizes")


def bench_sandbox_command(tmp_path: Path) -> None:
    assert sandbox.main(["--smoke", "--soak", "300", "--results", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench-sandbox.json").read_text())
    names = {"cold", "bwrap", "ipykernel", "smolagents", "in_place", "snapshot", "stateless", "fresh"}
    assert {(row["name"], row["cell"]) for row in rows} == {(name, cell) for name in names for cell in CELLS}
    for row in rows:
        measured = [row["p50_ms"], row["p99_ms"], row["per_s"]]
        # What is not installed says so; ours is.
        assert None not in measured or (row["note"].startswith("absent: ") and row["name"] in names - set(NOTES))
    faults = json.loads((tmp_path / "bench-sandbox-faults.json").read_text())
    lost = [fault for fault in faults if "sessions lost" in fault["figure"]]
    assert len(lost) == 7 and all(fault["passed"] for fault in lost), lost
