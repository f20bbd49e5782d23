"""The fork server: a launcher, which waits and cleans up, and the zygote, which forks one keeper per request.

The zygote is small, single-threaded and has imported what cells use, so a fork costs about a millisecond. It never sees
code or output, so nothing of one session can be found in the memory of another.
"""

from __future__ import annotations

import _imp
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import site
import socket
import sys
import traceback
import types
from typing import Any, NoReturn

from gtpo.sandbox import cell, confinement, keeper, removal, session_users
from gtpo.sandbox.contract import SandboxLimits
from gtpo.sandbox.descendants import ProcessTree
from gtpo.sandbox.layout import NOBODY
from gtpo.sandbox.session_cgroup import SessionCgroup

# What cells import most. Each library behind a module makes every fork slower, by five mappings to copy.
_PRELOADED = """
bisect calendar collections copy dataclasses datetime decimal enum fractions functools heapq io itertools json
keyword math numbers operator random re statistics string struct textwrap time traceback typing
"""


def main(config_json: str) -> None:
    """Run the fork server; in an interpreter that it starts, go on as that, with nothing of the server on the stack."""
    try:
        _launch(json.loads(config_json))
    except cell.Start as start:
        run = start.run
    else:
        return
    del config_json
    run()


def _launch(config: dict[str, Any]) -> None:
    """Be the launcher: fork the zygote, wait for it, remove the scratch directory. Under bubblewrap: be the zygote."""
    control = socket.socket(fileno=config["control_fd"])
    jail, proc_fd = config["jail"], config["proc_fd"]
    os.set_inheritable(proc_fd, False)
    # In the place of the script that brought it here.
    null_fd = os.open("/dev/null", os.O_RDWR)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    try:
        if jail == "namespaces":
            own_users = confinement.enter_namespaces(proc_fd)
        else:
            own_users = jail == "bubblewrap" and config["own_users"]
        readable, libraries = tuple(config["readable"]), config["libraries"]
        plan = confinement.Plan(
            limits=SandboxLimits(**config["limits"]),
            jail=jail,
            scratch=config["scratch"],
            proc_fd=proc_fd,
            readable=readable,
            libraries=libraries,
            uid=confinement.session_uid(
                [*readable, *libraries.values()], proc_fd, config["first_user"], own_root=jail != "none"
            ),
            own_users=own_users,
            pool_cgroup=config["pool_cgroup"],
        )
        # Same-user processes could otherwise read the memory of these through /proc.
        confinement.set_process(undumpable=True)
        if jail == "bubblewrap":
            # It is the launcher, and this the first process of the jail.
            _run_zygote(control, plan, config)
        zygote = os.fork()
        if zygote == 0:
            _run_zygote(control, plan, config)
    except OSError as failure:
        _report(control, failed=confinement.describe_failure(failure))
        return
    control.close()
    os.waitpid(zygote, 0)
    removal.remove_tree(plan.scratch)


def _report(control: socket.socket, **message: object) -> None:
    control.send(json.dumps(message).encode())


def _run_zygote(control: socket.socket, plan: confinement.Plan, config: dict[str, Any]) -> NoReturn:
    try:
        confinement.set_process(dies_with_parent=True)
        own_namespace = -1
        if plan.namespaces:
            own_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=plan.proc_fd)
            if plan.jail == "namespaces":
                confinement.enter_root(plan)
        else:
            os.chmod(plan.scratch, 0o711)
            confinement.link_libraries(plan)
        if plan.libraries:
            sys.path.append(plan.library_root)
        for name in (*_PRELOADED.split(), *config["modules"]):
            importlib.import_module(name)
        exec(config["warm_up"], {})
        # What -S leaves out: exit, quit, help and the like.
        site.setquit()
        site.setcopyright()
        site.sethelper()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        # Not Python's: before Linux 6.12 a cell can send it to its keeper, where it would raise KeyboardInterrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _hide_plumbing()
        gc.collect()
        _return_free_memory()
        gc.freeze()
        plan, missing = _measured(plan)
        _report(control, ready=True, missing=missing, library_bytes=plan.library_memory_bytes)
        _serve(control, config["trainer_fd"], plan, own_namespace)
    except cell.Start:
        raise
    except (OSError, ImportError) as failure:
        error = confinement.describe_failure(failure) if isinstance(failure, OSError) else str(failure)
        _report(control, failed=error)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _hide_plumbing() -> None:
    """Leave code no trace of this package: neither in `sys` nor in tracebacks, nor as something to import."""
    sys.argv, sys.orig_argv, sys.executable = [""], [""], ""
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and _is_own(function.__module__):
            _imp._fix_co_filename(function.__code__, "<sandbox>")  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if _is_own(name)]:
        module = vars(sys.modules.pop(name))
        for attribute in ("__file__", "__cached__", "__path__", "__spec__", "__loader__"):
            path = module.pop(attribute, None)
            sys.path_importer_cache.pop(path[0] if attribute == "__path__" and path else "", None)


def _is_own(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] == "gtpo"


def _return_free_memory() -> None:
    """Give back the pages that hold nothing any more: a fork costs by the page."""
    # musl has it not.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _measured(plan: confinement.Plan) -> tuple[confinement.Plan, dict[str, str]]:
    """The plan with the size of the imported libraries, and whether cells may fork; why not, where they may not.

    A session may have processes where their number can be bounded, by a user that nobody else is, and where they
    can be found and killed, in a pid namespace. Its snapshots are such processes.
    """
    missing = {}
    try:
        tree = ProcessTree(plan.proc_fd)
        tree.descendants()
        address_bytes, memory_bytes = tree.own_memory()
    except OSError as failure:
        missing["snapshots"] = f"the kernel does not list the children of a process: {failure}"
        return plan, missing
    plan = dataclasses.replace(plan, library_address_bytes=address_bytes, library_memory_bytes=memory_bytes)
    if not plan.namespaces:
        missing["snapshots"] = "cells can start no processes without namespaces, so none can be kept as a snapshot"
    elif not plan.own_users and plan.uid in (None, NOBODY):
        missing["snapshots"] = "sessions have no user of their own, so the number of their processes is not bounded"
    return dataclasses.replace(plan, processes=not missing), missing


def _serve(control: socket.socket, trainer_fd: int, plan: confinement.Plan, own_namespace: int) -> None:
    """Fork one keeper for every socket that arrives, until the trainer closes `control` or is gone."""
    slot = 0
    # Processes that the trainer has forked hold its end of `control` open when it is killed.
    events = select.poll()
    events.register(control, select.POLLIN)
    events.register(trainer_fd, select.POLLIN)
    while all(fd != trainer_fd for fd, _ in events.poll()):
        data, descriptors, _, _ = socket.recv_fds(control, 1024, 8)
        if not data:
            return
        host = socket.socket(fileno=descriptors[0])
        slot = (slot + 1) % session_users.NUM_USERS
        # The first word is no file of a cgroup.
        files = list(zip(data.decode().split(), descriptors, strict=True))[1:]
        own = dataclasses.replace(plan, cgroup=SessionCgroup(files) if files else None)
        if plan.uid not in (None, NOBODY):
            own = dataclasses.replace(own, uid=plan.uid + slot)
        is_keeper = False
        try:
            if plan.namespaces:
                confinement.unshare(confinement.NEW_PID)
            is_keeper = os.fork() == 0
        except OSError as failure:
            keeper.report_failure(host, confinement.describe_failure(failure))
        if is_keeper:
            control.close()
            os.close(trainer_fd)
            keeper.keep(host, own)
        if plan.namespaces:
            confinement.return_to_namespace(own_namespace)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        host.close()
