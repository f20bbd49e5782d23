"""Whether a run still has something to learn from: a warning where rewards do not differ within any group."""

from collections.abc import Mapping

_EVERY = 10


class SpreadWatch:
    """Counts the steps in a row in whose groups all rewards were equal: such a step has no advantage to learn from.

    >>> watch = SpreadWatch()
    >>> [watch.after_step({"frac_reward_zero_std": 1.0, "success": 0.0}) for _ in range(10)][8:]
    ['', 'no group had two different rewards for 10 steps (success 0%): the tasks may be too hard to learn from']
    >>> watch.after_step({"frac_reward_zero_std": 0.5, "success": 0.2}), watch.count
    ('', 0)
    """

    def __init__(self) -> None:
        self.count = 0

    def after_step(self, metrics: Mapping[str, float]) -> str:
        """What to say after a step; empty most of the time."""
        self.count = self.count + 1 if metrics["frac_reward_zero_std"] == 1 else 0
        if self.count == 0 or self.count % _EVERY:
            return ""
        success = metrics["success"]
        cause = "the tasks may be too hard" if success < 0.5 else "the tasks may be too easy"
        return (
            f"no group had two different rewards for {self.count} steps (success {success:.0%}): {cause} to learn from"
        )
