"""System calls that no cell needs."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import CRASH, ERROR, OK, Attempt, ends, harmless

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
    "memfd_secret": (447, 447), "sysinfo": (99, 179), "flock": (73, 32), "mincore": (27, 232), "preadv2": (327, 286),
    "cachestat": (451, 451), "readahead": (187, 213), "fadvise64": (221, 223), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "mlock": (149, 228), "mbind": (237, 235),
    "eventfd2": (290, 19), "epoll_create1": (291, 20), "splice": (275, 76), "futex_wait": (455, 455),
    "futex_waitv": (449, 449), "membarrier": (324, 283), "sync": (162, 81),
}  # fmt: skip
ATTEMPTS = [
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
ATTEMPTS += harmless(
    "kernel",
    {
        "clone3": (
            "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "assert libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM)"
        ),
        "type_into_a_terminal": (
            "import fcntl\ntry: fcntl.ioctl(0, 0x5412, b'x')\nexcept OSError as e: assert e.errno == 1\n"
            "else: print('ESCAPED')"
        ),
        "leases_and_notices_of_files": (
            "import fcntl, os\nopen('f', 'w').close()\n"
            "for fd, command in ((os.open('f', 0), 1024), (os.open('.', 0), 1026), (os.open('f', 0), 10)):\n"
            "    try: fcntl.fcntl(fd, command, 0)\n    except OSError as e: assert e.errno == 1\n"
            "    else: print('ESCAPED')"
        ),
        "merged_pages": (
            "import mmap\nm = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
            "for advice in (12, 20, 21):\n    try: m.madvise(advice)\n    except OSError as e: assert e.errno == 1\n"
            "    else: print('ESCAPED')"
        ),
        "own_limits": (
            "import resource as r\nfor limit in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CORE, r.RLIMIT_FSIZE):\n"
            "    try: r.setrlimit(limit, (r.RLIM_INFINITY,) * 2)\n    except (ValueError, OSError): continue\n"
            "    print('ESCAPED')"
        ),
    },
)
ATTEMPTS += ends(
    "kernel",
    {
        "calls_of_another_architecture": (
            "import ctypes, mmap, os\nassert os.uname().machine == 'x86_64'\n"
            "code = b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3'\n"
            "memory = mmap.mmap(-1, 4096, prot=7, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nmemory.write(code)\n"
            "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))\n"
            "if f() > 0: print('ESCAPED')",
            (CRASH, ERROR, OK),
            (),
        ),
        "x32_calls": (
            "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(0x40000000 | 39) == -1",
            (CRASH, OK),
            (),
        ),
        "no_core_file": ("import ctypes\nctypes.string_at(0)", (CRASH,), ("the interpreter was killed by SIGSEGV",)),
    },
)
