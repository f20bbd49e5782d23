"""Any typed Python function as a tool."""

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from gtpo.daemon_thread import DaemonThread
from gtpo.loading import load_object
from gtpo.tools.base import NO_OUTPUT, ToolTimeout, ToolUnavailable
from gtpo.tools.signature import CallSignature
from gtpo.tools.source import ToolSource, shared
from gtpo.types import ToolResult, ToolStatus


class FunctionTool:
    """A tool that calls `fn`, sync (in a thread of its own) or async, with arguments checked against its schema.

    fn: a function with type hints and a Google-style docstring; `name` and `description` stand in for its own.
    timeout_s: seconds after which the model is told that the call timed out. An async `fn` is cancelled then. A thread
    cannot be stopped: it is left to end by itself, as a daemon that does not hold up the end of the program, so a sync
    `fn` should bound its own work.
    Arguments that do not fit, and exceptions of `fn` ("TypeName: message"), are results of status ERROR; but for
    `ToolTimeout` (TIMEOUT) and `ToolUnavailable` (INFRA_ERROR), whose message alone is read.
    Raises ValueError for timeout_s <= 0 and what `CallSignature` refuses.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        self._signature = CallSignature(fn, name=name, description=description)
        self.name = self._signature.name
        self.schema = self._signature.schema
        self._fn = fn
        self._timeout_s = timeout_s

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            parsed = self._signature.parse(arguments)
        except ValueError as fault:
            return ToolResult(ToolStatus.ERROR, str(fault))
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                status, text = await self._run(parsed)
        except TimeoutError:
            status, text = ToolStatus.TIMEOUT, f"TimeoutError: {self.name} took longer than {self._timeout_s:g} seconds"
        return ToolResult(status, text, seconds=time.perf_counter() - start)

    async def _run(self, arguments: dict[str, Any]) -> tuple[ToolStatus, str]:
        """The function's outcome. Its own exceptions end here, so that a TimeoutError outside is always ours."""
        if not inspect.iscoroutinefunction(self._fn):
            # a thread a call: a few calls that hang starve no others
            with DaemonThread() as thread:
                return await thread.run(functools.partial(outcome_of, self._fn, arguments))
        try:
            return ToolStatus.OK, _text_of(await self._fn(**arguments))
        except Exception as error:
            return _status_of(error), _describe_exception(error)


def function_source(name: str, *, function: str, timeout_s: float = 10.0) -> ToolSource:
    """A tool of kind "function": `function` is "package.module:name" or "file.py:name" of a typed function."""
    fn = load_object(function, what="function")
    if not callable(fn):
        raise ValueError(f"function {function!r} must name a function, found {fn!r}")
    return shared(FunctionTool(fn, name=name, timeout_s=timeout_s))


def outcome_of(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[ToolStatus, str]:
    """How `fn(**arguments)` ended, and what the model reads of that."""
    try:
        return ToolStatus.OK, _text_of(fn(**arguments))
    except BaseException as error:  # SystemExit too: it would end the thread without an outcome
        return _status_of(error), _describe_exception(error)


def _text_of(value: object) -> str:
    return NO_OUTPUT if value is None or value == "" else str(value)


def _status_of(error: BaseException) -> ToolStatus:
    if isinstance(error, ToolTimeout):
        return ToolStatus.TIMEOUT
    return ToolStatus.INFRA_ERROR if isinstance(error, ToolUnavailable) else ToolStatus.ERROR


def _describe_exception(error: BaseException) -> str:
    message = str(error)
    if isinstance(error, ToolTimeout | ToolUnavailable) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
