"""The interpreter of one session: locks itself in, then runs cells in one set of globals. Its memory is the code's."""

from __future__ import annotations

import fcntl
import functools
import io
import os
import random
import sys
import traceback
import types
from typing import Any, NoReturn

from gtpo.sandbox import confinement, frames

_CONTROL_FD, _OUTPUT_FD, _FIRST_FREE_FD = 3, 4, 5
_MAX_ERROR_CHARS = 2000


def run_interpreter(plan: confinement.Plan, control_fd: int, output_fd: int) -> NoReturn:
    """Become the interpreter: confine this process, tell the keeper, then answer its cells until it is killed."""
    try:
        _keep_descriptors(control_fd, output_fd)
        try:
            layers, missing = confinement.confine(plan)
        except OSError as failure:
            _send({"failed": confinement.describe_failure(failure)})
            os._exit(1)
        _send({"layers": layers, "missing": missing})
        _serve()
    finally:
        os._exit(1)


def _keep_descriptors(control_fd: int, output_fd: int) -> None:
    """Leave /dev/null on 0, the output on 1 and 2, the control socket on 3, a spare of the output on 4, and no more."""
    # By way of high numbers, so that neither is overwritten before it is copied.
    control_fd, output_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (control_fd, output_fd))
    os.dup2(control_fd, _CONTROL_FD)
    os.dup2(output_fd, _OUTPUT_FD)
    os.closerange(_FIRST_FREE_FD, os.sysconf("SC_OPEN_MAX"))


def _serve() -> NoReturn:
    random.seed(0)
    here = os.getcwd()
    os.environ.clear()
    os.environ.update(HOME=here, TMPDIR=here, PATH="/usr/bin:/bin", LANG="C.UTF-8")
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    while True:
        request = frames.read_frame(functools.partial(os.read, _CONTROL_FD))
        number = main.__dict__["__cell__"] = request["cell"]
        _fresh_output()
        failure = _run(request["code"], f"<cell {number}>" if number else "<setup>", main.__dict__)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                # The cell put something else there, or closed it: its own output is lost.
                continue
        status, error, line = ("ok", "", None) if failure is None else ("error", *failure)
        _send({"cell": number, "status": status, "error": error, "line": line})


def _fresh_output() -> None:
    """Undo what the last cell did to stdout and stderr. Line buffered, so that a killed cell leaves its lines."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(_OUTPUT_FD, fd)
        raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True))


def _run(code: str, name: str, variables: dict[str, Any]) -> tuple[str, int | None] | None:
    """Execute one cell; None, or what it raised and at which of its lines."""
    try:
        exec(compile(code, name, "exec", dont_inherit=True), variables)
    except BaseException as exception:
        try:
            return _describe(exception)[:_MAX_ERROR_CHARS], _line(exception, name)
        except BaseException:
            # The exception's own methods failed, or memory or the stack is exhausted.
            return "the cell raised an exception that cannot be shown", None
    return None


def _describe(exception: BaseException) -> str:
    """The last lines of the traceback: "Type: message".

    >>> _describe(ValueError("no")), _describe(KeyError("a")), _describe(EOFError())
    ('ValueError: no', "KeyError: 'a'", 'EOFError')
    """
    kind = type(exception)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    # str() of a SyntaxError also names the file.
    message = exception.msg if isinstance(exception, SyntaxError) and exception.msg else str(exception)
    return f"{name}: {message}" if message else name


def _line(exception: BaseException, name: str) -> int | None:
    if isinstance(exception, SyntaxError) and exception.filename == name:
        return exception.lineno
    lines = [line for frame, line in traceback.walk_tb(exception.__traceback__) if frame.f_code.co_filename == name]
    return lines[-1] if lines else None


def _send(message: dict[str, Any]) -> None:
    data = frames.encode(message)
    while data:
        data = data[os.write(_CONTROL_FD, data) :]
