"""The kernel's fences, one function each: namespaces, root directory, box, rlimits, identity, Landlock. Linux only.

The pool's fork server enters the namespaces and builds the root once (`enter_namespaces`, `enter_root`); each keeper
makes its box (`make_box`); each interpreter locks itself in before it reads any code (`confine`).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field

from gtpo.sandbox import removal, session_users, syscall_filter
from gtpo.sandbox.contract import SandboxLimits
from gtpo.sandbox.layout import BOX, DEVICES, LIBRARIES, LINKS_TO_BOX, MAX_FILES, NOBODY, STDIN
from gtpo.sandbox.session_cgroup import SessionCgroup

_libc = ctypes.CDLL(None, use_errno=True)

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_CAP_DAC_OVERRIDE, _CAP_FOWNER, _CAP_KILL, _CAP_SYS_PTRACE = 1, 3, 5, 19
# Keepers enforce the CPU limit of a cell; this many of them end an interpreter whose keeper hangs.
_BACKSTOP_CELLS = 100


@dataclass(frozen=True)
class Plan:
    """What the sessions of a pool get.

    jail: "bubblewrap", "namespaces" or "none", what the pool is in.  scratch: an empty directory.
    proc_fd: the host's /proc.  libraries: name -> path of what cells can import besides the standard library.
    uid: who a session is, None to stay who we are; own_users: in a user namespace of its own.
    cgroup: of the session, None where we may make none; pool_cgroup: whether one bounds the memory of all sessions.
    processes: whether cells may start some.  library_address_bytes, library_memory_bytes: what an interpreter has
    before any code has run.
    """

    limits: SandboxLimits
    jail: str
    scratch: str
    proc_fd: int
    readable: tuple[str, ...]
    libraries: dict[str, str] = field(default_factory=dict)
    uid: int | None = None
    own_users: bool = False
    cgroup: SessionCgroup | None = None
    pool_cgroup: bool = False
    processes: bool = False
    library_address_bytes: int = 0
    library_memory_bytes: int = 0

    @property
    def namespaces(self) -> bool:
        """Whether the pool has namespaces and a root of its own."""
        return self.jail != "none"

    @property
    def library_root(self) -> str:
        """Where sessions import `libraries` from."""
        return LIBRARIES if self.namespaces else self.scratch + LIBRARIES

    @property
    def library_paths(self) -> tuple[str, ...]:
        """What of them a session must be able to read."""
        if not self.libraries:
            return ()
        return (self.library_root, *(() if self.namespaces else self.libraries.values()))


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Move this process (NEW_PID: its next children) into new namespaces."""
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def return_to_namespace(descriptor: int) -> None:
    """Have the next children start in the pid namespace that `descriptor` names."""
    _checked(_libc.setns(descriptor, NEW_PID), "setns")


def set_process(*, dies_with_parent: bool = False, undumpable: bool | None = None, no_new_privs: bool = False) -> None:
    """Set the named prctl flags of this process."""
    for wanted, option, value in (
        (dies_with_parent, 1, signal.SIGKILL),
        (undumpable is not None, 4, int(not undumpable)),
        (no_new_privs, 38, 1),
    ):
        if wanted:
            _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _checked(result, f"mount({target})")


def readable_paths() -> tuple[str, ...]:
    """Files that an interpreter needs: its standard library, shared libraries, time zones. Outer directories first."""
    stdlib = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    system = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"}
    wanted = {os.path.normpath(path) for path in stdlib | {os.path.realpath(p) for p in stdlib} | system}
    return tuple(path for path in sorted(wanted) if os.path.exists(path))


def session_uid(paths: Iterable[str], proc_fd: int, first_user: int | None, *, own_root: bool) -> int | None:
    """The first user id of sessions when we are root and others can read `paths` (or the root will be ours).

    `first_user` where all ids from it on exist, NOBODY elsewhere.
    """
    if os.geteuid() != 0 or first_user is None:
        return None
    # Not pathlib: its four modules would make every fork slower.
    real = {place for path in paths for place in _with_parents(os.path.realpath(path))}
    if not own_root and any(os.stat(path).st_mode & 0o005 != 0o005 for path in real if os.path.isdir(path)):
        return None
    with open(os.open("self/uid_map", os.O_RDONLY, dir_fd=proc_fd)) as uid_map:
        ranges = [map(int, line.split()) for line in uid_map]
    all_exist = any(first <= first_user <= first + count - session_users.NUM_USERS for first, _, count in ranges)
    return first_user if all_exist else NOBODY


def _with_parents(path: str) -> list[str]:
    """`path`, which is absolute, and the directories above it.

    >>> _with_parents("/usr/lib")
    ['/usr/lib', '/usr', '/']
    """
    return [path] if path == "/" else [path, *_with_parents(os.path.dirname(path))]


def enter_namespaces(proc_fd: int) -> bool:
    """Unshare pid, network, ipc and uts, with a user namespace (returns True) unless we may do it without.

    Fork to enter the first.
    """
    flags = NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    if os.geteuid() == 0:
        try:
            unshare(flags)
            return False
        except PermissionError:
            # Root without CAP_SYS_ADMIN, as in a container: go on like an ordinary user.
            pass
    _enter_user_namespace(proc_fd, flags)
    return True


def _enter_user_namespace(proc_fd: int, flags: int) -> None:
    """Unshare `flags` and the users; the only user and group there is NOBODY, who is who we were."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(flags | NEW_USER)
    # The files of an undumpable process belong to root.
    set_process(undumpable=False)
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        fd = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc_fd)
        try:
            os.write(fd, content.encode())
        finally:
            os.close(fd)
    set_process(undumpable=True)


def _make_file(path: str) -> None:
    with open(path, "xb"):
        pass


def enter_root(plan: Plan) -> None:
    """Make a read-only root of what is readable, three devices and an empty box, enter it, let go of the old one."""
    unshare(NEW_NS)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", plan.scratch, "tmpfs", _MS_NOSUID, "size=1m,mode=0755")
    for path in (*plan.readable, *DEVICES):
        target = plan.scratch + path
        # Lies within a directory that is bound already; going on would write through it.
        if os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            _make_file(target)
        _mount(path, target, None, _MS_BIND | _MS_REC)
    if plan.libraries:
        os.makedirs(plan.scratch + LIBRARIES)
    for name, path in plan.libraries.items():
        target = f"{plan.scratch}{LIBRARIES}/{name}"
        os.mkdir(target) if os.path.isdir(path) else _make_file(target)
        _mount(path, target, None, _MS_BIND | _MS_REC)
    _make_file(plan.scratch + STDIN)
    os.mkdir(plan.scratch + BOX)
    for link in LINKS_TO_BOX:
        # An interpreter can lie in /tmp.
        if not os.path.exists(plan.scratch + link):
            os.symlink(BOX, plan.scratch + link)
    # mount_setattr(2), because a remount of bind mounts in a user namespace would have to repeat their locked flags.
    attributes = struct.pack("=QQQQ", 1 | _MS_NOSUID, 0, 0, 0)
    at_fdcwd, at_recursive = -100, 0x8000
    result = _libc.syscall(442, at_fdcwd, plan.scratch.encode(), at_recursive, attributes, ctypes.c_size_t(32))
    _checked(result, "mount_setattr")
    os.chdir(plan.scratch)
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")
    _checked(_libc.sethostname(b"sandbox", ctypes.c_size_t(7)), "sethostname")


def link_libraries(plan: Plan) -> None:
    """Without a root of our own: a directory of links to the libraries, for sessions to import from."""
    if plan.libraries:
        os.makedirs(plan.library_root)
    for name, path in plan.libraries.items():
        os.symlink(path, f"{plan.library_root}/{name}")


def make_box(plan: Plan) -> str:
    """The session's working directory, entered: a tmpfs of `file_bytes` of its own, or a new directory in scratch."""
    if plan.namespaces:
        if plan.own_users:
            _enter_user_namespace(plan.proc_fd, NEW_NS)
        else:
            unshare(NEW_NS)
        owner = NOBODY if plan.uid is None else plan.uid
        options = f"size={plan.limits.file_bytes},nr_inodes=4096,mode=0700,uid={owner},gid={owner}"
        _mount("tmpfs", BOX, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
        _make_stdin(owner)
        box = BOX
    else:
        box = f"{plan.scratch}/{os.urandom(8).hex()}"
        os.mkdir(box, 0o700)
        if plan.uid is not None:
            os.chown(box, plan.uid, plan.uid)
    os.chdir(box)
    return box


def _make_stdin(owner: int) -> None:
    """Have the session's standard input at STDIN: a file that counts as one of its box, but has no name there."""
    path = f"{BOX}/stdin"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.fchown(fd, owner, owner)
    os.close(fd)
    _mount(path, STDIN, None, _MS_BIND)
    os.unlink(path)


def empty_box(plan: Plan, box: str) -> None:
    """Delete what a session has written."""
    removal.empty_directory(box)
    if plan.namespaces:
        os.truncate(STDIN, 0)


def remove_box(plan: Plan, box: str) -> None:
    """Delete what `make_box` made, as far as the kernel does not: a tmpfs goes with its last process."""
    if not plan.namespaces:
        removal.remove_tree(box)


def offer_to_oom_killer(plan: Plan) -> None:
    """Have the kernel take this process first when the machine is out of memory, and not the trainer."""
    # The files of an undumpable process belong to root; it becomes that again when it locks itself in.
    set_process(undumpable=False)
    fd = os.open("self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC, dir_fd=plan.proc_fd)
    try:
        os.write(fd, b"1000")
    finally:
        os.close(fd)


def keep_capabilities(*capabilities: int) -> None:
    """Give up every capability but these."""
    mask = sum(1 << capability for capability in capabilities)
    version_3 = 0x20080522
    header, data = struct.pack("=Ii", version_3, 0), struct.pack("=IIIIII", mask, mask, 0, 0, 0, 0)
    _checked(_libc.capset(header, data), "capset")


def confine_keeper(plan: Plan) -> None:
    """Leave a keeper what it needs: kill an interpreter of another user, delete its box, see what memory is shared."""
    needed = [_CAP_KILL, _CAP_DAC_OVERRIDE] if os.geteuid() == 0 else []
    if plan.uid is not None:
        # What lies in a sticky directory is its owner's to delete.
        needed.append(_CAP_FOWNER)
    # Where cells have processes we are root or have a user namespace.
    keep_capabilities(*needed, *([_CAP_SYS_PTRACE] if plan.processes else []))
    set_process(dies_with_parent=True, no_new_privs=True)


def confine_reader(readable: Iterable[str]) -> dict[str, str]:
    """Leave this process and its children nothing but to read `readable`, as far as the kernel can; what is missing,
    with the reason."""
    try:
        # for files of others, which root can read
        keep_capabilities(*((_CAP_DAC_OVERRIDE,) if os.geteuid() == 0 else ()))
    except PermissionError:
        # root of a container that has not got it
        keep_capabilities()
    set_process(no_new_privs=True)
    try:
        ruleset = _landlock_ruleset(tuple(readable), box=None)
    except OSError as failure:
        return {"landlock": describe_failure(failure)}
    _checked(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return {}


def confine(plan: Plan) -> tuple[list[str], dict[str, str]]:
    """Lock this process in, as far as the kernel can; the layers that are on, and the others with their reason."""
    layers = {"bubblewrap": ["namespaces", "bubblewrap"], "namespaces": ["namespaces"], "none": []}[plan.jail]
    missing: dict[str, str] = {}
    os.setsid()
    try:
        own_files = (STDIN,) if plan.namespaces else ()
        ruleset: int | None = _landlock_ruleset((*plan.readable, *plan.library_paths), own_files=own_files)
    except OSError as failure:
        ruleset, missing["landlock"] = None, str(failure)
    if plan.uid is not None:
        os.setgroups([])
        os.setresgid(plan.uid, plan.uid, plan.uid)
        os.setresuid(plan.uid, plan.uid, plan.uid)
        layers.append("uid")
    elif plan.own_users:
        layers.append("user namespace")
    elif os.geteuid() == 0:
        missing["uid"] = "root is kept, without capabilities: nobody else can read the interpreter"
    keep_capabilities()
    # After the change of user, which clears the first of them.
    set_process(dies_with_parent=True, undumpable=True, no_new_privs=True)
    _set_rlimits(plan)
    layers.append("rlimits")
    if ruleset is not None:
        _checked(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
        os.close(ruleset)
        layers.append("landlock")
    try:
        syscall_filter.install(processes=plan.processes)
        layers.append("seccomp")
    except (OSError, ValueError) as failure:
        missing["seccomp"] = str(failure)
    optional = {"cgroup": plan.cgroup is not None, "pool cgroup": plan.pool_cgroup, "snapshots": plan.processes}
    layers += [name for name, there in optional.items() if there]
    return layers, missing


def _set_rlimits(plan: Plan) -> None:
    limits = plan.limits
    cpu_s = int(max(600, _BACKSTOP_CELLS * limits.cpu_time_s))
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, plan.library_address_bytes + limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        # The interpreter, its snapshot and, where it has the same user, the keeper come on top.
        (resource.RLIMIT_NPROC, 3 + limits.max_processes if plan.processes else 1),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _landlock_ruleset(readable: tuple[str, ...], *, box: str | None = ".", own_files: tuple[str, ...] = ()) -> int:
    """A ruleset: read `readable` and the devices, change the directory `box` and `own_files`, connect to nothing,
    signal nobody."""
    abi = _checked(_libc.syscall(444, None, ctypes.c_size_t(0), 1), "landlock_create_ruleset")
    write, read, read_dir, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 14
    remove_dir, remove_file, make_dir, make_file, refer = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 13
    # Rights that the kernel knows: 13 in ABI 1, refer in 2, truncate in 3, TCP in 4, device ioctl in 5, scopes in 6.
    handled = (1 << (13 + (abi >= 2) + (abi >= 3))) - 1 | (1 << 15 if abi >= 5 else 0)
    attributes = struct.pack("=QQQ", handled, 3, 3)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _checked(_libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create_ruleset")
    in_box = write | read | read_dir | truncate | remove_dir | remove_file | make_dir | make_file | refer
    rules = [(path, read | (read_dir if os.path.isdir(path) else 0)) for path in readable]
    rules += [(path, read | (write if path == os.devnull else 0)) for path in DEVICES]
    rules += [] if box is None else [(box, in_box)]
    rules += [(path, read | write | truncate) for path in own_files]
    for path, rights in rules:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, parent)
        _checked(_libc.syscall(445, ruleset, 1, rule, 0), f"landlock_add_rule({path})")
        os.close(parent)
    return ruleset


def describe_failure(failure: OSError) -> str:
    """The failing step, for the report.

    >>> describe_failure(OSError(1, "unshare(0x6c000000): Operation not permitted"))
    'unshare(0x6c000000): Operation not permitted'
    """
    return failure.strerror if failure.filename is None and failure.strerror else str(failure)
