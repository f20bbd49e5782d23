"""Hostile lines in random mixtures: what each attempt of the abuse suite does alone, several do in turn."""

import asyncio
import random

import pytest

from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SandboxPool
from gtpo.sandbox.code_tools import CodeTools
from tests.sandbox.conftest import without_namespaces

LIMITS = SandboxLimits(cpu_time_s=0.05, wall_time_s=20.0, memory_bytes=2**26, file_bytes=2**20, max_processes=8)
HELPERS = """
import ctypes, gc, os, resource, signal, sys, threading, time
libc = ctypes.CDLL(None)
def attempt(act):
    try: return act()
    except BaseException: return None
def child(act):
    pid = attempt(os.fork)
    if pid == 0:
        attempt(act)
        os._exit(0)
def frame(body): os.write(60, len(body).to_bytes(4, "big") + body)
"""
# None waits for anything: a mixture ends at once, or by its CPU time.
LINES = """
attempt(lambda: os.kill(0, 2))
attempt(lambda: os.kill(0, 15))
attempt(lambda: os.kill(0, 18))
attempt(lambda: [os.kill(pid, 18) for pid in range(2, 40)])
attempt(lambda: os.kill(-1, 9))
attempt(lambda: os.kill(-1, 14))
for number in (2, 10, 14, 15): signal.signal(number, signal.SIG_IGN)
signal.signal(14, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
child(lambda: time.sleep(9))
child(lambda: [child(lambda: time.sleep(9)) for _ in range(3)])
child(lambda: [os.write(1, b'x' * 65536) for _ in range(99)])
child(lambda: frame(b'{"cell":3,"status":"ok","error":""}'))
child(lambda: os.kill(os.getppid(), 9))
attempt(lambda: [os.fork() for _ in range(4)])
attempt(lambda: libc.syscall(56, 0x8011, 0, 0, 0, 0))
frame(b'{"cell":2,"status":"ok","error":""}')
attempt(lambda: os.write(63, (3).to_bytes(4)))
frame(b'{"cell":3,"call":{"name":"look","arguments":{}}}')
attempt(lambda: look())
threading.Thread(target=lambda: attempt(lambda: look()), daemon=True).start()
for fd in range(7): os.set_blocking(fd, False)
attempt(lambda: os.close(4))
attempt(lambda: os.dup2(1, 3))
os.closerange(0, 64)
os._exit(0)
os.abort()
raise KeyboardInterrupt
while True: pass
x = bytearray(40 << 20)
attempt(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0)))
attempt(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (0, 0)))
attempt(lambda: os.makedirs('d/' * 50))
attempt(lambda: os.mkdir('closed', 0))
attempt(lambda: os.chdir('/'))
print('x' * 50_000)
sys.stdout = None
os.write = None
import builtins; builtins.compile = None
sys.modules.clear()
gc.callbacks.append(lambda *_: 1 / 0)
sys.settrace(lambda *_: 1 / 0)
""".strip().splitlines()
INNOCENT = "import os\nopen('q', 'w').write('1')\nprint(input(), sorted(os.listdir('.')))"


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_mixtures_cost_only_themselves(monkeypatch, tier):
    if tier == "landlock":
        without_namespaces(monkeypatch)
    choices = random.Random(1)

    def mixture() -> str:
        return HELPERS + "\n".join(choices.choices(LINES, k=choices.randint(1, 4)))

    async def call(*_: object) -> tuple[bool, str]:
        return True, "seen"

    async def run() -> tuple[list[CellResult], list[CellResult], list[str]]:
        hostile, innocent, neighbour = [], [], []
        async with SandboxPool(LIMITS, min_tier=tier, max_concurrent=1) as pool:
            beside = await pool.open("kept = 'kept'")
            for _ in range(12):
                async with await pool.open() as session:
                    for tools in (None, CodeTools({"look": ()}, call), None):
                        hostile.append(await session.run(mixture(), tools=tools))
                hostile.append(await pool.run(mixture()))
                innocent.append(await pool.run(INNOCENT, stdin="hello"))
                neighbour.append((await beside.run("print(kept)")).stdout)
        return hostile, innocent, neighbour

    hostile, innocent, neighbour = asyncio.run(run())
    assert {result.num_tries for result in hostile} == {1}
    assert CellStatus.INFRA_ERROR not in {result.status for result in hostile}
    assert len({result.status for result in hostile}) >= 3
    assert [(result.status, result.stdout) for result in innocent] == [(CellStatus.OK, "hello ['q']\n")] * 12
    assert neighbour == ["kept\n"] * 12
