"""A "sandbox" that lets everything through, to see that the abuse suite notices."""

import contextlib
from collections.abc import AsyncIterator

from gtpo.sandbox import CellResult, CellStatus


class Careless:
    """A sandbox and its one session."""

    async def open(self) -> "Careless":
        return self

    async def run(self, code: str) -> CellResult:
        return CellResult(CellStatus.OK, "ESCAPED")

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[Careless]:
    yield Careless()
