"""What faults and hostile neighbours cost: each in a pool of its own, beside sessions that must not notice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.sandbox_processes import alive, family_of, memory_bytes
from gtpo.sandbox import CellStatus, SandboxLimits, SandboxPool, SandboxSession, fork_server

MIB = 2**20


@dataclass
class Fault:
    """One line of the second table: what was done, and what it cost."""

    name: str
    figure: str
    passed: bool | None


class Good:
    """Sessions that count; `lost()` says how many no longer know their number."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool
        self.sessions: list[SandboxSession] = []
        self.turns = 0

    async def open(self, count: int) -> None:
        self.sessions = [await self.pool.open(f"n = {i}") for i in range(count)]

    async def turn(self) -> float:
        """One turn of all; the longest, in seconds."""

        async def one(session: SandboxSession) -> float:
            start = time.perf_counter()
            await session.run("n += 1000")
            return time.perf_counter() - start

        self.turns += 1
        return max(await asyncio.gather(*(one(session) for session in self.sessions)))

    async def lost(self) -> int:
        results = await asyncio.gather(*(session.run("print(n)") for session in self.sessions))
        return sum(r.stdout != f"{i + 1000 * self.turns}\n" for i, r in enumerate(results))


async def killed(victim: str, num_good: int) -> Fault:
    """SIGKILL for a process of the sandbox while cells run."""
    async with SandboxPool() as pool:
        good = Good(pool)
        await good.open(num_good)
        await good.turn()
        assert pool._server is not None
        family = sorted(family_of(pool._server.process.pid))
        turn = asyncio.ensure_future(good.turn())
        await asyncio.sleep(0.002)
        os.kill(family[("launcher", "zygote", "keeper").index(victim)], signal.SIGKILL)
        took, lost = await turn, await good.lost()
        faults, restarts = (pool.metrics()[f"sandbox/{name}"] for name in ("faults", "restarts"))
        figure = f"{lost} of {num_good} sessions lost; {faults:.0f} rebuilt, {restarts:.0f} restart; {took:.2f} s"
        return Fault(f"{victim} killed", figure, lost == 0)


async def hostile_cell(name: str, code: str, num_good: int) -> Fault:
    """One session does its worst; its own variables are as before, the others do not notice."""
    async with SandboxPool(SandboxLimits(cpu_time_s=0.5, wall_time_s=5.0)) as pool:
        good = Good(pool)
        await good.open(num_good)
        bad = await pool.open("kept = 41")
        result, _ = await asyncio.gather(bad.run(code), good.turn())
        after, lost = await bad.run("print(kept)"), await good.lost()
        own = "kept its variables" if after.stdout == "41\n" else "lost its variables"
        figure = f"{lost} of {num_good} sessions lost; the cell: {result.status.value}, its session {own}"
        return Fault(name, figure, lost == 0 and after.stdout == "41\n")


async def jumping_clock(num_good: int) -> Fault:
    """time.time goes an hour back or forth at every call, here and in the fork server."""
    jump = "import itertools, time\nhours = itertools.cycle([3600.0, -3600.0])\nreal = time.time\n"
    jump += "time.time = lambda: real() + next(hours)\n"
    bootstrap, real = fork_server._BOOTSTRAP, time.time
    fork_server._BOOTSTRAP = jump + bootstrap
    try:
        exec(jump, {})
        async with SandboxPool(SandboxLimits(cpu_time_s=0.5)) as pool:
            good = Good(pool)
            await good.open(num_good)
            await good.turn()
            slow = await (await pool.open()).run("while True: pass")
            lost = await good.lost()
    finally:
        fork_server._BOOTSTRAP, time.time = bootstrap, real
    figure = f"{lost} of {num_good} sessions lost; a limit of 0.5 s ended a cell after {slow.cpu_time_s:.2f} s"
    return Fault("wall clock jumps", figure, lost == 0 and slow.status is CellStatus.TIMEOUT)


HOSTILE = (
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = []\nwhile True: x.append(bytearray(2**22))",
    "while True: print('x' * 1000)",
    "import os\nos.kill(-1, 9)",
    "i = 0\nwhile True:\n    open(str(i), 'w').write('x' * 4096)\n    i += 1",
    "import os\nos.write(60, b'x' * 99)\nwhile True: pass",
)


async def hostile_neighbours(num_hostile: int, num_good: int, num_turns: int) -> Fault:
    """Many hostile sessions beside good ones, all through one pool."""
    async with SandboxPool(SandboxLimits(cpu_time_s=0.2, wall_time_s=5.0, memory_bytes=128 * MIB)) as pool:
        good = Good(pool)
        await good.open(num_good)
        bad = [await pool.open() for _ in range(num_hostile)]

        async def attack(number: int, session: SandboxSession) -> int:
            result = await session.run(HOSTILE[number % len(HOSTILE)])
            return result.status is CellStatus.INFRA_ERROR

        attacks = asyncio.gather(*(attack(number, session) for number, session in enumerate(bad)))
        longest = max([await good.turn() for _ in range(num_turns)])
        broken = sum(await attacks)
        lost = await good.lost()
        figure = f"{lost} of {num_good} sessions lost over {num_turns} turns; longest wait {longest:.1f} s in the queue"
        return Fault(f"{num_hostile} hostile sessions", figure, lost == 0 and broken == 0)


async def live_sessions(count: int) -> Fault:
    """Many sessions at once: memory of each, and whether all states are right."""
    async with SandboxPool(max_sessions=count) as pool:
        assert pool._server is not None
        before = memory_bytes(pool._server.process.pid)
        good = Good(pool)
        await good.open(count)
        for _ in range(2):
            await good.turn()
        each_mb = (memory_bytes(pool._server.process.pid) - before) / count / 1e6
        lost = await good.lost()
        return Fault(
            f"{count} live sessions", f"{each_mb:.1f} MB each (PSS), {lost} wrong states", lost == 0 and each_mb <= 6
        )


async def overshoot() -> Fault:
    """How late a cell is ended: of its CPU time, and of its wall time."""
    async with SandboxPool(SandboxLimits(cpu_time_s=0.5, wall_time_s=1.0)) as pool:
        session = await pool.open()
        late = []
        for _ in range(3):
            late.append((await session.run("while True: pass")).cpu_time_s - 0.5)
            late.append((await session.run("import time\ntime.sleep(9)")).wall_time_s - 1.0)
        return Fault("time-out overshoot", f"at most {max(late) * 1e3:.0f} ms over the limit", max(late) <= 0.3)


TRAINER = """
import asyncio
from gtpo.sandbox import SandboxPool
async def main():
    pool = SandboxPool(max_concurrent=8)
    await pool.start()
    sessions = [await pool.open() for _ in range(8)]
    print(pool._server.process.pid, flush=True)
    bomb = "import os\\nwhile True:\\n    try: os.fork()\\n    except OSError: pass"
    await asyncio.gather(*(session.run(bomb) for session in sessions))
asyncio.run(main())
"""


def survivors_of_sigkill() -> Fault:
    """The trainer is killed while fork bombs run; what is left a second later."""
    with subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        launcher = int(trainer.stdout.readline())
        time.sleep(0.3)
        family = family_of(launcher)
        trainer.kill()
    time.sleep(1.0)
    left = [pid for pid in family if alive(pid)]
    return Fault("trainer killed by SIGKILL", f"{len(left)} of {len(family)} processes left after 1 s", not left)


async def survivors_of_close() -> Fault:
    """What a closed pool leaves."""
    async with SandboxPool() as pool:
        good = Good(pool)
        await good.open(16)
        await good.turn()
        assert pool._server is not None
        family, scratch = family_of(pool._server.process.pid), pool._server.scratch
    left = [pid for pid in family if alive(pid)]
    clean = not left and not os.path.exists(scratch)
    return Fault("pool closed", f"{len(left)} of {len(family)} processes left", clean)


async def faults(*, smoke: bool) -> list[Fault]:
    """Every fault; with `smoke` at tiny sizes."""
    num_good = 4 if smoke else 50
    fill = "with open('f', 'wb') as f:\n    while True: f.write(b'x' * 2**16)"
    threads = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()"
    found = [await killed(victim, num_good) for victim in ("launcher", "zygote", "keeper")]
    found.append(await hostile_cell("disk full", fill, num_good))
    found.append(await hostile_cell("process limit reached", threads, num_good))
    found.append(await jumping_clock(num_good))
    found.append(await hostile_neighbours(6 if smoke else 200, num_good, 2 if smoke else 20))
    found.append(await live_sessions(8 if smoke else 512))
    found.append(await overshoot())
    found.append(await survivors_of_close())
    found.append(survivors_of_sigkill())
    return found
