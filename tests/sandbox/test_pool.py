"""Stateless calls, files, input, profiles, sessions in reserve, back-pressure, recovery and the blocking API."""

import asyncio
import os
import signal

import pytest

from gtpo.sandbox import CellStatus, SandboxLimits, SandboxPool, SandboxUnavailable, SessionState, profiles
from gtpo.sandbox.blocking import BlockingSandboxPool
from gtpo.sandbox.code_tools import CodeTools
from tests.sandbox.conftest import LIMITS, Place, children, eventually, is_alive, process_states, soon


def test_a_stateless_call_sees_nothing_of_another(cage):
    async def run():
        first = await cage.pool.run("x = 1\nopen('f', 'w').write('x')\nimport os\nos.makedirs('a' + '/b' * 500)")
        second = await cage.pool.run("import os\nprint('x' in globals(), os.listdir('.'), __cell__)")
        return first, second, await cage.pool.run("import os\nos._exit(3)"), await cage.pool.run("print(1)")

    first, second, crash, after = cage.do(run())
    assert first.status is CellStatus.OK and first.state is not SessionState.KEPT
    assert second.stdout == "False [] 1\n"
    assert (crash.status, crash.exit_status, after.stdout) == (CellStatus.CRASH, 3, "1\n")


def test_stateless_calls_use_a_jail_again(cage):
    async def run():
        before = cage.pool.metrics()["sandbox/sessions_opened"]
        for _ in range(5):
            await cage.pool.run("print(1)")
        return cage.pool.metrics()["sandbox/sessions_opened"] - before

    assert cage.do(run()) <= 1


def test_a_session_is_closed_at_the_end_of_its_block(cage):
    async def run():
        before = cage.pool.metrics()["sandbox/sessions_open"]
        async with await cage.pool.open("x = 1") as session:
            assert (await session.run("print(x)")).stdout == "1\n"
        with pytest.raises(RuntimeError, match="closed"):
            await session.run("1")
        return cage.pool.metrics()["sandbox/sessions_open"] - before

    assert cage.do(run()) == 0


def test_as_many_cells_run_at_once_as_there_are_cpus_for_us(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert SandboxPool()._num_slots == 3


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_directories_that_a_call_leaves_cost_no_jail(cage):
    code = "import os\nos.makedirs('a/b')\nos.mkdir('closed', 0)"
    states = [cage.do(cage.pool.run(code)).state for _ in range(2)]
    assert states == [SessionState.ROLLED_BACK] * 2


def test_input_and_files_go_in_and_files_come_out(cage):
    async def run():
        code = "import sys\nprint(input(), sys.stdin.read(), open('in.txt', 'rb').read(3))"
        stateless = await cage.pool.run(code, stdin="one\ntwo", files={"in.txt": b"abc"})
        session = await cage.pool.open()
        data = bytes(range(256)) * 600
        await session.put("a.bin", data)
        doubled = await session.run("import os\ndata = open('a.bin', 'rb').read()\nopen('b.bin', 'wb').write(data * 2)")
        back = await session.get("b.bin")
        await session.put("in/a/folder.txt", b"there")
        assert (await session.run("print(open('in/a/folder.txt').read())")).stdout == "there\n"
        with pytest.raises(OSError, match="missing: FileNotFoundError"):
            await session.get("missing")
        with pytest.raises(OSError, match="more than max_bytes=1000"):
            await session.get("b.bin", max_bytes=1000)
        for name in ("/etc/passwd", "../a", "", "a\0b"):
            with pytest.raises(ValueError, match="name must be a path below"):
                await session.put(name, b"")
        with pytest.raises(OSError, match="full: OSError"):
            await session.put("full", b"x" * 2**21)
        read_again = await session.run("print(repr(input()))", stdin="again\n")
        await session.run("os.unlink('full')\nos.unlink('b.bin')")
        long = await session.run("print(len(input()))", stdin="x" * 50_000)
        assert long.stdout == "50000\n"
        empty = await session.run("input()")
        await session.close()
        return stateless.stdout, doubled.status, back == data * 2, read_again.stdout, empty.error

    assert cage.do(run()) == (
        "one two b'abc'\n",
        CellStatus.OK,
        True,
        "'again'\n",
        "EOFError: EOF when reading a line",
    )


def test_reset_forgets_variables_files_and_the_count(cage):
    async def run():
        session = await cage.pool.open("base = 7")
        await session.run("x = 1\nopen('f', 'w')")
        await session.reset()
        result = await session.run("import os\nprint('x' in globals(), os.listdir('.'), base, __cell__)")
        await session.close()
        return result.stdout

    assert cage.do(run()) == "False [] 7 1\n"


def test_without_rollback_a_failure_costs_the_variables(cage):
    async def run():
        session = await cage.pool.open("base = 7")
        await session.run("x = 1")
        crash = await session.run("import os\nos._exit(1)", rollback=False)
        after = await session.run("print('x' in globals(), base)")
        again = await session.run("import os\nos._exit(1)")
        await session.close()
        return crash.state, after.stdout, again.state

    assert cage.do(run()) == (SessionState.LOST, "False 7\n", SessionState.ROLLED_BACK)


def test_without_snapshots_a_failed_cell_is_rolled_back_by_running_the_others_again():
    async def run():
        async with SandboxPool(LIMITS, min_tier="landlock", snapshots=False) as pool:
            session = await pool.open("base = 7")
            first = await session.run("import random\nx = random.random()\nprint(x)")
            crash = await session.run("x = 0\nimport os\nos._exit(1)")
            again = await session.run("print(x)")
            return first.stdout == again.stdout, crash.state, (await pool.run("print(1)")).stdout

    assert asyncio.run(run()) == (True, SessionState.ROLLED_BACK, "1\n")


def test_a_snapshot_is_an_exact_copy(cage):
    """Also of what a fork would change: the random numbers go on as if the failed cell had not been."""
    draw = "import random\nprint(random.random())"
    straight = cage.cells(draw, draw, draw)
    broken = cage.cells(draw, f"{draw}\nimport os\nos._exit(1)", draw, draw)
    assert [cell.stdout for cell in straight] == [broken[i].stdout for i in (0, 2, 3)]


def test_many_turns_of_one_session_leave_nothing_behind():
    async def run():
        async with SandboxPool(LIMITS, min_tier="landlock") as pool:
            session = await pool.open("n = 0")
            for _ in range(60):
                await session.run("n += 1")
            # Launcher, zygote, keeper, interpreter.
            assert eventually(lambda: len(process_states(pool._server.process.pid)) == 4)
            return (await session.run("print(n)")).stdout

    assert asyncio.run(run()) == "60\n"


def test_a_session_that_cannot_be_repeated_is_lost_not_falsified(cage):
    """After a fault its cells run again; where they print something else, the variables are not passed off."""

    async def run():
        session = await cage.pool.open("base = 7")
        await session.run("import time\nx = time.time_ns()\nprint(x)")
        os.kill(cage.pool._server.process.pid, signal.SIGKILL)
        # The kernel ends the server's children one after another: until then a cell may still be served.
        while not session._stream[0].at_eof():
            await asyncio.sleep(0.005)
        lost = await session.run("print(x)")
        after = await session.run("print('x' in globals(), base)")
        await session.close()
        return lost, after

    lost, after = cage.do(run())
    assert (lost.status, lost.state) == (CellStatus.INFRA_ERROR, SessionState.LOST)
    assert lost.error.endswith("the session's variables could not be restored")
    assert after.stdout == "False 7\n"


def test_sessions_in_reserve_are_handed_out_and_replaced():
    async def run():
        async with SandboxPool(LIMITS, min_tier="landlock", num_prewarmed=3) as pool:
            while len(pool._warm) < 3:
                await asyncio.sleep(0.001)
            session = await pool.open("x = 1")
            assert (await session.run("print(x)")).stdout == "1\n"
            while len(pool._warm) < 3:
                await asyncio.sleep(0.001)
            # Those in reserve die with the fork server; nobody notices.
            os.kill(pool._server.process.pid, signal.SIGKILL)
            opened = await asyncio.gather(*(pool.open() for _ in range(4)))
            return [(await session.run("print(2)")).stdout for session in opened]

    assert asyncio.run(run()) == ["2\n"] * 4


def test_a_keeper_that_hangs_is_given_up(monkeypatch):
    async def run():
        async with SandboxPool(LIMITS, min_tier="landlock") as pool:
            session = await pool.open("x = 1")
            (zygote,) = children(pool._server.process.pid)
            (keeper,) = (pid for pid in children(zygote) if is_alive(pid))
            os.kill(keeper, signal.SIGSTOP)
            # long since over, so that the first answer is not waited for
            monkeypatch.setattr("gtpo.sandbox.session._KEEPER_TIMEOUT_S", -LIMITS.max_wall_time_s)
            running = asyncio.ensure_future(session.run("print(x)"))
            while session._stream is not None:
                await asyncio.sleep(0)
            monkeypatch.undo()
            os.kill(keeper, signal.SIGKILL)
            result = await running
            return result.stdout, result.num_tries, pool.metrics()["sandbox/faults"]

    assert asyncio.run(run()) == ("1\n", 2, 1.0)


def test_open_waits_while_all_places_are_taken():
    async def run():
        async with SandboxPool(LIMITS, min_tier="landlock", max_sessions=2) as pool:
            sessions = [await pool.open() for _ in range(2)]
            waiting = asyncio.ensure_future(pool.open())
            await sessions[0].run("print(1)")
            assert not waiting.done()
            await sessions[0].close()
            await sessions[0].close()
            third = await waiting
            return (await third.run("print(3)")).stdout, pool.metrics()["sandbox/sessions_open"]

    assert asyncio.run(run()) == ("3\n", 2.0)


def test_an_idle_session_makes_place_for_one_that_is_opened():
    async def run():
        async with soon(), SandboxPool(LIMITS, min_tier="landlock", max_sessions=1) as pool:
            outputs = [(await pool.run("print(1)")).stdout]
            async with asyncio.TaskGroup() as group:
                session = await pool.open()
                outputs.append((await session.run("print(2)")).stdout)
                # these wait for the place; the first to get it must not keep it
                stateless = group.create_task(pool.run("print(3)"))
                opened = group.create_task(pool.open())
                await asyncio.sleep(0)
                await session.close()
            return [*outputs, stateless.result().stdout, (await opened.result().run("print(4)")).stdout]

    assert asyncio.run(run()) == ["1\n", "2\n", "3\n", "4\n"]


def test_a_cell_that_waits_for_a_tool_lets_others_run():
    async def run():
        async with soon(), SandboxPool(LIMITS, min_tier="landlock", max_concurrent=1) as pool:
            session, other = await pool.open("x = 1"), await pool.open()
            place = Place()
            waiting = asyncio.ensure_future(session.run("here()\nprint(x)", tools=place.tools))
            await place.reached.wait()
            outputs = [(await other.run("print(2)")).stdout, (await pool.run("print(3)")).stdout]
            place.leave.set()
            result = await waiting
            assert not pool._slots.locked()
            return [*outputs, result.stdout]

    assert asyncio.run(run()) == ["2\n", "3\n", "1\n"]


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def mathematician(request):
    from tests.sandbox.conftest import without_namespaces

    pool = SandboxPool(SandboxLimits(cpu_time_s=5.0), min_tier=request.param, profile="math")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "landlock":
            without_namespaces(patch)
        blocking = BlockingSandboxPool(pool)
        blocking.start()
    yield blocking
    blocking.close()


def test_the_math_profile_has_numpy_and_sympy_and_nothing_else(mathematician):
    with mathematician.open() as session:
        code = "import numpy as np, sympy\nx = sympy.symbols('x')\nprint(np.arange(6).sum(), sympy.solve(x**2 - 4, x))"
        assert session.run(code).stdout == "15 [-2, 2]\n"
        lazy = session.run("import numpy.polynomial, sympy.physics.mechanics as m\nprint(m.Point('P'))")
        assert (lazy.stdout, lazy.error) == ("P\n", "")
        assert session.run("import torch").error == "ModuleNotFoundError: No module named 'torch'"
        draws = {mathematician.run("import numpy as np\nprint(np.random.rand())").stdout for _ in range(2)}
        assert len(draws) == 1


def test_the_blocking_pool_does_what_the_other_does(mathematician):
    with mathematician.open("x = 1") as session:
        session.put("f", b"abc")
        assert session.get("f") == b"abc"
        crash = session.run("x = 2\nimport os\nos._exit(0)")
        assert crash.state is SessionState.ROLLED_BACK and session.run("print(x)").stdout == "1\n"
        session.reset()
        assert session.run("print(input())", stdin="hi").stdout == "hi\n"

        async def call(name, arguments):
            return True, f"{name} {arguments['place']}"

        tools = CodeTools({"weather": ["place"]}, call)
        assert session.run("print(weather('Ulm'))", tools=tools).stdout == "weather Ulm\n"
    assert mathematician.run("print(1)").stdout == "1\n"
    assert mathematician.metrics()["sandbox/cells_crash"] == 1.0
    assert "seccomp" in mathematician.report.layers
    with pytest.raises(RuntimeError, match="setup_code: NameError"):
        mathematician.open("nope")


def test_a_profile_whose_libraries_are_missing_names_them(monkeypatch):
    monkeypatch.setitem(profiles.PROFILES, "math", ("no-such-library",))
    with pytest.raises(SandboxUnavailable, match="profile 'math' needs no-such-library: pip install no-such-library"):
        asyncio.run(SandboxPool(profile="math").start())


def test_no_isolation_is_asked_for_by_name_and_said_loudly(caplog, monkeypatch):
    with pytest.raises(ValueError, match="min_tier 'rlimits' is no isolation: it takes unsafe_no_isolation=True"):
        SandboxPool(min_tier="rlimits")

    from gtpo.sandbox import fork_server

    hook = "confinement.syscall_filter.install = lambda processes: None\nfrom gtpo.sandbox import zygote"
    hook = f"from gtpo.sandbox import confinement\n{hook}"
    monkeypatch.setattr(
        fork_server, "_BOOTSTRAP", fork_server._BOOTSTRAP.replace("from gtpo.sandbox import zygote", hook)
    )

    async def run():
        async with SandboxPool(LIMITS, unsafe_no_isolation=True) as pool:
            return pool.metrics()["sandbox/tier"]

    assert asyncio.run(run()) == 1.0
    assert "NO ISOLATION: the sandbox reached tier rlimits only" in caplog.text


def test_the_memory_of_all_sessions_together_is_bounded_by_a_cgroup():
    """The kernel then takes an interpreter, which is no fault of its cell: it was within its own limit."""
    hold = "x = bytearray(b'x') * (90 << 20)\nhere()\ndel x"
    limits = SandboxLimits(memory_bytes=200 * 2**20)

    async def run():
        async with SandboxPool(limits, min_tier="landlock", max_concurrent=8, total_memory_bytes=200 * 2**20) as pool:
            assert {"cgroup", "pool cgroup"} <= set(pool.report.layers)
            path = pool._server.cgroup.path
            good = await pool.open("kept = 1")
            greedy = [await pool.open("kept = 2") for _ in range(4)]
            places = [Place() for _ in greedy]
            cells = [
                asyncio.ensure_future(session.run(hold, tools=place.tools))
                for session, place in zip(greedy, places, strict=True)
            ]
            # each holds what it has until all have it, or have died of it
            for cell, place in zip(cells, places, strict=True):
                there = asyncio.ensure_future(place.reached.wait())
                await asyncio.wait([cell, there], return_when=asyncio.FIRST_COMPLETED)
                there.cancel()
            for place in places:
                place.leave.set()
            results = await asyncio.gather(*cells)
            after = [(await session.run("print(kept)")).stdout for session in (good, *greedy)]
            faults = pool.metrics()["sandbox/faults"]
        return results, after, faults, path.exists()

    try:
        results, after, faults, exists = asyncio.run(run())
    except SandboxUnavailable as refused:
        assert "total_memory_bytes needs a memory cgroup" in str(refused)
        return
    # two had to go at least; a cell that is tried again after the others have ended finds room
    assert {result.status for result in results} <= {CellStatus.OK, CellStatus.INFRA_ERROR} and faults >= 2
    assert after == ["1\n", *["2\n"] * 4] and not exists


def test_a_bound_on_all_memory_is_not_dropped_silently(monkeypatch):
    monkeypatch.setattr("gtpo.sandbox.cgroup._hierarchies", lambda: [])
    with pytest.raises(SandboxUnavailable, match=r"total_memory_bytes needs a memory cgroup.*no memory controller"):
        asyncio.run(SandboxPool(total_memory_bytes=2**30).start())
