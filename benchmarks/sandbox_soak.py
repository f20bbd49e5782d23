"""What grows in a sandbox, its trainer and the system while calls of all kinds go on."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from benchmarks.sandbox_calls import NUM_CALLERS
from benchmarks.sandbox_faults import Fault
from benchmarks.sandbox_processes import alive, family_of, resident_kb
from gtpo.sandbox import SandboxPool, SandboxSession


async def soak(num_calls: int) -> Fault:
    """Calls of all kinds, some of them failing; what has grown since the first hundredth."""
    codes = [
        "n += 1",
        "x = [0] * 10_000",
        "open('f', 'w').write('x' * 1000)",
        "import os\nos._exit(1)",
        "1/0",
        "import os\nif os.fork() == 0: os._exit(0)",
        "import threading\nthreading.Thread(target=int).start()",
    ]
    async with SandboxPool() as pool:
        sessions: list[SandboxSession] = []

        async def some(first: int, last: int) -> None:
            for number in range(first, last):
                if number % 50 == 0:
                    await asyncio.gather(*(session.close() for session in sessions))
                    sessions[:] = [await pool.open("n = 0") for _ in range(NUM_CALLERS)]
                await asyncio.gather(
                    *(session.run(codes[(number + i) % len(codes)]) for i, session in enumerate(sessions)),
                    pool.run("print(1+1)"),
                )

        num_rounds = num_calls // (NUM_CALLERS + 1)
        warm = max(num_rounds // 100, 1) // 50 * 50 + 1
        await some(0, warm)
        before = _footprint(pool)
        await some(warm, num_rounds // 50 * 50 + 1)
        grown = {name: value - before[name] for name, value in _footprint(pool).items()}
    figure = ", ".join(f"{name} {value:+d}" for name, value in grown.items())
    allowed = {
        "kB of trainer": 20_000,
        "kB of zygote": 1000,
        "descriptors": 0,
        "processes": 4,
        "mounts": 0,
        "cgroups": 0,
    }
    return Fault(f"soak of {num_calls} calls", figure, all(grown[name] <= most for name, most in allowed.items()))


def _footprint(pool: SandboxPool) -> dict[str, int]:
    assert pool._server is not None
    zygote = sorted(family_of(pool._server.process.pid))[1]
    return {
        "kB of trainer": resident_kb(os.getpid()),
        "kB of zygote": resident_kb(zygote),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": sum(alive(pid) for pid in family_of(pool._server.process.pid)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": sum(int(line.split()[2]) for line in Path("/proc/cgroups").read_text().splitlines()[1:]),
    }
