"""Closing while something runs, restarts that are interrupted, and what a trainer that is gone leaves behind."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from gtpo.sandbox import CellStatus, SandboxPool, SandboxUnavailable, SessionState, fork_server, session_users
from gtpo.sandbox import pool as pool_module
from gtpo.sandbox.blocking import BlockingSandboxPool
from gtpo.sandbox.code_tools import CodeTools
from gtpo.sandbox.scratch import make_scratch
from tests.sandbox.conftest import LIMITS, Place, eventually, is_alive, process_states, soon

ROOT = Path(__file__).parents[2]
CLOSED = "was closed during the call"


def test_closing_a_pool_ends_what_runs_in_it():
    """A cell that runs, one that a tool works for, one that waits for its turn, and one that waits for a place."""

    async def run():
        pool = SandboxPool(LIMITS, min_tier="landlock", max_concurrent=1, max_sessions=3)
        await pool.start()
        launcher = pool._server.process
        sessions = [await pool.open() for _ in range(3)]
        at_tool, before_sleep = Place(), Place()
        calls = [asyncio.ensure_future(sessions[0].run("here()", tools=at_tool.tools))]
        await at_tool.reached.wait()
        calls.append(
            asyncio.ensure_future(sessions[1].run("here()\nimport time\ntime.sleep(99)", tools=before_sleep.tools))
        )
        await before_sleep.reached.wait()
        before_sleep.leave.set()
        while not pool._slots.locked():
            await asyncio.sleep(0)
        calls += [asyncio.ensure_future(work) for work in (sessions[2].run("1"), pool.open(), pool.run("2"))]
        await asyncio.sleep(0)
        family = process_states(launcher.pid)
        await pool.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        return outcomes, family, launcher.returncode, len(pool._sessions)

    outcomes, family, returncode, num_open = asyncio.run(run())
    assert all(type(outcome) is RuntimeError and CLOSED in str(outcome) for outcome in outcomes), outcomes
    assert not any(is_alive(pid) for pid in family) and num_open == 0
    # it ended by itself
    assert returncode == 0


def test_closing_a_session_ends_its_cell_and_no_other(cage):
    async def run():
        session, other = await cage.pool.open(), await cage.pool.open("x = 1")
        place = Place()
        running = asyncio.ensure_future(session.run("here()\nimport time\ntime.sleep(99)", tools=place.tools))
        await place.reached.wait()
        place.leave.set()
        await asyncio.gather(session.close(), session.close())
        with pytest.raises(RuntimeError, match=f"the sandbox session {CLOSED}"):
            await running
        assert session._stream is None
        result = await other.run("print(x)")
        await other.close()
        return result.stdout, result.num_tries, cage.pool.metrics()["sandbox/sessions_open"] - len(cage.pool._idle)

    assert cage.do(run()) == ("1\n", 1, 0.0)


def test_a_cancelled_caller_is_cancelled_and_not_told_that_the_session_closed(cage):
    async def run():
        session, place = await cage.pool.open(), Place()
        running = asyncio.ensure_future(session.run("here()", tools=place.tools))
        await place.reached.wait()
        running.cancel()
        await session.close()
        with pytest.raises(asyncio.CancelledError):
            await running

    cage.do(run())


def test_closing_a_blocking_pool_ends_the_calls_of_other_threads():
    reached, outcomes = threading.Event(), []

    async def call(*_):
        reached.set()
        return True, ""

    def attempt(work, *arguments, **options):
        try:
            outcomes.append(work(*arguments, **options))
        except RuntimeError as error:
            outcomes.append(str(error))

    pool = BlockingSandboxPool(SandboxPool(LIMITS, min_tier="landlock", max_sessions=1))
    pool.start()
    with pytest.raises(RuntimeError, match="already started"):
        pool.start()
    session = pool.open()
    threads = [
        threading.Thread(
            target=attempt,
            args=(session.run, "here()\nimport time\ntime.sleep(99)"),
            kwargs={"tools": CodeTools({"here": ()}, call)},
        ),
        threading.Thread(target=attempt, args=(pool.open,)),
    ]
    for thread in threads:
        thread.start()
    assert reached.wait(60) and eventually(lambda: pool._pool._num_waiting == 1)
    pool.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(outcomes) == 2 and all(CLOSED in outcome for outcome in outcomes)
    pool.close()
    session.close()
    with pytest.raises(RuntimeError, match="the sandbox pool is not started or closed"):
        pool.run("1")


def kill_server(pool):
    family = process_states(pool._server.process.pid)
    pool._server.process.kill()
    assert eventually(lambda: not any(is_alive(pid) for pid in family))


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_blocking_call_is_cancelled():
    interrupted = threading.Event()

    async def call(*_):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        # for ever, unless the interrupted call is cancelled
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            interrupted.set()
            raise
        return True, ""

    with BlockingSandboxPool(SandboxPool(LIMITS, min_tier="landlock")) as pool, pool.open("x = 1") as session:
        with pytest.raises(KeyboardInterrupt):
            session.run("x = 2\nhere()", tools=CodeTools({"here": ()}, call))
        assert session.run("print(x)").stdout == "1\n"
        assert interrupted.is_set()


def test_a_blocking_call_that_is_interrupted_as_it_is_handed_over_is_cancelled(monkeypatch):
    hand_over = asyncio.run_coroutine_threadsafe

    def interrupted(call, loop):
        hand_over(call, loop)
        raise KeyboardInterrupt

    async def for_ever(*_):
        await asyncio.sleep(20)
        return True, ""

    with BlockingSandboxPool(SandboxPool(LIMITS, min_tier="landlock")) as pool, pool.open("x = 1") as session:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.run("x = 2\nhere()", tools=CodeTools({"here": ()}, for_ever))
        assert session.run("print(x)").stdout == "1\n"


class Launches:
    """Stands in for `fork_server.launch`: waits for `go`, then fails `num_failures` times; keeps the servers."""

    def __init__(self, patch):
        self.launch, self.servers, self.num_failures = fork_server.launch, [], 0
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        patch.setattr(fork_server, "launch", self)

    async def __call__(self, *arguments, **options):
        self.asked.set()
        await self.go.wait()
        if self.num_failures > 0:
            self.num_failures -= 1
            raise SandboxUnavailable("no more processes")
        self.servers.append(await self.launch(*arguments, **options))
        return self.servers[-1]


def test_a_cancelled_caller_does_not_interrupt_a_restart(monkeypatch):
    async def run():
        async with soon(), SandboxPool(LIMITS, min_tier="landlock") as pool:
            session = await pool.open("x = 1")
            launches = Launches(monkeypatch)
            kill_server(pool)
            first = asyncio.ensure_future(session.run("print(x)"))
            await launches.asked.wait()
            other = asyncio.ensure_future(pool.open("x = 2"))
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            launches.go.set()
            outputs = [(await each.run("print(x)")).stdout for each in (session, await other)]
            return outputs, pool.metrics()["sandbox/restarts"]

    assert asyncio.run(run()) == (["1\n", "2\n"], 1.0)


def test_a_restart_that_fails_is_tried_again(monkeypatch):
    async def run():
        async with soon(), SandboxPool(LIMITS, min_tier="landlock") as pool:
            session = await pool.open("x = 1")
            launches = Launches(monkeypatch)
            launches.go.set()
            launches.num_failures = 2
            kill_server(pool)
            lost = await session.run("print(x)")
            with pytest.raises(SandboxUnavailable, match="no more processes"):
                await pool.open()
            return lost, await session.run("print(x)"), (await (await pool.open()).run("print(2)")).stdout

    lost, after, opened = asyncio.run(run())
    assert (lost.status, lost.state) == (CellStatus.INFRA_ERROR, SessionState.LOST)
    assert (after.stdout, opened) == ("1\n", "2\n")


def test_closing_during_a_restart_ends_the_new_server(monkeypatch):
    async def run():
        pool = SandboxPool(LIMITS, min_tier="landlock")
        await pool.start()
        launches = Launches(monkeypatch)
        kill_server(pool)
        opening = asyncio.ensure_future(pool.open())
        await launches.asked.wait()
        closing = asyncio.ensure_future(pool.close())
        with pytest.raises(RuntimeError, match=f"the sandbox pool {CLOSED}"):
            await opening
        launches.go.set()
        await closing
        with pytest.raises(RuntimeError, match="the sandbox pool is not started or closed"):
            await pool.open()
        return [server.process.returncode for server in launches.servers], pool._server

    assert asyncio.run(run()) == ([0], None)


FORKING_TRAINER = """
import asyncio, os, time
from gtpo.sandbox import SandboxPool
from tests.sandbox.conftest import LIMITS

async def run():
    async with SandboxPool(LIMITS, min_tier="landlock") as pool:
        session = await pool.open()
        child = os.fork()
        if child == 0:
            time.sleep(999)
        print(child, pool._server.process.pid, flush=True)
        input()
        launcher = pool._server.process
    print(launcher.returncode, flush=True)

asyncio.run(run())
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_forked_child_of_the_trainer_keeps_nothing_alive(end):
    """As the workers of a data loader are: they have copies of the pool's sockets, and outlive the trainer."""
    command = [sys.executable, "-W", "ignore", "-c", FORKING_TRAINER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as trainer:
        child, launcher = map(int, trainer.stdout.readline().split())
        try:
            family = process_states(launcher)
            if end == "kill":
                trainer.kill()
                assert eventually(lambda: not any(is_alive(pid) for pid in family))
            else:
                trainer.stdin.write("\n")
                trainer.stdin.flush()
                # not killed after waiting for it
                assert trainer.stdout.readline() == "0\n"
            assert is_alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_pools_on_one_machine_share_no_user_ids(monkeypatch):
    drawn = iter([0x7000_0000, 0x7000_0000, 0x7003_0000, 0x7000_0000])
    monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: next(drawn))
    first, holder = session_users.claim()
    second, other = session_users.claim()
    assert (first, second) == (0x7000_0000, 0x7003_0000)
    holder.close()
    again, holder = session_users.claim()
    assert again == first
    holder.close()
    other.close()


def test_directories_of_killed_trainers_are_removed_and_of_others_not(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    used, used_lock = make_scratch()
    left, left_lock = make_scratch()
    (Path(left) / "box").mkdir()
    (tmp_path / "other").mkdir()
    os.close(left_lock)
    new, new_lock = make_scratch()
    assert sorted(map(str, tmp_path.iterdir())) == sorted([used, new, str(tmp_path / "other")])
    os.close(used_lock)
    os.close(new_lock)


def test_a_pool_starts_again_in_another_event_loop():
    pool = SandboxPool(LIMITS, min_tier="landlock", max_concurrent=1, max_sessions=1)

    async def run() -> list[str]:
        async with pool:
            # more than there are slots and places: some wait
            results = await asyncio.gather(*(pool.run(f"print({i})") for i in range(3)))
            return [result.stdout for result in results]

    assert asyncio.run(run()) == asyncio.run(run()) == ["0\n", "1\n", "2\n"]


def test_of_two_starts_at_once_one_is_refused():
    async def run() -> list[object]:
        pool = SandboxPool(LIMITS, min_tier="landlock")
        try:
            return await asyncio.gather(pool.start(), pool.start(), return_exceptions=True)
        finally:
            await pool.close()

    first, second = asyncio.run(run())
    assert first is None and "already started" in str(second)


def test_too_many_open_files_are_named_with_what_to_do(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def run() -> None:
        async with SandboxPool(LIMITS, min_tier="landlock") as pool:
            with monkeypatch.context() as patch:
                patch.setattr(pool_module.socket, "socketpair", refuse)
                with pytest.raises(SandboxUnavailable, match=r"Too many open files.*lower max_sessions.*ulimit -n"):
                    await pool.open()
            await (await pool.open()).close()

    asyncio.run(run())
