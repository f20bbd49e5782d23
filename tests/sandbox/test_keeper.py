"""The keeper's reading of what an interpreter says, which can be anything."""

import json
import os
import socket
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo.sandbox import frames
from gtpo.sandbox.keeper import InterpreterGone, Keeper
from gtpo.sandbox.output import Output
from gtpo.sandbox.session_processes import SessionProcesses

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NEARLY_ANSWERS = st.fixed_dictionaries(
    {"cell": st.sampled_from([1, 1, 1, 2, "1", None]), "status": st.sampled_from(["ok", "error", "infra_error", 1])},
    optional={"error": st.text(max_size=4) | JSON, "line": JSON, "value": JSON, "snapshot": JSON},
)


def framed(message: object) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


PIECES = st.lists(st.binary(max_size=12) | JSON.map(framed) | NEARLY_ANSWERS.map(framed), min_size=1, max_size=4).map(
    b"".join
)


class Listener(Keeper):
    """A keeper with nothing but its end of the control channel."""

    def __init__(self) -> None:
        self._control, self.interpreter = socket.socketpair()
        self._control.setblocking(False)
        self._received = b""
        self._processes = SessionProcesses(os.getpid(), proc_fd=None)

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self.interpreter.close()
        os.close(self._processes.pidfd)


@given(PIECES, st.integers(1, 40), st.booleans())
def test_whatever_an_interpreter_says_is_an_answer_or_its_end(data, piece, snapshot):
    with Listener() as keeper:
        for start in range(0, len(data), piece):
            keeper.interpreter.send(data[start : start + piece])
            try:
                answer = keeper._receive({"cell": 1, "snapshot": snapshot})
            except InterpreterGone:
                return
            if answer is not None:
                assert answer["cell"] == 1 and answer["status"] in ("ok", "error")
                assert isinstance(answer["error"], str)
                assert answer["line"] is None or type(answer["line"]) is int
                assert answer["value"] is None or isinstance(answer["value"], str)
                return
        # Nobody is made a snapshot, let alone stopped, who is not a child of the keeper.
        assert keeper._processes.snapshot is None


# names for the ids of processes: the processes that tests are spread over must collect the same
@pytest.mark.parametrize(
    "pid",
    [
        *(0, 1, -1, -2, 2**31, 2**70, True, 1.5, "2", None),
        pytest.param(os.getpid(), id="own"),
        pytest.param(os.getppid(), id="parent"),
    ],
)
def test_only_a_child_can_be_a_snapshot(pid):
    with Listener() as keeper:
        keeper.interpreter.send(framed({"cell": 1, "snapshot": pid}))
        with pytest.raises(InterpreterGone, match="control channel"):
            keeper._receive({"cell": 1, "snapshot": True})
        assert keeper._processes.snapshot is None


def test_an_answer_may_come_in_pieces_after_the_snapshot_of_a_child():
    with subprocess.Popen(["sleep", "60"]) as child, Listener() as keeper:
        answer = framed({"cell": 1, "status": "error", "error": "E", "line": 3})
        keeper.interpreter.send(framed({"cell": 1, "snapshot": child.pid}) + answer[:5])
        assert keeper._receive({"cell": 1, "snapshot": True}) is None and keeper._processes.snapshot == child.pid
        keeper.interpreter.send(answer[5:])
        said = keeper._receive({"cell": 1, "snapshot": True})
        child.kill()
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
