"""The keeper of one session: starts its interpreter, passes cells to it, and judges from outside how they end.

Everything in a result but the output and the text of an exception comes from here or from the kernel: the clocks, the
exit status, the limits. An interpreter that breaks the protocol is killed.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import selectors
import signal
import socket
import time
from typing import Any, NoReturn

from gtpo.sandbox import cell, confinement, frames

_MAX_ERROR_CHARS = 2000
# The addresses in default reprs change from run to run. Pointers have 9 to 12 digits on 64 bits.
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{9,16}\b")


def keep(host: socket.socket, plan: confinement.Plan) -> NoReturn:
    """Serve one session on `host` until the trainer closes it or the interpreter dies."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        box = confinement.make_box(plan)
        try:
            Keeper(host, plan).serve()
        finally:
            confinement.remove_box(plan, box)
    except OSError as failure:
        report_failure(host, confinement.describe_failure(failure))
    finally:
        os._exit(0)


def report_failure(host: socket.socket, error: str) -> None:
    """Tell the trainer, if it still listens, that the sandbox itself failed."""
    with contextlib.suppress(OSError):
        host.sendall(frames.encode({"status": "infra_error", "error": error}))


class InterpreterGone(Exception):
    """The interpreter ended or broke the protocol; the message says which."""


class Keeper:
    """Holds one interpreter: its process, its control socket and the read end of its output."""

    def __init__(self, host: socket.socket, plan: confinement.Plan) -> None:
        self._host = host
        self._limits = plan.limits
        self._control, remote = socket.socketpair()
        self._output_fd, write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            cell.run_interpreter(plan, remote.fileno(), write_end)
        remote.close()
        os.close(write_end)
        os.chdir("/")
        confinement.confine_keeper()
        os.set_blocking(self._output_fd, False)
        # The clock of the process's CPU time: the kernel's encoding of the inverted pid and CPUCLOCK_SCHED.
        self._cpu_clock = (~self._pid << 3) | 2
        self._received = b""
        self._output = b""
        self._truncated = False
        self._selector = selectors.DefaultSelector()
        for fileobj in (host, self._control, self._output_fd):
            self._selector.register(fileobj, selectors.EVENT_READ)

    def serve(self) -> None:
        """Answer every request of the trainer; returns when the session is over."""
        try:
            # It comes after the interpreter has locked itself in and before any code is sent to it.
            hello = frames.read_frame(self._control.recv)
        except (EOFError, ValueError, OSError):
            hello = {"failed": "the interpreter died while it locked itself in"}
        if "failed" in hello:
            self._reap()
            report_failure(self._host, hello["failed"])
            return
        self._control.setblocking(False)
        alive = True
        while alive:
            try:
                request = frames.read_frame(self._host.recv)
            except (EOFError, OSError):
                self._reap()
                return
            answer, alive = self._run_cell(request)
            self._host.sendall(frames.encode(answer | hello))

    def _run_cell(self, request: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Run one cell within its limits; the answer, and whether the interpreter is still good."""
        self._drain()
        self._output, self._truncated = b"", False
        wall_start, cpu_start = time.monotonic(), self._cpu_time_s()
        alive, line = True, None
        try:
            message = self._exchange(frames.encode(request), request["cell"], wall_start, cpu_start)
            status, error, line = message["status"], message["error"], message["line"]
            cpu_end = self._cpu_time_s()
            # Nothing of the session runs between cells.
            os.kill(self._pid, signal.SIGSTOP)
        except (InterpreterGone, TimeoutError) as end:
            alive, status = False, "timeout" if isinstance(end, TimeoutError) else "crash"
            wait_status, cpu_end = self._reap()
            error = str(end) or _describe_exit(wait_status)
        self._drain()
        answer = {
            "status": status,
            "stdout": self._captured(),
            "error": _ADDRESS.sub("at 0x0", error[:_MAX_ERROR_CHARS]).encode("utf-8", "backslashreplace").decode(),
            "error_line": line,
            "cpu_time_s": max(cpu_end - cpu_start, 0.0),
            "wall_time_s": time.monotonic() - wall_start,
            "output_truncated": self._truncated,
        }
        return answer, alive

    def _exchange(self, frame: bytes, number: int, wall_start: float, cpu_start: float) -> dict[str, Any]:
        """Send a cell and wait for its answer; InterpreterGone or TimeoutError when there is none."""
        os.kill(self._pid, signal.SIGCONT)
        try:
            if self._control.send(frame) < len(frame):
                raise InterpreterGone("the interpreter does not read its cells")
        except BlockingIOError:
            raise InterpreterGone("the interpreter does not read its cells") from None
        except ConnectionError:
            raise InterpreterGone from None
        while True:
            cpu_left = self._limits.cpu_time_s - (self._cpu_time_s() - cpu_start)
            wall_left = self._limits.wall_time_s - (time.monotonic() - wall_start)
            # A single thread spends no more CPU time than wall time passes.
            for key, _ in self._selector.select(max(min(cpu_left, wall_left), 0.0)):
                if key.fileobj is self._host:
                    # The trainer closed the session, or died, in the middle of a cell.
                    self._reap()
                    raise SystemExit
                if key.fileobj == self._output_fd:
                    self._drain()
                elif (message := self._receive(number)) is not None:
                    return message
            if cpu_left <= 0:
                raise TimeoutError(f"CPU time limit of {self._limits.cpu_time_s:g} s exceeded")
            if wall_left <= 0:
                raise TimeoutError(f"wall time limit of {self._limits.wall_time_s:g} s exceeded")

    def _receive(self, number: int) -> dict[str, Any] | None:
        """The interpreter's answer to cell `number` once it is complete. Its content is untrusted."""
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        if not data:
            raise InterpreterGone
        self._received += data
        header, body = self._received[: frames.HEADER.size], self._received[frames.HEADER.size :]
        try:
            if len(header) < frames.HEADER.size or len(body) < frames.body_length(header):
                return None
            if len(body) > frames.body_length(header):
                raise ValueError("more than one answer")
            message = frames.decode(body)
            if message.get("cell") != number or message.get("status") not in ("ok", "error"):
                raise ValueError("not an answer to this cell")
            line = message.get("line")
            if not isinstance(message.get("error"), str) or not (line is None or type(line) is int):
                raise ValueError("not an answer")
        except ValueError:
            raise InterpreterGone("the cell wrote to the interpreter's control channel") from None
        self._received = b""
        return message

    def _drain(self) -> None:
        """Take what lies in the output pipe; keep the head of it."""
        while True:
            try:
                data = os.read(self._output_fd, 65536)
            except BlockingIOError:
                return
            if not data:
                if self._output_fd in self._selector.get_map():
                    self._selector.unregister(self._output_fd)
                return
            room = self._limits.output_bytes - len(self._output)
            self._output += data[:room]
            self._truncated |= len(data) > room
            if self._truncated:
                # A flood goes on for ever: look at the clocks between two reads.
                return

    def _captured(self) -> str:
        # A character that the cut divides is left out.
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        text = _ADDRESS.sub("at 0x0", decoder.decode(self._output, not self._truncated))
        return text + f"\n[output cut after {self._limits.output_bytes} bytes]" if self._truncated else text

    def _cpu_time_s(self) -> float:
        try:
            return time.clock_gettime(self._cpu_clock)
        except OSError:
            # Dead, not yet reaped: its end is seen on the control socket.
            return 0.0

    def _reap(self) -> tuple[int, float]:
        """Kill the interpreter with its process group; its wait status and the CPU seconds of its life."""
        for kill in (os.killpg, os.kill):
            # It may have ended, or not have come to its setsid.
            with contextlib.suppress(ProcessLookupError):
                kill(self._pid, signal.SIGKILL)
        _, wait_status, usage = os.wait4(self._pid, 0)
        return wait_status, usage.ru_utime + usage.ru_stime


def _describe_exit(wait_status: int) -> str:
    if os.WIFEXITED(wait_status):
        return f"the interpreter exited with status {os.WEXITSTATUS(wait_status)}"
    return f"the interpreter was killed by {signal.Signals(os.WTERMSIG(wait_status)).name}"
