"""Runs model-written Python in isolated, stateful sessions: a pre-warmed fork server, one process per session.

Covered on Linux 5.13+ (x86_64, aarch64; root or not; tier "namespaces"): the code sees neither the trainer's memory,
environment, descriptors and processes nor the host's files and network; it cannot signal anybody but itself, or write
outside its own working directory, whose size is bounded; CPU time, wall time, memory, processes and output are limited
from outside, what it leaves running is killed, and no output of the code is read as a status.  A cell that crashes is
rolled back.  Without user namespaces (plain Docker) the tier is "landlock": the same by Landlock and seccomp, but names
and sizes of outside files can be seen, the sum of a session's files is not bounded, and cells can start no processes.
Below that (older kernels, other CPUs) only resource limits hold, and the pool refuses to start unless it is told
`unsafe_no_isolation`.  macOS and Windows: `SandboxPool.start` raises SandboxUnavailable.

Not covered anywhere: bugs of the kernel, CPU side channels, reading the clock, code that lies about its own result from
within its own interpreter.

    async with SandboxPool(SandboxLimits(cpu_time_s=1.0)) as pool:
        async with await pool.open("import math") as session:
            result = await session.run("print(math.pi)")
"""

from gtpo.sandbox.contract import (
    CellResult,
    CellStatus,
    SandboxLimits,
    SandboxReport,
    SandboxTier,
    SandboxUnavailable,
    SessionState,
)
from gtpo.sandbox.pool import SandboxPool
from gtpo.sandbox.protocol import Sandbox, Session
from gtpo.sandbox.session import SandboxSession

__all__ = [
    "CellResult",
    "CellStatus",
    "Sandbox",
    "SandboxLimits",
    "SandboxPool",
    "SandboxReport",
    "SandboxSession",
    "SandboxTier",
    "SandboxUnavailable",
    "Session",
    "SessionState",
]
