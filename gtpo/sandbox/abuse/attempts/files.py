"""Files of the host, of the system, and too many of the cell's own."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import (
    CPU,
    CRASH,
    ERROR,
    OK,
    OUT_OF_MEMORY,
    REFUSALS,
    TIMEOUT,
    Attempt,
    ends,
    refused,
)

ATTEMPTS = refused(
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
ATTEMPTS += refused("files", {"sparse_file": "open('f', 'wb').truncate(2**40)"}, ("OSError: [Errno 27]",))
ATTEMPTS += ends(
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
            ("OSError: [Errno 28]", *CPU),
        ),
        "deep_directories": (
            "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
            (ERROR, TIMEOUT),
            ("OSError", *CPU),
        ),
        "temporary_files_of_others": (
            "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x' * 10)",
            (OK, ERROR),
            (),
        ),
        "write_tmp": ("open('/tmp/gtpo-escape', 'w').write('x')", (OK, ERROR), REFUSALS),
        "write_shared_memory": ("open('/dev/shm/gtpo-escape', 'w').write('x')", (OK, ERROR), REFUSALS),
        "many_open_files": ("x = []\nwhile True: x.append(open('/dev/null'))", (ERROR,), ("OSError: [Errno 24]",)),
        "endless_read": ("open('/dev/zero', 'rb').read()", (ERROR, TIMEOUT, OUT_OF_MEMORY), ()),
    },
)
# Where a sandbox has a /tmp of its own, these may succeed.
ATTEMPTS = [
    Attempt(a.kind, a.name, a.code, a.statuses) if a.name in ("write_tmp", "write_shared_memory") else a
    for a in ATTEMPTS
]
