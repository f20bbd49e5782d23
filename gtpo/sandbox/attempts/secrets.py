"""What the trainer and the keeper know: environments, memory, descriptors, names of files."""

from __future__ import annotations

from gtpo.sandbox.attempts.attempt import harmless, refused

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
        "arguments": "import sys\nassert 'scratch' not in ''.join(map(str, sys.argv[:1]))",
        "mounts": (
            "try: mounts = open('/proc/self/mounts').read()\nexcept OSError: mounts = ''\n"
            "assert '$CANARY' not in mounts"
        ),
    },
)
