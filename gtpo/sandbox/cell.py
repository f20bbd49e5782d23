"""The interpreter of one session: locks itself in, then runs cells in one set of globals. Its memory is the code's.

A request is a cell to run, or a file to write or read, with `op` "run", "put" or "get". With `snapshot` the interpreter
first clones itself; the clone waits for the request after this one, which it gets only if this one fails. Its process
id goes to the keeper on a pipe, which wakes nobody, before the cell begins, so that the cell cannot pass off another
process.
A cell that calls one of the tools which its request names sends the call, and reads the answer before it goes on.
"""

from __future__ import annotations

import _thread
import atexit
import base64
import builtins
import contextlib
import fcntl
import functools
import os
import random
import sys
import time
import types
from typing import Any, NoReturn

from gtpo.sandbox import channel, confinement, ending, frames
from gtpo.sandbox.cell_streams import CellStreams
from gtpo.sandbox.clones import Cloner
from gtpo.sandbox.layout import CLONES_FD, CONTROL_FD, MAX_FILES, NULL_FD, OUTPUT_FD, STDIN

_WAIT_FOR_ALL = os.WNOHANG | 0x4000_0000  # __WALL: also those whose end sends no signal
# Of the sandbox below those of a cell, for which code could recurse less deep.
_NUM_FRAMES = 5
_getpid = os.getpid


class Start(BaseException):
    """Raised in a process that is to be the interpreter, and caught at the bottom of its stack, which is its own then.

    Else code would find the frames of the sandbox below its own, could recurse less deep for them, and could use what
    lies in them.
    """

    def __init__(self, plan: confinement.Plan, control_fd: int, output_fd: int, clones_fd: int) -> None:
        self.run = functools.partial(run_interpreter, plan, control_fd, output_fd, clones_fd)


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
        control = channel.Channel(CONTROL_FD)
        try:
            layers, missing = confinement.confine(plan)
        except OSError as failure:
            control.write(frames.encode({"failed": confinement.describe_failure(failure)}))
            os._exit(1)
        control.write(frames.encode({"layers": layers, "missing": missing}))
        streams = CellStreams(OUTPUT_FD, NULL_FD, STDIN if plan.namespaces else None)
        cloner = Cloner() if plan.processes else None
        del plan
        _serve(control, streams, cloner)
    finally:
        os._exit(1)


def _keep_descriptors(control_fd: int, output_fd: int, clones_fd: int) -> None:
    """Leave the control socket, spares of the output and of /dev/null, and the pipe for clones.

    0 to 2 are set per cell.
    """
    places = {
        CONTROL_FD: control_fd,
        OUTPUT_FD: output_fd,
        NULL_FD: os.open("/dev/null", os.O_RDWR),
        CLONES_FD: clones_fd,
    }
    # By way of high numbers, so that none is overwritten before it is copied.
    high = {place: fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for place, fd in places.items()}
    for place, fd in high.items():
        os.dup2(fd, place)
    os.closerange(3, min(places))
    os.closerange(MAX_FILES, os.sysconf("SC_OPEN_MAX"))


def _serve(control: channel.Channel, streams: CellStreams, cloner: Cloner | None) -> NoReturn:
    here, main = os.getcwd(), _prepare()
    while True:
        request = control.receive()
        number = request["cell"]
        failure: tuple[str, int | None] | None = None
        value = None
        if request["op"] == "run":
            # All of this before the clone: a page that is written to after it has to be copied.
            _offer_tools(control, request["tools"])
            try:
                streams.renew(request["stdin"], with_stderr=request["with_stderr"])
            except OSError as failed:
                failure = f"the standard input does not fit: {ending.describe(failed)}", None
        if cloner is not None:
            _reap_children()
            if request["snapshot"]:
                has_threads = _thread._count() > 0
                if has_threads:
                    # One that has asked for the GIL gets it: the clone would wait for it, which it has not.
                    time.sleep(0)
                if cloner.clone():
                    if has_threads:
                        streams.forget()
                        control.forget()
                    cloner.wait()
                    continue
        if request["op"] != "run":
            failure, value = _move_file(request, here, streams)
        elif failure is None:
            main["__cell__"] = request["number"]
            failure = _run(request, main, streams, control)
        if failure is None and value is None:
            # Like the message below without the encoder of JSON, which writes to sixty pages.
            answer = frames.enclose(b'{"cell":%d,"status":"ok","error":"","line":null,"value":null}' % number)
        else:
            status, error, line = ("ok", "", None) if failure is None else ("error", *failure)
            answer = frames.encode({"cell": number, "status": status, "error": error, "line": line, "value": value})
        control.write(answer)


def _prepare() -> dict[str, Any]:
    """Have all as in a Python that has just started; the variables of its main module."""
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    here = os.getcwd()
    os.environ.clear()
    os.environ.update(HOME=here, TMPDIR=here, PATH="/usr/bin:/bin", LANG="C.UTF-8")
    sys.path.insert(0, "")
    sys.setrecursionlimit(sys.getrecursionlimit() + _NUM_FRAMES)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    variables = vars(main)
    variables |= {"__builtins__": builtins, "__annotations__": {}}
    return variables


def _run(
    request: dict[str, Any], variables: dict[str, Any], streams: CellStreams, control: channel.Channel
) -> tuple[str, int | None] | None:
    """Execute a cell; None, or what it raised and at which of its lines."""
    own_pid, is_child = _getpid(), False
    name = f"<cell {request['number']}>" if request["number"] else "<setup>"
    failure = status = None
    try:
        control.begin()
        try:
            exec(compile(request["code"], name, "exec", dont_inherit=True), variables)
        finally:
            is_child = _getpid() != own_pid
            if not is_child:
                control.end()
    except BaseException as exception:
        failure, status = ending.judge(exception, name, show=is_child)
    # It will run nothing more.
    is_last = is_child or request["discard"]
    if is_last and (_thread._count() or atexit._ncallbacks()):
        ending.finish()
    streams.flush()
    if is_child:
        # Of the cell, and has run past the cell's end: it does not answer for its parent.
        os._exit(status or 0)
    return failure


def _offer_tools(control: channel.Channel, tools: dict[str, list[str]]) -> None:
    """Put a function for each tool into the builtins, so that a variable of the code with its name stays what it is."""
    for name, parameters in tools.items():
        vars(builtins)[name] = channel.tool(control, name, parameters)
    if tools:
        vars(builtins)["ToolError"] = channel.ToolError


def _reap_children() -> None:
    """Let the dead children of earlier cells go, which count against the number of processes."""
    try:
        while os.waitpid(-1, _WAIT_FOR_ALL)[0]:
            pass
    except ChildProcessError:
        return


def _move_file(
    request: dict[str, Any], here: str, streams: CellStreams
) -> tuple[tuple[str, int | None] | None, str | None]:
    """Write or read a piece of a file of the working directory, or write one of the next cell's standard input.

    What failed, and the piece that was read.
    """
    try:
        if request["op"] == "stdin":
            streams.add_input(base64.b64decode(request["data"]), first=request["offset"] == 0)
            return None, None
        path = os.path.join(here, request["name"])
        if request["op"] == "put":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "ab" if request["offset"] else "wb") as file:
                file.write(base64.b64decode(request["data"]))
            return None, None
        with open(path, "rb") as file:
            file.seek(request["offset"])
            return None, base64.b64encode(file.read(frames.MAX_PIECE_BYTES)).decode()
    except Exception as failure:
        return (ending.describe(failure), None), None
