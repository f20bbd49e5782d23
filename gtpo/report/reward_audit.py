"""Whether a reward term runs against what the run is for."""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from gtpo.methods import REWARD_TERMS

_NUM_STEPS = 8
_MIN_CORRELATION = -0.1


class RewardAudit:
    """Watches the terms of the user's own: those of [reward] are paid to failures on purpose.

    A term is named while the mean of its correlation with success over the last 8 steps in which both vary is below
    -0.1; before the fourth such step it is never.

    >>> audit = RewardAudit()
    >>> [audit.after_step({"reward_term/calls/success_correlation": -0.5}) for _ in range(4)][2:]
    ['', '  calls runs against success (-0.50)']
    """

    def __init__(self) -> None:
        self._seen: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_STEPS))

    def after_step(self, metrics: Mapping[str, Any]) -> str:
        """What to say beside the progress of the step whose metrics these are; empty where all is well."""
        said = ""
        for key, value in metrics.items():
            kind, _, rest = key.partition("/")
            name, _, measure = rest.rpartition("/")
            if kind != "reward_term" or measure != "success_correlation" or name in REWARD_TERMS:
                continue
            seen = self._seen[name]
            if value:
                seen.append(value)
            mean = sum(seen) / max(len(seen), 1)
            if len(seen) >= _NUM_STEPS // 2 and mean < _MIN_CORRELATION:
                said += f"  {name} runs against success ({mean:.2f})"
        return said
