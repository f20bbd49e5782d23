"""The keeper of one session: starts its interpreter, passes cells to it, and judges from outside how they end.

Everything in a result but the output and the text of an exception comes from here or from the kernel: the clocks, the
memory, the exit status, the limits. An interpreter that breaks the protocol is killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import time
from typing import Any

from gtpo.sandbox import cell, clones, confinement, frames
from gtpo.sandbox.cell_ends import STATUS_OF_END, InterpreterGone, KilledForOthers, OutOfMemory, describe_exit
from gtpo.sandbox.demand import Demand
from gtpo.sandbox.descendants import ProcessTree
from gtpo.sandbox.output import Output, without_addresses
from gtpo.sandbox.session_processes import SessionProcesses
from gtpo.sandbox.untrusted import answer_of, call_of
from gtpo.sandbox.wall_clock import WallClock

_MAX_ERROR_CHARS = 2000
# How often a running cell's snapshot, its memory and the CPU time of its children are looked at.
_WATCH_S = 0.05
# For how long what a cell prints may wait in the pipe: most cells have ended by then, and wake the keeper once.
_QUIET_S = 0.003
# How long a cell that was cancelled at its start may take to leave a snapshot.
_MAX_CLONE_S = 1.0


def keep(host: socket.socket, plan: confinement.Plan) -> None:
    """Serve one session on `host` until the trainer closes it or the interpreter dies, then exit.

    Raises cell.Start in another process, which is to be the interpreter.
    """
    own_pid = os.getpid()
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        box = confinement.make_box(plan)
        try:
            Keeper(host, plan, box).serve()
        finally:
            if os.getpid() == own_pid:
                confinement.remove_box(plan, box)
    except OSError as failure:
        report_failure(host, confinement.describe_failure(failure))
    finally:
        if os.getpid() == own_pid:
            os._exit(0)


def report_failure(host: socket.socket, error: str) -> None:
    """Tell the trainer, if it still listens, that the sandbox itself failed."""
    with contextlib.suppress(OSError):
        host.sendall(frames.encode({"status": "infra_error", "error": error}))


_FORGED = "the cell wrote to the interpreter's control channel"
_KILLED_FOR_OTHERS = "out of memory outside of the session: the kernel took a process of it"


class Keeper:
    """Holds one interpreter: its process, its control socket and the read end of its output."""

    def __init__(self, host: socket.socket, plan: confinement.Plan, box: str) -> None:
        self._host = host
        self._plan = plan
        self._limits = plan.limits
        self._box = box
        self._control, self._remote = socket.socketpair()
        self._output_fd, self._output_end = os.pipe()
        self._clones_fd, clones_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            raise cell.Start(plan, self._remote.detach(), self._output_end, clones_end)
        if plan.cgroup is not None:
            plan.cgroup.lock()
        os.chdir("/")
        confinement.confine_keeper(plan)
        os.close(clones_end)
        for fd in (self._output_fd, self._clones_fd):
            os.set_blocking(fd, False)
        self._processes = SessionProcesses(pid, plan.proc_fd if plan.processes else None, plan.cgroup)
        self._received = b""
        self._output = Output(plan.limits.output_bytes)
        self._selector = selectors.DefaultSelector()
        for fileobj in (host, self._control, self._processes.pidfd):
            self._selector.register(fileobj, selectors.EVENT_READ)
        self._reads_output = self._heard_of_clone = False
        self._start_clocks()

    def serve(self) -> None:
        """Answer every request of the trainer; returns when the session is over."""
        hello = self._await_hello()
        if "failed" in hello:
            self._end_interpreter()
            report_failure(self._host, hello["failed"])
            return
        self._control.setblocking(False)
        alive = True
        while alive:
            self._processes.reap_snapshots(until_readable=self._host.fileno())
            try:
                request = frames.read_frame(self._host.recv)
            except (EOFError, OSError):
                break
            if "op" not in request:
                # The answer to a tool call, or the cancellation, of a cell that ended meanwhile.
                continue
            frame, alive = self._answer(request, hello)
            self._host.sendall(frame)
            # Said once, with the answer to the setup code.
            hello = {}
        if alive:
            self._end_interpreter()
            return
        # What the trainer still sends, the answer to a tool call of that cell, must find a reader until it has read the
        # last answer: else its connection breaks, and the fault would be the sandbox's.
        with contextlib.suppress(OSError):
            while self._host.recv(65536):
                pass

    def _answer(self, request: dict[str, Any], hello: dict[str, Any]) -> tuple[bytes, bool]:
        """The answer to a request, as a frame with `hello` added, and whether the session can go on.

        Whatever fails in here may be the cell's work, so it is the cell's crash and never a failure of the sandbox,
        which would be tried again and then be forgiven.
        """
        try:
            answer = self._run_cell(request)
            return frames.encode(answer | hello), answer["state"] != "lost"
        except Exception as failure:
            answer = self._crash(f"the keeper failed under the cell: {type(failure).__name__}")
            return frames.encode(answer | hello), answer["state"] != "lost"

    def _crash(self, error: str) -> dict[str, Any]:
        """Kill what is left of a cell that made the keeper fail; its answer."""
        try:
            self._end_interpreter()
            state = self._roll_back(empty_box=False)
        except Exception:
            # What is left ends with the keeper.
            state = "lost"
        self._output = Output(self._limits.output_bytes)
        return self._result("crash", error, state)

    def _await_hello(self) -> dict[str, Any]:
        """What the interpreter says after it has locked itself in and before any code is sent to it."""
        self._selector.unregister(self._host)
        ready = {key.fileobj for key, _ in self._selector.select()}
        self._selector.register(self._host, selectors.EVENT_READ)
        if self._control in ready:
            with contextlib.suppress(EOFError, ValueError, OSError):
                return frames.read_frame(self._control.recv)
        return {"failed": "the interpreter died while it locked itself in"}

    def _run_cell(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one cell within its limits and say what became of it and of the session."""
        self._take_output()
        self._output = Output(self._limits.output_bytes, with_digest=request.get("with_digest", False))
        # A cell may have changed these for all who share them: its own snapshot too.
        self._remote.setblocking(True)
        os.set_blocking(self._output_end, True)
        self._processes.reap_orphans()
        self._start_clocks()
        line = value = exit_status = None
        peak_bytes = 0
        try:
            message = self._exchange(request)
            self._learn_of_snapshot()
            self._look_for_kills()
            status, error, line, value = (message[key] for key in ("status", "error", "line", "value"))
            cpu_time_s = self._processes.cell_cpu_s(to_the_moment=True)
            if request["discard"]:
                state, (_, _, peak_bytes) = "lost", self._end_interpreter()
            else:
                state, peak_bytes = self._processes.settle()
        except tuple(STATUS_OF_END) as failure:
            end, state = failure, "lost"
            with contextlib.suppress(InterpreterGone):
                self._learn_of_snapshot()
            wait_status, cpu_time_s, peak_bytes = self._end_interpreter()
            try:
                self._look_for_kills()
            except (OutOfMemory, KilledForOthers) as cause:
                end = cause
            # Without a message it ended by itself.
            exit_status = None if str(end) else os.waitstatus_to_exitcode(wait_status)
            status, error = STATUS_OF_END[type(end)], str(end) or describe_exit(wait_status)
        wall_time_s = time.monotonic() - self._clock.start
        self._take_output()
        if request["op"] != "run":
            # What threads of the cell before print meanwhile; with a piece of a file it could be too much for a frame.
            self._output = Output(self._limits.output_bytes)
        if state == "lost":
            state = self._roll_back(empty_box=request["discard"])
        result = self._result(status, error, state)
        return result | {
            "error_line": line,
            "value": value,
            "exit_status": exit_status,
            "cpu_time_s": cpu_time_s,
            "wall_time_s": wall_time_s,
            "peak_memory_bytes": peak_bytes,
        }

    def _result(self, status: str, error: str, state: str) -> dict[str, Any]:
        return {
            "status": status,
            "stdout": self._output.text(),
            "num_output_bytes": self._output.num_bytes,
            "output_digest": self._output.digest,
            "output_truncated": self._output.truncated,
            "error": without_addresses(error[:_MAX_ERROR_CHARS]).encode("utf-8", "backslashreplace").decode(),
            "error_line": None,
            "value": None,
            "exit_status": None,
            "cpu_time_s": self._processes.seen_cpu_s,
            "wall_time_s": time.monotonic() - self._clock.start,
            "peak_memory_bytes": 0,
            "state": state,
        }

    def _start_clocks(self) -> None:
        now = time.monotonic()
        self._clock = WallClock(self._limits, self._whole_run_delay_s, now=now)
        self._processes.start_clocks()
        self._next_watch = now + _WATCH_S
        self._demand: Demand | None = None
        self._num_calls = 0
        # By when the trainer's cancellation ends the cell.
        self._cancel_time = math.inf

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a cell and wait for its answer; InterpreterGone or TimeoutError when there is none."""
        self._heard_of_clone = not request["snapshot"]
        self._processes.resume()
        self._send(request)
        while True:
            now = time.monotonic()
            self._read_output(now >= self._clock.start + _QUIET_S)
            wall_left = self._clock.left_s(now)
            cpu_left = self._limits.cpu_time_s - self._processes.cell_cpu_s()
            # A single thread spends no more CPU time than wall time passes.
            pause = min(cpu_left, wall_left, self._cancel_time - now)
            pause = min(pause, self._next_watch - now)
            if not self._reads_output:
                pause = min(pause, _QUIET_S)
            ready = {key.fileobj for key, _ in self._selector.select(max(pause, 0.0))}
            if self._host in ready:
                self._hear(request)
            if self._output_fd in ready:
                self._take_output(once=True)
            if self._control in ready and (message := self._receive(request)) is not None:
                return message
            if self._processes.pidfd in ready:
                raise InterpreterGone
            if self._cancel_time < math.inf and (self._processes.snapshot is not None or now >= self._cancel_time):
                raise InterpreterGone("cancelled")
            if cpu_left <= 0:
                raise TimeoutError(f"CPU time limit of {self._limits.cpu_time_s:g} s exceeded")
            if wall_left <= 0:
                self._clock.extend(now)
            if (start := time.monotonic()) >= self._next_watch:
                self._clock.watch_run_delay()
                if self._plan.processes:
                    self._learn_of_snapshot()
                    self._watch()
                self._tell_demand(start)
                now = time.monotonic()
                # Of much memory a look takes long: not more than half of the time.
                self._next_watch = now + max(_WATCH_S, now - start)

    def _tell_demand(self, now: float) -> None:
        """Tell the trainer when the cell begins or ceases to wait. While a tool works for it, it is known to."""
        if not self._clock.is_in_call:
            wanted_s = self._processes.cell_cpu_s() + self._whole_run_delay_s()
            if self._demand is None:
                self._demand = Demand(wanted_s=wanted_s, now=now)
            elif (waits := self._demand.look(wanted_s=wanted_s, now=now)) is not None:
                self._host.sendall(frames.encode({"waits": waits}))

    def _read_output(self, wanted: bool) -> None:
        """Have output wake the keeper from now on, or not."""
        if wanted != self._reads_output:
            self._reads_output = wanted
            if wanted:
                self._selector.register(self._output_fd, selectors.EVENT_READ)
            else:
                self._selector.unregister(self._output_fd)

    def _whole_run_delay_s(self) -> float:
        """For how long the interpreter has waited for a CPU since it was started."""
        try:
            return ProcessTree(self._plan.proc_fd).run_delay_s(self._processes.pid)
        except OSError:
            # The kernel lists no children: it counts nothing then.
            return 0.0

    def _pass_call(self, request: dict[str, Any], call: object) -> None:
        """Tell the trainer which tool the cell calls. ValueError for anything but a call that it may make."""
        name, arguments = call_of(call)
        self._num_calls += 1
        if name not in request.get("tools", ()) or self._clock.is_in_call or self._num_calls > request["max_calls"]:
            raise ValueError("no tool can be called so")
        self._host.sendall(frames.encode({"call": {"name": name, "arguments": arguments}}))
        self._clock.begin_call(time.monotonic())

    def _hear(self, request: dict[str, Any]) -> None:
        """Pass the trainer's answer to a tool call on to the cell, or learn that it cancels the cell."""
        answer = None
        with contextlib.suppress(EOFError, OSError):
            answer = frames.read_frame(self._host.recv)
        if answer is not None and "cancel" in answer:
            # Not before there is a snapshot to go on with.
            clones = request["snapshot"] and self._plan.processes
            self._cancel_time = time.monotonic() + (_MAX_CLONE_S if clones else 0.0)
            return
        if answer is None or not self._clock.is_in_call:
            # The trainer closed the session, or died, in the middle of a cell.
            self._end_interpreter()
            raise SystemExit
        self._clock.end_call(time.monotonic())
        # the trainer gave the cell a slot again
        self._demand = None
        self._send(answer)

    def _send(self, message: dict[str, Any]) -> None:
        """Give the interpreter a message; InterpreterGone where it does not read."""
        frame = frames.encode(message)
        try:
            if self._control.send(frame) < len(frame):
                raise InterpreterGone("the interpreter does not read its cells")
        except BlockingIOError:
            raise InterpreterGone("the interpreter does not read its cells") from None
        except ConnectionError:
            raise InterpreterGone from None

    def _watch(self) -> None:
        """Look at the memory and the CPU time of all processes of the session."""
        self._look_for_kills()
        limit = self._limits.memory_bytes + self._plan.library_memory_bytes
        if self._processes.look() > limit and self._processes.memory_bytes() > limit:
            raise self._out_of_memory()

    def _look_for_kills(self) -> None:
        """OutOfMemory or KilledForOthers where the kernel has taken processes of the session since this was asked."""
        cgroup = self._plan.cgroup
        if cgroup is not None and cgroup.was_killed():
            raise self._out_of_memory() if cgroup.was_full() else KilledForOthers(_KILLED_FOR_OTHERS)

    def _out_of_memory(self) -> OutOfMemory:
        return OutOfMemory(f"memory limit of {self._limits.memory_bytes >> 20} MB exceeded")

    def _receive(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The interpreter's answer to `request` once it is complete. Its content is untrusted."""
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        if not data:
            raise InterpreterGone
        self._received += data
        try:
            while (message := self._next_frame()) is not None:
                if message.get("cell") != request["cell"]:
                    raise ValueError("not an answer to this cell")
                if "call" in message:
                    self._pass_call(request, message["call"])
                    continue
                if self._received:
                    raise ValueError("more than one answer")
                return answer_of(message, request["op"])
        except ValueError:
            raise InterpreterGone(_FORGED) from None
        return None

    def _learn_of_snapshot(self) -> None:
        """Take the number of the interpreter's clone, once it has been said. It is untrusted, too."""
        if self._heard_of_clone:
            return
        try:
            said = os.read(self._clones_fd, clones.CLONE_BYTES + 1)
        except BlockingIOError:
            return
        self._heard_of_clone = True
        try:
            # Nothing: it has ended.
            if said and (pid := clones.decode_clone(said)):
                self._processes.hold_snapshot(pid)
        except ValueError:
            raise InterpreterGone(_FORGED) from None

    def _next_frame(self) -> dict[str, Any] | None:
        header = self._received[: frames.HEADER.size]
        if len(header) < frames.HEADER.size:
            return None
        end = frames.HEADER.size + frames.body_length(header)
        if len(self._received) < end:
            return None
        body, self._received = self._received[frames.HEADER.size : end], self._received[end:]
        return frames.decode(body)

    def _end_interpreter(self) -> tuple[int, float, int]:
        """End all but the snapshot; wait status, CPU seconds of the cell, and most memory it ever had."""
        self._selector.unregister(self._processes.pidfd)
        return self._processes.end_interpreter()

    def _roll_back(self, *, empty_box: bool) -> str:
        """Go on with the snapshot, with its files if not `empty_box`; "lost" where there is none."""
        if self._processes.snapshot is None:
            return "lost"
        # What the cell has written, and what it has not read: the answer to a tool call.
        self._remote.setblocking(False)
        for end in (self._control, self._remote):
            with contextlib.suppress(BlockingIOError):
                while end.recv(65536):
                    pass
        self._remote.setblocking(True)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._clones_fd, 65536):
                pass
        self._received = b""
        try:
            if not self._processes.adopt_snapshot():
                return "lost"
            self._selector.register(self._processes.pidfd, selectors.EVENT_READ)
            if empty_box:
                confinement.empty_box(self._plan, self._box)
        except OSError:
            return "lost"
        return "rolled_back"

    def _take_output(self, *, once: bool = False) -> None:
        """Take what lies in the output pipe. A flood goes on for ever: `once` looks at the clocks between two reads."""
        while True:
            try:
                data = os.read(self._output_fd, 65536)
            except BlockingIOError:
                return
            self._output.add(data)
            if once:
                return
