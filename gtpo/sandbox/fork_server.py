"""The trainer's end of the fork server: starts it by a clean exec, asks it for sessions, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gtpo.sandbox import bubblewrap, frames, profiles, removal, session_users
from gtpo.sandbox.contract import SandboxLimits, SandboxUnavailable

if TYPE_CHECKING:
    from gtpo.sandbox.cgroup import PoolCgroup

# Stand-ins for the two packages, so that the fork server imports its own modules and not the trainer's.
_BOOTSTRAP = """
import sys, types
while packages:
    name, path = packages.popitem()
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
del name, path
from gtpo.sandbox import zygote
zygote.main(globals().pop("config"))
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
    """A running fork server. `missing` maps what its sessions cannot have to the reason; `held` is what it occupies."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    scratch: str
    cgroup: PoolCgroup | None
    missing: dict[str, str]
    held: contextlib.ExitStack

    async def spawn(self, end: socket.socket, *, ours: socket.socket) -> None:
        """Have it start a session's keeper, which will serve `end` until `ours`, the other one, is closed.

        ConnectionError where the server is dead, SandboxUnavailable where the session can have no cgroup.
        """
        try:
            files = [] if self.cgroup is None else self.cgroup.lend(ours)
        except OSError as failure:
            raise SandboxUnavailable(f"no cgroup can be made for the session: {failure}") from failure
        names = " ".join(["spawn", *(name for name, _ in files)])
        try:
            while True:
                if self.control.fileno() < 0:
                    raise ConnectionResetError("the fork server was stopped")
                try:
                    socket.send_fds(self.control, [names.encode()], [end.fileno(), *(fd for _, fd in files)])
                    break
                except BlockingIOError:
                    # It is behind by a whole socket buffer of requests.
                    await asyncio.sleep(0.005)
        finally:
            for _, fd in files:
                os.close(fd)
        if self.cgroup is not None:
            # While the session starts. If it fails, it fails for the next.
            with contextlib.suppress(OSError):
                self.cgroup.prepare()

    async def stop(self) -> None:
        """End it with all of its sessions, and wait for that."""
        with contextlib.suppress(OSError):
            # Closing is not enough where a process that the trainer has forked holds the socket, too.
            self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()
        try:
            await asyncio.to_thread(self.process.wait, 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        # The launcher removes it, unless it was killed.
        if self.scratch:
            removal.remove_tree(self.scratch)
        if self.cgroup is not None:
            await asyncio.to_thread(self.cgroup.remove)
        self.held.close()


JAILS = ("bubblewrap", "namespaces", "none")
"""What a pool can be in, the best first: the second is built by the fork server itself."""


async def launch(
    limits: SandboxLimits, profile: str, *, jail: str, total_memory_bytes: int | None = None
) -> ForkServer:
    """Start a fork server in one of `JAILS`; SandboxUnavailable with the step that failed.

    `total_memory_bytes` bounds it and all of its sessions together.
    """
    try:
        libraries = profiles.libraries(profile)
    except ImportError as failure:
        raise SandboxUnavailable(str(failure)) from failure
    package = os.path.dirname(os.path.abspath(__file__))
    parent, prefix = os.path.dirname(package), list[str]()
    # Linux only, as this.
    from gtpo.sandbox.confinement import readable_paths

    readable = readable_paths()
    if jail == "bubblewrap":
        prefix = bubblewrap.command(package, readable, libraries)
        parent, package = bubblewrap.PACKAGE, f"{bubblewrap.PACKAGE}/sandbox"
    # Linux only, as this.
    from gtpo.sandbox.cgroup import PoolCgroup, session_bytes

    cgroup, missing = None, dict[str, str]()
    try:
        cgroup = PoolCgroup(total_memory_bytes)
    except OSError as failure:
        if total_memory_bytes is not None:
            reason = f"total_memory_bytes needs a memory cgroup that we may make: {failure}"
            raise SandboxUnavailable(reason) from failure
        missing["cgroup"] = f"the kernel bounds no session's memory, it is only looked at from time to time: {failure}"
    scratch, first_user = "", None
    with contextlib.ExitStack() as held, tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as script:
        # bubblewrap needs none.
        if jail != "bubblewrap":
            # Linux only, as this.
            from gtpo.sandbox.scratch import make_scratch

            scratch, lock = make_scratch()
            held.callback(os.close, lock)
        if os.geteuid() == 0:
            first_user, holder = session_users.claim()
            held.enter_context(holder)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        held.enter_context(ours)
        proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Tells it that we are gone, also while a process that we forked holds a copy of our socket.
        trainer_fd = os.pidfd_open(os.getpid())
        config = {
            "control_fd": theirs.fileno(),
            "trainer_fd": trainer_fd,
            "proc_fd": proc_fd,
            "scratch": scratch,
            "first_user": first_user,
            "jail": jail,
            "own_users": os.geteuid() != 0,
            "pool_cgroup": total_memory_bytes is not None,
            "limits": asdict(limits),
            "readable": readable,
            "libraries": libraries,
            "modules": profiles.modules(profile),
            "warm_up": profiles.warm_up(profile),
        }
        # Not on its command line, which code can find in the memory of its interpreter.
        packages = {"gtpo": parent, "gtpo.sandbox": package}
        script.write(f"packages, config = {packages!r}, {json.dumps(config)!r}\n{_BOOTSTRAP}".encode())
        script.seek(0)
        try:
            process = subprocess.Popen(
                [*prefix, bubblewrap.interpreter(), *_FLAGS, "-"],
                env=_ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                cwd="/",
                stdin=script,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[theirs.fileno(), trainer_fd, proc_fd],
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(proc_fd)
            os.close(trainer_fd)
        server = ForkServer(process, ours, scratch, cgroup, missing, held.pop_all())
        try:
            hello = await asyncio.get_running_loop().sock_recv(ours, frames.MAX_FRAME_BYTES)
        except ConnectionError:
            hello = b""
        except BaseException:
            await server.stop()
            raise
        answer: dict[str, Any] = json.loads(hello) if hello else {"failed": "the fork server died at its start"}
        if "failed" not in answer:
            server.missing |= answer["missing"]
            if cgroup is not None:
                processes = "snapshots" not in server.missing
                if total_memory_bytes is not None:
                    # There are no sessions yet.
                    cgroup.add_server(process.pid)
                cgroup.bound_sessions(session_bytes(limits, answer["library_bytes"], processes=processes))
            return server
        await server.stop()
        log.seek(0)
        last_words = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxUnavailable(": ".join(filter(None, (answer["failed"], last_words))))
