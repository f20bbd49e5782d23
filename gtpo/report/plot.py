"""Reward, success and turns over the steps of a run, as one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """rows: those of `metrics.jsonl`. Thin lines are steps, thick ones their mean over a tenth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row["phase"] == "train"]
    evaluations = [row for row in rows if row["phase"] == "eval"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (key, title) in zip(
        axes, [("reward", "reward"), ("success", "success"), ("turns/mean", "turns")], strict=True
    ):
        x, y = [row["step"] for row in steps], [row[key] for row in steps]
        axis.plot(x, y, linewidth=0.6, alpha=0.5, color="tab:blue")
        axis.plot(x, _running_mean(y, max(len(y) // 10, 1)), linewidth=2, color="tab:blue", label="training tasks")
        if key != "reward" and evaluations:
            name = {"success": "success", "turns/mean": "turns"}[key]
            axis.plot(
                [row["step"] for row in evaluations],
                [row[name] for row in evaluations],
                "o",
                color="tab:red",
                label="held-out tasks",
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]
