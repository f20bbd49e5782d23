"""With GTPO_BENCH_SMOKE=1: every command that prints a table runs, at tiny sizes, and writes complete rows."""

import importlib
import json
import os
import warnings
from pathlib import Path

import pytest

COLUMNS = {
    *("name", "backend", "shape", "dtype", "mask_fraction"),
    *("cpu_s", "wall_s", "extra_mb", "ratio_to_floor", "error"),
}
TRAINERS = ("verl", "skyrl", "openrlhf", "areal", "tinker_cookbook")
# backends whose rows are absent in CI, and how the reasons begin: what needs a GPU, and trainers that are no dependency
ABSENT = {
    "cuda": ("absent: backend=",),
    "triton": ("absent: backend=",),
    **{name: (f"absent: No module named {name!r}",) for name in TRAINERS},
}

pytestmark = pytest.mark.skipif(os.environ.get("GTPO_BENCH_SMOKE") != "1", reason="the commands have true sizes")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["linear", "--smoke"], "bench-linear"),
        (["logits", "--smoke"], "bench-logits"),
        (["credit", "--smoke"], "bench-credit"),
        (["skip", "--smoke"], "bench-skip"),
        (["adapters", "--smoke"], "bench-adapters"),
        (["trl_step", "--smoke"], "bench-trl-step"),
        (["gpu_check", "--smoke", "--device", "cpu", "--tests"], "gpu-check"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def bench_command(command: list[str], name: str, tmp_path: Path) -> None:
    module, *options = command
    main = importlib.import_module(f"benchmarks.{module}").main
    with warnings.catch_warnings():
        # the peers' own
        warnings.simplefilter("ignore")
        code = main([*options, "--results", str(tmp_path)])
    assert not code
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert rows
    for row in rows:
        assert set(row) >= COLUMNS
        if row["note"]:
            assert row["backend"] in ABSENT and row["note"].startswith(ABSENT[row["backend"]]), row
        else:
            assert None not in (row["cpu_s"], row["wall_s"], row["extra_mb"], row["ratio_to_floor"]), row
            assert (row["error"] is None) == row["name"].startswith("floor"), row
