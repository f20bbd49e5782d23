"""`python -m gtpo.report.compare RUN_A RUN_B`: are the metrics of two runs equal bit for bit, timing fields aside?

Exits 0 if so, 1 with the first differences, 2 with one line for what is no run.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtpo.run_folder import read_rows


def is_timing(key: str) -> bool:
    """Whether a field of a log measures time, by its name.

    >>> is_timing("time/generate_s"), is_timing("tokens_per_s"), is_timing("seconds"), is_timing("loss")
    (True, True, True, False)
    """
    return key.endswith("_s") or key == "seconds"


def without_timing(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not is_timing(key)}


def differences(run_a: Path, run_b: Path) -> list[str]:
    """One line for each row of metrics or turns that differs, and for each log whose length does."""
    found = []
    for name in ("metrics.jsonl", "turns.jsonl"):
        rows_a, rows_b = (read_rows(run / name) for run in (run_a, run_b))
        if len(rows_a) != len(rows_b):
            found.append(f"{name}: {len(rows_a)} rows against {len(rows_b)}")
        for number, (a, b) in enumerate(zip(rows_a, rows_b, strict=False), start=1):
            a, b = without_timing(a), without_timing(b)
            keys = [key for key in a.keys() | b.keys() if json.dumps(a.get(key)) != json.dumps(b.get(key))]
            if keys:
                found.append(
                    f"{name} row {number}: " + ", ".join(f"{k}: {a.get(k)} / {b.get(k)}" for k in sorted(keys)[:5])
                )
    return found


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m gtpo.report.compare RUN_A RUN_B", file=sys.stderr)
        return 2
    run_a, run_b = map(Path, arguments)
    try:
        found, rows = differences(run_a, run_b), len(read_rows(run_a / "metrics.jsonl"))
    except OSError as error:
        print(
            f"compare: a run must have logs that can be read, got {error.filename}: {error.strerror}", file=sys.stderr
        )
        return 2
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(found[:20]) if found else f"{rows} rows of metrics are equal bit for bit, timing fields aside")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
