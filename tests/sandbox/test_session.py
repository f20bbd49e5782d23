"""What a cell's result says, and what lasts from cell to cell."""

import asyncio
import contextlib
import os
import signal
import time
import zlib
from typing import Any

import pytest

from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SandboxPool, SandboxSession, SessionState
from gtpo.sandbox import session as session_module
from gtpo.sandbox.code_tools import CodeTools
from tests.sandbox.conftest import children, is_alive


def test_variables_last_and_cells_are_counted(cage):
    setup = "def where(): return __cell__\nbefore = where()"
    results = cage.cells("x = 41", "print(x + 1, where(), before)", "import os\nprint(where())", setup=setup)
    assert [r.stdout for r in results] == ["", "42 2 0\n", "3\n"]
    assert all(r.status is CellStatus.OK and not r.state_lost and r.error == "" for r in results)


@pytest.mark.parametrize(
    ("code", "error", "line"),
    [
        ("y = 1\nprint(x)", "NameError: name 'x' is not defined", 2),
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero", 2),
        ("a = (1,\nb = 2", "SyntaxError: '(' was never closed", 1),
        ("{}['k']", "KeyError: 'k'", 1),
        ("import json\njson.loads('{')", None, 2),
        ("raise SystemExit(1)", "SystemExit: 1", 1),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", 1),
        ("class E(BaseException): pass\nraise E('x')", "E: x", 2),
        ("raise ValueError(object())", "ValueError: <object object at 0x0>", 1),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "the cell raised an exception that", None),
        ("input()", "EOFError: EOF when reading a line", 1),
        ("helper()", "ValueError: told you", 1),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded", 1),
        ("print('\\ud800')\nraise ValueError('\\ud800')", "ValueError: \\ud800", 2),
        ("x = '\ud800'", "UnicodeEncodeError: ", None),
        ("a = 1\x00", "SyntaxError: source code string cannot contain null bytes", None),
        ("(" * 5000, "SyntaxError: too many nested parentheses", 1),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'", 1),
    ],
)
def test_errors_are_the_last_line_and_the_cells_own_line(cage, code, error, line):
    setup = "def helper(): raise ValueError('told you')"
    first, again = cage.cells(code, setup=setup)[0], cage.cells(code, setup=setup)[0]
    assert first.status is CellStatus.ERROR and not first.state_lost
    assert first.error.startswith(error or "json.decoder.JSONDecodeError: Expecting property name")
    assert first.error_line == line
    assert (first.stdout, first.error) == (again.stdout, again.error)


def test_the_session_goes_on_after_an_error(cage):
    _, error, after = cage.cells("x = 1", "x = 2; 1/0", "print(x)")
    assert error.status is CellStatus.ERROR and after.stdout == "2\n"


def test_the_cpu_limit_ends_the_cell_and_the_state_is_as_before_it(cage):
    _, timeout, after = cage.cells(
        "x = 1", "print('in')\nx = 2\nwhile True: pass", "print(x, s, __cell__)", setup="s = 7"
    )
    assert timeout.status is CellStatus.TIMEOUT and timeout.state is SessionState.ROLLED_BACK
    assert (timeout.stdout, timeout.error) == ("in\n", "CPU time limit of 0.3 s exceeded")
    assert timeout.cpu_time_s >= 0.3
    assert after.status is CellStatus.OK and after.stdout == "1 7 3\n"


def test_the_wall_limit_ends_a_sleeping_cell():
    async def run() -> tuple[CellResult, CellResult]:
        async with SandboxPool(SandboxLimits(wall_time_s=1.0)) as pool:
            session = await pool.open()
            return await session.run("print('in', flush=True)\nimport time\ntime.sleep(99)"), await session.run(
                "print(1)"
            )

    timeout, after = asyncio.run(run())
    assert (timeout.status, timeout.error) == (CellStatus.TIMEOUT, "wall time limit of 1 s exceeded")
    assert timeout.stdout == "in\n" and timeout.wall_time_s >= 1.0 and timeout.cpu_time_s < 1.0
    assert after.stdout == "1\n"


def test_time_is_counted_per_cell(cage):
    burn = "import time\nend = time.process_time() + 0.15\nwhile time.process_time() < end: pass"
    results = cage.cells(burn, burn, burn)
    assert [r.status for r in results] == [CellStatus.OK] * 3
    assert all(0.1 < r.cpu_time_s < 0.3 for r in results)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os\nprint('a', flush=True)\nos._exit(0)", "the interpreter exited with status 0"),
        ("import os\nprint('a', flush=True)\nos._exit(3)", "the interpreter exited with status 3"),
        ("print('a')\nimport ctypes\nctypes.string_at(0)", "the interpreter was killed by SIGSEGV"),
        ("print('a')\nimport signal\nsignal.alarm(1)\nsignal.pause()", "the interpreter was killed by SIGALRM"),
    ],
)
def test_a_crash_loses_neither_the_state_nor_the_output(cage, code, error):
    _, crash, after = cage.cells("x = 1", f"x = 2\n{code}", "print(x)")
    assert (crash.status, crash.stdout, crash.error) == (CellStatus.CRASH, "a\n", error)
    assert crash.state is SessionState.ROLLED_BACK and (after.stdout, after.state) == ("1\n", SessionState.KEPT)


def test_lies_about_clones_end_with_their_cell(cage):
    lies = "import os, time\nx = 2\ntime.sleep(0.1)\nos.write(63, bytes(20))\nos._exit(0)"
    _, crash, after = cage.cells("x = 1", lies, "print(x)")
    assert (crash.status, crash.state) == (CellStatus.CRASH, SessionState.ROLLED_BACK)
    assert (after.status, after.stdout) == (CellStatus.OK, "1\n")


def test_output_is_taken_from_the_descriptors_and_cut(cage):
    code = "import os, sys\nprint('a')\nprint('b', file=sys.stderr)\nos.write(1, b'c\\xff\\n')\nsys.stdout = None"
    flood = "print('é' * 100_000)"
    first, second, third = cage.cells(code, flood, "print('still here')")
    assert first.stdout == "a\nb\nc\\xff\n" and not first.output_truncated
    assert second.status is CellStatus.OK and second.output_truncated
    assert second.stdout == "é" * 1536 + "\n[195906 of 200001 bytes left out]\n" + "é" * 511 + "\n"
    assert second.num_output_bytes == 200_001 and first.num_output_bytes == 7
    assert third.stdout == "still here\n"


def test_a_flood_ends_with_the_cpu_limit(cage):
    (flood,) = cage.cells("while True: print('x' * 1000)")
    assert flood.status is CellStatus.TIMEOUT and len(flood.stdout) < 4200 and flood.output_truncated


def test_same_code_same_output_in_every_session(cage):
    code = """
import random, uuid, os
print(random.random(), hash('a'), {'a', 'b', 'c', 'd'}, object(), lambda: 0, sorted(os.environ))
print(list(os.listdir('.')))
"""
    outputs = {cage.cells(code)[0].stdout for _ in range(3)}
    assert len(outputs) == 1 and "at 0x0>" in outputs.pop()


def test_files_of_the_working_directory_last_and_are_private(cage):
    write = "with open('a.txt', 'w') as f: f.write('hi')\nimport tempfile\ntempfile.TemporaryFile().write(b'x')"
    assert cage.cells(write, "print(open('a.txt').read())")[1].stdout == "hi\n"
    assert cage.cells("open('a.txt')")[0].error == "FileNotFoundError: [Errno 2] No such file or directory: 'a.txt'"


def test_files_move_between_directories(cage):
    code = "import os, shutil\nos.mkdir('a')\nos.mkdir('b')\nopen('a/x', 'w').write('1')\n"
    code += "os.rename('a/x', 'b/x')\nshutil.move('a', 'b')\nprint(sorted(os.listdir('b')), os.listdir('.'))"
    assert cage.cells(code)[0].stdout == "['a', 'x'] ['b']\n"


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_processes_of_a_cell_share_arrays_and_files(cage):
    code = """
import mmap, multiprocessing, os
numbers = multiprocessing.Array("i", 3)
open("f", "wb").write(bytes(8))
file = mmap.mmap(os.open("f", os.O_RDWR), 8)
def fill(i):
    with numbers.get_lock(): numbers[i] = i
    file[i] = 65 + i
processes = [multiprocessing.Process(target=fill, args=(i,)) for i in range(3)]
for process in processes: process.start()
for process in processes: process.join()
print(list(numbers), file[:4])
"""
    assert cage.cells(code)[0].stdout == "[0, 1, 2] b'ABC\\x00'\n"


def test_a_failing_setup_raises(cage):
    with pytest.raises(RuntimeError, match="setup_code: NameError: name 'nope' is not defined"):
        cage.cells("print(1)", setup="nope")


def test_a_cell_that_is_too_long_is_an_error(cage):
    ok, long, after = cage.cells("#" + "x" * 100_000, "#" + "x" * 200_000, "print(1)")
    assert ok.status is CellStatus.OK and after.stdout == "1\n"
    assert long.status is CellStatus.ERROR and long.error.startswith("SyntaxError: cell too long")


async def cancelled(session: SandboxSession, code: str) -> None:
    """Run `code`, which calls the tool `ready`, and cancel it then."""
    called = asyncio.Event()

    async def call(name: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        called.set()
        return True, ""

    running = asyncio.ensure_future(session.run(code, tools=CodeTools({"ready": ()}, call)))
    ready = asyncio.ensure_future(called.wait())
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_a_cancelled_cell_changes_nothing(cage):
    async def cancel() -> tuple[CellResult, CellResult]:
        session = await cage.pool.open()
        await session.run("x = 1")
        await cancelled(session, "x = 2\nready()\nimport time; time.sleep(99)")
        results = await session.run("print(x)"), await session.run("print(x)")
        await session.close()
        with pytest.raises(RuntimeError, match="closed"):
            await session.run("1")
        return results

    result, after = cage.do(cancel())
    assert (result.stdout, result.num_tries, after.stdout, after.rebuilt) == ("1\n", 1, "1\n", False)
    # Where there is no snapshot to go on with, the earlier cells have run again.
    assert result.rebuilt == ("snapshots" not in cage.pool.report.layers)


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
@pytest.mark.parametrize("code", ["ready()\nwhile True: pass", "while True: ready()"])
def test_a_cancelled_cell_is_rolled_back_to_what_no_replay_could_give(cage, code):
    async def cancel() -> tuple[list[str], float]:
        session = await cage.pool.open()
        faults = cage.pool.metrics()["sandbox/faults"]
        await session.run("import os\nx = os.urandom(8)\nopen('f', 'wb').write(x)")
        before = await session.run("print(x)")
        for _ in range(3):
            await cancelled(session, f"x = 0\n{code}")
        after = await session.run("print(x)")
        files = await session.run("print(open('f', 'rb').read())")
        await session.close()
        return [before.stdout, after.stdout, files.stdout], cage.pool.metrics()["sandbox/faults"] - faults

    outputs, faults = cage.do(cancel())
    assert len(set(outputs)) == 1 and faults == 0


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
@pytest.mark.parametrize("ended", [False, True], ids=["just begun", "just ended"])
def test_the_moment_of_a_cancellation_costs_no_state(cage, ended):
    async def cancel() -> tuple[str, list[CellResult]]:
        session = await cage.pool.open()
        await session.run("import os\nx = os.urandom(8)")
        before = await session.run("print(x)")
        results = []
        for turns in range(2, 8):
            running = asyncio.ensure_future(session.run("y = 1" if ended else "while True: pass"))
            for _ in range(turns):
                await asyncio.sleep(0)
            if ended:
                # the loop stands still, so the answer waits
                time.sleep(0.02)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            results.append(await session.run("print(x)"))
        await session.close()
        return before.stdout, results

    before, results = cage.do(cancel())
    assert [(result.stdout, result.rebuilt) for result in results] == [(before, False)] * len(results)


@pytest.mark.parametrize("failure", [OSError("down"), RuntimeError("broken"), KeyError("k")], ids=repr)
def test_what_a_tool_raises_is_raised_and_is_no_fault_of_the_sandbox(cage, failure):
    calls = []

    async def call(name: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        calls.append(name)
        raise failure

    async def run() -> tuple[CellResult, float]:
        session = await cage.pool.open()
        faults = cage.pool.metrics()["sandbox/faults"]
        await session.run("x = 1")
        with pytest.raises(type(failure)) as raised:
            await session.run("x = 2\nlook()", tools=CodeTools({"look": ()}, call))
        assert raised.value is failure
        after = await session.run("print(x)")
        await session.close()
        return after, cage.pool.metrics()["sandbox/faults"] - faults

    after, faults = cage.do(run())
    assert (after.stdout, calls, faults) == ("1\n", ["look"], 0)


def test_a_cell_that_ends_while_a_tool_works_for_it_has_crashed(cage):
    """Also where no snapshot is left, so that its keeper ends, too: the answer that is still sent breaks nothing."""
    code = """
import json, os, time
call = {"name": "look", "arguments": {"word": os.urandom(4).hex()}}
body = json.dumps({"cell": __cell__, "call": call}).encode()
os.write(60, len(body).to_bytes(4, "big") + body)
time.sleep(0.005)
try: os.kill(-1, 9)
finally: os._exit(3)
"""

    async def call(name: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        # longer than the keeper lives
        await asyncio.sleep(0.05)
        return True, ""

    async def run() -> CellResult:
        async with await cage.pool.open() as session:
            return await session.run(code, tools=CodeTools({"look": ("word",)}, call))

    result = cage.do(run())
    assert (result.status, result.exit_status, result.num_tries) == (CellStatus.CRASH, 3, 1)


def test_a_forged_file_is_an_error(cage):
    forge = """
import json, os
def read():
    data = os.read(60, int.from_bytes(os.read(60, 4), "big"))
    return json.loads(data)
def answer(**message):
    body = json.dumps(message | {"status": "ok", "error": ""}).encode()
    os.write(60, len(body).to_bytes(4, "big") + body)
answer(cell=1)
answer(cell=read()["cell"], value="A")
while True: pass
"""

    async def run() -> CellResult:
        session = await cage.pool.open()
        await session.run(forge)
        with pytest.raises(OSError, match="f: the session gave no data"):
            await session.get("f")
        result = await session.run("print(1)")
        await session.close()
        return result

    assert cage.do(run()).status is not CellStatus.INFRA_ERROR


@pytest.mark.parametrize("cage", ["landlock"], indirect=True)
def test_cells_that_waited_for_long_are_not_run_again(cage, monkeypatch):
    crash = "import os\nos._exit(1)"
    assert cage.cells("x = 1", crash)[1].state is SessionState.ROLLED_BACK
    monkeypatch.setattr(session_module, "_MAX_REPLAY_WALL_S", 0.0)
    assert cage.cells("x = 1", crash)[1].state is SessionState.LOST


def test_input_of_any_length_that_files_may_have_goes_in(cage):
    """Also what takes six times as much as JSON; what an earlier cell had is not there any more."""
    read = "import os, sys, zlib\nprint(zlib.crc32(sys.stdin.buffer.read()), __cell__, os.listdir())"
    texts = ["x" * 98_000, "\0" * 200_000, "", "é\n" * 150_000, "b", "\udc80" * 100_000]

    async def run() -> list[str]:
        session = await cage.pool.open()
        with pytest.raises(ValueError, match="stdin must have at most file_bytes=1048576 bytes, got 1048578"):
            await session.run("print(1)", stdin="é" * (2**19 + 1))
        printed = [(await session.run(read, stdin=text)).stdout for text in texts]
        alone = await cage.pool.run(read, stdin=texts[3])
        await session.close()
        return [*printed, alone.stdout]

    def expected(text: str, number: int) -> str:
        return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass'))} {number} []\n"

    assert cage.do(run()) == [*(expected(text, number + 1) for number, text in enumerate(texts)), expected(texts[3], 1)]


@pytest.mark.parametrize("max_concurrent", [3, 32])
def test_cells_of_many_sessions_run_at_once_up_to_the_bound(max_concurrent):
    async def run() -> tuple[list[int], list[str]]:
        async with SandboxPool(max_concurrent=max_concurrent) as pool:
            sessions = await asyncio.gather(*(pool.open(f"me = {i}") for i in range(32)))
            (zygote,) = children(pool._server.process.pid)
            keepers = [pid for pid in children(zygote) if is_alive(pid)]
            for keeper in keepers:
                os.kill(keeper, signal.SIGSTOP)
            running = [asyncio.ensure_future(session.run("print(me)")) for session in sessions]
            num_running = []
            # none of them can end, so that all come to stand where they wait
            for _ in range(20):
                await asyncio.sleep(0)
                num_running.append(sum(session._slot._held for session in sessions))
            for keeper in keepers:
                os.kill(keeper, signal.SIGCONT)
            return num_running, [result.stdout for result in await asyncio.gather(*running)]

    num_running, outputs = asyncio.run(run())
    assert max(num_running) == num_running[-1] == max_concurrent
    assert outputs == [f"{i}\n" for i in range(32)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wall_time_s": 0.0}, "wall_time_s must be positive, got 0.0"),
        ({"memory_bytes": 1}, "memory_bytes must be at least 67108864, got 1"),
        ({"output_bytes": 10**6}, "output_bytes must be from 512 to 16384, got 1000000"),
        ({"output_bytes": 100}, "output_bytes must be from 512 to 16384, got 100"),
    ],
)
def test_bad_limits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SandboxLimits(**arguments)


def test_bad_pool_arguments_are_refused():
    with pytest.raises(ValueError, match=r"min_tier must be one of .* got 'jail'"):
        SandboxPool(min_tier="jail")
    with pytest.raises(ValueError, match="max_concurrent must be at least 1, got 0"):
        SandboxPool(max_concurrent=0)
    with pytest.raises(RuntimeError, match="not started"):
        asyncio.run(SandboxPool().open())
