"""The outer jail by bubblewrap: the command line under which the fork server finds itself in namespaces and a root.

What it cannot do is done by the fork server inside: a pid namespace, a user and a working directory for each session.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from gtpo.sandbox.contract import SandboxUnavailable
from gtpo.sandbox.layout import BOX, DEVICES, LIBRARIES, LINKS_TO_BOX, NOBODY, STDIN

# Where the jail has this package; cells cannot read it.
PACKAGE = "/opt/gtpo"


def command(package: str, readable: Iterable[str], libraries: Mapping[str, str]) -> list[str]:
    """bwrap with its options, for a program of which `package`, `readable` and `libraries` (name -> path) are seen.

    SandboxUnavailable where bubblewrap is not installed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable("bwrap is not on the PATH (Debian, Ubuntu, Fedora: the package bubblewrap)")
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--hostname", "sandbox", "--new-session", "--as-pid-1", "--cap-add", "ALL"]
    if os.geteuid() != 0:
        options += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    bound: list[str] = []
    placed: dict[str, list[str]] = {}
    for path in [*readable, *_interpreter()]:
        if any(path == other or path.startswith(f"{other}/") for other in bound):
            continue
        if os.path.islink(path):
            placed[path] = ["--symlink", os.readlink(path), path]
        else:
            placed[path] = ["--ro-bind", path, path]
            bound.append(path)
    placed[f"{PACKAGE}/sandbox"] = ["--ro-bind", package, f"{PACKAGE}/sandbox"]
    for name, path in libraries.items():
        placed[f"{LIBRARIES}/{name}"] = ["--ro-bind", path, f"{LIBRARIES}/{name}"]
    for device in DEVICES:
        placed[device] = ["--dev-bind", device, device]
    # Something to mount each session's own on.
    placed[STDIN] = ["--ro-bind", DEVICES[0], STDIN]
    # Directories that it makes without being asked to are closed to others.
    parents = {str(parent) for path in (*placed, *LINKS_TO_BOX) for parent in PurePosixPath(path).parents} | {BOX}
    # An interpreter can lie in /tmp.
    placed |= {link: ["--symlink", BOX, link] for link in LINKS_TO_BOX if link not in parents}
    for parent in sorted(parents - {"/"} - set(bound)):
        options += ["--dir", parent]
    options += [option for placing in placed.values() for option in placing]
    return [bwrap, *options, "--remount-ro", "/", "--"]


def interpreter() -> str:
    """The path of this interpreter that the jail has too: not that of a virtual environment."""
    return os.path.realpath(sys.executable)


def _interpreter() -> list[str]:
    """What this interpreter needs to start, besides the standard library."""
    paths = [interpreter(), os.path.join(sys.base_prefix, "lib"), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    return [path for path in paths if os.path.isabs(path) and os.path.exists(path)]
