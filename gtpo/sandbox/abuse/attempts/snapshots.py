"""A cell that wakes the copy of itself with which a sandbox would go on after its failure, or passes off another.

Earlier cells may have planted what that copy then does. In sandboxes without such copies nobody is woken.
"""

from __future__ import annotations

from gtpo.sandbox import layout
from gtpo.sandbox.abuse.attempts.attempt import ANY, CRASH, ERROR, OK, OUT_OF_MEMORY, TIMEOUT, Attempt

_CONTROL, _CLONES = layout.CONTROL_FD, layout.CLONES_FD
_WAKE = """
import os, signal, time
open('failing', 'w').close()
def wake(pids):
    woken = []
    for pid in pids:
        if pid != os.getpid():
            try: os.kill(pid, signal.SIGCONT); woken.append(pid)
            except OSError: pass
    return woken
woken = wake(range(2, 400))
"""
TAMPER = """
import gc
def tamper(**names):
    for o in gc.get_objects():
        if type(o).__name__ == 'Cloner': type(o).wait.__globals__.update(names)
"""
"""Defines what replaces functions of the module that makes the clones."""
# It is woken again when the keeper has stopped it.
_WAIT = "\nif woken:\n    for _ in range(90): wake(woken); time.sleep(0.1)\n    print('ESCAPED')"
_SHOW = "if x != 'kept': print('ESCAPED', x)"


def _planted(deed: str) -> str:
    """A cell that has every process but its own do `deed` when it is woken while another cell runs."""
    body = "\n        ".join(deed.splitlines())
    return f"""
import os, signal, time
x, hold, first = 'kept', None, os.getpid()
def handler(*_):
    global x, hold
    if os.getpid() != first and os.path.exists('failing'):
        {body}
signal.signal(signal.SIGCONT, handler)
"""


# Of a file that is left, planted code could learn in the next cell.
_END = "if os.path.exists('failing'): os.remove('failing')\nos._exit(1)"
_STOP_AGAIN = "os.kill(os.getpid(), signal.SIGSTOP)"
# So that a clone does it, too, in which no handler runs.
_ALSO_UNHANDLED = f"{TAMPER}def instead(*_):\n    handler()\n    return [1], [], []\ntamper(_select=instead)\n"
_BURN = "end = time.process_time() + 9\nwhile time.process_time() < end: pass"
_CHANGED = {
    "woken_snapshot_changes_a_variable": (_planted(f"x = 'changed'\n{_STOP_AGAIN}"), f"{_WAKE}time.sleep(0.1)\n"),
    "woken_snapshot_changes_a_variable_at_once": (_planted(f"x = 'changed'\n{_STOP_AGAIN}"), _WAKE),
    "woken_snapshot_is_stopped_by_its_cell": (
        _planted("x = 'changed'"),
        f"{_WAKE}time.sleep(0.01)\nif woken: os.kill(-1, signal.SIGSTOP)\n",
    ),
    "woken_snapshot_runs_on": (_planted("x = 'changed'\ntime.sleep(9)"), f"{_WAKE}time.sleep(0.1)\n"),
    # The next cell begins without a clone, and makes one of itself when it has changed the variable.
    "clone_of_its_own_for_one_that_failed": (
        "import resource as r\nx = 'kept'\nhard = r.getrlimit(r.RLIMIT_NPROC)[1]\n"
        "r.setrlimit(r.RLIMIT_NPROC, (0, hard))",
        "import ctypes, json, os\nr.setrlimit(r.RLIMIT_NPROC, (hard, hard))\nx = 'changed'\n"
        "call = ctypes.PyDLL(None).syscall\nnumber = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
        "pid = call(ctypes.c_long(number), ctypes.c_long(0x8011), 0, 0, 0, 0)\n"
        # It answers the next cell.
        f"while pid == 0:\n    request = json.loads(os.read({_CONTROL}, int.from_bytes(os.read({_CONTROL}, 4))))\n"
        "    exec(request['code'])\n    answer = json.dumps({'cell': request['cell'], 'status': 'ok', 'error': ''})\n"
        f"    os.write({_CONTROL}, len(answer).to_bytes(4) + answer.encode())\n"
        f"if pid > 0:\n    os.kill(pid, 19)\n    os.write({_CLONES}, pid.to_bytes(4))\n",
    ),
}
ATTEMPTS = [
    Attempt("snapshots", name, f"{code}{_END}", (CRASH, ERROR), plant=plant, then=_SHOW)
    for name, (plant, code) in _CHANGED.items()
]
ATTEMPTS += [
    Attempt(
        "snapshots",
        "woken_snapshot_burns_cpu",
        f"{_WAKE}{_WAIT}",
        (TIMEOUT, OK),
        (),
        plant=_planted(_BURN) + _ALSO_UNHANDLED,
        then=_SHOW,
    ),
    Attempt(
        "snapshots",
        "woken_snapshot_forks_what_burns_cpu",
        f"{_WAKE}{_WAIT}",
        (TIMEOUT, OK),
        (),
        plant=_planted(f"os.fork()\n{_BURN}") + _ALSO_UNHANDLED,
        then=_SHOW,
    ),
    Attempt(
        "snapshots",
        "woken_snapshot_holds_memory",
        f"hold = bytearray(b'x') * (150 << 20)\n{_WAKE}{_WAIT}",
        (OUT_OF_MEMORY, TIMEOUT, OK),
        (),
        plant=_planted("hold = bytearray(b'x') * (150 << 20)\ntime.sleep(9)") + _ALSO_UNHANDLED,
        then=_SHOW,
    ),
    Attempt(
        "snapshots",
        "thread_keeps_the_clone_from_stopping",
        "pass",
        ANY,
        plant=(
            "import os, threading, time\ndef wake():\n    while True:\n        try: os.kill(-1, 18)\n"
            "        except OSError: time.sleep(1)\n"
            "try: threading.Thread(target=wake, daemon=True).start()\nexcept RuntimeError: pass\nx = 'kept'"
        ),
    ),
]
