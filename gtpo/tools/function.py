"""Any typed Python function as a tool."""

import asyncio
import dataclasses
import functools
import inspect
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
import pydantic_core

from gtpo.daemon_thread import DaemonThread
from gtpo.loading import load_object
from gtpo.tools.base import NO_OUTPUT, ToolTimeout, ToolUnavailable, cut_text
from gtpo.tools.signature import CallSignature
from gtpo.tools.source import ToolSource, shared
from gtpo.types import ToolResult, ToolStatus

MAX_CHARS = 4000  # of a result, unless a tool says otherwise


class FunctionTool:
    """A tool that calls `fn`, sync (in a thread of its own) or async, with arguments checked against its schema.

    fn: a function with type hints and a Google-style docstring; `name` and `description` stand in for its own.
    timeout_s: seconds after which the model is told that the call timed out. An async `fn` is cancelled then. A thread
    cannot be stopped: it is left to end by itself, as a daemon that does not hold up the end of the program, so a sync
    `fn` should bound its own work.
    Arguments that do not fit, and exceptions of `fn` ("TypeName: message"), are results of status ERROR; but for
    `ToolTimeout` (TIMEOUT) and `ToolUnavailable` (INFRA_ERROR), whose message alone is read. A text is read as it is, a
    dict, a list or a record as JSON, anything else as `str` writes it. max_chars: of a result; the rest is cut off.
    Raises ValueError for timeout_s <= 0, max_chars < 1 and what `CallSignature` refuses.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float = 10.0,
        max_chars: int = MAX_CHARS,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        if max_chars < 1:
            raise ValueError(f"max_chars must be at least 1, got {max_chars}")
        self._signature = CallSignature(fn, name=name, description=description)
        self.name = self._signature.name
        self.schema = self._signature.schema
        self._fn = fn
        self._timeout_s = timeout_s
        self._max_chars = max_chars

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
        return ToolResult(status, cut_text(text, self._max_chars), seconds=time.perf_counter() - start)

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


def function_source(name: str, *, function: str, timeout_s: float = 10.0, max_chars: int = MAX_CHARS) -> ToolSource:
    """A tool of kind "function": `function` is "package.module:name" or "file.py:name" of a typed function."""
    fn = load_object(function, what="function")
    if not callable(fn):
        raise ValueError(f"function {function!r} must name a function, found {fn!r}")
    return shared(FunctionTool(fn, name=name, timeout_s=timeout_s, max_chars=max_chars))


def outcome_of(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[ToolStatus, str]:
    """How `fn(**arguments)` ended, and what the model reads of that."""
    try:
        return ToolStatus.OK, _text_of(fn(**arguments))
    except BaseException as error:  # SystemExit too: it would end the thread without an outcome
        return _status_of(error), _describe_exception(error)


def _text_of(value: object) -> str:
    if value is None or (isinstance(value, str) and not value):
        return NO_OUTPUT
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if not is_record and not isinstance(value, Mapping | list | tuple | set | frozenset | pydantic.BaseModel):
        return str(value)
    try:
        plain = pydantic_core.to_jsonable_python(value, fallback=str, inf_nan_mode="constants")
        return json.dumps(plain, ensure_ascii=False)
    except (TypeError, ValueError):
        # it holds itself, or keys that are no JSON
        return str(value)


def _status_of(error: BaseException) -> ToolStatus:
    if isinstance(error, ToolTimeout):
        return ToolStatus.TIMEOUT
    return ToolStatus.INFRA_ERROR if isinstance(error, ToolUnavailable) else ToolStatus.ERROR


def _describe_exception(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        # an exception whose own text fails
        message = ""
    if isinstance(error, ToolTimeout | ToolUnavailable) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
