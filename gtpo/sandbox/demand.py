"""Whether a running cell wants a CPU or waits, for a timer, a lock or its children, and needs no slot while it does."""

from __future__ import annotations

# A cell that ran, or stood in the queue for a CPU, for less than this share of the time since the last look waits.
_LEAST_SHARE = 0.1


class Demand:
    """What a cell was last seen to want; it begins as one that wants a CPU, with `wanted_s` seconds at `now`.

    >>> demand = Demand(wanted_s=0.0, now=10.0)
    >>> [demand.look(wanted_s=wanted_s, now=now) for wanted_s, now in ((0.05, 10.1), (0.051, 10.2), (0.052, 10.3))]
    [None, True, None]
    >>> demand.look(wanted_s=0.1, now=10.4)
    False
    """

    def __init__(self, *, wanted_s: float, now: float) -> None:
        self._wanted_s, self._time = wanted_s, now
        self._waits = False

    def look(self, *, wanted_s: float, now: float) -> bool | None:
        """True if the cell has begun to wait since the last look, False if it has ceased to; None if nothing changed.

        wanted_s: seconds for which it has run or stood in the queue, from its start.
        """
        waits = wanted_s - self._wanted_s < _LEAST_SHARE * (now - self._time)
        self._wanted_s, self._time = wanted_s, now
        changed, self._waits = waits is not self._waits, waits
        return waits if changed else None
