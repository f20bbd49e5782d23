"""A reward term of your own: a float a turn. `warehouse.toml` names it and gives its weight."""

from gtpo import Trajectory


def few_looks(trajectory: Trajectory, free: int = 2) -> list[float]:
    """Minus 1 for every turn that still calls after the first `free` turns."""
    return [-1.0 if turn.calls and number >= free else 0.0 for number, turn in enumerate(trajectory.turns)]
