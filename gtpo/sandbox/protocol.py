"""What rollouts and tools ask of a sandbox, ours or another's behind an adapter."""

from typing import Protocol

from gtpo.sandbox.contract import CellResult


class Session(Protocol):
    """One interpreter, whose variables last from cell to cell."""

    async def run(self, code: str) -> CellResult:
        """Run the next cell. Never raises for what the code does."""
        ...

    async def close(self) -> None:
        """End the session. Closing twice is harmless."""
        ...


class Sandbox(Protocol):
    """Opens sessions, between `start` and `close`."""

    async def start(self) -> None:
        """Raises SandboxUnavailable where code cannot be run."""
        ...

    async def open(self, setup_code: str = "") -> Session:
        """A session after `setup_code`. Raises RuntimeError where that fails, SandboxUnavailable where none starts."""
        ...

    async def close(self) -> None:
        """End all sessions."""
        ...
