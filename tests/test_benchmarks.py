"""How the benchmark commands check, measure and judge; `GTPO_BENCH_SMOKE=1 pytest benchmarks` runs them."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import credit, gpu_check, linear, logits
from benchmarks.measure import PEAKS, Contestant, Outputs, Row, compare, find, publish, with_peak_memory
from gtpo_kernels import BackendUnavailable

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EXACT = {"sum": torch.tensor(6.0, dtype=torch.float64)}


def _row(name: str, backend: str) -> Row:
    return Row(name, backend, {"N": 3}, "float32", 0.0)


def _contestant(name: str, function: Callable[[Tensor], Tensor]) -> Contestant[Tensor]:
    return Contestant(name, "torch", lambda batch: lambda: {"sum": function(batch)})


def _raising(name: str, reason: Exception) -> Contestant[Tensor]:
    def prepare(batch: Tensor) -> Callable[[], Outputs]:
        raise reason

    return Contestant(name, "peer", prepare)


def _compare(*contestants: Contestant[Tensor], **options: float) -> list[Row]:
    batch = torch.tensor([1.0, 2.0, 3.0])
    return compare(contestants, batch, EXACT, _row, allowed=1e-4, rounds=3, device=CPU, **options)


def test_a_contestant_that_computes_something_else_is_refused_and_not_timed() -> None:
    right, wrong, nan = _compare(
        _contestant("right", torch.sum),
        _contestant("wrong", lambda x: x.sum() * 1.01),
        _contestant("nan", lambda x: x.sum() * float("nan")),
    )
    assert (right.note, right.error) == ("", 0.0)
    assert None not in (right.cpu_s, right.wall_s)
    for row in (wrong, nan):
        assert row.note.startswith("refused, computes something else")
        assert row.cpu_s is None
    assert wrong.error == pytest.approx(0.01, rel=1e-3)


def test_other_shapes_are_refused() -> None:
    (row,) = _compare(_contestant("shape", lambda x: x.sum()[None]))
    assert row.note == "refused, computes something else: sum is (1,), not ()"


def test_what_cannot_run_has_a_row_with_the_reason() -> None:
    reasons = {
        "not installed": (ImportError("No module named 'peer'"), "absent: No module named 'peer'"),
        "no kernel": (BackendUnavailable("needs a GPU"), "absent: needs a GPU"),
        "memory": (torch.OutOfMemoryError("1 TiB"), "out of memory"),
        "bug": (KeyError("x"), "failed: KeyError: 'x'"),
    }
    rows = _compare(*(_raising(name, reason) for name, (reason, _) in reasons.items()), _contestant("sum", torch.sum))
    assert [row.note for row in rows] == [note for _, note in reasons.values()] + [""]


def test_after_the_deadline_nothing_is_begun() -> None:
    (row,) = _compare(_contestant("sum", torch.sum), deadline=0.0)
    assert (row.note, row.cpu_s) == ("not run: out of time", None)


def test_what_a_call_overwrites_is_put_back_before_every_call() -> None:
    def prepare(batch: Tensor) -> Callable[[], Outputs]:
        return lambda: {"sum": batch.mul_(2.0).sum()}

    seen = []

    def reset(batch: Tensor) -> None:
        seen.append(batch.sum().item())
        batch.copy_(torch.tensor([0.5, 1.0, 1.5]))

    (row,) = _compare(Contestant("in place", "torch", prepare, reset))
    assert row.error == 0.0
    assert seen == [6.0] * (PEAKS + 3)  # the check and three rounds


def test_peak_memory_counts_what_is_freed_again() -> None:
    def call() -> int:
        return len(torch.ones(2**24).mul_(2.0))  # 64 MiB

    _, peak = with_peak_memory(call, CPU)
    assert 63.0 <= peak < 80.0


def test_the_collector_passes_over_earlier_objects_only_within_a_comparison() -> None:
    frozen: list[int] = []
    _compare(_contestant("sum", lambda x: frozen.append(gc.get_freeze_count()) or x.sum()))
    assert frozen[0] > 0
    assert gc.get_freeze_count() == 0


def test_gates_stand_in_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = _row("ours", "cpp")
    row.gate("CPU <= 1 x floor", False)
    row.gate("memory <= 9 MiB", True)
    publish("bench-x", "Caption.", [row], tmp_path)
    printed = capsys.readouterr().out
    assert "CPU <= 1 x floor FAIL; memory <= 9 MiB PASS" in printed
    assert "bench-x: 1 gates PASS, 1 FAIL\n  FAIL ours N=3 float32 mask 0: CPU <= 1 x floor" in printed
    (written,) = json.loads((tmp_path / "bench-x.json").read_text())
    assert written["gates"] == {"CPU <= 1 x floor": "FAIL", "memory <= 9 MiB": "PASS"}


def test_missing_figures_fail_the_gates() -> None:
    plan = linear.PLANS[0]
    rows = [_row("linear_gtpo_loss, cpp", "cpp")]
    linear.judge(plan, 0.0, rows)
    assert rows[0].gates == {"CPU <= 1.08 x floor": "FAIL", "memory <= 100 MiB": "FAIL"}
    for module, name, others in (
        (logits, "gtpo_loss_, cpp", ()),
        (credit, "turn_advantages, cpp", (credit.GRPO_LOOP, credit.RETURNS_LOOP)),
    ):
        rows = [_row(other, "x") for other in (name, *others)]
        module.judge(rows)
        assert set(find(rows, name).gates.values()) == {"FAIL"}


def test_figures_within_the_limits_pass() -> None:
    line = _row("linear_gtpo_loss, cpp", "cpp")
    line.ratio_to_floor, line.extra_mb = 0.76, 99.0
    linear.judge(linear.PLANS[0], 0.3, [line])
    assert set(line.gates.values()) == {"PASS"}


def test_gpu_check_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_gpu_check_goes_on_without_what_ends_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process dies in the third contestant, then in the fifth, then finishes the rest."""
    shape = gpu_check.SMOKE_SHAPES[0]
    names = [contestant.name for contestant in gpu_check.contestants(shape)]
    deadly = [names[2], names[4]]

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        without = command[command.index("--without") + 1 :]
        for name in deadly:
            if name not in without:
                (tmp_path / "progress").write_text(name)
                return subprocess.CompletedProcess(command, -11, "", "an illegal memory access")
        rows = [vars(_row(name, "x")) for name in names if name not in without]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    options = gpu_check.parse(["--device", "cpu", "--smoke"])
    rows = gpu_check.measure_in_process(0, options, float("inf"), tmp_path)
    assert [row.name for row in rows] == names
    failed = {row.name: row.note for row in rows if row.note}
    assert failed == dict.fromkeys(deadly, "failed: ended its process: an illegal memory access")


def test_gpu_check_reports_tests_that_fail(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one():\n    assert False\n")
    report = gpu_check.run_tests("cpu", [str(tmp_path)], 120.0)
    assert "**failed** (exit code 1)" in report
    assert "test_one" in report
    assert sys.executable not in report
