"""The keeper's reading of what an interpreter says, which can be anything."""

import fcntl
import io
import json
import os
import selectors
import socket
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SessionState, confinement, frames
from gtpo.sandbox.cell_ends import InterpreterGone
from gtpo.sandbox.keeper import Keeper
from gtpo.sandbox.output import Output
from gtpo.sandbox.session_processes import SessionProcesses
from gtpo.sandbox.wall_clock import WallClock

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NEARLY_ANSWERS = st.fixed_dictionaries(
    {"cell": st.sampled_from([1, 1, 1, 2, "1", None]), "status": st.sampled_from(["ok", "error", "infra_error", 1])},
    optional={"error": st.text(max_size=4) | JSON, "line": JSON, "value": JSON},
)


ANSWERS = st.fixed_dictionaries(
    {"cell": st.just(1), "status": st.sampled_from(["ok", "error"]), "error": st.text(max_size=4)},
    optional={"line": st.integers(), "value": st.sampled_from(["", "x" * 87_000, "\0" * 20_000])},
)


def framed(message: object) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


PIECES = st.lists(st.binary(max_size=12) | JSON.map(framed) | NEARLY_ANSWERS.map(framed), min_size=1, max_size=4).map(
    b"".join
)


class Listener(Keeper):
    """A keeper with nothing but its ends of the control channel and of the pipe for clones."""

    def __init__(self) -> None:
        self._limits = SandboxLimits(output_bytes=2**14)
        self._selector = selectors.DefaultSelector()
        self._heard_of_clone = False
        self._control, self.interpreter = socket.socketpair()
        self._control.setblocking(False)
        self._received = b""
        self._clones_fd, self.clones_end = os.pipe()
        os.set_blocking(self._clones_fd, False)
        self._processes = SessionProcesses(os.getpid(), proc_fd=None)

    def __enter__(self) -> "Listener":
        return self

    def told(self, said: bytes) -> None:
        """Hear that `said` is said of a clone."""
        os.write(self.clones_end, said)
        self._learn_of_snapshot()

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._control.close()
        self.interpreter.close()
        for fd in (self._clones_fd, self.clones_end, self._processes.pidfd):
            os.close(fd)


@given(PIECES, st.integers(1, 40), st.sampled_from(["run", "put", "get"]))
def test_whatever_an_interpreter_says_is_an_answer_or_its_end(data, piece, op):
    with Listener() as keeper:
        for start in range(0, len(data), piece):
            keeper.interpreter.send(data[start : start + piece])
            try:
                answer = keeper._receive({"op": op, "cell": 1})
            except InterpreterGone:
                return
            if answer is not None:
                assert answer["cell"] == 1 and answer["status"] in ("ok", "error")
                assert isinstance(answer["error"], str)
                assert answer["line"] is None or type(answer["line"]) is int
                assert answer["value"] is None or (op == "get" and isinstance(answer["value"], str))
                return


class Served(Listener):
    """A keeper whose interpreter, not a process at all, says `said`, prints `printed` and ends as `end` tells."""

    def __init__(self, said: bytes, printed: bytes, end: "FakeProcesses") -> None:
        super().__init__()
        os.close(self._processes.pidfd)
        self._host, self.trainer = socket.socketpair()
        self._plan = confinement.Plan(self._limits, "namespaces", "", -1, ())
        self._remote = self.interpreter
        self._output_fd, self._output_end = os.pipe()
        os.set_blocking(self._output_fd, False)
        fcntl.fcntl(self._output_end, fcntl.F_SETPIPE_SZ, 2**17)
        self._said, self._printed = said, printed
        self._processes = end
        for fileobj in (self._control, end.pidfd):
            self._selector.register(fileobj, selectors.EVENT_READ)
        self._reads_output = False

    def _send(self, message: dict) -> None:
        self.interpreter.sendall(self._said)
        os.write(self._output_end, self._printed)
        self._processes.say_end()

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._host.close()
        self.trainer.close()
        os.close(self._output_fd)
        os.close(self._output_end)


class FakeProcesses:
    """Ends at once with `wait_status`; a look at the processes raises `failure`."""

    snapshot = None
    seen_cpu_s = 0.0

    def __init__(self, wait_status: int, failure: Exception | None) -> None:
        self._wait_status, self._failure = wait_status, failure
        self.pidfd, self._end = os.pipe()

    def say_end(self) -> None:
        os.write(self._end, b"x")

    def __getattr__(self, name: str) -> Callable[..., float]:
        assert name in ("reap_orphans", "start_clocks", "resume", "cell_cpu_s")
        return lambda **_: 0.0

    def settle(self) -> tuple[str, int]:
        if self._failure is not None:
            raise self._failure
        return "kept", 0

    def end_interpreter(self) -> tuple[int, float, int]:
        return self._wait_status, 0.0, 0


@given(
    PIECES | ANSWERS.map(framed),
    st.binary(max_size=40).map(lambda data: data * 2**9),
    st.integers(1, 127) | st.integers(0, 255).map(lambda status: status << 8),
    st.sampled_from([None, ValueError("no number"), KeyError("NSpid"), OSError(24, "too many")]),
    st.sampled_from(["run", "put", "get"]),
)
def test_whatever_a_cell_does_its_keeper_answers_and_never_for_the_sandbox(said, printed, wait_status, failure, op):
    processes = FakeProcesses(wait_status, failure)
    with Served(said, printed, processes) as keeper:
        request = {"op": op, "cell": 1, "snapshot": False, "discard": False}
        frame, alive = keeper._answer(request, {"layers": ["x"] * 20, "missing": {}})
        answer = frames.read_frame(io.BytesIO(frame).read)
    os.close(processes._end)
    assert answer["status"] in ("ok", "error", "crash") and alive == (answer["state"] == "kept")
    assert isinstance(answer["error"], str) and isinstance(answer["stdout"], str)
    CellResult(CellStatus(answer["status"]), state=SessionState(answer["state"]))


def test_a_call_that_the_trainer_could_not_decode_is_the_end_of_the_cell():
    nested: object = "x"
    for _ in range(80):
        nested = [nested]
    call = {"name": "look", "arguments": {"a": nested}}
    with Listener() as keeper:
        keeper._clock, keeper._num_calls = WallClock(keeper._limits, lambda: 0.0, now=0.0), 0
        keeper.interpreter.send(framed({"cell": 1, "call": call}))
        with pytest.raises(InterpreterGone, match="control channel"):
            keeper._receive({"op": "run", "cell": 1, "snapshot": False, "tools": {"look": ["a"]}, "max_calls": 1})


@given(st.binary(min_size=1, max_size=12) | st.integers(1, 2**32 - 1).map(lambda pid: pid.to_bytes(4)))
def test_whatever_is_said_of_a_clone_nobody_else_is_stopped(said):
    with Listener() as keeper:
        if said == bytes(4):
            keeper.told(said)
        else:
            with pytest.raises(InterpreterGone, match="control channel"):
                keeper.told(said)
        assert keeper._processes.snapshot is None


# names for the ids of processes: the processes that tests are spread over must collect the same
@pytest.mark.parametrize(
    "pid",
    [
        *(1, 2**31, 2**32 - 1, 2**32 - 2),
        pytest.param(os.getpid(), id="own"),
        pytest.param(os.getppid(), id="parent"),
    ],
)
def test_only_a_child_can_be_a_snapshot(pid):
    with Listener() as keeper:
        with pytest.raises(InterpreterGone, match="control channel"):
            keeper.told(pid.to_bytes(4))
        assert keeper._processes.snapshot is None


def test_a_snapshot_is_a_child_of_which_was_said_once_that_it_is_one():
    with subprocess.Popen(["sleep", "60"]) as child, Listener() as keeper:
        keeper._learn_of_snapshot()
        assert keeper._processes.snapshot is None
        keeper.told(child.pid.to_bytes(4))
        assert keeper._processes.snapshot == child.pid
        child.kill()


def test_when_no_clone_could_be_made_none_is_heard_of_later():
    with subprocess.Popen(["sleep", "60"]) as child, Listener() as keeper:
        keeper.told(bytes(4))
        keeper.told(child.pid.to_bytes(4))
        assert keeper._processes.snapshot is None
        child.kill()


def test_of_a_clone_nothing_is_said_by_an_interpreter_that_has_ended():
    with Listener() as keeper:
        os.close(keeper.clones_end)
        keeper._learn_of_snapshot()
        assert keeper._processes.snapshot is None
        keeper.clones_end = os.open(os.devnull, os.O_WRONLY)


def test_an_answer_may_come_in_pieces():
    with Listener() as keeper:
        answer = framed({"cell": 1, "status": "error", "error": "E", "line": 3})
        keeper.interpreter.send(answer[:5])
        assert keeper._receive({"op": "run", "cell": 1}) is None
        keeper.interpreter.send(answer[5:])
        said = keeper._receive({"op": "run", "cell": 1})
    assert said == {"cell": 1, "status": "error", "error": "E", "line": 3, "value": None}


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(8, 64))
def test_output_keeps_head_and_tail_and_counts(pieces, limit):
    output, data = Output(limit), b"".join(pieces)
    for piece in pieces:
        output.add(piece)
    assert output.num_bytes == len(data) and output.truncated == (len(data) > limit)
    text = output.text()
    if not output.truncated:
        assert text == data.decode("utf-8", "backslashreplace")
    else:
        assert f" of {len(data)} bytes left out]\n" in text


@given(st.text(alphabet="aé€😀", max_size=60), st.integers(8, 40))
def test_a_cut_divides_no_character(text, limit):
    output = Output(limit)
    output.add(text.encode())
    shown = output.text()
    assert "\\x" not in shown
    if output.truncated:
        head, _, rest = shown.partition("\n[")
        tail = rest.partition("]\n")[2]
        assert text.startswith(head) and text.endswith(tail)
        left_out = int(rest.split()[0])
        assert left_out == len(text.encode()) - len(head.encode()) - len(tail.encode())


def test_frames_fit_where_a_piece_of_a_file_does():
    message = {"op": "put", "name": "x" * 200, "offset": 2**40, "data": "x" * (frames.MAX_PIECE_BYTES * 4 // 3 + 4)}
    assert frames.encode(message)
