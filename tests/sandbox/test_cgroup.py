"""The cgroups of a pool and its sessions: what they bound and count, who is in them, and that none is left."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gtpo.sandbox import CellStatus, SandboxLimits, SandboxPool, SessionState, abuse, cgroup, fork_server
from gtpo.sandbox.abuse.attempts import ATTEMPTS
from gtpo.sandbox.directory_lock import lock_directory
from gtpo.sandbox.session_cgroup import SessionCgroup
from tests.sandbox.conftest import LIMITS, children, eventually, is_alive, process_states, soon

ROOT = Path(__file__).parents[2]
PATIENT = replace(abuse.LIMITS, cpu_time_s=5.0, wall_time_s=60.0, memory_bytes=2**26)


@pytest.fixture
def cgroups():
    """Skips where none can be made."""
    try:
        cgroup.PoolCgroup().remove()
    except OSError as failure:
        pytest.skip(f"no memory cgroup can be made: {failure}")


def without_looks(patch: pytest.MonkeyPatch) -> None:
    """Have keepers see no memory of the processes of their sessions."""
    blind = "from gtpo.sandbox import session_processes\nsession_processes.SessionProcesses.look = lambda self: 0\n"
    bootstrap = fork_server._BOOTSTRAP.replace(
        "from gtpo.sandbox import zygote", f"{blind}from gtpo.sandbox import zygote"
    )
    patch.setattr(fork_server, "_BOOTSTRAP", bootstrap)


def test_the_interpreter_and_what_it_starts_are_in_a_cgroup_of_their_own(cgroups):
    async def run():
        async with SandboxPool(LIMITS) as pool:
            sessions = [await pool.open() for _ in range(2)]
            (zygote,) = children(pool._server.process.pid)
            # That of the self test may be ending.
            assert eventually(lambda: len(list(filter(is_alive, children(zygote)))) == 2)
            keepers = list(filter(is_alive, children(zygote)))
            members = [set(map(int, f.read_text().split())) for f in pool._server.cgroup.path.glob("*/cgroup.procs")]
            del sessions
            return pool.report.layers, members, [set(children(keeper)) for keeper in keepers]

    layers, members, expected = asyncio.run(run())
    assert "cgroup" in layers and "pool cgroup" not in layers
    # What is ending is still listed.
    found = [[number for number, listed in enumerate(members) if own <= listed] for own in expected]
    assert len(found) == 2 and all(len(numbers) == 1 for numbers in found) and found[0] != found[1]


def test_a_burst_between_two_looks_is_stopped_by_the_kernel(cgroups, monkeypatch):
    without_looks(monkeypatch)
    (burst,) = (attempt for attempt in ATTEMPTS if attempt.name == "children_touch_memory_at_once")

    async def run():
        async with SandboxPool(PATIENT) as pool:
            session = await pool.open()
            await session.run("import os\nx = os.urandom(4)")
            before = await session.run("print(x)")
            full = await session.run(burst.code)
            after = await session.run("print(x)")
            names = ("memory.peak", "memory.max"), ("memory.max_usage_in_bytes", "memory.limit_in_bytes")
            files = (
                [path / name for name in pair]
                for path in pool._server.cgroup.path.glob("*/")
                for pair in names
                if (path / pair[0]).exists()
            )
            figures = [[int(file.read_text()) for file in pair] for pair in files]
            bounded = bool(figures) and all(peak <= limit < 12 * 60 << 20 for peak, limit in figures)
            return full, before.stdout == after.stdout, bounded

    full, kept, bounded = asyncio.run(run())
    assert (full.status, full.error) == (CellStatus.OUT_OF_MEMORY, "memory limit of 64 MB exceeded")
    assert (full.state, kept, bounded) == (SessionState.ROLLED_BACK, True, True)


def test_a_cell_whose_child_alone_was_killed_for_memory_has_not_ended_well(cgroups, monkeypatch):
    without_looks(monkeypatch)
    code = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        block = bytearray(b"x") * (60 << 20)
        time.sleep(99)
print(os.wait()[1])
"""

    async def run():
        async with SandboxPool(PATIENT) as pool:
            return await pool.run(code)

    assert asyncio.run(run()).status is CellStatus.OUT_OF_MEMORY


def test_cpu_time_of_children_counts_to_the_moment(cgroups):
    """Of a child that nobody waits for, in less time than the keeper takes to look."""
    code = """
import os, time
read_end, write_end = os.pipe()
if os.fork() == 0:
    while time.process_time() < 0.03: pass
    os.write(write_end, b"x")
    time.sleep(99)
os.read(read_end, 1)
"""

    async def run():
        async with SandboxPool(PATIENT) as pool:
            return await pool.run(code)

    assert asyncio.run(run()).cpu_time_s >= 0.03


def test_cgroups_are_lent_again_and_none_is_left(cgroups):
    async def run():
        async with SandboxPool(LIMITS) as pool:
            for _ in range(10):
                sessions = [await pool.open() for _ in range(2)]
                for session in sessions:
                    await session.run("print(1)")
                    await session.close()
            paths = list(pool._server.cgroup._paths)
            return paths, pool._server.cgroup._num_made

    paths, num_made = asyncio.run(run())
    # Two at a time; one that is still ending is not lent.
    assert num_made <= 8
    assert paths and not any(path.exists() for path in paths)


TRAINER = """
import asyncio
from gtpo.sandbox import SandboxPool

async def run():
    pool = SandboxPool()
    await pool.start()
    session = await pool.open()
    print(pool._server.process.pid, *pool._server.cgroup._paths, flush=True)
    await session.run("import time; time.sleep(99)")

asyncio.run(run())
"""


def test_what_a_killed_trainer_left_is_removed_by_the_next_and_nothing_else(cgroups):
    async def run(left: list[Path]) -> None:
        async with soon(), SandboxPool(LIMITS) as living:
            await living.open()
            assert not any(path.exists() for path in left)
            async with SandboxPool(LIMITS):
                # Its own are not taken for left ones, though some are empty.
                assert all((path / "0").exists() for path in living._server.cgroup._paths)
                await living.open()

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER], env=environment, stdout=subprocess.PIPE, text=True
    ) as trainer:
        launcher, *left = trainer.stdout.readline().split()
        paths = [Path(path) for path in left]
        assert paths and all(path.exists() for path in paths)
        family = process_states(int(launcher))
        trainer.kill()
    assert eventually(lambda: not any(is_alive(pid) for pid in family))
    asyncio.run(run(paths))


def test_what_was_left_beside_is_removed_where_nobody_holds_it(tmp_path):
    left, held, other = (tmp_path / name for name in ("job/gtpo-sandbox-1", "job/gtpo-sandbox-2", "job/other"))
    for path in (left, held, other):
        (path / "0").mkdir(parents=True)
    lock = lock_directory(str(held))
    cgroup._sweep(tmp_path / "own")
    os.close(lock)
    assert not left.exists() and (held / "0").exists() and (other / "0").exists()


def test_without_cgroups_the_report_says_so_and_the_watch_is_left(monkeypatch):
    monkeypatch.setattr(cgroup, "_hierarchies", lambda: [])

    async def run():
        async with SandboxPool(LIMITS, min_tier="landlock") as pool:
            result = await pool.run("print(1)")
            return pool.report, result.stdout

    report, printed = asyncio.run(run())
    assert "cgroup" not in report.layers and printed == "1\n"
    assert report.missing["cgroup"].endswith("looked at from time to time: no memory controller is mounted")


SYSTEMD = """
30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""
HYBRID = """
31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 23 0:28 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 23 0:29 / /sys/fs/cgroup/my\\040unified rw - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("own", "mounts", "found"),
    [
        (
            "0::/user.slice/a.scope\n",
            SYSTEMD,
            [(2, ("",), ["/sys/fs/cgroup/user.slice/a.scope", "/sys/fs/cgroup/user.slice", "/sys/fs/cgroup"])],
        ),
        (
            "5:memory:/docker/1/x\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/s\n0::/\n",
            HYBRID,
            [
                (
                    1,
                    ("cpu", "cpuacct"),
                    [
                        "/sys/fs/cgroup/cpu,cpuacct/docker/1",
                        "/sys/fs/cgroup/cpu,cpuacct/docker",
                        "/sys/fs/cgroup/cpu,cpuacct",
                    ],
                ),
                (1, ("memory",), ["/sys/fs/cgroup/memory/x", "/sys/fs/cgroup/memory"]),
                (2, ("",), ["/sys/fs/cgroup/my unified"]),
            ],
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_where_cgroups_can_be_made(tmp_path, own, mounts, found):
    (tmp_path / "cgroup").write_text(own)
    (tmp_path / "mountinfo").write_text(mounts.lstrip("\n"))
    assert [(h.version, h.controllers, list(map(str, h.parents))) for h in cgroup._hierarchies(tmp_path)] == found


@pytest.mark.parametrize(
    ("files", "join", "kill", "fill"),
    [
        (
            {
                "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
                "memory.limit_in_bytes": "9000000\n",
                "memory.max_usage_in_bytes": "9000000\n",
                "cpuacct.usage": "1500000000\n",
            },
            "tasks",
            ("memory.oom_control", "oom_kill 3", "oom_kill 4"),
            ("memory.max_usage_in_bytes", "0", "8999999"),
        ),
        (
            {
                "memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 3\noom_group_kill 0\n",
                "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
            },
            "cgroup.procs",
            ("memory.events", "oom_kill 3", "oom_kill 4"),
            ("memory.events", "oom 2", "oom 3"),
        ),
    ],
    ids=["version 1", "version 2"],
)
def test_what_a_keeper_reads_of_a_cgroup(tmp_path, files, join, kill, fill):
    for name, text in (*files.items(), (join, "")):
        (tmp_path / name).write_text(text)
    opened = {name: os.open(tmp_path / name, os.O_RDWR) for name in (*files, join)}

    def change(name: str, before: str, after: str) -> None:
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(before, after))

    group = SessionCgroup(opened.items())
    # The session before was killed, and full; the kernel sets the peak to what is used now.
    if "memory.max_usage_in_bytes" in files:
        assert (tmp_path / "memory.max_usage_in_bytes").read_text()[0] == "0"
        (tmp_path / "memory.max_usage_in_bytes").write_text("0")
    assert (group.was_killed(), group.was_full(), group.cpu_time_s()) == (False, False, 1.5)
    change(*kill)
    assert (group.was_killed(), group.was_full(), group.was_killed()) == (True, False, False)
    change(*fill)
    assert (group.was_killed(), group.was_full()) == (False, True)
    group.join()
    assert (tmp_path / join).read_text() == "0"
    group.lock()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[join])
    for name in files:
        os.close(opened[name])


def test_the_limit_of_a_cgroup_is_above_the_keepers():
    limits = SandboxLimits(memory_bytes=2**29, file_bytes=2**24, max_processes=32)
    alone = cgroup.session_bytes(limits, 2**24, processes=False)
    assert alone >= 2**29 + 2**24 + 2**24
    assert cgroup.session_bytes(limits, 2**24, processes=True) >= 2 * (2**29 + 2**24) + 2**24
