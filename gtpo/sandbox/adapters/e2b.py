"""E2B's code interpreter, and SDKs of its shape: a virtual machine for each session, with a kernel that keeps state.

Source: package e2b-code-interpreter 2.11.5. An account, or a server of one's own, is needed; nothing is read but
what the SDK itself reads (E2B_API_KEY).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from gtpo.sandbox.adapters.remote import RemoteCell, RemoteFault, RemoteSandbox, RemoteSession, RemoteTimeout
from gtpo.sandbox.contract import SandboxLimits


class Interpreter(Protocol):
    """What is asked of an SDK's sandbox.

    The result of `run_code` has `logs.stdout` and `logs.stderr`, lists of texts, and `error`: None, or an object with
    `name` and `value`.
    """

    async def run_code(self, code: str, *, timeout: float) -> Any: ...

    async def kill(self) -> Any: ...


Create = Callable[[], Awaitable[Interpreter]]


class E2BSandbox(RemoteSandbox):
    """Sessions in the sandboxes that `create` gives; by default `e2b_code_interpreter.AsyncSandbox.create()`.

    A service limits how many sandboxes start in a second: one lasts for a whole session. After a time-out it is thrown
    away, since the cell may still run in it.
    Raises ImportError without the package e2b-code-interpreter where `create` is not given.
    """

    def __init__(
        self, create: Create | None = None, limits: SandboxLimits | None = None, *, max_concurrent: int = 16
    ) -> None:
        super().__init__(limits, max_concurrent=max_concurrent)
        self._create = create or _default_create()

    def _session(self, setup_code: str) -> _E2BSession:
        return _E2BSession(self, setup_code, self._create)


class _E2BSession(RemoteSession):
    def __init__(self, sandbox: E2BSandbox, setup_code: str, create: Create) -> None:
        super().__init__(sandbox, setup_code)
        self._create = create
        self._interpreter: Interpreter | None = None

    async def _start(self) -> None:
        creating = asyncio.ensure_future(self._create())
        try:
            try:
                self._interpreter = await asyncio.shield(creating)
            except asyncio.CancelledError:
                # The service starts it all the same: wait for it, to end it.
                self._interpreter = await creating
                raise
        except Exception as error:  # SDKs raise classes of their own
            raise RemoteFault(f"no sandbox could be started: {type(error).__name__}: {error}") from error

    async def _stop(self) -> None:
        interpreter, self._interpreter = self._interpreter, None
        if interpreter is not None:
            # One who stops waiting does not stop it.
            await asyncio.shield(_kill(interpreter))

    async def _execute(self, code: str, *, timeout_s: float) -> RemoteCell:
        assert self._interpreter is not None
        started = time.monotonic()
        try:
            execution = await self._interpreter.run_code(code, timeout=timeout_s)
        except Exception as failure:
            # E2B's TimeoutException also says that the whole sandbox was ended, which comes earlier
            if "timeout" in type(failure).__name__.lower() and time.monotonic() - started >= timeout_s:
                raise RemoteTimeout from failure
            raise RemoteFault(f"{type(failure).__name__}: {failure}") from failure
        output = "".join([*execution.logs.stdout, *execution.logs.stderr])
        error = execution.error
        return RemoteCell(output, "" if error is None else f"{error.name}: {error.value}")


async def _kill(interpreter: Interpreter) -> None:
    # it ends by itself where it cannot be told to
    with contextlib.suppress(Exception):
        await interpreter.kill()


def _default_create() -> Create:
    try:
        create: Create = importlib.import_module("e2b_code_interpreter").AsyncSandbox.create
    except ImportError as error:
        raise ImportError("E2BSandbox needs the package e2b-code-interpreter: pip install 'gtpo[e2b]'") from error
    return create


def from_environment(limits: SandboxLimits | None = None, *, max_concurrent: int = 16) -> E2BSandbox:
    """Sandboxes of the account that E2B_API_KEY names."""
    return E2BSandbox(limits=limits, max_concurrent=max_concurrent)
