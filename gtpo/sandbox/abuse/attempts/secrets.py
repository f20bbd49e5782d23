"""What the trainer and the keeper know: environments, memory, descriptors, names of files."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import harmless, refused

ATTEMPTS = refused(
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
        "group_of_trainer_process": "import os\nos.getpgid($TRAINER)",
        "session_of_trainer_process": "import os\nos.getsid($TRAINER)",
        "cpus_of_trainer": "import os\nos.sched_getaffinity($TRAINER)",
        "cpu_time_of_trainer": "import time\ntime.clock_gettime(~$TRAINER << 3 | 2)",
        "clock_of_trainer": "import time\ntime.clock_getres(~$TRAINER << 3 | 2)",
        "flags_of_shared_files": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETFL, 0o2000)",
        "limits_of_others": "import resource\nresource.prlimit($TRAINER, resource.RLIMIT_CPU)",
    },
)
ATTEMPTS += harmless(
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
        "arguments": "import sys\nassert sys.argv == sys.orig_argv == [''] and not sys.executable",
        "arguments_of_c": (
            "import ctypes\ncount, words = ctypes.c_int(), ctypes.POINTER(ctypes.c_wchar_p)()\n"
            "ctypes.pythonapi.Py_GetArgcArgv(ctypes.byref(count), ctypes.byref(words))\n"
            "text = ' '.join(words[1:count.value])\nassert not set(text) & set('/{[') and len(text) < 30, text"
        ),
        "modules_of_the_sandbox": (
            "import sys\nassert not [n for n in sys.modules if 'gtpo' in n or 'sandbox' in n]\n"
            "assert not [p for p in (*sys.path, *sys.path_importer_cache) if 'gtpo' in p.rpartition('/opt/')[2]]"
        ),
        "frames_below": (
            "import sys\nf = sys._getframe().f_back\nwhile f:\n    assert '/' not in f.f_code.co_filename\n"
            "    for v in (*f.f_globals.values(), *f.f_locals.values()):\n"
            "        v = v.replace('/gtpo-sandbox-', '') if type(v) is str else v\n"
            "        assert type(v) is not str or not ('/gtpo' in v or '.py' in v), v\n"
            "        assert type(v).__name__ not in ('Plan', 'Keeper', 'socket'), v\n    f = f.f_back"
        ),
        "mounts": (
            "try: mounts = open('/proc/self/mounts').read()\nexcept OSError: mounts = ''\n"
            "assert '$CANARY' not in mounts"
        ),
    },
)
