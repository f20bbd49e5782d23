"""The trainer's end of the fork server: starts it by a clean exec, asks it for sessions, ends it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from gtpo.sandbox import frames, profiles, removal
from gtpo.sandbox.contract import SandboxLimits, SandboxUnavailable

# Stand-ins for the two packages, so that the fork server imports its own modules and not the trainer's.
_BOOTSTRAP = """
import sys, types
for name, path in (("gtpo", sys.argv[1]), ("gtpo.sandbox", sys.argv[2])):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
from gtpo.sandbox import zygote
zygote.main(sys.argv[3])
"""
# Not -I: it would ignore PYTHONHASHSEED. With an environment of our own, -P -s -S isolate as much.
_FLAGS = ("-P", "-s", "-S", "-B")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PATH": "/usr/bin:/bin"}
# A forked library cannot use the threads that it had started.
_ENVIRONMENT |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# An interpreter of a cluster's module system may find its own libraries only by it. Cells do not see it.
_PASSED_ON = ("LD_LIBRARY_PATH",)


@dataclass
class ForkServer:
    """A running fork server. `missing` maps what its sessions cannot have to the reason."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    scratch: str
    missing: dict[str, str]

    async def spawn(self, end: socket.socket) -> None:
        """Have it start a session's keeper, which will serve `end`. ConnectionError where the server is dead."""
        while True:
            try:
                socket.send_fds(self.control, [b"spawn"], [end.fileno()])
                return
            except BlockingIOError:
                # It is behind by a whole socket buffer of requests.
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """End it with all of its sessions, and wait for that."""
        self.control.close()
        try:
            await asyncio.to_thread(self.process.wait, 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        # The launcher removes it, unless it was killed.
        removal.remove_tree(self.scratch)


async def launch(limits: SandboxLimits, profile: str, *, namespaces: bool) -> ForkServer:
    """Start a fork server; SandboxUnavailable with the step that failed."""
    loop = asyncio.get_running_loop()
    try:
        libraries = profiles.libraries(profile)
    except ImportError as failure:
        raise SandboxUnavailable(str(failure)) from failure
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    scratch = tempfile.mkdtemp(prefix="gtpo-sandbox-")
    package = os.path.dirname(os.path.abspath(__file__))
    config = {
        "control_fd": theirs.fileno(),
        "scratch": scratch,
        "namespaces": namespaces,
        "limits": asdict(limits),
        "libraries": libraries,
        "modules": profiles.modules(profile),
    }
    with tempfile.TemporaryFile() as log:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *_FLAGS, "-c", _BOOTSTRAP, os.path.dirname(package), package, json.dumps(config)],
                env=_ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        server = ForkServer(process, ours, scratch, {})
        try:
            hello = await loop.sock_recv(ours, frames.MAX_FRAME_BYTES)
        except ConnectionError:
            hello = b""
        except BaseException:
            await server.stop()
            raise
        answer: dict[str, Any] = json.loads(hello) if hello else {"failed": "the fork server died at its start"}
        if "failed" not in answer:
            server.missing = answer["missing"]
            return server
        await server.stop()
        log.seek(0)
        last_words = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxUnavailable(": ".join(filter(None, (answer["failed"], last_words))))
