"""ByteDance's SandboxFusion by its HTTP API (POST /run_jupyter). Source: github.com/bytedance/SandboxFusion, 53a6341.

The service keeps nothing between requests. So a cell is sent with all cells before it, which run again in a fresh
kernel: state lasts as long as the cells are repeatable, and the price of a session grows with its length squared.
What isolates the code is the service's configuration; its shipped `local.yaml` isolates nothing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from gtpo.sandbox.adapters.remote import RemoteCell, RemoteFault, RemoteSandbox, RemoteSession, RemoteTimeout
from gtpo.sandbox.contract import SandboxLimits, SessionState

# for the start of a kernel, beside the time of the cells
_KERNEL_START_S = 20.0


class SandboxFusion(RemoteSandbox):
    """The service at `url`, such as "http://localhost:8080". `limits.wall_time_s` and `memory_bytes` go with each cell.

    Raises ImportError without the package httpx2.
    """

    def __init__(self, url: str, limits: SandboxLimits | None = None, *, max_concurrent: int = 16) -> None:
        super().__init__(limits, max_concurrent=max_concurrent)
        try:
            self._httpx = importlib.import_module("httpx2")
        except ImportError as error:
            raise ImportError("SandboxFusion needs the package httpx2: pip install 'gtpo[tools]'") from error
        self._url = url.rstrip("/")
        self._client: Any = None

    def _session(self, setup_code: str) -> _FusionSession:
        return _FusionSession(self, setup_code)

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        """The service's answer. Raises RemoteFault."""
        if self._client is None:
            self._client = self._httpx.AsyncClient(trust_env=False)
        try:
            response = await self._client.post(self._url + path, json=body, timeout=timeout_s)
            response.raise_for_status()
            answer = response.json()
        except (self._httpx.HTTPError, ValueError) as error:
            raise RemoteFault(f"{self._url}{path}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, Mapping) or answer.get("status") not in ("Success", "Failed"):
            raise RemoteFault(f"{self._url}{path}: {str(answer)[:300]}")
        return answer

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()


class _FusionSession(RemoteSession):
    after_failure = SessionState.ROLLED_BACK

    def __init__(self, sandbox: SandboxFusion, setup_code: str) -> None:
        super().__init__(sandbox, setup_code)
        self._service = sandbox
        self._cells: list[str] = []

    async def _start(self) -> None:
        # after a time-out or a fault the cells that ended are still there to be sent again
        if self._cells:
            self._setup_code = ""

    async def _stop(self) -> None:
        """There is nothing to end."""

    async def _execute(self, code: str, *, timeout_s: float) -> RemoteCell:
        cells = [*self._cells, code]
        total_s = _KERNEL_START_S + timeout_s * len(cells)
        body = {
            "cells": cells,
            "cell_timeout": timeout_s,
            "total_timeout": total_s,
            "memory_limit_MB": self._service.limits.memory_bytes // 2**20,
        }
        answer = await self._service.post("/run_jupyter", body, timeout_s=total_s + _KERNEL_START_S)
        try:
            cell = _last_cell(answer, num_cells=len(cells))
        except (LookupError, TypeError, AttributeError) as error:
            raise RemoteFault(f"an answer of another form: {type(error).__name__}: {error}") from error
        self._cells = cells
        return cell


def _last_cell(answer: Mapping[str, Any], *, num_cells: int) -> RemoteCell:
    if answer["status"] == "Failed":
        driver = answer.get("driver") or {}
        if driver.get("status") == "TimeLimitExceeded":
            raise RemoteTimeout
        raise RemoteFault(f"the kernel failed: {str(driver.get('stderr') or answer.get('message'))[:300]}")
    if len(answer["cells"]) != num_cells:
        raise RemoteFault(f"{num_cells} cells were sent and {len(answer['cells'])} answered")
    last = answer["cells"][-1]
    error = last["error"][0] if last["error"] else None
    return RemoteCell(last["stdout"] + last["stderr"], "" if error is None else f"{error['ename']}: {error['evalue']}")


def from_environment(limits: SandboxLimits | None = None, *, max_concurrent: int = 16) -> SandboxFusion:
    """The service at SANDBOX_FUSION_ENDPOINT, the variable that its own client reads."""
    url = os.environ.get("SANDBOX_FUSION_ENDPOINT")
    if not url:
        raise ValueError("set SANDBOX_FUSION_ENDPOINT to the URL of the service")
    return SandboxFusion(url, limits, max_concurrent=max_concurrent)
