"""The canary session: tries at every start of a pool what must be refused, and derives the tier from the result."""

from __future__ import annotations

import json
import os
import tempfile
from typing import TYPE_CHECKING

from gtpo.sandbox.contract import CellStatus, SandboxReport, SandboxTier, SandboxUnavailable

if TYPE_CHECKING:
    from gtpo.sandbox.pool import SandboxPool

# Every attempt returns when the sandbox lets it through. An exec of a missing file fails with another error than the
# refusal.
_CANARY = """
import json, os, socket
outside, trainer = {outside!r}, {trainer}

def execute():
    try:
        os.execv("/nonexistent", ["x"])
    except FileNotFoundError:
        pass

attempts = {{
    "exec": execute,
    "network": socket.socket,
    "socketpair": socket.socketpair,
    "read_outside": lambda: open(outside).read(),
    "write_outside": lambda: open(outside, "r+"),
    "change_outside": lambda: os.chmod(outside, 0o600),
    "signal_trainer": lambda: os.kill(trainer, 0),
    "trainer_environment": lambda: open(f"/proc/{{trainer}}/environ", "rb").read(),
    "own_environment": lambda: 1 / len(set(os.environ) - {{"HOME", "TMPDIR", "PATH", "LANG"}}),
}}
refused = {{}}
for name, attempt in attempts.items():
    try:
        attempt()
        refused[name] = False
    except (OSError, ZeroDivisionError):
        refused[name] = True
print(json.dumps(refused))
"""
# A child of one cell must be gone in the next.
_LEAVE_A_CHILD = """
import os, time
try:
    child = os.fork()
except OSError:
    child = 0
else:
    if child == 0:
        time.sleep(60)
        os._exit(0)
"""
_FIND_THE_CHILD = """
import os
if child:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        child = 0
print(child)
"""
BANNER = (
    "NO ISOLATION: the sandbox reached tier %s only, and unsafe_no_isolation was set. Model-written code can read, "
    "change and send what the user of this process can."
)

_REMEDY = (
    "Remedies: Linux 5.13 or newer; Ubuntu 24.04: sysctl kernel.apparmor_restrict_unprivileged_userns=0 or an "
    "AppArmor profile that allows user namespaces; Docker: --security-opt seccomp=unconfined --security-opt "
    "apparmor=unconfined; Kubernetes: hostUsers: false and an unconfined seccomp profile; or accept less with min_tier."
)
_NEVER_COVERED = (
    "bugs of the kernel",
    "CPU side channels",
    "reading the clock",
    "a cell that forges its own ok or error",
    "signals between sessions by the load of the machine and what is in its caches",
    "how many processes and files earlier stateless calls in the same jail have made (numbers count on)",
)
# Of a layer: what comes with it, and what it would prevent.
_UNCOVERED_WITH = {
    "snapshots": "signals between sessions by record locks and futexes of files that they share (libraries, /dev/null)"
}
_UNCOVERED_WITHOUT = {
    "pool cgroup": "the sum of memory over all sessions",
    "uid": "signals between sessions by what the kernel counts by user (data in pipes, signals that wait, processes)",
}
_UNCOVERED_BELOW = {
    SandboxTier.NAMESPACES: (
        "names, sizes and times of access of files outside (stat)",
        "total size of files of a session",
        "a fixed working directory",
        "which processes the host has, by their numbers in /proc",
    ),
    SandboxTier.LANDLOCK: ("the network", "files of the user", "signals to and memory of the user's processes"),
    SandboxTier.RLIMITS: ("starting processes", "memory"),
}


async def probe(pool: SandboxPool, missing: dict[str, str]) -> SandboxReport:
    """Run the canary in a session of `pool`; `missing` says why layers of the fork server are off."""
    with tempfile.NamedTemporaryFile(prefix="gtpo-canary-") as outside:
        os.chmod(outside.name, 0o666)
        session = await pool.open()
        try:
            canary = _CANARY.format(outside=outside.name, trainer=os.getpid())
            results = [await session.run(code) for code in (canary, _LEAVE_A_CHILD, _FIND_THE_CHILD)]
        finally:
            await session.close()
    for result in results:
        if result.status is not CellStatus.OK:
            raise SandboxUnavailable(f"the self test ended with {result.status.value}: {result.error}")
    checks: dict[str, bool] = json.loads(results[0].stdout)
    checks["processes"] = results[2].stdout == "0\n"
    layers = session.layers
    missing = missing | session.missing
    tier = reached_tier(checks, layers)
    with_layers = (item for layer, item in _UNCOVERED_WITH.items() if layer in layers)
    without = (item for layer, item in _UNCOVERED_WITHOUT.items() if layer not in layers)
    below = (item for needed, items in _UNCOVERED_BELOW.items() if tier < needed for item in items)
    not_covered = (*_NEVER_COVERED, *with_layers, *without, *below)
    return SandboxReport(tier, layers, missing, checks, not_covered)


def reached_tier(checks: dict[str, bool], layers: tuple[str, ...]) -> SandboxTier:
    """The tier of a machine whose canary was refused `checks` and whose sessions have `layers`."""
    if not checks["processes"]:
        return SandboxTier.NONE
    if not all(checks.values()) or "seccomp" not in layers:
        return SandboxTier.RLIMITS
    return SandboxTier.NAMESPACES if "namespaces" in layers else SandboxTier.LANDLOCK


def refusal(report: SandboxReport, min_tier: SandboxTier) -> str:
    """Why a pool that needs `min_tier` does not start, and what to do about it."""
    let_through = [name for name, refused in report.checks.items() if not refused]
    return (
        f"the sandbox reached tier {report.tier.name.lower()}, {min_tier.name.lower()} is needed. "
        f"Layers that failed: {report.missing or 'none'}. Attempts not refused: {let_through or 'none'}. {_REMEDY}"
    )
