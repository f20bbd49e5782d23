"""The interpreter of one session: locks itself in, then runs cells in one set of globals. Its memory is the code's.

A request is a cell to run, or a file to write or read, with `op` "run", "put" or "get". With `snapshot` the interpreter
first clones itself; the clone waits for the request after this one, which it gets only if this one fails. Its process
id goes to the keeper on a pipe, which wakes nobody.
A cell that calls one of the tools which its request names sends the call, and reads the answer before it goes on.
"""

from __future__ import annotations

import _thread
import base64
import builtins
import contextlib
import ctypes
import fcntl
import functools
import os
import random
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from gtpo.sandbox import confinement, frames
from gtpo.sandbox.cell_streams import CellStreams

_CONTROL_FD, _OUTPUT_FD, _NULL_FD, _CLONES_FD, _FIRST_FREE_FD = 3, 4, 5, 6, 7
_MAX_ERROR_CHARS = 2000
CLONE_BYTES = 4
"""What the process id of a clone takes on its pipe."""
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_PARENT, _SIGCHLD = 0x8000, 17
_getpid, _kill = os.getpid, os.kill
_calling = _thread.allocate_lock()


class ToolError(Exception):
    """Raised in a cell by a tool that it called; the message is what the model would have read."""

    __module__ = "__main__"


def run_interpreter(plan: confinement.Plan, control_fd: int, output_fd: int, clones_fd: int) -> NoReturn:
    """Become the interpreter: confine this process, tell the keeper, then answer its cells until it is killed."""
    try:
        # Where /proc is read-only it is as likely to be taken as others.
        with contextlib.suppress(OSError):
            confinement.offer_to_oom_killer(plan)
        try:
            if plan.cgroup is not None:
                plan.cgroup.join()
        except OSError as failure:
            os.write(control_fd, frames.encode({"failed": f"cgroup: {confinement.describe_failure(failure)}"}))
            os._exit(1)
        # The way into the cgroup is closed, too.
        _keep_descriptors(control_fd, output_fd, clones_fd)
        try:
            layers, missing = confinement.confine(plan)
        except OSError as failure:
            _send({"failed": confinement.describe_failure(failure)})
            os._exit(1)
        _send({"layers": layers, "missing": missing})
        _serve(_cloner() if plan.processes else None)
    finally:
        os._exit(1)


def decode_clone(data: bytes) -> int:
    """The process id that the interpreter has said; ValueError where it is not one."""
    if len(data) != CLONE_BYTES:
        raise ValueError(f"the process id of a clone must have {CLONE_BYTES} bytes, got {len(data)}")
    return int.from_bytes(data)


def _keep_descriptors(control_fd: int, output_fd: int, clones_fd: int) -> None:
    """Leave the control socket on 3, on 4 and 5 spares of the output and of /dev/null, and the pipe for clones on 6.

    0 to 2 are set per cell.
    """
    # By way of high numbers, so that none is overwritten before it is copied.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (control_fd, output_fd, 0, clones_fd)]
    for fd, place in zip(high, (_CONTROL_FD, _OUTPUT_FD, _NULL_FD, _CLONES_FD), strict=True):
        os.dup2(fd, place)
    os.closerange(_FIRST_FREE_FD, os.sysconf("SC_OPEN_MAX"))


def _cloner() -> Callable[[], int]:
    """What clones this process as a child of its parent and returns as fork does; -1 where it fails.

    Not os.fork: a cell that waits for its children must not find the clone, and the handlers that run after a fork
    would change it (`random` is seeded anew).
    """
    # The GIL is kept, so that no other thread of an earlier cell is inside the interpreter.
    syscall = ctypes.PyDLL(None).syscall
    number, flags = ctypes.c_long(_SYS_CLONE[os.uname().machine]), ctypes.c_long(_CLONE_PARENT | _SIGCHLD)
    return functools.partial(syscall, number, flags, 0, 0, 0, 0)


def _serve(clone: Callable[[], int] | None) -> NoReturn:
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    here = os.getcwd()
    os.environ.clear()
    os.environ.update(HOME=here, TMPDIR=here, PATH="/usr/bin:/bin", LANG="C.UTF-8")
    streams = CellStreams(_OUTPUT_FD, _NULL_FD)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    receive = functools.partial(os.read, _CONTROL_FD)
    while True:
        request = frames.read_frame(receive)
        if "op" not in request:
            # The answer to a tool call of a cell that did not wait for it.
            continue
        number = request["cell"]
        failure: tuple[str, int | None] | None = None
        value = None
        if request["op"] == "run":
            # All of this before the clone: a page that is written to after it has to be copied.
            _offer_tools(number, request["tools"])
            try:
                streams.renew(request["stdin"], with_stderr=request["with_stderr"])
            except OSError as failed:
                failure = f"the standard input does not fit: {_describe(failed)}", None
        if clone is not None:
            _reap_children()
            if request["snapshot"]:
                if _thread._count():
                    # A thread that has asked for the GIL gets it: the clone would wait for it, which it has not.
                    time.sleep(0)
                pid = clone()
                if pid == 0:
                    streams.forget()
                    continue
                if pid > 0:
                    # The keeper does so, too, but later: until then the clone would write to pages.
                    _kill(pid, signal.SIGSTOP)
                    os.write(_CLONES_FD, pid.to_bytes(CLONE_BYTES))
        own_pid = _getpid()
        if request["op"] != "run":
            failure, value = _move_file(request, here)
        elif failure is None:
            name = f"<cell {request['number']}>" if request["number"] else "<setup>"
            main.__dict__["__cell__"] = request["number"]
            failure = _run(request["code"], name, main.__dict__)
            streams.flush()
        if _getpid() != own_pid:
            # A child that the cell forked has run past the cell's end: it does not answer for its parent.
            os._exit(0)
        if failure is None and value is None:
            # Like the message above without the encoder of JSON, which writes to sixty pages.
            _write(frames.enclose(b'{"cell":%d,"status":"ok","error":"","line":null,"value":null}' % number))
            continue
        status, error, line = ("ok", "", None) if failure is None else ("error", *failure)
        _send({"cell": number, "status": status, "error": error, "line": line, "value": value})


def _offer_tools(cell: int, tools: dict[str, list[str]]) -> None:
    """Put a function for each tool into the builtins, so that a variable of the code with its name stays what it is."""
    for name, parameters in tools.items():
        vars(builtins)[name] = _tool(cell, name, parameters)
    if tools:
        vars(builtins)["ToolError"] = ToolError


def _tool(cell: int, name: str, parameters: list[str]) -> Callable[..., str]:
    """A function that asks the trainer to call the tool `name`, while `cell` runs, and returns what it says."""

    def tool(*values: Any, **arguments: Any) -> str:
        if len(values) > len(parameters):
            raise TypeError(f"{name}() takes {len(parameters)} arguments ({', '.join(parameters)}), got {len(values)}")
        by_position = dict(zip(parameters, values, strict=False))
        if twice := by_position.keys() & arguments.keys():
            raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
        call = {"name": name, "arguments": by_position | arguments}
        with _calling:
            _send({"cell": cell, "call": call})
            answer = frames.read_frame(functools.partial(os.read, _CONTROL_FD))
        if not answer["ok"]:
            raise ToolError(answer["text"])
        text: str = answer["text"]
        return text

    tool.__name__ = tool.__qualname__ = name
    return tool


def _reap_children() -> None:
    """Let the dead children of earlier cells go, which count against the number of processes."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _move_file(request: dict[str, Any], here: str) -> tuple[tuple[str, int | None] | None, str | None]:
    """Write or read a piece of a file of the working directory; what failed, and the piece that was read."""
    path = os.path.join(here, request["name"])
    try:
        if request["op"] == "put":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "ab" if request["offset"] else "wb") as file:
                file.write(base64.b64decode(request["data"]))
            return None, None
        with open(path, "rb") as file:
            file.seek(request["offset"])
            return None, base64.b64encode(file.read(frames.MAX_PIECE_BYTES)).decode()
    except Exception as failure:
        return (_describe(failure), None), None


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
    _write(frames.encode(message))


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_CONTROL_FD, data) :]
