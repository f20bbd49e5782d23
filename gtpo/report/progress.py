"""Progress bars on long work.

Where the output is no terminal: one line at the end of each phase, and ten during training.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Advance = Callable[..., None]


class Progress:
    """Shows the phases of a run on standard error."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._bars: Bars | None = None

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, line: str) -> None:
        """One line beside the bars."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def phase(self, label: str, *, total: int, done: int = 0) -> Iterator[Advance]:
        """Yields `advance(text="")`, to be called once an item."""
        if self._is_terminal:
            yield from self._bar(label, total, done)
        else:
            yield from self._lines(label, total, done)

    def _bar(self, label: str, total: int, done: int) -> Iterator[Advance]:
        if self._bars is None:
            from rich.console import Console

            columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._bars.start()
        bars = self._bars
        task = bars.add_task(label, total=total, completed=done, text="")
        try:
            yield lambda text="": bars.update(task, advance=1, text=text)
        finally:
            if label in ("generating",):
                bars.remove_task(task)

    def _lines(self, label: str, total: int, done: int) -> Iterator[Advance]:
        started, count = time.perf_counter(), done
        every = max(total // 10, 1)

        def advance(text: str = "") -> None:
            nonlocal count
            count += 1
            if text and (count % every == 0 or count == total):
                print(f"{label} {count}/{total}  {text}", file=sys.stderr, flush=True)

        yield advance
        if label != "generating":
            print(f"{label}: {count}/{total} in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
