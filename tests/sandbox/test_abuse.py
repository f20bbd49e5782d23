"""Hostile cells, each at both isolating tiers and beside a sentinel session; the host is looked at from outside."""

import os
import socket

import pytest

from gtpo.sandbox import CellStatus

OK, ERROR, TIMEOUT, CRASH = CellStatus.OK, CellStatus.ERROR, CellStatus.TIMEOUT, CellStatus.CRASH
REFUSED = ("PermissionError", "FileNotFoundError", "OSError")

# name: (code, statuses that are safe, start of the error). {canary} is a world-writable file of the host, {port} a
# port that it listens on, {trainer} this process, which has a secret in its environment and memory.
CASES: dict[str, tuple[str, tuple[CellStatus, ...], str | tuple[str, ...]]] = {
    # processes and threads
    "fork": ("import os\nos.fork()", (ERROR,), REFUSED),
    "fork_bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", (TIMEOUT,), "CPU"),
    "thread": ("import threading\nthreading.Thread(target=print).start()", (ERROR,), "RuntimeError: can't start new"),
    "subprocess": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])", (ERROR,), REFUSED),
    "exec": ("import os\nos.execv('/bin/sh', ['sh'])", (ERROR,), REFUSED),
    "system": ("import os\nassert os.system('id') not in (0, 256)", (OK,), ""),
    "multiprocessing": ("import multiprocessing as m\nm.Pool(2)", (ERROR,), REFUSED),
    "memfd": ("import os\nos.memfd_create('x')", (ERROR,), REFUSED),
    # signals
    "kill_trainer": ("import os\nos.kill({trainer}, 9)", (ERROR,), (*REFUSED, "ProcessLookupError")),
    "kill_parent": ("import os\nos.kill(os.getppid(), 9)", (ERROR,), REFUSED),
    "kill_all": ("import os\nos.kill(-1, 9)", (ERROR,), REFUSED),
    "kill_group": ("import os\nos.kill(0, 9)", (ERROR,), REFUSED),
    "kill_pid_1": ("import os\nfor s in range(1, 65):\n    os.kill(1, s)", (ERROR,), REFUSED),
    "kill_by_async_io": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {trainer})",
        (ERROR,),
        REFUSED,
    ),
    "stop_self": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", (ERROR,), REFUSED),
    "abort": ("import os\nos.abort()", (CRASH,), "the interpreter was killed by"),
    "ignore_signals": (
        "import signal\nfor s in set(signal.Signals) - {{9, 19}}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        (TIMEOUT,),
        "CPU",
    ),
    "catch_everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        (TIMEOUT,),
        "CPU",
    ),
    # memory and stack
    "huge_bytearray": ("x = bytearray(10**10)", (ERROR,), "MemoryError"),
    "growing_list": ("x = []\nwhile True: x.append(bytearray(2**23))", (ERROR, TIMEOUT), ("MemoryError", "CPU")),
    "small_objects": ("x = []\nwhile True: x.append([x])", (ERROR, TIMEOUT, CRASH), ""),
    "anonymous_mmap": ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**24))", (ERROR,), REFUSED),
    "huge_int": ("9**9**9", (ERROR, TIMEOUT), ("MemoryError", "CPU")),
    "huge_str": ("str(10**5000)", (ERROR,), "ValueError: Exceeds the limit"),
    "regex": ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", (TIMEOUT,), "CPU"),
    "deep_stack": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n): return getattr(s, n)\nA().x",
        (CRASH, ERROR, TIMEOUT),
        "",
    ),
    "raise_rlimits": (
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)",
        (ERROR,),
        ("ValueError", "PermissionError"),
    ),
    "rlimits_of_others": ("import resource as r\nr.prlimit({trainer}, r.RLIMIT_CPU)", (ERROR,), REFUSED),
    "core": ("import os, ctypes\nctypes.string_at(0)", (CRASH,), "the interpreter was killed by SIGSEGV"),
    # files
    "read_outside": ("open('{canary}').read()", (ERROR,), REFUSED),
    "write_outside": ("open('{canary}', 'w')", (ERROR,), REFUSED),
    "append_outside": ("open('{canary}', 'a').write('x')", (ERROR,), REFUSED),
    "truncate_outside": ("import os\nos.truncate('{canary}', 0)", (ERROR,), REFUSED),
    "remove_outside": ("import os\nos.unlink('{canary}')", (ERROR,), REFUSED),
    "rename_outside": ("import os\nos.rename('{canary}', 'mine')", (ERROR,), REFUSED),
    "link_outside": ("import os\nos.link('{canary}', 'mine')", (ERROR,), REFUSED),
    "symlink_outside": ("import os\nos.symlink('{canary}', 'mine')\nopen('mine').read()", (ERROR,), REFUSED),
    "chmod_outside": ("import os\nos.chmod('{canary}', 0)", (ERROR,), REFUSED),
    "touch_outside": ("import os\nos.utime('{canary}', (0, 0))", (ERROR,), REFUSED),
    "list_outside": ("import os\nos.listdir(os.path.dirname('{canary}'))", (ERROR,), REFUSED),
    "shadow": ("open('/etc/shadow').read()", (ERROR,), REFUSED),
    "write_stdlib": (
        "import os\nopen(os.__file__ + 'x' if 0 else __import__('json').__file__, 'w')",
        (ERROR,),
        REFUSED,
    ),
    "write_system": ("open('/usr/lib/x', 'w')", (ERROR,), REFUSED),
    "write_tmp": ("open('/tmp/gtpo-escape', 'w')", (ERROR,), REFUSED),
    "write_shm": ("open('/dev/shm/gtpo-escape', 'w')", (ERROR,), REFUSED),
    "sysrq": ("open('/proc/sysrq-trigger', 'w').write('x')", (ERROR,), REFUSED),
    "dotdot": ("open('../../../../etc/shadow').read()", (ERROR,), REFUSED),
    "mknod": ("import os, stat\nos.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(254, 0))", (ERROR,), REFUSED),
    "chroot": ("import os\nos.chroot('.')", (ERROR,), REFUSED),
    "chmod_box": ("import os\nos.chmod('.', 0)", (ERROR,), REFUSED),
    "huge_file": ("with open('f', 'wb') as f:\n    while True: f.write(b'x' * 2**16)", (ERROR,), "OSError: [Errno 2"),
    "sparse_file": ("open('f', 'wb').truncate(2**40)", (ERROR,), "OSError: [Errno 27]"),
    "many_open_files": ("x = []\nwhile True: x.append(open('/dev/null'))", (ERROR,), "OSError: [Errno 24]"),
    # the trainer's secrets
    "trainer_environ": ("open('/proc/{trainer}/environ', 'rb').read()", (ERROR,), REFUSED),
    "trainer_memory": ("open('/proc/{trainer}/mem', 'rb')", (ERROR,), REFUSED),
    "keeper_memory": ("import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb')", (ERROR,), REFUSED),
    "own_environ": ("import os\nassert set(os.environ) == {{'HOME', 'TMPDIR', 'PATH', 'LANG'}}", (OK,), ""),
    "inherited_environ": ("import os\nassert b'hunter' + b'2' not in str(os.environ).encode()", (OK,), ""),
    "c_environ": ("import ctypes\nassert ctypes.CDLL(None).getenv(b'GTPO_TEST_SECRET') == 0", (OK,), ""),
    "descriptors": (
        "import os, stat\nmodes = []\nfor fd in range(64):\n    try: modes.append(stat.S_IFMT(os.fstat(fd).st_mode))\n"
        "    except OSError: pass\n"
        "assert modes == [stat.S_IFCHR, stat.S_IFIFO, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFIFO], modes",
        (OK,),
        "",
    ),
    "identity": ("import os\nos.setuid(0)", (ERROR,), REFUSED),
    # network
    "tcp": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", (ERROR,), REFUSED),
    "udp": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", (ERROR,), REFUSED),
    "unix": ("import socket\nsocket.socket(socket.AF_UNIX)", (ERROR,), REFUSED),
    "netlink": ("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", (ERROR,), REFUSED),
    "vsock": ("import socket\nsocket.socket(socket.AF_VSOCK)", (ERROR,), REFUSED),
    "urllib": ("import urllib.request as u\nu.urlopen('http://127.0.0.1:{port}')", (ERROR,), "urllib.error.URLError"),
    "control_socket_sendmsg": ("import socket\nsocket.socket(fileno=3).send(b'x')", (ERROR,), REFUSED),
    # the protocol
    "garbage_on_every_fd": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'x' * 99)\n    except OSError: pass",
        (CRASH,),
        "the cell wrote to the interpreter's control channel",
    ),
    "forged_answer_of_another_cell": (
        'import os\nb = b\'{{"cell":7,"status":"ok","error":"","line":null}}\'\n'
        "os.write(3, len(b).to_bytes(4, 'big') + b)\nwhile True: pass",
        (CRASH,),
        "the cell wrote to the interpreter's control channel",
    ),
    "forged_status": (
        'import os\nb = b\'{{"cell":1,"status":"infra_error","error":"","line":null}}\'\n'
        "os.write(3, len(b).to_bytes(4, 'big') + b)\nwhile True: pass",
        (CRASH,),
        "the cell wrote to the interpreter's control channel",
    ),
    "forged_nesting": (
        "import os\nb = b'[' * 100_000\nos.write(3, len(b).to_bytes(4, 'big') + b)\nwhile True: pass",
        (CRASH,),
        "the cell wrote to the interpreter's control channel",
    ),
    "half_a_frame": ("import os\nos.write(3, b'\\0\\0\\0\\x09{{')\nwhile True: pass", (TIMEOUT,), "CPU"),
    "huge_length": ("import os\nos.write(3, b'\\xff' * 4)\nwhile True: pass", (CRASH,), "the cell wrote to"),
    "json_on_stdout": ('print(\'{{"cell":1,"status":"infra_error"}}\')', (OK,), ""),
    "close_all": ("import os\nos.closerange(0, 64)", (CRASH,), "the interpreter"),
    "close_output": ("import os\nos.closerange(1, 3)\nprint(1)", (OK, ERROR), ""),
    "replace_builtins": (
        "import builtins, json\nbuiltins.print = json.dumps = None\nraise ValueError('x')",
        (ERROR,),
        "",
    ),
    "patch_the_clock": (
        "import time\ntime.monotonic = time.clock_gettime = lambda *a: 0\nwhile True: pass",
        (TIMEOUT,),
        "",
    ),
    "clear_modules": ("import sys\nsys.modules.clear()", (OK, CRASH), ""),
    "exit_in_frames": (
        "import sys\nf = sys._getframe()\nwhile f: f.f_locals.clear(); f = f.f_back",
        (OK, ERROR, CRASH),
        "",
    ),
}


@pytest.fixture
def host(cage, tmp_path, monkeypatch):
    """Placeholders for the cells; after the test the host must be as before and the sentinel must know its variable."""
    monkeypatch.setenv("GTPO_TEST_SECRET", "hunter2")
    tmp_path.chmod(0o777)
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    canary.chmod(0o666)
    sentinel = cage.do(cage.pool.open())
    cage.do(sentinel.run("kept = 'kept'"))
    before = canary.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"canary": canary, "port": server.getsockname()[1], "trainer": os.getpid()}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert canary.read_text() == "untouched" and list(tmp_path.iterdir()) == [canary]
    after = canary.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert not os.path.exists("/tmp/gtpo-escape") and not os.path.exists("/dev/shm/gtpo-escape")
    assert cage.do(sentinel.run("print(kept)")).stdout == "kept\n"
    cage.do(sentinel.close())


@pytest.mark.parametrize("name", CASES)
def test_abuse(cage, host, name):
    code, statuses, error = CASES[name]
    result, after = cage.cells(code.format(**host), "import os\nos.write(1, b'alive\\n')")
    assert result.status in statuses, result
    assert result.error.startswith(error), result
    # The session answers again, from its old or a new process. After a lie or with its own tools broken it may crash.
    assert after.status in (OK, ERROR, CRASH), after


def test_a_forged_ok_costs_only_the_forger(cage):
    """Code can claim, from within its own interpreter, that it succeeded; not how long it took, and not for long."""
    code = """
import json, os
body = json.dumps({"cell": __cell__, "status": "ok", "error": "", "line": None, "cpu_time_s": 99.0}).encode()
os.write(3, len(body).to_bytes(4, "big") + body)
while True: pass
"""
    forged, next_cell, after = cage.cells(code, "print(1)", "print(2)")
    assert forged.status is OK and forged.cpu_time_s < 1
    assert next_cell.status is TIMEOUT and next_cell.state_lost and next_cell.stdout == ""
    assert after.status is OK and after.stdout == "2\n"


def test_dangerous_system_calls_are_refused(cage):
    """Called with zeros, which do nothing: without the filter most of them fail with another error."""
    code = """
import ctypes, errno, os
column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
calls = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "userfaultfd": (323, 282), "kexec_load": (246, 104),
    "init_module": (175, 105), "execve": (59, 221), "execveat": (322, 281), "memfd_create": (319, 279),
    "clone": (56, 220), "socket": (41, 198), "connect": (42, 203), "sendmsg": (46, 211), "personality": (135, 92),
    "seccomp": (317, 277), "prctl": (157, 167), "open_by_handle_at": (304, 265), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tgkill": (234, 131), "kill": (62, 129),
    "fsopen": (430, 430), "move_mount": (429, 429), "mount_setattr": (442, 442), "setuid": (105, 146),
    "capset": (126, 91), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "reboot": (169, 142), "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "swapon": (167, 224), "quotactl": (179, 60), "fanotify_init": (300, 262), "kcmp": (312, 272),
    "sched_setscheduler": (144, 119), "setpriority": (141, 140), "vmsplice": (278, 75), "syslog": (103, 116),
    "landlock_create_ruleset": (444, 444), "fchmod": (91, 52), "truncate": (76, 45), "setxattr": (188, 5),
}
libc = ctypes.CDLL(None, use_errno=True)
for name, numbers in calls.items():
    if libc.syscall(numbers[column], 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.EPERM:
        print(name)
assert libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() == errno.ENOSYS
assert libc.syscall(0x40000000 | 39) == -1, "the x32 call numbers are open"
"""
    (result,) = cage.cells(code)
    assert (result.status, result.stdout, result.error) == (OK, "", "")


def test_no_code_of_another_session_is_in_memory(cage):
    """Sessions are forked from a process that never saw code, so their heaps hold nothing of each other."""
    marker = "marker" + "-of-the-first"
    search = """
import ctypes, gc
found = [o for o in gc.get_objects() if isinstance(o, (str, bytes)) and "-of-the-first" in str(o)]
assert not found
heap = id(object()) & ~0xfff
blob = b"".join(ctypes.string_at(heap + i * 4096, 4096) for i in range(16))
print(b"marker" + b"-of-the-first" in blob)
"""
    first = cage.do(cage.pool.open(f"x = '{marker}'"))
    (result,) = cage.cells(search)
    cage.do(first.close())
    assert result.stdout == "False\n"


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_with_namespaces_the_host_cannot_be_named(cage, tmp_path):
    code = f"import os\nprint(os.path.exists({str(tmp_path)!r}), os.path.exists('/proc'), os.getcwd(), os.getpid())"
    assert cage.cells(code)[0].stdout == "False False /box 2\n"


@pytest.mark.parametrize("cage", ["namespaces"], indirect=True)
def test_with_namespaces_all_files_together_are_bounded(cage):
    code = "for i in range(99):\n    with open(str(i), 'wb') as f: f.write(b'x' * 2**16)"
    (result,) = cage.cells(code)
    assert result.error == "OSError: [Errno 28] No space left on device"
