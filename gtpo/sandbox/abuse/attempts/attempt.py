"""What an attempt is, and the three ways to say how it may end."""

from __future__ import annotations

from dataclasses import dataclass

from gtpo.sandbox.contract import CellStatus

OK, ERROR, TIMEOUT, CRASH = CellStatus.OK, CellStatus.ERROR, CellStatus.TIMEOUT, CellStatus.CRASH
OUT_OF_MEMORY = CellStatus.OUT_OF_MEMORY
ANY = (OK, ERROR, TIMEOUT, CRASH, OUT_OF_MEMORY)
REFUSALS = ("PermissionError", "FileNotFoundError", "OSError", "ProcessLookupError", "NotADirectoryError")
# On a busy machine the wall time limit can come first.
CPU, WALL = ("CPU time limit", "wall time limit"), ("wall time limit",)


@dataclass(frozen=True)
class Attempt:
    """A hostile cell and how it may end.

    In `code`, $CANARY is a file of the host that everybody may write, $PORT a port that it listens on, $TRAINER the
    trainer's process id.  `errors` are the beginnings of the error of a safe ending; empty for any.  One that `waits`
    may be ended by nothing but the wall time limit.
    `plant` is a cell before it, `then` one after it, `neighbour` one that another session runs after it: in none of
    them may it have got through.
    """

    kind: str
    name: str
    code: str
    statuses: tuple[CellStatus, ...]
    errors: tuple[str, ...] = ()
    waits: bool = False
    plant: str = ""
    then: str = ""
    neighbour: str = ""


def refused(kind: str, cells: dict[str, str], errors: tuple[str, ...] = REFUSALS) -> list[Attempt]:
    """Cells that must fail with one of `errors`."""
    return [Attempt(kind, name, f"{code}\nprint('ESCAPED')", (ERROR,), errors) for name, code in cells.items()]


def harmless(kind: str, cells: dict[str, str]) -> list[Attempt]:
    """Cells whose own assertions hold."""
    return [Attempt(kind, name, code, (OK,)) for name, code in cells.items()]


def ends(
    kind: str, cells: dict[str, tuple[str, tuple[CellStatus, ...], tuple[str, ...]]], *, waits: bool = False
) -> list[Attempt]:
    """Cells that end in a certain way."""
    return [Attempt(kind, name, code, statuses, errors, waits) for name, (code, statuses, errors) in cells.items()]
