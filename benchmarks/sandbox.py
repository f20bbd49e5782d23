"""`make bench-sandbox`: what a call costs in our sandbox and beside it, and what faults and hostile neighbours cost.

Every contestant runs the same two cells and must print the same. Latencies are of one caller, calls per second of four
callers on the CPUs that are there. Ours have the profile that the cell needs: "plain" and "math".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.sandbox_calls import (
    CELLS,
    OTHERS,
    Row,
    bwrap,
    cold,
    measure_other,
    measure_ours,
    snapshot_over_bwrap,
)
from benchmarks.sandbox_faults import Fault, faults
from benchmarks.sandbox_soak import soak

RESULTS = Path(__file__).parent / "results"
# Rounds and calls of bubblewrap in a round, for `snapshot_over_bwrap`.
ROUNDS = {"print": (9, 60), "numpy_sympy": (7, 8)}


def gates(rows: list[Row], over_bwrap: dict[str, float | None]) -> list[Fault]:
    """What was aimed at, of the table of calls, and of `snapshot_over_bwrap` for each cell."""
    at = {(row.name, row.cell): row for row in rows}

    def latency(name: str, most_ms: float) -> Fault:
        figure = at[name, "print"].p50_ms
        return Fault(f"{name}, print: p50", f"{figure} ms, at most {most_ms}", figure is not None and figure <= most_ms)

    def rate(name: str, least: float) -> Fault:
        figure = at[name, "print"].per_s
        return Fault(f"{name}, print: calls/s", f"{figure}, at least {least}", figure is not None and figure >= least)

    def faster(cell: str, least: float) -> Fault:
        ratio = over_bwrap[cell]
        figure = "bwrap is absent" if ratio is None else f"{ratio:.1f} x bwrap + python, at least {least}"
        return Fault(f"snapshot, {cell}: calls/s", figure, ratio is not None and ratio >= least)

    return [
        latency("in_place", 0.6),
        latency("snapshot", 5.0),
        latency("stateless", 9.0),
        rate("snapshot", 400),
        rate("stateless", 300),
        faster("print", 10),
        faster("numpy_sympy", 40),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that it runs")
    parser.add_argument("--soak", type=int, default=0, metavar="CALLS", help="also a soak of so many calls")
    parser.add_argument(
        "--results", type=Path, help="where to write (default: benchmarks/results; with --smoke nowhere)"
    )
    options = parser.parse_args(arguments)
    rows = []
    for context, note, num_callers in OTHERS:
        for cell in CELLS:
            slow = context in (cold, bwrap)
            num_calls = 1 if options.smoke else (100 if cell == "print" else 20) if slow else 300
            rows.append(measure_other(context, note, num_callers, cell, num_calls))
            _show(asdict(rows[-1]))
    rows += asyncio.run(measure_ours(5 if options.smoke else 400))
    for row in rows[len(OTHERS) * len(CELLS) :]:
        _show(asdict(row))
    # In turns, since what a machine gives moves by a tenth from minute to minute.
    over_bwrap = {
        cell: asyncio.run(snapshot_over_bwrap(cell, *((1, 4) if options.smoke else ROUNDS[cell]))) for cell in CELLS
    }
    found = gates(rows, over_bwrap) + asyncio.run(faults(smoke=options.smoke))
    if options.soak:
        found.append(asyncio.run(soak(options.soak)))
    print()
    for fault in found:
        print(f"{'PASS' if fault.passed else 'FAIL'}  {fault.name:<32} {fault.figure}")
    folder = options.results or (None if options.smoke else RESULTS)
    if folder is not None:
        machine = f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}"
        about = {"machine": machine, "cpus": os.cpu_count(), "uid": os.getuid(), "smoke": options.smoke}
        folder.mkdir(exist_ok=True)
        (folder / "bench-sandbox.json").write_text(json.dumps([asdict(row) | about for row in rows], indent=1) + "\n")
        text = json.dumps([asdict(fault) | about for fault in found], indent=1)
        (folder / "bench-sandbox-faults.json").write_text(text + "\n")
    return 0 if options.smoke or all(fault.passed for fault in found) else 1


def _show(row: dict[str, Any]) -> None:
    figures = "".join(f"{row[key] if row[key] is not None else '-':>10}" for key in ("p50_ms", "p99_ms", "per_s"))
    print(f"{row['name']:<12} {row['cell']:<12} {figures}   {row['note']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
