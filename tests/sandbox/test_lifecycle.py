"""Start, refusal, death and what is left behind."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gtpo.sandbox import CellStatus, SandboxPool, SandboxTier, SandboxUnavailable, contract, fork_server, selftest
from tests.sandbox.conftest import (
    LIMITS,
    Place,
    children,
    eventually,
    is_alive,
    process_states,
    without_namespaces,
)

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
    assert ("names, sizes and times of access of files outside (stat)" in report.not_covered) == (tier == "landlock")


def test_nothing_is_left_after_close(tier, tmp_path):
    async def run() -> dict[int, str]:
        started = SandboxPool(LIMITS, min_tier="landlock")
        await started.start()
        sessions = [await started.open() for _ in range(4)]
        await sessions[0].run("open('a', 'w').write('x')")
        await sessions[1].run("import os; os._exit(0)")
        await sessions[2].close()
        launcher = started._server.process.pid
        # Idle interpreters are stopped: launcher, zygote, three keepers, three interpreters.
        # The processes of the closed session and the snapshot of the last cell may take a moment to die.
        assert eventually(lambda: len([s for s in process_states(launcher).values() if s not in "ZX"]) == 8)
        assert eventually(lambda: list(process_states(launcher).values()).count("T") == 3)
        family = process_states(launcher)
        await started.close()
        await started.close()
        return family

    family = asyncio.run(run())
    assert len(family) >= 8 and not any(is_alive(pid) for pid in family)
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_takes_an_interpreter_before_the_trainer(tier):
    async def run() -> list[int]:
        async with SandboxPool(LIMITS, min_tier="landlock") as started:
            session = await started.open()
            await session.run("x = 1")
            scores = []
            for pid in process_states(started._server.process.pid):
                # the snapshot of the cell before is just being killed
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    scores.append(int(Path(f"/proc/{pid}/oom_score_adj").read_text()))
            return scores

    own = int(Path("/proc/self/oom_score_adj").read_text())
    scores = asyncio.run(run())
    assert scores.count(1000) >= 1 and scores.count(own) >= 3


def test_a_closed_session_leaves_the_launcher_and_the_zygote(tier):
    async def run() -> None:
        async with SandboxPool(LIMITS, min_tier="landlock") as started:
            launcher, scratch = started._server.process.pid, started._server.scratch
            session = await started.open()
            assert len(process_states(launcher)) >= 4
            await session.close()
            assert not scratch or os.listdir(scratch) == []
            assert eventually(lambda: len(process_states(launcher)) == 2)

    asyncio.run(run())


@pytest.mark.parametrize("victim", ["launcher", "zygote", "keeper"])
def test_a_killed_fork_server_is_replaced_and_costs_no_session(tier, victim, tmp_path):
    async def run() -> None:
        async with SandboxPool(LIMITS, min_tier="landlock") as started:
            session = await started.open("s = 7")
            idle = await started.open()
            await idle.run("import random\nx = random.random()\nopen('f', 'w').write('kept')")
            x = (await idle.run("print(x)")).stdout
            launcher = started._server.process.pid
            (zygote,) = children(launcher)
            # of the session of the self test there may be a zombie
            keepers = [pid for pid in children(zygote) if is_alive(pid)]
            assert len(keepers) == 2
            family = process_states(launcher)
            place = Place()
            running = asyncio.ensure_future(session.run("here()\nprint(s, __cell__)", tools=place.tools))
            await place.reached.wait()
            killed = {"launcher": launcher, "zygote": zygote, "keeper": keepers[0]}[victim]
            os.kill(killed, signal.SIGKILL)
            if victim != "keeper":
                assert eventually(lambda: not any(is_alive(pid) for pid in family))
            place.leave.set()
            result = await running
            assert (result.status, result.stdout, result.num_tries) == (CellStatus.OK, "7 1\n", 2)
            after = await idle.run("print(x)\nassert open('f').read() == 'kept'")
            assert (after.status, after.stdout, after.num_tries) == (CellStatus.OK, x, 1 + (victim != "keeper"))
            assert started.metrics()["sandbox/faults"] == 1 + (victim != "keeper")

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


TRAINER = """
import asyncio, dataclasses, sys
import pytest
from gtpo.sandbox import SandboxPool
from tests.sandbox.conftest import LIMITS, without_namespaces

async def run():
    limits = dataclasses.replace(LIMITS, cpu_time_s=60.0, wall_time_s=60.0)
    pool = SandboxPool(limits, min_tier="landlock", max_concurrent=8)
    await pool.start()
    sessions = [await pool.open() for _ in range(3)]
    print(pool._server.process.pid, flush=True)
    await sessions[0].run("open('a', 'w').write('x')")
    await asyncio.gather(sessions[1].run("import time; time.sleep(99)"), sessions[2].run("while True: pass"))

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
        # Launcher, zygote, and of each session the keeper and the interpreter; and the snapshots of two.
        assert eventually(lambda: len(process_states(launcher)) >= (10 if tier == "namespaces" else 8))
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
    confinement.syscall_filter.install = lambda processes: None
if "landlock" in sys.argv[4]:
    confinement._landlock_ruleset = lambda readable, own_files: None
zygote"""
    bootstrap = fork_server._BOOTSTRAP.replace("\nzygote", disable).replace("sys.argv[4]", repr(layers_off))
    monkeypatch.setattr(fork_server, "_BOOTSTRAP", bootstrap)
    if "namespaces" in layers_off:
        without_namespaces(monkeypatch)

    async def run() -> contract.SandboxReport:
        async with SandboxPool(unsafe_no_isolation=True) as started:
            return started.report

    report = asyncio.run(run())
    assert report.tier < SandboxTier.LANDLOCK
    assert let_through <= {name for name, refused in report.checks.items() if not refused}
    with pytest.raises(SandboxUnavailable, match=r"landlock is needed.*Attempts not refused: .*'socketpair'"):
        asyncio.run(SandboxPool(min_tier="landlock").start())


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
    monkeypatch.setattr(fork_server, "_BOOTSTRAP", "raise RuntimeError('no such thing')")
    with pytest.raises(SandboxUnavailable, match="the fork server died at its start: RuntimeError: no such thing"):
        asyncio.run(SandboxPool().start())


def test_the_fork_server_gets_no_environment_but_what_it_needs(monkeypatch):
    monkeypatch.setenv("GTPO_TEST_SECRET", "hunter2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nonexistent")
    monkeypatch.setattr(fork_server, "_BOOTSTRAP", "import os; raise RuntimeError(sorted(os.environ))")
    # The interpreter itself sets LC_CTYPE where no locale is set.
    with pytest.raises(SandboxUnavailable) as caught:
        asyncio.run(SandboxPool().start())
    names = str(caught.value).rpartition("Error: ")[2].replace("'LC_CTYPE', ", "")
    threads = "'MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'"
    assert names == f"['LD_LIBRARY_PATH', {threads}, 'PATH', 'PYTHONHASHSEED', 'PYTHONUTF8']"
