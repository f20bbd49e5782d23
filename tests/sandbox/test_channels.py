"""What one session could tell another by what the kernel lets them share: nothing, or the report names the way."""

import asyncio
import ctypes
import os

import pytest

from gtpo.sandbox import CellStatus
from gtpo.sandbox.layout import CLONES_FD, CONTROL_FD, NULL_FD, OUTPUT_FD
from tests.sandbox.conftest import children

LOCK = "import fcntl, json, os\nheld = open({path}, {mode!r})\nfcntl.lockf(held, fcntl.LOCK_{kind} | fcntl.LOCK_NB)"
# The file is looked at for a lock that a writer would have to wait for.
SEE_LOCK = """
import fcntl, json, os, struct
with open({path}, {mode!r}) as file:
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    print(struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
"""
FILES = {
    "library": {"path": "json.__file__", "mode": "rb", "kind": "SH"},
    "null": {"path": "os.devnull", "mode": "r+b", "kind": "EX"},
}
# A page of a library, as it is mapped in every session.
FUTEX = """
import ctypes, json, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
fd = os.open(json.__file__, os.O_RDONLY)
address = libc.mmap(None, ctypes.c_size_t(4096), 1, {sharing}, fd, ctypes.c_long(0))
number = {{"x86_64": 202, "aarch64": 98}}[os.uname().machine]
class Time(ctypes.Structure): _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))
def futex(operation, value, timeout):
    return libc.syscall(number, ctypes.c_void_p(address), operation, ctypes.c_uint(value), timeout, None, 0)
"""
WAIT = "print(futex(0, int.from_bytes(ctypes.string_at(address, 4), 'little'), ctypes.byref(Time(3, 0))))"
WAKE = (
    "woken, end = 0, time.monotonic() + 3\nwhile woken < 1 and time.monotonic() < end:\n    woken = futex(1, 9, None)\n"
)
WAKE += "    time.sleep(0.01)\nprint(woken)"


def named(cage, what: str) -> bool:
    return any("signals between sessions" in item and what in item for item in cage.pool.report.not_covered)


@pytest.mark.parametrize("file", FILES)
def test_a_record_lock_is_seen_by_no_other_session_unless_the_report_says_so(cage, file):
    async def run() -> str:
        async with await cage.pool.open() as first, await cage.pool.open() as second:
            lock = await first.run(LOCK.format(**FILES[file]))
            assert lock.status is CellStatus.OK, lock
            seen = await second.run(SEE_LOCK.format(**FILES[file]))
            assert seen.status is CellStatus.OK, seen
            return seen.stdout

    assert cage.do(run()) == f"{named(cage, 'record locks')}\n"
    assert named(cage, "record locks") == ("snapshots" in cage.pool.report.layers)


@pytest.mark.parametrize("sharing", [1, 2], ids=["shared", "private"])
def test_a_futex_of_a_library_wakes_no_other_session_unless_the_report_says_so(cage, sharing):
    async def run() -> list[str]:
        async with await cage.pool.open() as first, await cage.pool.open() as second:
            await asyncio.gather(first.run(FUTEX.format(sharing=sharing)), second.run(FUTEX.format(sharing=sharing)))
            return [result.stdout for result in await asyncio.gather(first.run(WAIT), second.run(WAKE))]

    waited, woken = cage.do(run())
    assert (int(waited) == 0 or int(woken) > 0) == named(cage, "futexes")


def test_no_open_file_is_of_two_sessions(cage):
    """Its flags and its position would be of both, too."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to compare the open files of processes that cannot be looked into")

    async def run() -> list[tuple[int, int]]:
        async with await cage.pool.open() as first, await cage.pool.open() as second:
            (zygote,) = children(cage.pool._server.process.pid)
            ours = [children(keeper)[0] for keeper in children(zygote)[-2:]]
            before = [pair for pair in pairs if same_open_file(ours, pair)]
            await asyncio.gather(first.run("pass", stdin="a"), second.run("pass", stdin="b"))
            return before + [pair for pair in pairs if same_open_file(ours, pair)]

    places = (0, 1, 2, CONTROL_FD, OUTPUT_FD, NULL_FD, CLONES_FD)
    pairs = [(one, other) for one in places for other in places]
    with open(os.devnull) as one, open(os.devnull) as other:
        own, fds = [os.getpid()] * 2, (one.fileno(), other.fileno())
        assert same_open_file(own, fds[:1] * 2) and not same_open_file(own, fds)
    assert cage.do(run()) == []


def same_open_file(pids, places) -> bool:
    """Whether the descriptors of two processes name one open file, by kcmp(2)."""
    number = {"x86_64": 312, "aarch64": 272}[os.uname().machine]
    answer = ctypes.CDLL(None, use_errno=True).syscall(number, *pids, 0, *places)
    assert answer >= 0, os.strerror(ctypes.get_errno())
    return answer == 0


def test_sqlite_works_with_the_locks_that_there_are(cage):
    begin = """
import sqlite3
first, second = sqlite3.connect("a.db"), sqlite3.connect("a.db")
with first:
    first.execute("create table t (n integer)")
    first.executemany("insert into t values (?)", [(n,) for n in range(10)])
print(second.execute("select sum(n) from t").fetchone())
"""
    undone = """
third = sqlite3.connect("a.db", isolation_level=None)
third.execute("pragma cache_size = 1")
third.execute("begin immediate")
third.executemany("insert into t values (?)", [(n,) for n in range(9000)])
import os
print(os.path.exists("a.db-journal"))
os._exit(1)
"""
    # The file of the journal is still there: it says what to undo.
    again = "print(sqlite3.connect('a.db').execute('select sum(n) from t').fetchone())\nfirst.execute('delete from t')"
    made, crashed, found = cage.cells(begin, undone, again)
    assert (made.stdout, made.error, crashed.stdout) == ("(45,)\n", "", "True\n")
    assert (found.stdout, found.error) == ("(45,)\n", "")


def test_usual_programs_of_files_work(cage):
    code = """
import logging, os, tempfile
logging.basicConfig(filename="log", level="INFO")
logging.info("written")
with tempfile.TemporaryFile() as file: file.write(b"x")
with tempfile.NamedTemporaryFile() as file: file.write(b"x")
with open(os.devnull, "w") as null: print("gone", file=null)
print(open("log").read(), os.path.exists(file.name), open(os.devnull).read() == "")
"""
    (result,) = cage.cells(code)
    assert (result.stdout, result.error) == ("INFO:root:written\n False True\n", "")
