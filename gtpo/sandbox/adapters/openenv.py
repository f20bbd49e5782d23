"""OpenEnv's coding environment by its WebSocket messages. Source: package openenv 0.10.0, envs/coding_env.

The environment interprets Python itself (smolagents' LocalPythonExecutor), which its authors call no security sandbox:
what isolates is the container around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
from collections.abc import Mapping
from typing import Any

from gtpo.sandbox.adapters.remote import (
    RemoteCell,
    RemoteFault,
    RemoteSandbox,
    RemoteSession,
    RemoteTimeout,
    error_of_traceback,
)
from gtpo.sandbox.contract import SandboxLimits

_CONNECT_TIMEOUT_S = 20.0


class OpenEnvSandbox(RemoteSandbox):
    """The server at `url`, such as "ws://localhost:8000/ws". Each session is a connection, and an episode of its own.

    Raises ImportError without the package websockets.
    """

    def __init__(self, url: str, limits: SandboxLimits | None = None, *, max_concurrent: int = 16) -> None:
        super().__init__(limits, max_concurrent=max_concurrent)
        try:
            self.websockets = importlib.import_module("websockets.asyncio.client")
        except ImportError as error:
            raise ImportError("OpenEnvSandbox needs the package websockets: pip install 'gtpo[tools]'") from error
        self.url = url

    def _session(self, setup_code: str) -> _OpenEnvSession:
        return _OpenEnvSession(self, setup_code)


class _OpenEnvSession(RemoteSession):
    def __init__(self, sandbox: OpenEnvSandbox, setup_code: str) -> None:
        super().__init__(sandbox, setup_code)
        self._server = sandbox
        self._connection: Any = None

    async def _start(self) -> None:
        try:
            self._connection = await self._server.websockets.connect(
                self._server.url, open_timeout=_CONNECT_TIMEOUT_S, proxy=None
            )
        except (OSError, ValueError, TimeoutError, self._invalid) as error:
            raise RemoteFault(f"{self._server.url}: {type(error).__name__}: {error}") from error
        try:
            await self._exchange({"type": "reset", "data": {}}, timeout_s=_CONNECT_TIMEOUT_S)
        except RemoteTimeout:
            raise RemoteFault(f"{self._server.url}: no reset within {_CONNECT_TIMEOUT_S:g} seconds") from None

    @property
    def _invalid(self) -> type[Exception]:
        error: type[Exception] = importlib.import_module("websockets.exceptions").WebSocketException
        return error

    async def _stop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await connection.send(json.dumps({"type": "close"}))
            with contextlib.suppress(Exception):
                await connection.close()

    async def _execute(self, code: str, *, timeout_s: float) -> RemoteCell:
        observation = await self._exchange({"type": "step", "data": {"code": code}}, timeout_s=timeout_s)
        stdout, stderr = str(observation.get("stdout", "")), str(observation.get("stderr", ""))
        if observation.get("exit_code", 0) == 0:
            return RemoteCell(stdout + stderr)
        return RemoteCell(stdout, error_of_traceback(stderr) or f"exit code {observation['exit_code']}")

    async def _exchange(self, message: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        """The observation that the server answers with. Raises RemoteTimeout and RemoteFault."""
        connection = self._connection
        try:
            async with asyncio.timeout(timeout_s):
                await connection.send(json.dumps(message))
                answer = json.loads(await connection.recv())
        except TimeoutError:
            raise RemoteTimeout from None
        except (OSError, ValueError, self._invalid) as error:
            raise RemoteFault(f"{self._server.url}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, Mapping) or answer.get("type") != "observation":
            raise RemoteFault(f"{self._server.url}: {str(answer)[:300]}")
        observation = answer.get("data", {}).get("observation")
        if not isinstance(observation, Mapping):
            raise RemoteFault(f"{self._server.url}: an answer without an observation")
        return observation


def from_environment(limits: SandboxLimits | None = None, *, max_concurrent: int = 16) -> OpenEnvSandbox:
    """The server at OPENENV_URL."""
    url = os.environ.get("OPENENV_URL")
    if not url:
        raise ValueError("set OPENENV_URL to the server's WebSocket, such as ws://localhost:8000/ws")
    return OpenEnvSandbox(url, limits, max_concurrent=max_concurrent)
