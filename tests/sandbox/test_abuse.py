"""The abuse suite at both isolating tiers, its bite, and what it cannot say in one cell."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from gtpo.__main__ import main
from gtpo.sandbox import CellStatus, SandboxLimits, SandboxPool, SessionState, abuse, fork_server
from gtpo.sandbox.abuse.attempts import ATTEMPTS, Attempt
from gtpo.sandbox.abuse.check import run_check
from tests.sandbox.conftest import LIMITS, TIERS, children, eventually, process_states, without_namespaces

OK, ERROR, TIMEOUT, CRASH = CellStatus.OK, CellStatus.ERROR, CellStatus.TIMEOUT, CellStatus.CRASH
OUT_OF_MEMORY = CellStatus.OUT_OF_MEMORY
ROOT = Path(__file__).parents[2]
# For what is to end by another limit, also on a busy machine.
PATIENT = SandboxLimits(cpu_time_s=5.0, wall_time_s=60.0, memory_bytes=256 * 2**20)


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def attack(request):
    """Runs one attempt, at each of the two tiers that isolate, beside a neighbour that all attempts share."""
    with asyncio.Runner() as runner, abuse.prepared_host() as host:
        pool = SandboxPool(abuse.LIMITS, min_tier=request.param)
        waiting = SandboxPool(abuse.WAITING_LIMITS, min_tier=request.param)
        with pytest.MonkeyPatch.context() as patch:
            if request.param == "landlock":
                without_namespaces(patch)
            runner.run(pool.start())
            runner.run(waiting.start())
        neighbour = runner.run(pool.open())
        runner.run(neighbour.run("kept = 'kept'"))

        def attack(attempt: Attempt) -> abuse.Verdict:
            opened = waiting if attempt.waits else pool
            return runner.run(abuse.run_one(opened.open, attempt, host, neighbour))

        yield attack
        # Of all that, the launchers, the zygotes and the neighbour's two processes are left.
        assert eventually(lambda: num_alive(pool) <= 5 and num_alive(waiting) <= 2)
        runner.run(pool.close())
        runner.run(waiting.close())


def num_alive(pool: SandboxPool) -> int:
    """How many processes there are of a pool."""
    return sum(state not in "ZX" for state in process_states(pool._server.process.pid).values())


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_an_attempt_is_contained(attack, attempt):
    assert attack(attempt).faults == ()


def test_the_suite_is_large_and_its_names_are_unique():
    assert len(ATTEMPTS) == len({attempt.name for attempt in ATTEMPTS}) >= 120


def named(*names: str) -> list[Attempt]:
    attempts = [attempt for attempt in ATTEMPTS if attempt.name in names]
    assert len(attempts) == len(names)
    return attempts


@pytest.mark.parametrize(
    ("tier", "switch_off", "failing"),
    [
        (
            "namespaces",
            "confinement.syscall_filter.install = lambda processes: None",
            (
                "unshare",
                "personality",
                "memfd_exec",
                "shmget",
                "inotify_init1",
                "chmod_directory",
            ),
        ),
        ("namespaces", "confinement._set_rlimits = lambda plan: None", ("sparse_file", "own_limits")),
        (
            "namespaces",
            "from gtpo.sandbox import keeper\nkeeper.Keeper._watch = lambda self: None",
            ("children_hold_memory",),
        ),
        (
            "namespaces",
            "from gtpo.sandbox import keeper, session_cgroup\nkeeper.Keeper._watch = lambda self: None\n"
            "session_cgroup.SessionCgroup.join = lambda self: None",
            ("children_touch_memory_at_once",),
        ),
        (
            "landlock",
            "confinement._landlock_ruleset = lambda readable, own_files: None",
            ("read_host", "write_host", "list_host", "replace_host"),
        ),
    ],
    ids=["seccomp", "rlimits", "watch", "watch and cgroup", "landlock"],
)
def test_without_a_layer_named_attempts_get_through(monkeypatch, tier, switch_off, failing):
    """The layer is switched off inside the fork server. What still holds is another layer's work."""
    hook = f"from gtpo.sandbox import confinement\n{switch_off}\nfrom gtpo.sandbox import zygote"
    bootstrap = fork_server._BOOTSTRAP.replace("from gtpo.sandbox import zygote", hook)
    monkeypatch.setattr(fork_server, "_BOOTSTRAP", bootstrap)
    if tier == "landlock":
        without_namespaces(monkeypatch)

    async def run() -> list[abuse.Verdict]:
        with abuse.prepared_host() as host:
            # No limit of CPU time is to stand in for another layer.
            async with SandboxPool(replace(abuse.LIMITS, cpu_time_s=5.0), unsafe_no_isolation=True) as pool:
                neighbour = await pool.open()
                await neighbour.run("kept = 'kept'")
                verdicts = []
                for attempt in named(*failing):
                    verdicts.append(await abuse.run_one(pool.open, attempt, host, neighbour))
                    # The next one is judged by what it does itself.
                    host.restore()
                return verdicts

    contained = [verdict.attempt.name for verdict in asyncio.run(run()) if not verdict.faults]
    assert contained == []


READABLE_INTERPRETER = """
import os, sys
from gtpo.sandbox import confinement

# The interpreter may lie below a directory that only root can enter: in a mount namespace of our own, open the way.
confinement.unshare(confinement.NEW_NS)
confinement._mount("none", "/", None, 0x44000)
prefix = os.path.realpath(sys.base_prefix)
closed = [p for p in ["/" + "/".join(prefix.split("/")[1:i]) for i in range(2, 9)] if not os.stat(p).st_mode & 1]
if closed:
    held = os.open(prefix, os.O_PATH)
    confinement._mount("tmpfs", closed[0], "tmpfs", 0, "mode=0755")
    os.makedirs(prefix)
    confinement._mount(f"/proc/self/fd/{held}", prefix, None, 0x5000)
if uid := int(sys.argv[1]):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
os.execv(sys.executable, [sys.executable, "-m", "tests.sandbox.rootless", *sys.argv[2:]])
"""


QUICK = ["files", "secrets", "network", "snapshots"]


@pytest.mark.parametrize(
    ("uid", "jail", "layers", "kinds"),
    [
        (12345, "bubblewrap", "namespaces, bubblewrap, user namespace, rlimits, landlock, seccomp, snapshots", []),
        (12345, "namespaces", "namespaces, user namespace, rlimits, landlock, seccomp, snapshots", QUICK),
        (12345, "none", "rlimits, landlock, seccomp", QUICK),
        (0, "namespaces", "namespaces, uid, rlimits, landlock, seccomp, snapshots", QUICK),
        (0, "none", "uid, rlimits, landlock, seccomp", QUICK),
    ],
)
def test_the_suite_with_an_interpreter_that_everybody_can_read(uid, jail, layers, kinds):
    """As an ordinary user, and as root that can become another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user; as this user the suite has run already")
    if jail == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap")
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o777)
        finished = subprocess.run(
            [sys.executable, "-c", READABLE_INTERPRETER, str(uid), jail, *kinds],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": scratch, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # Of cgroups root may make some, where they are mounted.
    said = finished.stdout.replace(", cgroup", "")
    assert said.startswith(f"tier: {TIERS[jail]}\nlayers: {layers}\n"), finished.stdout


def test_the_command_line_runs_the_check(capsys):
    assert main(["sandbox", "check", "--min-tier", "landlock", "--kind", "network", "--kind", "output"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tier: ") and said.endswith("25 of 25 attempts contained\n")
    assert main(["sandbox", "check", "--kind", "nothing"]) == 2
    assert main(["sandbox", "check", "--sandbox.profile", "math"]) == 2


def test_the_check_names_what_was_not_contained(monkeypatch):
    said = []
    assert not run_check(adapter="tests.sandbox.no_sandbox:opened", only=["secrets"], say=said.append)
    assert said[0].split() == ["secrets", "0", "of", "25", "contained"]
    assert said[1].startswith("FAILED secrets environment_of_trainer: it got through; it ended with ok")
    assert said[-1] == "0 of 25 attempts contained"
    with pytest.raises(ValueError, match=r"kind must be one of \['processes', .* got \['nothing'\]"):
        run_check(only=["nothing"])
    with pytest.raises(ValueError, match='adapter must be "module:name", got'):
        run_check(adapter="nothing")


def test_a_forged_ok_costs_only_the_forger(cage):
    """Code can claim, from within its own interpreter, that it succeeded; not how long it took, and not for long."""
    code = """
import json, os
body = json.dumps({"cell": __cell__, "status": "ok", "error": "", "line": None, "cpu_time_s": 99.0}).encode()
os.write(60, len(body).to_bytes(4, "big") + body)
while True: pass
"""
    forged, next_cell, after = cage.cells(code, "print(1)", "print(2)")
    assert forged.status is OK and forged.cpu_time_s < 1
    assert next_cell.status in (TIMEOUT, CRASH) and next_cell.stdout == ""
    assert after.status in (OK, TIMEOUT, CRASH)


def test_threads_of_a_cell_stand_still_between_cells(cage):
    leave = """
import threading
def run():
    while True: pass
try: threading.Thread(target=run, daemon=True).start()
except RuntimeError: pass
print(threading.active_count())
"""

    def thread_states() -> list[str]:
        (zygote,) = children(cage.pool._server.process.pid)
        stats = []
        for interpreter in (pid for keeper in children(zygote) for pid in children(keeper)):
            for stat in Path(f"/proc/{interpreter}/task").glob("*/stat"):
                # the snapshot of the cell before is just being killed
                with contextlib.suppress(OSError):
                    stats.append(stat.read_text().rpartition(")")[2].split()[0])
        return [state for state in stats if state not in "ZX"]

    session = cage.do(cage.pool.open())
    num_threads = int(cage.do(session.run(leave)).stdout)
    assert num_threads == 1 + ("snapshots" in cage.pool.report.layers)
    assert eventually(lambda: len(thread_states()) >= num_threads and set(thread_states()) == {"T"})
    cage.do(session.close())


def test_children_of_a_cell_end_with_it(cage):
    fill = """
import os, time
children = []
try:
    while True:
        pid = os.fork()
        if pid == 0:
            time.sleep(99)
        children.append(pid)
except OSError:
    pass
print(len(children))
"""
    first, gone, second = cage.cells(
        fill,
        "alive = 0\nfor pid in children:\n    try: os.kill(pid, 0); alive += 1\n    except OSError: pass\nprint(alive)",
        fill,
    )
    assert gone.stdout == "0\n"
    # As many as the limit says, or none at all where a cell can start no processes.
    least = LIMITS.max_processes if "snapshots" in cage.pool.report.layers else 0
    assert all(least <= int(cell.stdout) <= least + 2 for cell in (first, second))


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
@pytest.mark.parametrize("exit_signal", [0, 10, 17])
def test_dead_children_do_not_count_in_later_cells(cage, exit_signal):
    """Whatever signal their end sends: without one, a wait for children does not find them unless it asks for all."""
    code = f"""
import ctypes, os
libc, number = ctypes.CDLL(None, use_errno=True), {{"x86_64": 56, "aarch64": 220}}[os.uname().machine]
started = 0
for _ in range({LIMITS.max_processes}):
    pid = libc.syscall(number, {exit_signal}, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    started += pid > 0
print(started)
"""
    ignore = "import signal\nsignal.signal(10, signal.SIG_IGN)"
    results = cage.cells(ignore, *[code] * 4)
    assert [result.stdout for result in results[1:]] == [f"{LIMITS.max_processes}\n"] * 4


def test_fork_bombs_end_and_a_killed_snapshot_is_replaced():
    """Processes that are just being forked while the others are killed must not keep the keeper waiting."""
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"

    async def run():
        limits = SandboxLimits(cpu_time_s=0.2, wall_time_s=5.0, memory_bytes=128 * 2**20)
        async with SandboxPool(limits, max_concurrent=4) as pool:
            sessions = [await pool.open("x = 41") for _ in range(4)]
            bombs = [await asyncio.gather(*(session.run(bomb) for session in sessions)) for _ in range(3)]
            killed = await sessions[0].run("import os\ntry: os.kill(-1, 9)\nfinally: os._exit(1)")
            after = [(await session.run("print(x)")).stdout for session in sessions]
        return [result for round in bombs for result in round], killed, after

    bombs, killed, after = asyncio.run(run())
    assert {result.status for result in bombs} <= {CRASH, TIMEOUT}
    assert {result.state for result in (*bombs, killed)} == {SessionState.ROLLED_BACK}
    assert killed.exit_status == 1 and after == ["41\n"] * 4


def test_memory_of_all_processes_counts_and_the_session_goes_on():
    code = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        block = bytearray(b"x") * (50 << 20)
        time.sleep(99)
time.sleep(99)
"""

    async def run():
        async with SandboxPool(PATIENT) as pool:
            session = await pool.open()
            await session.run("x = 41")
            return await session.run(code), await session.run("print(x)")

    full, after = asyncio.run(run())
    assert (full.status, full.error) == (OUT_OF_MEMORY, "memory limit of 256 MB exceeded")
    assert full.state is SessionState.ROLLED_BACK
    assert after.stdout == "41\n"


def test_memory_that_processes_share_counts_once():
    """Children have the pages of their parent, until one of them writes."""
    code = """
import os, time
block = bytearray(b"x") * (150 << 20)
read_end, write_end = os.pipe()
for _ in range(4):
    if os.fork() == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
time.sleep(0.2)
os.close(write_end)
print([os.wait()[1] for _ in range(4)])
"""

    async def run():
        async with SandboxPool(PATIENT) as pool:
            if not {"uid", "bubblewrap"} & set(pool.report.layers):
                pytest.skip("needs root or bubblewrap: the keeper may not see which memory is shared")
            return await pool.run(code)

    shared = asyncio.run(run())
    assert (shared.stdout, shared.error) == ("[0, 0, 0, 0]\n", "")


def test_no_code_of_another_session_is_in_memory(cage):
    """Sessions are forked from a process that never saw code, so their heaps hold nothing of each other."""
    marker = "marker" + "-of-the-first"
    search = """
import ctypes, gc
found = [o for o in gc.get_objects() if isinstance(o, (str, bytes)) and "-of-the-first" in str(o)]
assert not found
heap = id(object()) & ~0xfff
blob = b"".join(ctypes.string_at(heap + i * 4096, 4096) for i in range(16))
print(b"marker" + b"-of-the-first" in blob)
"""
    first = cage.do(cage.pool.open(f"x = '{marker}'"))
    (result,) = cage.cells(search)
    cage.do(first.close())
    assert result.stdout == "False\n"


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_with_namespaces_the_host_cannot_be_named(cage, tmp_path):
    code = f"import os\nprint(os.path.exists({str(tmp_path)!r}), os.path.exists('/proc'), os.getcwd(), os.getpid())"
    assert cage.cells(code)[0].stdout == "False False /box 2\n"


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_with_namespaces_all_files_together_are_bounded(cage):
    code = "for i in range(99):\n    with open(str(i), 'wb') as f: f.write(b'x' * 2**16)"
    (result,) = cage.cells(code)
    assert result.error == "OSError: [Errno 28] No space left on device"


def test_sessions_have_users_of_their_own(cage):
    """What one session may do to itself, it may not do to its neighbour's processes, files or process count."""
    first, second = (cage.cells("import os\nprint(os.getuid())")[0].stdout for _ in range(2))
    if "uid" in cage.pool.report.layers and "namespaces" in cage.pool.report.layers:
        assert first != second and int(first) > 2**16
