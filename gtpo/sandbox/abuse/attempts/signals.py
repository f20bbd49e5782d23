"""Signals to the trainer, the keeper, the session itself."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import CRASH, ERROR, OK, TIMEOUT, WALL, ends, refused

ATTEMPTS = refused(
    "signals",
    {
        "kill_trainer": "import os\nos.kill($TRAINER, 9)",
        "group_of_trainer": "import os\nos.killpg($TRAINER, 9)",
        "owner_of_async_io": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, $TRAINER)",
        "pidfd_of_trainer": "import os\nos.pidfd_open($TRAINER)",
    },
)
ATTEMPTS += ends(
    "signals",
    {
        "kill_everybody": ("import os\nos.kill(-1, 9)\nwhile True: pass", (CRASH, ERROR, TIMEOUT), ()),
        "kill_own_group": ("import os\nos.kill(0, 9)\nwhile True: pass", (CRASH, ERROR, TIMEOUT), ()),
        "kill_parent": (
            "import os\nfor s in (9, 15, 2, 1, 19, 11):\n    os.kill(os.getppid(), s)\nraise OSError('still here')",
            (ERROR,),
            (),
        ),
        "kill_parents_group": ("import os\nos.killpg(os.getppid(), 9)\nraise OSError", (ERROR, CRASH), ()),
        "kill_self": ("import os\nos.kill(os.getpid(), 9)\nwhile True: pass", (CRASH, ERROR), ()),
        "kill_self_without_a_name": (
            "import os\nos.kill(os.getpid(), 40)\nwhile True: pass",
            (CRASH, ERROR),
            ("the interpreter was killed by", "PermissionError"),
        ),
        "kill_every_number": (
            "import os\nfor pid in range(2, 300):\n    try: os.kill(pid, 9)\n    except OSError: pass",
            (CRASH, OK),
            (),
        ),
        "abort": ("import os\nos.abort()", (CRASH,), ("the interpreter was killed by",)),
        "alarm": ("import signal\nsignal.alarm(1)\nsignal.pause()", (CRASH, TIMEOUT), ()),
        "many_pending_signals": (
            "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [40])\n"
            "for _ in range(20_000): os.kill(os.getpid(), 40)",
            (OK, ERROR, TIMEOUT),
            (),
        ),
    },
)
ATTEMPTS += ends(
    "signals",
    {
        "stop_self": ("import os\nos.kill(os.getpid(), 19)", (TIMEOUT, ERROR), (*WALL, "PermissionError")),
    },
    waits=True,
)
