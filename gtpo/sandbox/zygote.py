"""The fork server: a launcher, which waits and cleans up, and the zygote, which forks one keeper per request.

The zygote is small, single-threaded and has imported what cells use, so a fork costs about a millisecond. It never sees
code or output, so nothing of one session can be found in the memory of another.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import socket
from typing import Any, NoReturn

from gtpo.sandbox import confinement, keeper
from gtpo.sandbox.contract import SandboxLimits

# What cells import most; importing more makes every fork slower.
_PRELOADED = """
bisect calendar cmath collections copy csv dataclasses datetime decimal enum fractions functools hashlib heapq io
itertools json keyword math numbers operator random re statistics string struct textwrap time traceback typing
"""


def main(config_json: str) -> None:
    """Run as the launcher: fork the zygote, wait for it, remove the scratch directory."""
    config: dict[str, Any] = json.loads(config_json)
    control = socket.socket(fileno=config["control_fd"])
    namespaces = config["namespaces"]
    try:
        if namespaces:
            confinement.enter_namespaces()
        plan = confinement.Plan(
            limits=SandboxLimits(**config["limits"]),
            namespaces=namespaces,
            scratch=config["scratch"],
            readable=confinement.readable_paths(),
            uid=confinement.droppable_uid(own_root=namespaces),
        )
        # Same-user processes could otherwise read the memory of these through /proc.
        confinement.set_process(undumpable=True)
        zygote = os.fork()
        if zygote == 0:
            _run_zygote(control, plan)
    except OSError as failure:
        _report(control, failed=confinement.describe_failure(failure))
        return
    control.close()
    os.waitpid(zygote, 0)
    shutil.rmtree(plan.scratch, ignore_errors=True)


def _report(control: socket.socket, **message: object) -> None:
    control.send(json.dumps(message).encode())


def _run_zygote(control: socket.socket, plan: confinement.Plan) -> NoReturn:
    try:
        confinement.set_process(dies_with_parent=True)
        own_namespace = -1
        if plan.namespaces:
            own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
            confinement.enter_root(plan)
        else:
            os.chmod(plan.scratch, 0o711)
        for name in _PRELOADED.split():
            importlib.import_module(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        gc.collect()
        gc.freeze()
        _report(control, ready=True)
        _serve(control, plan, own_namespace)
    except OSError as failure:
        _report(control, failed=confinement.describe_failure(failure))
    finally:
        os._exit(0)


def _serve(control: socket.socket, plan: confinement.Plan, own_namespace: int) -> None:
    """Fork one keeper for every socket that arrives, until the trainer is gone."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        if not data:
            return
        host = socket.socket(fileno=descriptors[0])
        try:
            if plan.namespaces:
                confinement.unshare(confinement.NEW_PID)
            if os.fork() == 0:
                control.close()
                keeper.keep(host, plan)
        except OSError as failure:
            keeper.report_failure(host, confinement.describe_failure(failure))
        finally:
            if plan.namespaces:
                confinement.return_to_namespace(own_namespace)
            host.close()
