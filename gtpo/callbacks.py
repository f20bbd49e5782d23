"""What a run tells the code around it: a `Callback` is called after each step, evaluation and checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtpo.credit import Scored
from gtpo.evaluation import Evaluation


class Callback:
    """Override what you need. What a callback raises ends the run, as any other error of the trainer's does.

    A callback may call `Trainer.stop` of the trainer that it was given to.

    >>> class Lengths(Callback):
    ...     def after_step(self, step, metrics, groups):
    ...         print(step, metrics["success"], [len(scored.trajectory.turns) for group in groups for scored in group])
    >>> Lengths().after_step(1, {"success": 0.5}, [])
    1 0.5 []
    """

    def after_step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[Sequence[Scored]]) -> None:
        """After step number `step`, from 1. metrics: its row of metrics.jsonl. groups: lost trajectories left out."""

    def after_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """After an evaluation, before the first step (`step` is 0) or behind step number `step`."""

    def after_checkpoint(self, step: int, path: Path) -> None:
        """After the checkpoint of step number `step` is on the disk, whole."""
