"""Memory, address space and the stack, to the limit and beyond."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import CPU, CRASH, ERROR, OK, OUT_OF_MEMORY, TIMEOUT, ends, refused

_MEMORY = ("MemoryError", "memory limit", *CPU, "OSError", "PermissionError")

ATTEMPTS = ends(
    "memory",
    {
        "ten_gigabytes": ("x = bytearray(10**10)", (ERROR,), ("MemoryError",)),
        "growing_list": ("x = []\nwhile True: x.append(bytearray(2**23))", (ERROR, TIMEOUT, OUT_OF_MEMORY), _MEMORY),
        "small_objects": ("x = []\nwhile True: x.append([x])", (ERROR, TIMEOUT, OUT_OF_MEMORY), ()),
        "anonymous_maps": (
            "from mmap import *\nx = []\nwhile True:\n"
            "    x.append(mmap(-1, 2**24, flags=MAP_PRIVATE | MAP_ANONYMOUS))\n    x[-1].write(b'x' * 2**24)",
            (ERROR, TIMEOUT, OUT_OF_MEMORY),
            _MEMORY,
        ),
        "shared_maps_of_files": (
            "import mmap, os\nopen('f', 'wb').truncate(2**20)\nfd = os.open('f', 2)\n"
            "x = [mmap.mmap(fd, 2**20) for _ in range(1000)]",
            (OK, ERROR),
            (),
        ),
        "huge_integer": ("9**9**9", (ERROR, TIMEOUT), ("MemoryError", *CPU)),
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
# Pages of it stay when a process lets go of all mappings but one of a single page: so none would be counted.
ATTEMPTS += refused(
    "memory",
    {
        "shared_anonymous_map": "import mmap\nmmap.mmap(-1, 2**20)",
        "shared_map_of_zeros": "import mmap\nwith open('/dev/zero', 'r+b') as f: mmap.mmap(f.fileno(), 2**20)",
        "huge_pages": (
            "import mmap\nhuge = 0x40000\nmmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | huge)"
        ),
    },
    ("PermissionError", "FileNotFoundError"),
)
