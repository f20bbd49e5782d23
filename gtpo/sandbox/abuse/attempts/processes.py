"""Starting, hiding and leaving processes and threads."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import (
    ANY,
    CPU,
    CRASH,
    ERROR,
    OK,
    OUT_OF_MEMORY,
    TIMEOUT,
    ends,
    harmless,
    refused,
)
from gtpo.sandbox.abuse.attempts.protocol import FRAME

ATTEMPTS = ends(
    "processes",
    {
        "fork_bomb": ("import os\nwhile True: os.fork()", ANY, ()),
        "stubborn_fork_bomb": (
            "import os, signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n"
            "while True:\n    try: os.fork()\n    except OSError: pass",
            (TIMEOUT, OK, CRASH),
            (),
        ),
        "many_threads": (
            "import threading, time\nfor _ in range(10_000): threading.Thread(target=time.sleep, args=(9,)).start()",
            (ERROR, CRASH),
            ("RuntimeError: can't start new thread", "MemoryError"),
        ),
        "daemon": (
            "import os, time\nif os.fork() == 0:\n    os.fork()\n    time.sleep(0.5)\n"
            "    open('/tmp/gtpo-escape', 'w')\n"
            "    os._exit(0)",
            (OK, ERROR),
            (),
        ),
        "zombies": ("import os\nfor _ in range(8):\n    if os.fork() == 0: os._exit(0)", (OK, ERROR), ()),
        "child_runs_past_the_cell": ("import os\nos.fork()", (OK, ERROR), ()),
        "child_answers_for_its_parent": (
            FRAME + 'if os.fork() == 0:\n    frame(b\'{"cell":2,"status":"ok","error":""}\')\n    os._exit(0)\n'
            "import time\ntime.sleep(0.05)\nraise ValueError",
            (ERROR, CRASH, OK),
            (),
        ),
        "name_that_poses_as_a_line": (
            "import ctypes, os\npid = os.fork()\nif pid == 0:\n"
            "    ctypes.CDLL(None).prctl(15, b'\\rRssAnon:\\tx', 0, 0, 0)\n    os._exit(0)\n"
            "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)",
            (OK, ERROR),
            ("", "PermissionError"),
        ),
        "vfork": (
            "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(58) == -1",
            (OK, ERROR),
            (),
        ),
        "pool_of_processes": ("import multiprocessing as m\nm.Pool(2)", ANY, ()),
        "sockets_of_children": (
            "import os, socket\nif os.fork() == 0:\n    try: socket.create_connection(('127.0.0.1', $PORT), 1)\n"
            "    finally: os._exit(0)",
            (OK, ERROR),
            (),
        ),
        "children_hold_memory": (
            "import os, time\nread_end, write_end = os.pipe()\nfor _ in range(8):\n    if os.fork() == 0:\n"
            "        x = bytearray(b'x') * (60 << 20)\n        os.write(write_end, b'x')\n        time.sleep(99)\n"
            "os.close(write_end)\nfor _ in range(8): os.read(read_end, 1)\ntime.sleep(1)\nprint('ESCAPED')",
            (OUT_OF_MEMORY, ERROR, TIMEOUT),
            ("memory limit", "PermissionError", "CPU time limit"),
        ),
        "children_touch_memory_at_once": (
            "import os, time\ngo, start = os.pipe()\ndone, end = os.pipe()\nfor _ in range(12):\n"
            "    if os.fork() == 0:\n        os.close(start)\n        os.read(go, 1)\n"
            "        x = bytearray(b'x') * (60 << 20)\n        os.write(end, b'x')\n        time.sleep(99)\n"
            "os.close(start)\nos.close(end)\n"
            "for _ in range(12): assert os.read(done, 1)\nprint('ESCAPED')",
            (OUT_OF_MEMORY, ERROR, TIMEOUT),
            ("memory limit", "PermissionError", "CPU time limit"),
        ),
        "children_burn_cpu": (
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        while True: pass\ntime.sleep(9)",
            (TIMEOUT, ERROR),
            (*CPU, "PermissionError"),
        ),
        "children_that_nobody_waits_for": (
            "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfor _ in range(50):\n"
            "    if os.fork() == 0:\n        end = time.process_time() + 0.03\n"
            "        while time.process_time() < end: pass\n        os._exit(0)\n"
            "    try: os.wait()\n    except ChildProcessError: pass\nprint('ESCAPED')",
            (TIMEOUT, ERROR),
            (*CPU, "PermissionError"),
        ),
        "clone_with_a_user_namespace": (
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "number = {'x86_64': 56, 'aarch64': 220}[__import__('os').uname().machine]\n"
            "pid = libc.syscall(number, 0x10000011, 0, 0, 0, 0)\nif pid == 0: libc._exit(0)\n"
            "assert pid == -1 and ctypes.get_errno() == 1",
            (OK,),
            (),
        ),
    },
)
ATTEMPTS += refused(
    "processes",
    {
        "exec_shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
        "exec_interpreter": "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(\"ESCAPED\")'])",
        "subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo ESCAPED'], check=True)",
        "spawn": "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'echo ESCAPED'], {})",
        "setuid_binary": "import os\nos.execv('/usr/bin/su', ['su'])",
        "exec_own_file": "import os\nopen('x', 'w').write('#!/bin/sh')\nos.execv('./x', ['x'])",
        "memfd_exec": "import os\nos.memfd_create('x')",
        "become_root": "import os\nos.setuid(0)",
        "become_another_group": "import os\nos.setgroups([0])",
        "realtime": "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "priority": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -5)",
        "cpu_affinity": "import os\nos.sched_setaffinity(0, {0})",
        "new_session": "import os\nos.setsid()",
    },
)
ATTEMPTS += harmless(
    "processes", {"system": "import os\nassert os.system('echo ESCAPED > /tmp/gtpo-escape') not in (0, 256)"}
)
ATTEMPTS += ends(
    "processes",
    {
        "first_thread_ends": (
            "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()\n"
            "ctypes.CDLL(None).pthread_exit(0)",
            (TIMEOUT, CRASH, ERROR),
            (),
        ),
    },
    waits=True,
)
