"""Cells that do not end, or not by what they are asked to end by."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import CPU, CRASH, ERROR, OK, OUT_OF_MEMORY, TIMEOUT, WALL, ends

ATTEMPTS = ends(
    "time",
    {
        "endless_loop": ("while True: pass", (TIMEOUT,), CPU),
        "ignores_signals": (
            "import signal\nfor s in set(signal.Signals) - {9, 17, 19}: signal.signal(s, signal.SIG_IGN)\n"
            "while True: pass",
            (TIMEOUT,),
            CPU,
        ),
        "catches_everything": (
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            (TIMEOUT,),
            CPU,
        ),
        "regex": ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", (TIMEOUT,), CPU),
        "patched_clock": (
            "import time\ntime.monotonic = time.clock_gettime = lambda *a: 0\nwhile True: pass",
            (TIMEOUT,),
            CPU,
        ),
        "timer_reset": (
            "import signal\nsignal.signal(signal.SIGVTALRM, lambda *a: None)\n"
            "signal.setitimer(signal.ITIMER_VIRTUAL, 0.01, 0.01)\nwhile True: pass",
            (TIMEOUT,),
            CPU,
        ),
        "endless_repr": ("class A:\n    def __repr__(s):\n        while True: pass\nprint(A())", (TIMEOUT,), CPU),
        "endless_exception_text": (
            "class E(Exception):\n    def __str__(s):\n        while True: pass\nraise E",
            (TIMEOUT,),
            CPU,
        ),
        "endless_hash": ("class A:\n    def __hash__(s):\n        while True: pass\n{A()}", (TIMEOUT,), CPU),
        "endless_compile": (
            "compile('-' * 200_000 + '1', 'x', 'eval')",
            (ERROR, TIMEOUT, CRASH, OUT_OF_MEMORY, OK),
            (),
        ),
        "endless_garbage": (
            "class A:\n    def __del__(s):\n        while True: pass\nx = A()\ndel x",
            (TIMEOUT,),
            CPU,
        ),
        "gc_callback": (
            "import gc\ngc.callbacks.append(lambda *a: exec('while True: pass'))\ngc.collect()",
            (TIMEOUT,),
            CPU,
        ),
    },
)
ATTEMPTS += ends(
    "time",
    {
        "sleep": ("import time\ntime.sleep(99)", (TIMEOUT,), WALL),
        "select": ("import select\nselect.select([], [], [], 99)", (TIMEOUT,), WALL),
        "deadlock": ("import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()", (TIMEOUT,), WALL),
        "input_never_comes": ("import os\nr, w = os.pipe()\nos.read(r, 1)", (TIMEOUT,), WALL),
    },
    waits=True,
)
