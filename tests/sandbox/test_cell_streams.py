"""What a cell does to its standard streams must not reach the next one."""

import subprocess
import sys

import pytest

from gtpo.sandbox import CellStatus, SandboxPool, SessionState
from tests.sandbox.conftest import Cage

GREET = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint(repr(sys.stdin.read()))"


@pytest.mark.parametrize(
    "code",
    [
        "sys.stdout = sys.stderr = sys.stdin = None",
        "del sys.stdout, sys.stderr, sys.stdin",
        "sys.stdout = sys.stderr = sys.stdin = io.StringIO('x')",
        "sys.stdout.close(), sys.stderr.close(), sys.stdin.close()",
        "sys.stdout.buffer.close(), sys.stderr.buffer.close(), sys.stdin.buffer.close()",
        "sys.stdout.detach(), sys.stderr.detach(), sys.stdin.detach()",
        "os.close(0), os.close(1), os.close(2)",
        "os.dup2(os.open('file', os.O_RDWR | os.O_CREAT), 1), os.dup2(1, 2), os.dup2(1, 0)",
    ],
)
def test_every_cell_has_its_streams(cage: Cage, code: str) -> None:
    before, broken, after = cage.cells(GREET, f"import io, os, sys\n{code}", GREET)
    assert before.stdout == after.stdout == "out\nerr\n''\n"
    assert broken.status is CellStatus.OK and after.state is SessionState.KEPT


def test_streams_that_were_left_alone_are_not_made_again(cage: Cage) -> None:
    code = "import sys\nkept = sys.stdin, sys.stdout, sys.stderr"
    _, same = cage.cells(code, "print([a is b for a, b in zip(kept, (sys.stdin, sys.stdout, sys.stderr))])")
    assert same.stdout == "[True, True, True]\n"


def test_a_text_without_end_of_line_belongs_to_its_cell_also_if_the_stream_was_replaced(cage: Cage) -> None:
    first, second = cage.cells("import sys\nsys.stdout.write('a')\nsys.stdout = None", "print('b')")
    assert (first.stdout, second.stdout) == ("a", "b\n")


def test_what_could_not_be_written_is_not_written_by_the_next_cell(cage: Cage) -> None:
    lost, after = cage.cells("import os, sys\nsys.stdout.write('lost')\nos.close(1)", "print('after')")
    assert lost.status is CellStatus.OK and (lost.stdout, after.stdout) == ("", "after\n")


def test_input_that_was_read_ahead_is_not_the_next_cells(cage: Cage) -> None:
    async def run(pool: SandboxPool) -> list[str]:
        async with await pool.open("import sys") as session:
            texts = ["a\nb\n", "", "c\nd\n", "e\n" * 5000, ""]
            return [(await session.run("print(repr(sys.stdin.readline()))", stdin=text)).stdout for text in texts]

    assert cage.do(run(cage.pool)) == ["'a\\n'\n", "''\n", "'c\\n'\n", "'e\\n'\n", "''\n"]


def test_a_snapshot_waits_for_no_thread_that_it_has_not(cage: Cage) -> None:
    """Neither for the lock of a stream nor for the GIL."""
    flood = """
import os, sys, threading, time
def flood(stream):
    while True:
        stream.write('x' * 4000 + '\\n')
for stream in (sys.stdout, sys.stderr):
    threading.Thread(target=flood, args=(stream,), daemon=True).start()
time.sleep(0.02)
"""
    for _ in range(4):
        _, crash, after = cage.cells(flood, "time.sleep(0.01)\nos._exit(1)", "print('here')")
        assert (crash.status, crash.state) == (CellStatus.CRASH, SessionState.ROLLED_BACK)
        assert (after.status, after.stdout) == (CellStatus.OK, "here\n")


_HELD_LOCK = """
import os, sys, threading, time
from gtpo.sandbox.cell_streams import CellStreams
report = os.dup(1)
_, output = os.pipe()
os.set_blocking(output, False)
try:
    while True: os.write(output, b"x")
except BlockingIOError:
    os.set_blocking(output, True)
streams = CellStreams(output, os.open(os.devnull, os.O_RDWR))
streams.renew("", with_stderr=True)
printing = threading.Thread(target=print, args=("waits for ever",), daemon=True)
printing.start()
while "State:\\tS" not in open(f"/proc/self/task/{printing.native_id}/status").read(): time.sleep(0.01)
time.sleep(0.05)
os.dup2(report, output)
streams.forget()
streams.renew("", with_stderr=True)
print("went on", flush=True)
os._exit(0)
"""


def test_after_a_clone_no_stream_is_used_whose_lock_a_thread_may_hold() -> None:
    done = subprocess.run([sys.executable, "-c", _HELD_LOCK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("went on\n", "")
