"""What of its wall time a cell is charged for: not the CPUs that others have, nor tools, but neither without end."""

from __future__ import annotations

from collections.abc import Callable

from gtpo.sandbox.contract import SandboxLimits

# On a machine that is busy, a cell which has just been given more time is not looked at again before.
_ASK_AGAIN_S = 0.05


class WallClock:
    """Of one cell that starts at `now`.

    run_delay_s: says for how long the cell's interpreter has waited for a CPU since it was started.
    start: moves on by the time of tools, so `now - start` is the cell's own time.
    """

    def __init__(self, limits: SandboxLimits, run_delay_s: Callable[[], float], *, now: float) -> None:
        self.start = now
        self._limits, self._whole_run_delay_s = limits, run_delay_s
        # What of the wall time does not count: for tools, and for a CPU as of when it was last asked.
        self._tool_time_s = self._run_delay_s = 0.0
        self._run_delay_start: float | None = None
        # Since when the trainer works on a tool call of the cell.
        self._call_start: float | None = None

    @property
    def is_in_call(self) -> bool:
        """Whether the trainer works on a tool call of the cell."""
        return self._call_start is not None

    def begin_call(self, now: float) -> None:
        self._call_start = now

    def end_call(self, now: float) -> None:
        assert self._call_start is not None
        waited_s = now - self._call_start
        self._tool_time_s += waited_s
        self.start += waited_s
        self._call_start = None

    def watch_run_delay(self) -> None:
        """From the first call on, waiting for a CPU is not the cell's."""
        if self._run_delay_start is None:
            self._run_delay_start = self._whole_run_delay_s()

    def left_s(self, now: float) -> float:
        """Until the clock has to be looked at more closely."""
        if self._call_start is not None:
            return self._limits.tool_time_s - self._tool_time_s - (now - self._call_start)
        return self._limits.wall_time_s + self._run_delay_s - (now - self.start)

    def extend(self, now: float) -> None:
        """Let the cell have the time in which it waited for a CPU; TimeoutError where it has had all it may."""
        if self.left_s(now) > 0:
            # A call of a tool has just begun or ended.
            return
        if self._call_start is not None:
            raise TimeoutError(f"time limit of {self._limits.tool_time_s:g} s for tools exceeded")
        if self._run_delay_start is not None:
            most_s = self._limits.max_wall_time_s - self._limits.wall_time_s
            self._run_delay_s = min(self._whole_run_delay_s() - self._run_delay_start, most_s)
            left_s = self.left_s(now)
            if left_s > 0 and self._run_delay_s < most_s:
                self._run_delay_s += max(_ASK_AGAIN_S - left_s, 0.0)
        if self.left_s(now) <= 0:
            raise TimeoutError(f"wall time limit of {self._limits.wall_time_s:g} s exceeded")
