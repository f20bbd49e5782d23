"""Start, refusal, death and what is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gtpo.sandbox import CellStatus, SandboxPool, SandboxTier, SandboxUnavailable, contract, pool, selftest
from tests.sandbox.conftest import LIMITS, eventually, is_alive, process_states, without_namespaces

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["namespaces", "landlock"])
def tier(request, monkeypatch, tmp_path):
    """The name of a tier that pools of the test reach; their temporary files lie in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if request.param == "landlock":
        without_namespaces(monkeypatch)
    return request.param


def test_the_report_says_what_holds(tier):
    async def run() -> contract.SandboxReport:
        async with SandboxPool(LIMITS, min_tier=tier) as started:
            assert started.tier is SandboxTier.parse(tier)
            return started.report

    report = asyncio.run(run())
    assert {"rlimits", "landlock", "seccomp"} <= set(report.layers) and all(report.checks.values())
    assert ("namespaces" in report.layers) == (tier == "namespaces") != ("namespaces" in report.missing)
    assert ("names and sizes of files outside (stat)" in report.not_covered) == (tier == "landlock")


def test_nothing_is_left_after_close(tier, tmp_path):
    async def run() -> dict[int, str]:
        started = SandboxPool(LIMITS)
        await started.start()
        sessions = [await started.open() for _ in range(4)]
        await sessions[0].run("open('a', 'w').write('x')")
        await sessions[1].run("import os; os._exit(0)")
        await sessions[2].close()
        launcher = started._server.process.pid
        # Idle interpreters are stopped: launcher, zygote, two keepers, two interpreters.
        # The processes of the closed and of the crashed session may take a moment to be reaped.
        assert eventually(lambda: len(s := list(process_states(launcher).values())) == 6 and s.count("T") == 2)
        family = process_states(launcher)
        await started.close()
        await started.close()
        return family

    family = asyncio.run(run())
    assert len(family) == 6 and not any(is_alive(pid) for pid in family)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_session_leaves_the_launcher_and_the_zygote(tier):
    async def run() -> None:
        async with SandboxPool(LIMITS) as started:
            launcher, scratch = started._server.process.pid, Path(started._server.scratch)
            session = await started.open()
            assert len(process_states(launcher)) >= 4
            await session.close()
            assert list(scratch.iterdir()) == []
            assert eventually(lambda: len(process_states(launcher)) == 2)

    asyncio.run(run())


@pytest.mark.parametrize("victim", ["launcher", "zygote", "keeper"])
def test_a_killed_fork_server_is_an_infra_error_and_is_replaced(tier, victim, tmp_path):
    async def run() -> None:
        async with SandboxPool(LIMITS) as started:
            session = await started.open("s = 7")
            idle = await started.open()
            await idle.run("x = 1")
            # Launcher, zygote, and of each session the keeper and the interpreter.
            family = sorted(process_states(started._server.process.pid))
            assert len(family) == 6
            running = asyncio.ensure_future(session.run("import time; time.sleep(4)"))
            await asyncio.sleep(0.1)
            os.kill(family[("launcher", "zygote", "keeper").index(victim)], signal.SIGKILL)
            result = await running
            assert result.status is CellStatus.INFRA_ERROR and result.state_lost
            if victim != "keeper":
                assert eventually(lambda: not any(is_alive(pid) for pid in family[1:]))
                assert (await idle.run("print(1)")).status is CellStatus.INFRA_ERROR
            after = await session.run("print(s, __cell__)")
            assert (after.status, after.stdout) == (CellStatus.OK, "7 2\n")
            assert (await idle.run("print('x' in globals())")).stdout == ("True\n" if victim == "keeper" else "False\n")

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


TRAINER = """
import asyncio, sys
import pytest
from gtpo.sandbox import SandboxPool
from tests.sandbox.conftest import LIMITS, without_namespaces

async def run():
    pool = SandboxPool(LIMITS, max_concurrent=8)
    await pool.start()
    sessions = [await pool.open() for _ in range(3)]
    print(pool._server.process.pid, flush=True)
    await sessions[0].run("open('a', 'w').write('x')")
    await asyncio.gather(sessions[1].run("while True: pass"), sessions[2].run("import time; time.sleep(99)"))

patch = pytest.MonkeyPatch()
if sys.argv[1] == "landlock":
    without_namespaces(patch)
asyncio.run(run())
"""


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_nothing_survives_a_killed_trainer(tier, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, tier], env=environment, stdout=subprocess.PIPE, text=True
    ) as trainer:
        launcher = int(trainer.stdout.readline())
        assert eventually(lambda: len(process_states(launcher)) == 8)
        family = process_states(launcher)
        trainer.kill()
    assert eventually(lambda: not any(is_alive(pid) for pid in family))
    assert eventually(lambda: list(tmp_path.iterdir()) == [])


def test_a_pool_below_min_tier_refuses_with_the_step_and_a_remedy(monkeypatch):
    without_namespaces(monkeypatch)
    with pytest.raises(
        SandboxUnavailable, match=r"tier landlock, namespaces is needed.*unshare.*Ubuntu.*Docker.*Kubern"
    ):
        asyncio.run(SandboxPool(min_tier="namespaces").start())


@pytest.mark.parametrize(
    ("layers_off", "let_through"),
    [
        ("seccomp", {"socketpair"}),
        ("seccomp landlock namespaces", {"network", "socketpair", "read_outside", "write_outside", "signal_trainer"}),
    ],
)
def test_a_layer_that_is_off_is_found_out_and_refused(monkeypatch, layers_off, let_through):
    """The layers are switched off inside the fork server, which does not say so."""
    disable = """
from gtpo.sandbox import confinement
if "seccomp" in sys.argv[4]:
    confinement.syscall_filter.install = lambda: None
if "landlock" in sys.argv[4]:
    confinement._landlock_ruleset = lambda readable: None
zygote"""
    bootstrap = pool._BOOTSTRAP.replace("\nzygote", disable).replace("sys.argv[4]", repr(layers_off))
    monkeypatch.setattr(pool, "_BOOTSTRAP", bootstrap)
    if "namespaces" in layers_off:
        without_namespaces(monkeypatch)

    async def run() -> contract.SandboxReport:
        async with SandboxPool(min_tier="none") as started:
            return started.report

    report = asyncio.run(run())
    assert report.tier < SandboxTier.LANDLOCK
    assert let_through <= {name for name, refused in report.checks.items() if not refused}
    with pytest.raises(SandboxUnavailable, match=r"landlock is needed.*Attempts not refused: .*'socketpair'"):
        asyncio.run(SandboxPool().start())


@pytest.mark.parametrize(
    ("checks", "layers", "tier"),
    [
        ({"processes": True, "network": True}, ("namespaces", "seccomp"), SandboxTier.NAMESPACES),
        ({"processes": True, "network": True}, ("landlock", "seccomp"), SandboxTier.LANDLOCK),
        ({"processes": True, "network": True}, ("namespaces",), SandboxTier.RLIMITS),
        ({"processes": True, "network": False}, ("namespaces", "seccomp"), SandboxTier.RLIMITS),
        ({"processes": False, "network": True}, ("namespaces", "seccomp"), SandboxTier.NONE),
    ],
)
def test_the_tier_follows_from_what_the_canary_could_do(checks, layers, tier):
    assert selftest.reached_tier(checks, layers) is tier


def test_other_systems_refuse_with_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="needs Linux, this is darwin"):
        asyncio.run(SandboxPool().start())


def test_importing_needs_no_linux_module():
    code = (
        "import sys\nfor name in ('fcntl', 'resource', 'ctypes'): sys.modules[name] = None\n"
        "import gtpo.sandbox\nassert 'gtpo.sandbox.confinement' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_fork_server_that_dies_at_start_is_unavailable(monkeypatch):
    monkeypatch.setattr(pool, "_BOOTSTRAP", "raise RuntimeError('no such thing')")
    with pytest.raises(SandboxUnavailable, match="the fork server died at its start: RuntimeError: no such thing"):
        asyncio.run(SandboxPool().start())


def test_the_fork_server_gets_no_environment_but_what_it_needs(monkeypatch):
    monkeypatch.setenv("GTPO_TEST_SECRET", "hunter2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nonexistent")
    monkeypatch.setattr(pool, "_BOOTSTRAP", "import os; raise RuntimeError(sorted(os.environ))")
    # The interpreter itself sets LC_CTYPE where no locale is set.
    with pytest.raises(SandboxUnavailable) as caught:
        asyncio.run(SandboxPool().start())
    names = str(caught.value).rpartition("Error: ")[2].replace("'LC_CTYPE', ", "")
    assert names == "['LD_LIBRARY_PATH', 'PATH', 'PYTHONHASHSEED', 'PYTHONUTF8']"


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
arguments = ["-q", "-p", "no:cacheprovider", "tests/sandbox/test_abuse.py", "-k", *sys.argv[2:]]
os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
"""


@pytest.mark.parametrize(("uid", "tests"), [(0, "landlock"), (12345, "test_")])
def test_the_abuse_suite_with_an_interpreter_that_everybody_can_read(uid, tests):
    """As an ordinary user, and as root that can become nobody. An ordinary user has run the suite already."""
    if os.geteuid() != 0:
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o777)
        finished = subprocess.run(
            [sys.executable, "-c", READABLE_INTERPRETER, str(uid), tests, f"--basetemp={scratch}/base"],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": scratch, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert finished.returncode == 0 and " passed" in finished.stdout, finished.stdout + finished.stderr
