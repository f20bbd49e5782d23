"""The hostile cells of the abuse suite, by kind, each with the endings that are safe."""

from __future__ import annotations

from dataclasses import dataclass

from gtpo.sandbox.contract import CellStatus

OK, ERROR, TIMEOUT, CRASH = CellStatus.OK, CellStatus.ERROR, CellStatus.TIMEOUT, CellStatus.CRASH
_ANY = (OK, ERROR, TIMEOUT, CRASH)
_REFUSALS = ("PermissionError", "FileNotFoundError", "OSError", "ProcessLookupError", "NotADirectoryError")


@dataclass(frozen=True)
class Attempt:
    """A hostile cell and how it may end.

    In `code`, $CANARY is a file of the host that everybody may write, $PORT a port that it listens on, $TRAINER the
    trainer's process id.  `errors` are the beginnings of the error of a safe ending; empty for any.
    """

    kind: str
    name: str
    code: str
    statuses: tuple[CellStatus, ...]
    errors: tuple[str, ...] = ()


def _refused(kind: str, cells: dict[str, str], errors: tuple[str, ...] = _REFUSALS) -> list[Attempt]:
    """Cells that must fail with one of `errors`."""
    return [Attempt(kind, name, f"{code}\nprint('ESCAPED')", (ERROR,), errors) for name, code in cells.items()]


def _harmless(kind: str, cells: dict[str, str]) -> list[Attempt]:
    """Cells whose own assertions hold."""
    return [Attempt(kind, name, code, (OK,)) for name, code in cells.items()]


def _ends(kind: str, cells: dict[str, tuple[str, tuple[CellStatus, ...], tuple[str, ...]]]) -> list[Attempt]:
    """Cells that end in a certain way."""
    return [Attempt(kind, name, code, statuses, errors) for name, (code, statuses, errors) in cells.items()]


# On a busy machine the wall time limit can come first.
_CPU, _WALL = ("CPU time limit", "wall time limit"), ("wall time limit",)
_MEMORY = ("MemoryError", "memory limit", "CPU time limit", "OSError", "the interpreter was killed", "PermissionError")
_CHANNEL = ("the cell wrote to the interpreter's control channel",)
_FRAME = "import os\ndef frame(b): os.write(3, len(b).to_bytes(4, 'big') + b)\n"

_PROCESSES = _ends(
    "processes",
    {
        "fork_bomb": ("import os\nwhile True: os.fork()", _ANY, ()),
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
            _FRAME + 'if os.fork() == 0:\n    frame(b\'{"cell":2,"status":"ok","error":""}\')\n    os._exit(0)\n'
            "import time\ntime.sleep(0.05)\nraise ValueError",
            (ERROR, CRASH, OK),
            (),
        ),
        "first_thread_ends": (
            "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()\n"
            "ctypes.CDLL(None).pthread_exit(0)",
            (TIMEOUT, CRASH, ERROR),
            (),
        ),
        "vfork": (
            "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(58) == -1",
            (OK, ERROR),
            (),
        ),
        "pool_of_processes": ("import multiprocessing as m\nm.Pool(2)", _ANY, ()),
        "sockets_of_children": (
            "import os, socket\nif os.fork() == 0:\n    try: socket.create_connection(('127.0.0.1', $PORT), 1)\n"
            "    finally: os._exit(0)",
            (OK, ERROR),
            (),
        ),
        "children_hold_memory": (
            "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (60 << 20)\n"
            "        time.sleep(9)\ntime.sleep(9)",
            (CRASH, ERROR, TIMEOUT),
            ("memory limit", "PermissionError", "CPU time limit"),
        ),
        "children_burn_cpu": (
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        while True: pass\ntime.sleep(9)",
            (TIMEOUT, ERROR),
            (*_CPU, "PermissionError"),
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
_PROCESSES += _refused(
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
_PROCESSES += _harmless(
    "processes", {"system": "import os\nassert os.system('echo ESCAPED > /tmp/gtpo-escape') not in (0, 256)"}
)

_SIGNALS = _refused(
    "signals",
    {
        "kill_trainer": "import os\nos.kill($TRAINER, 9)",
        "group_of_trainer": "import os\nos.killpg($TRAINER, 9)",
        "owner_of_async_io": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, $TRAINER)",
        "pidfd_of_trainer": "import os\nos.pidfd_open($TRAINER)",
    },
)
_SIGNALS += _ends(
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
        "stop_self": ("import os\nos.kill(os.getpid(), 19)", (TIMEOUT, ERROR), (*_WALL, "PermissionError")),
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

_MEMORY_ATTEMPTS = _ends(
    "memory",
    {
        "ten_gigabytes": ("x = bytearray(10**10)", (ERROR,), ("MemoryError",)),
        "growing_list": ("x = []\nwhile True: x.append(bytearray(2**23))", (ERROR, TIMEOUT, CRASH), _MEMORY),
        "small_objects": ("x = []\nwhile True: x.append([x])", (ERROR, TIMEOUT, CRASH), ()),
        "anonymous_maps": (
            "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**24)); x[-1].write(b'x' * 2**24)",
            (ERROR, TIMEOUT, CRASH),
            _MEMORY,
        ),
        "shared_maps_of_files": (
            "import mmap, os\nopen('f', 'wb').truncate(2**20)\nfd = os.open('f', 2)\n"
            "x = [mmap.mmap(fd, 2**20) for _ in range(1000)]",
            (OK, ERROR),
            (),
        ),
        "huge_integer": ("9**9**9", (ERROR, TIMEOUT), ("MemoryError", *_CPU)),
        "huge_decimal_string": ("str(10**5000)", (ERROR,), ("ValueError: Exceeds the limit",)),
        "deep_recursion": ("def f(): f()\nf()", (ERROR,), ("RecursionError",)),
        "c_stack": (
            "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n): return getattr(s, n)\n"
            "A().x",
            (CRASH, ERROR, TIMEOUT),
            (),
        ),
        "locked_memory": (
            "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mlockall(1) != 0",
            (OK,),
            (),
        ),
        "huge_repr": ("class A:\n    def __repr__(s): return 'x' * 10**8\nprint(A())", (OK, ERROR, TIMEOUT), ()),
        "pipes_full_of_data": (
            "import os\nx = []\nwhile True:\n    r, w = os.pipe()\n    os.set_blocking(w, False)\n"
            "    x.append((r, w))\n    os.write(w, b'x' * 65536)",
            (ERROR,),
            ("OSError: [Errno 24]", "PermissionError"),
        ),
    },
)

_TIME = _ends(
    "time",
    {
        "endless_loop": ("while True: pass", (TIMEOUT,), _CPU),
        "ignores_signals": (
            "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
            (TIMEOUT,),
            _CPU,
        ),
        "catches_everything": (
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            (TIMEOUT,),
            _CPU,
        ),
        "regex": ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", (TIMEOUT,), _CPU),
        "sleep": ("import time\ntime.sleep(99)", (TIMEOUT,), _WALL),
        "select": ("import select\nselect.select([], [], [], 99)", (TIMEOUT,), _WALL),
        "deadlock": ("import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()", (TIMEOUT,), _WALL),
        "input_never_comes": ("import os\nr, w = os.pipe()\nos.read(r, 1)", (TIMEOUT,), _WALL),
        "patched_clock": (
            "import time\ntime.monotonic = time.clock_gettime = lambda *a: 0\nwhile True: pass",
            (TIMEOUT,),
            _CPU,
        ),
        "timer_reset": (
            "import signal\nsignal.signal(signal.SIGVTALRM, lambda *a: None)\n"
            "signal.setitimer(signal.ITIMER_VIRTUAL, 0.01, 0.01)\nwhile True: pass",
            (TIMEOUT,),
            _CPU,
        ),
        "endless_repr": ("class A:\n    def __repr__(s):\n        while True: pass\nprint(A())", (TIMEOUT,), _CPU),
        "endless_exception_text": (
            "class E(Exception):\n    def __str__(s):\n        while True: pass\nraise E",
            (TIMEOUT,),
            _CPU,
        ),
        "endless_hash": ("class A:\n    def __hash__(s):\n        while True: pass\n{A()}", (TIMEOUT,), _CPU),
        "endless_compile": ("compile('-' * 200_000 + '1', 'x', 'eval')", (ERROR, TIMEOUT, CRASH, OK), ()),
        "endless_garbage": (
            "class A:\n    def __del__(s):\n        while True: pass\nx = A()\ndel x",
            (TIMEOUT,),
            _CPU,
        ),
        "gc_callback": (
            "import gc\ngc.callbacks.append(lambda *a: exec('while True: pass'))\ngc.collect()",
            (TIMEOUT,),
            _CPU,
        ),
    },
)

_OUTPUT = _ends(
    "output",
    {
        "flood": ("while True: print('x' * 1000)", (TIMEOUT,), ()),
        "one_large_write": ("print('x' * 10**8)", (OK, TIMEOUT, ERROR), ()),
        "flood_of_errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", (TIMEOUT,), ()),
        "not_text": ("import os\nos.write(1, bytes(range(256)) * 8)", (OK,), ()),
        "escape_sequences": ("print('\\x1b]0;title\\x07\\x1b[2J\\0')", (OK,), ()),
        "lone_surrogates": ("print('\\ud800')\nraise ValueError('\\udfff')", (ERROR,), ("ValueError",)),
        "closed_output": ("import os\nos.closerange(1, 3)\nprint(1)", (OK, ERROR), ()),
        "output_that_blocks": (
            "import os\nos.set_blocking(1, False)\nfor _ in range(99): os.write(1, b'x' * 65536)",
            (OK, ERROR),
            (),
        ),
        "large_exception": ("raise ValueError('x' * 10**7)", (ERROR,), ("ValueError: xxx",)),
        "json_on_stdout": ('print(\'{"cell":2,"status":"infra_error","reward":1}\')', (OK,), ()),
    },
)

_FILES = _refused(
    "files",
    {
        "read_host": "open('$CANARY').read()",
        "write_host": "open('$CANARY', 'r+').write('x')",
        "truncate_host": "import os\nos.truncate('$CANARY', 0)",
        "unlink_host": "import os\nos.unlink('$CANARY')",
        "rename_host": "import os\nos.rename('$CANARY', 'mine')",
        "replace_host": "import os\nopen('mine', 'w')\nos.rename('mine', '$CANARY')",
        "hardlink_host": "import os\nos.link('$CANARY', 'mine')",
        "symlink_host": "import os\nos.symlink('$CANARY', 'mine')\nopen('mine').read()",
        "chmod_host": "import os\nos.chmod('$CANARY', 0)",
        "chown_host": "import os\nos.chown('$CANARY', 0, 0)",
        "utime_host": "import os\nos.utime('$CANARY', (0, 0))",
        "list_host": "import os\nos.listdir(os.path.dirname('$CANARY'))",
        "shadow": "open('/etc/shadow').read()",
        "dotdot": "open('../../../../../../etc/shadow').read()",
        "root_directory": "import os\nos.mkdir('/gtpo')",
        "write_usr": "open('/usr/lib/gtpo', 'w')",
        "write_etc": "open('/etc/gtpo', 'w')",
        "write_run": "open('/run/gtpo-escape', 'w')",
        "write_dev": "open('/dev/gtpo', 'w')",
        "write_standard_library": "import json\nopen(json.__file__, 'r+').write('x')",
        "add_to_standard_library": "import os\nopen(os.path.dirname(os.__file__) + '/gtpo.py', 'w')",
        "sysrq": "open('/proc/sysrq-trigger', 'w').write('x')",
        "core_pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/sh')",
        "kernel_memory": "open('/proc/kcore', 'rb').read(1)",
        "kernel_log": "open('/dev/kmsg').read(1)",
        "raw_disk": "open('/dev/vda', 'rb').read(1)",
        "terminal": "open('/dev/tty', 'w').write('x')",
        "cgroups": "import os\nos.listdir('/sys/fs/cgroup')",
        "docker_socket": "import os\nos.stat('/var/run/docker.sock')",
        "device_node": "import os, stat\nos.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(254, 0))",
        "fifo": "import os\nos.mkfifo('f')",
        "chroot": "import os\nos.chroot('.')",
        "chmod_directory": "import os\nos.chmod('.', 0)",
        "extended_attribute": "import os\nos.setxattr('.', 'user.x', b'x')",
    },
)
_FILES += _refused("files", {"sparse_file": "open('f', 'wb').truncate(2**40)"}, ("OSError: [Errno 27]",))
_FILES += _ends(
    "files",
    {
        "fill_the_disk": (
            "with open('f', 'wb') as f:\n    while True: f.write(b'x' * 2**16)",
            (ERROR, CRASH),
            ("OSError: [Errno 2", "the interpreter was killed by SIGXFSZ"),
        ),
        "many_files": (
            "i = 0\nwhile True:\n    open(str(i), 'w').close()\n    i += 1",
            (ERROR, TIMEOUT),
            ("OSError: [Errno 28]", *_CPU),
        ),
        "deep_directories": (
            "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
            (ERROR, TIMEOUT),
            ("OSError", *_CPU),
        ),
        "temporary_files_of_others": (
            "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x' * 10)",
            (OK, ERROR),
            (),
        ),
        "write_tmp": ("open('/tmp/gtpo-escape', 'w').write('x')", (OK, ERROR), _REFUSALS),
        "write_shared_memory": ("open('/dev/shm/gtpo-escape', 'w').write('x')", (OK, ERROR), _REFUSALS),
        "many_open_files": ("x = []\nwhile True: x.append(open('/dev/null'))", (ERROR,), ("OSError: [Errno 24]",)),
        "endless_read": ("open('/dev/zero', 'rb').read()", (ERROR, TIMEOUT, CRASH), ()),
    },
)
# Where a sandbox has a /tmp of its own, these may succeed.
_FILES = [
    Attempt(a.kind, a.name, a.code, a.statuses) if a.name in ("write_tmp", "write_shared_memory") else a for a in _FILES
]

_SECRETS = _refused(
    "secrets",
    {
        "environment_of_trainer": "open('/proc/$TRAINER/environ', 'rb').read()",
        "memory_of_trainer": "open('/proc/$TRAINER/mem', 'rb').read(1)",
        "directory_of_trainer": "import os\nos.listdir('/proc/$TRAINER/cwd')",
        "descriptors_of_trainer": "import os\nos.listdir('/proc/$TRAINER/fd')",
        "memory_of_parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
        "environment_of_parent": "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "memory_of_the_first": "open('/proc/1/mem', 'rb').read(1)",
        "root_of_the_first": "import os\nos.listdir('/proc/1/root/etc')",
        "limits_of_others": "import resource\nresource.prlimit($TRAINER, resource.RLIMIT_CPU)",
    },
)
_SECRETS += _harmless(
    "secrets",
    {
        "environment": "import os\nassert not [k for k in os.environ if k == '$NAME' or 'TOKEN' in k or 'KEY' in k]",
        "environment_of_c": "import ctypes\nassert ctypes.CDLL(None).getenv(b'$NAME') == 0",
        "descriptors": (
            "import os, stat\nfor fd in range(64):\n    try: s = os.fstat(fd)\n    except OSError: continue\n"
            "    assert not stat.S_ISDIR(s.st_mode) and not stat.S_ISREG(s.st_mode), fd"
        ),
        "heap": (
            "import gc\nneedle = 'hunter' + chr(50)\n"
            "assert not [o for o in gc.get_objects() if type(o) is str and o == needle and o is not needle]"
        ),
        "stack_of_c": (
            "import ctypes\nlibc = ctypes.CDLL(None)\nenviron = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')"
            "\nnames, i = [], 0\nwhile environ and environ[i]:\n    names.append(environ[i])\n    i += 1\n"
            "assert not [n for n in names if n.startswith(b'$NAME')]"
        ),
        "arguments": "import sys\nassert 'scratch' not in ''.join(map(str, sys.argv[:1]))",
        "mounts": (
            "try: mounts = open('/proc/self/mounts').read()\nexcept OSError: mounts = ''\n"
            "assert '$CANARY' not in mounts"
        ),
    },
)

_NETWORK = _refused(
    "network",
    {
        "tcp": "import socket\nsocket.create_connection(('127.0.0.1', $PORT), 1)",
        "tcp6": "import socket\nsocket.socket(socket.AF_INET6)",
        "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $PORT))",
        "listen": "import socket\nsocket.create_server(('127.0.0.1', 0))",
        "raw": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "packet": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "vsock": "import socket\nsocket.socket(socket.AF_VSOCK)",
        "kernel_crypto": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "unix": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0gtpo')",
        "bluetooth": "import socket\nsocket.socket(31, socket.SOCK_RAW)",
        "multipath_tcp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
        "dns": "import socket\nsocket.getaddrinfo('example.com', 80)",
        "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:$PORT')",
        "socket_of_the_keeper": "import socket\nsocket.socket(fileno=3).send(b'x')",
    },
    (*_REFUSALS, "socket.gaierror", "urllib.error.URLError"),
)

# Called with zeros, which do nothing: without the filter most of them fail with another error.
_CALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "execveat": (322, 281), "connect": (42, 203), "sendmsg": (46, 211),
    "personality": (135, 92), "seccomp": (317, 277), "prctl": (157, 167), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "fsopen": (430, 430),
    "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442), "capset": (126, 91),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "reboot": (169, 142),
    "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "swapon": (167, 224), "quotactl": (179, 60), "fanotify_init": (300, 262), "inotify_init1": (294, 26),
    "kcmp": (312, 272), "move_pages": (279, 239), "vmsplice": (278, 75), "syslog": (103, 116), "acct": (163, 89),
    "landlock_create_ruleset": (444, 444), "ioperm": (173, 40), "process_madvise": (440, 440),
    "memfd_secret": (447, 447),
}  # fmt: skip
_KERNEL = [
    Attempt(
        "kernel",
        name,
        f"import ctypes, errno, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"number = {numbers}[os.uname().machine == 'aarch64']\n"
        f"if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):\n"
        f"    print('ESCAPED', ctypes.get_errno())",
        (OK,),
    )
    for name, numbers in _CALLS.items()
]
_KERNEL += _harmless(
    "kernel",
    {
        "clone3": (
            "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "assert libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM)"
        ),
        "x32_calls": "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(0x40000000 | 39) == -1",
        "type_into_a_terminal": (
            "import fcntl\ntry: fcntl.ioctl(0, 0x5412, b'x')\nexcept OSError as e: assert e.errno == 1\n"
            "else: print('ESCAPED')"
        ),
        "own_limits": (
            "import resource as r\nfor limit in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CORE, r.RLIMIT_FSIZE):\n"
            "    try: r.setrlimit(limit, (r.RLIM_INFINITY,) * 2)\n    except (ValueError, OSError): continue\n"
            "    print('ESCAPED')"
        ),
    },
)
_KERNEL += _ends(
    "kernel",
    {
        "calls_of_another_architecture": (
            "import ctypes, mmap, os\nassert os.uname().machine == 'x86_64'\n"
            "code = b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3'\n"
            "memory = mmap.mmap(-1, 4096, prot=7)\nmemory.write(code)\n"
            "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))\n"
            "if f() > 0: print('ESCAPED')",
            (CRASH, ERROR, OK),
            (),
        ),
        "no_core_file": ("import ctypes\nctypes.string_at(0)", (CRASH,), ("the interpreter was killed by SIGSEGV",)),
    },
)

_PROTOCOL = _ends(
    "protocol",
    {
        "garbage_on_every_descriptor": (
            "import os\nfor fd in range(64):\n    try: os.write(fd, b'x' * 99)\n    except OSError: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "answer_of_another_cell": (
            _FRAME + 'frame(b\'{"cell":7,"status":"ok","error":""}\')\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "forged_infra_error": (
            _FRAME + 'frame(b\'{"cell":2,"status":"infra_error","error":""}\')\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "forged_snapshot": (
            _FRAME + "for pid in (1, 0, -1, 2, 10**9, 2**70, True):\n"
            '    frame(b\'{"cell":2,"snapshot":%d}\' % pid)\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "answer_of_wrong_types": (
            _FRAME + 'frame(b\'{"cell":2,"status":"ok","error":3,"line":[1]}\')\nwhile True: pass',
            (CRASH,),
            _CHANNEL,
        ),
        "two_answers": (
            _FRAME + 'b = b\'{"cell":2,"status":"ok","error":""}\'\n'
            "os.write(3, (len(b).to_bytes(4, 'big') + b) * 2)\nwhile True: pass",
            (CRASH,),
            _CHANNEL,
        ),
        "deep_nesting": (_FRAME + "frame(b'[' * 100_000)\nwhile True: pass", (CRASH,), _CHANNEL),
        "not_json": (_FRAME + "frame(b'\\xff' * 9)\nwhile True: pass", (CRASH,), _CHANNEL),
        "half_a_frame": ("import os\nos.write(3, b'\\0\\0\\0\\x09{')\nwhile True: pass", (TIMEOUT,), _CPU),
        "huge_length": ("import os\nos.write(3, b'\\xff' * 4)\nwhile True: pass", (CRASH,), _CHANNEL),
        "eats_the_next_request": (
            "import os\ntry:\n    os.set_blocking(3, False)\n    os.read(3, 99)\nexcept OSError: pass\nos._exit(0)",
            (CRASH,),
            (),
        ),
        "closes_everything": ("import os\nos.closerange(0, 64)", (CRASH,), ("the interpreter",)),
        "replaces_descriptors": (
            "import os\nr, w = os.pipe()\nfor fd in range(5): os.dup2(w, fd)",
            (CRASH, TIMEOUT, OK),
            (),
        ),
        "exit": ("import sys\nsys.exit(0)", (ERROR,), ("SystemExit",)),
        "exit_for_good": ("import os\nos._exit(0)", (CRASH,), ("the interpreter exited with status 0",)),
        "base_exception": ("class E(BaseException): pass\nraise E", (ERROR,), ("E",)),
        "exception_without_text": (
            "class E(Exception):\n    def __str__(s): raise s\nraise E",
            (ERROR,),
            ("the cell raised an exception that",),
        ),
        "exception_with_a_forged_name": (
            "class E(Exception): pass\nE.__qualname__ = 'OK'\nE.__module__ = 'builtins'\nraise E('1')",
            (ERROR,),
            ("OK: 1",),
        ),
    },
)

_INTERPRETER = _ends(
    "interpreter",
    {
        "replaced_builtins": (
            "import builtins, json\nbuiltins.print = builtins.len = json.dumps = None\nraise ValueError('x')",
            (ERROR, CRASH),
            (),
        ),
        "replaced_os": ("import os\nos.write = os.read = os.getpid = os._exit = None", _ANY, ()),
        "cleared_modules": ("import sys\nsys.modules.clear()", (OK, CRASH), ()),
        "cleared_frames": (
            "import sys\nf = sys._getframe()\nwhile f: f.f_locals.clear(); f = f.f_back",
            (OK, ERROR, CRASH),
            (),
        ),
        "trace_function": ("import sys\nsys.settrace(lambda *a: exec('raise ValueError'))\nint()", _ANY, ()),
        "audit_hook": (
            "import sys\ndef hook(*a): raise RuntimeError\nsys.addaudithook(hook)\nopen('x')",
            (ERROR, CRASH),
            (),
        ),
        "exit_functions": ("import atexit\natexit.register(lambda: exec('while True: pass'))", (OK,), ()),
        "closed_loop_of_the_keeper": (
            "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Keeper', 'Plan', 'socket'):\n"
            "        for n in list(getattr(o, '__dict__', {})):\n            try: setattr(o, n, None)\n"
            "            except BaseException: pass",
            _ANY,
            (),
        ),
        "random_memory": (
            "import ctypes, random\nbase = id(object()) & ~0xFFF\nfor _ in range(10**5):\n"
            "    ctypes.memset(base + random.randrange(2**16), 255, 1)",
            _ANY,
            (),
        ),
        "own_code": (
            "import sys\nm = sys.modules.get('gtpo.sandbox.cell')\nif m: m._send = m._run = m._serve = lambda *a: None",
            _ANY,
            (),
        ),
        "null_in_the_source": ("a = 1\x00", (ERROR,), ()),
        "many_parentheses": ("(" * 5000, (ERROR,), ()),
        "many_minuses": ("-" * 90_000 + "1", _ANY, ()),
        "empty": ("", (OK,), ()),
        "long_source": ("#" + "x" * 200_000, (ERROR, OK), ()),
        "subinterpreter": (
            "import _xxsubinterpreters as s\ni = s.create()\ns.run_string(i, 'import os; os._exit(0)')",
            (CRASH, ERROR),
            (),
        ),
        "import_of_the_trainer": ("import torch", (ERROR,), ("ModuleNotFoundError",)),
    },
)

ATTEMPTS: tuple[Attempt, ...] = (
    *_PROCESSES,
    *_SIGNALS,
    *_MEMORY_ATTEMPTS,
    *_TIME,
    *_OUTPUT,
    *_FILES,
    *_SECRETS,
    *_NETWORK,
    *_KERNEL,
    *_PROTOCOL,
    *_INTERPRETER,
)
"""Every attempt, by kind."""
