"""Hostile cells for any sandbox that runs Python, judged from outside: by the host and the neighbours, not by the code.

    async with SandboxPool(abuse.LIMITS) as pool:
        verdicts = await abuse.run_all(pool.open)

A cell that gets through with what it tries prints ESCAPED. Beside that a verdict needs one of the attempt's safe
endings, an untouched host (file, environment, ports) and a neighbour session that still knows its variable.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gtpo.sandbox.abuse.attempts import ATTEMPTS, Attempt
from gtpo.sandbox.contract import CellResult, CellStatus, SandboxLimits
from gtpo.sandbox.protocol import Session

LIMITS = SandboxLimits(
    cpu_time_s=0.2, wall_time_s=10.0, memory_bytes=256 * 2**20, file_bytes=2**20, output_bytes=4096, max_processes=16
)
"""With these all attempts but those that wait end in a fraction of a second each, and on a busy machine by the same."""
WAITING_LIMITS = replace(LIMITS, wall_time_s=1.0)
"""For attempts that wait."""

_SECRET_NAME, _SECRET = "GTPO_ABUSE_SECRET", "hunter" + "2"


OpenSession = Callable[[], Awaitable[Session]]


@dataclass(frozen=True)
class Verdict:
    """`faults` is empty where the attempt was contained."""

    attempt: Attempt
    result: CellResult
    faults: tuple[str, ...]


class Host:
    """What attempts aim at: a file, two ports, a secret in the environment. `faults()` says what was touched."""

    def __init__(self, folder: Path) -> None:
        self._canary = folder / "canary"
        folder.chmod(0o777)
        self.restore()
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self._tcp.setblocking(False)
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", self._tcp.getsockname()[1]))
        self._udp.setblocking(False)

    def restore(self) -> None:
        """Make the file anew, and be content with what lies beside it."""
        self._canary.unlink(missing_ok=True)
        self._canary.write_text("untouched")
        self._canary.chmod(0o666)
        self._before = self._look()

    def close(self) -> None:
        self._tcp.close()
        self._udp.close()

    def _look(self) -> tuple[Any, ...]:
        folder = self._canary.parent
        status = self._canary.stat()
        names = sorted(entry.name for entry in folder.iterdir())
        return names, self._canary.read_text(), status.st_mode, status.st_mtime_ns, status.st_nlink

    def fill_in(self, code: str) -> str:
        """`code` with the placeholders replaced."""
        port = self._tcp.getsockname()[1]
        places = {"$CANARY": str(self._canary), "$PORT": str(port), "$TRAINER": str(os.getpid()), "$NAME": _SECRET_NAME}
        for place, value in places.items():
            code = code.replace(place, value)
        return code

    def faults(self) -> list[str]:
        """What has happened to the host since its start."""
        found = [] if self._look() == self._before else [f"the host's file was changed: {self._look()}"]
        with contextlib.suppress(BlockingIOError):
            self._tcp.accept()
            found.append("a connection reached the host")
        with contextlib.suppress(BlockingIOError):
            self._udp.recv(1)
            found.append("a datagram reached the host")
        for path in ("/tmp/gtpo-escape", "/dev/shm/gtpo-escape", "/run/gtpo-escape"):
            if os.path.exists(path):
                found.append(f"{path} was written")
        return found


@contextlib.contextmanager
def prepared_host() -> Iterator[Host]:
    """A host with a secret in the environment, for sandboxes that are started inside."""
    os.environ[_SECRET_NAME] = _SECRET
    with tempfile.TemporaryDirectory(prefix="gtpo-abuse-") as folder:
        host = Host(Path(folder))
        try:
            yield host
        finally:
            host.close()
            os.environ.pop(_SECRET_NAME, None)


async def run_one(open_session: OpenSession, attempt: Attempt, host: Host, neighbour: Session) -> Verdict:
    """Run `attempt` in a session of its own and look what has become of everything else."""
    session = await open_session()
    try:
        await session.run("before = 'kept'")
        if attempt.plant:
            await session.run(host.fill_in(attempt.plant))
        result = await session.run(host.fill_in(attempt.code))
        # After a lie, or with its own tools broken, the session may need a turn to come back.
        after = [await session.run("import os\nos.write(1, b'alive')") for _ in range(2)]
        if attempt.then:
            after.append(await session.run(attempt.then))
    finally:
        await session.close()
    faults = host.faults()
    if "ESCAPED" in result.stdout:
        faults.append("it got through")
    if result.status not in attempt.statuses:
        faults.append(f"it ended with {result.status.value}: {result.error}")
    elif attempt.errors and not result.error.startswith(attempt.errors):
        faults.append(f"its error is {result.error!r}")
    if any(cell.status is CellStatus.INFRA_ERROR for cell in after):
        faults.append(f"its session broke: {after[-1].error}")
    if "ESCAPED" in after[-1].stdout:
        faults.append("it got through to the next cell")
    if attempt.neighbour and "ESCAPED" in (await neighbour.run(attempt.neighbour)).stdout:
        faults.append("it got through to its neighbour")
    kept = await neighbour.run("print(kept)")
    if kept.stdout != "kept\n":
        faults.append(f"its neighbour answers {kept.stdout!r} {kept.error!r}")
    return Verdict(attempt, result, tuple(faults))


async def run_all(
    open_session: OpenSession,
    attempts: Sequence[Attempt] = ATTEMPTS,
    *,
    host: Host | None = None,
    open_waiting: OpenSession | None = None,
) -> list[Verdict]:
    """Run `attempts` one after the other beside a neighbour session; `host` must be older than the sandbox.

    `open_waiting` opens the sessions for attempts that wait, of a sandbox with a short wall time limit.
    """
    with contextlib.ExitStack() as stack:
        host = host or stack.enter_context(prepared_host())
        neighbour = await open_session()
        try:
            await neighbour.run("kept = 'kept'")
            verdicts = []
            for attempt in attempts:
                opened = open_waiting if attempt.waits and open_waiting is not None else open_session
                verdicts.append(await run_one(opened, attempt, host, neighbour))
            return verdicts
        finally:
            await neighbour.close()
