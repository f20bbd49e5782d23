"""The process that holds a database: each query runs in a fork of it, which the kernel bounds in time and memory.

Nothing of the trainer is here: it starts by a clean exec with an empty environment, and ends when the trainer does, as
the forks end with it. What comes back of a query is text, or how its fork ended.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from gtpo.sandbox import confinement, syscall_filter

# more than the longest query, as JSON
MAX_REQUEST_BYTES = 150_000
_MAX_CELL_CHARS = 500
# Wall time of a query for each second of CPU time that it may take: a busy machine does not fail it.
WALL_PER_CPU_S = 10.0
# how the kernel ends a fork whose time is over
_CLOCKS = (signal.SIGPROF, signal.SIGALRM)
# what ends a process is its own doing, but for these
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SqlEngine(Protocol):
    """Runs queries that read and change nothing."""

    def tables(self) -> dict[str, list[str]]: ...

    def query(self, sql: str, *, max_rows: int) -> tuple[list[str], list[tuple[Any, ...]]]: ...


def main(config: Mapping[str, Any]) -> NoReturn:
    """Loads the database, says what is in it on the control socket, and answers queries until that is closed."""
    with socket.socket(fileno=config["control_fd"]) as control:
        try:
            engine = _open(config)
        except (ValueError, OSError, ImportError) as error:
            control.send(json.dumps({"failed": str(error), "kind": type(error).__name__}).encode())
            os._exit(0)
        trainer = os.pidfd_open(config["trainer_pid"])
        # a value can make the engine import what its type is in Python; DuckDB asks how many cores there are
        readable = [*confinement.readable_paths(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        readable += ["/proc/self/cgroup", "/sys/fs/cgroup", *filter(None, [config["database"]])]
        config = {**config, "readable": readable}
        control.send(json.dumps({"tables": engine.tables(), "missing": _missing(config)}).encode())
        _bound_memory(config["memory_bytes"])
        # the pidfd of each fork, with where its reader waits
        running: dict[int, socket.socket] = {}
        events = select.poll()
        events.register(control, select.POLLIN)
        # its children may hold the other end of the control socket when it is gone
        events.register(trainer, select.POLLIN)
        while True:
            for descriptor, _ in events.poll():
                if descriptor in running:
                    events.unregister(descriptor)
                    _conclude(descriptor, running.pop(descriptor))
                    continue
                if descriptor == trainer:
                    os._exit(0)
                request, passed, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 1)
                if not request:
                    os._exit(0)
                reply = socket.socket(fileno=passed[0])
                others = (control, *running.values())
                try:
                    fork = os.pidfd_open(_start(engine, json.loads(request), reply, config, not_its=others))
                except OSError as error:
                    _say(reply, {"unavailable": f"no process for the query: {error}"})
                    continue
                running[fork] = reply
                events.register(fork, select.POLLIN)


def _bound_memory(memory_bytes: int) -> None:
    """Leave this process and its forks `memory_bytes` beside what it holds now, and no file to write."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _lock_in(config: Mapping[str, Any]) -> dict[str, str]:
    """Leave this fork nothing to do but to read the database and to compute; what the kernel does not have for that."""
    missing = confinement.confine_reader(filter(os.path.exists, config["readable"]))
    try:
        syscall_filter.install(processes=False)
    except (OSError, ValueError) as failure:
        missing["seccomp"] = str(failure)
    return missing


def _missing(config: Mapping[str, Any]) -> dict[str, str]:
    """What `_lock_in` gives; a fork tries it, since it is for good."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(theirs, json.dumps(_lock_in(config)).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    missing: dict[str, str] = json.loads(data)
    return missing


def _start(
    engine: SqlEngine, sql: str, reply: socket.socket, config: Mapping[str, Any], *, not_its: Iterable[socket.socket]
) -> int:
    """The fork that runs `sql`."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            confinement.set_process(dies_with_parent=True)
            # readers of other queries wait for the last holder of their end
            for end in not_its:
                end.close()
            if os.getppid() == parent:
                _answer(engine, sql, reply, config)
        finally:
            os._exit(1)
    return pid


def _conclude(fork: int, reply: socket.socket) -> None:
    """Tell the reader of a query how its fork ended, unless it has answered."""
    ended = os.waitid(os.P_PIDFD, fork, os.WEXITED)
    os.close(fork)
    assert ended is not None
    if ended.si_code == os.CLD_EXITED and ended.si_status == 0:
        reply.close()
    elif ended.si_code == os.CLD_EXITED:
        _say(reply, {"error": "the query left its process unable to answer"})
    elif ended.si_status in _CLOCKS:
        _say(reply, {"timeout": True})
    elif ended.si_status in _FROM_OUTSIDE:
        _say(reply, {"unavailable": f"the query was ended from outside: {signal.strsignal(ended.si_status)}"})
    else:
        _say(reply, {"error": f"the query ended its process: {signal.strsignal(ended.si_status)}"})


def _say(reply: socket.socket, message: Mapping[str, Any]) -> None:
    # on a line of its own: a part of an answer may have gone before it
    with reply, contextlib.suppress(OSError):
        reply.sendall(f"\n{json.dumps(message)}".encode())


def _open(config: Mapping[str, Any]) -> SqlEngine:
    if config["database"] is not None:
        from gtpo.tools.sqlite_engine import SqliteEngine

        return SqliteEngine(Path(config["database"]))
    from gtpo.tools.duckdb_engine import DuckdbEngine

    return DuckdbEngine({table: Path(path) for table, path in config["tables"].items()})


def _answer(engine: SqlEngine, sql: str, reply: socket.socket, config: Mapping[str, Any]) -> NoReturn:
    """Runs one query in this fork and ends it. Out of time the kernel ends it first, by the default of its signals."""
    _lock_in(config)  # what is missing was said at the start
    signal.setitimer(signal.ITIMER_PROF, config["timeout_s"])
    signal.setitimer(signal.ITIMER_REAL, config["timeout_s"] * WALL_PER_CPU_S)
    try:
        columns, rows = engine.query(sql, max_rows=config["max_rows"] + 1)
        text = format_rows(columns, rows, max_rows=config["max_rows"], max_chars=config["max_chars"])
        answer = {"text": text}
    except (ValueError, RecursionError) as error:
        answer = {"error": str(error)[: config["max_chars"]]}
    except MemoryError:
        answer = {"error": f"the query needs more than {config['memory_bytes'] // 2**20} MiB of memory"}
    except Exception as error:
        # the engine's package gave way to what the query asks for
        answer = {"error": f"{type(error).__name__}: {error}"[: config["max_chars"]]}
    # what is left to do is not the query's
    signal.setitimer(signal.ITIMER_PROF, 0)
    data = json.dumps(answer).encode("utf-8", "backslashreplace")
    # no send: the filter has none
    while data:
        data = data[os.write(reply.fileno(), data) :]
    os._exit(0)


def format_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, max_rows: int, max_chars: int) -> str:
    """A header and one line a row, values separated by " | ", and what was left out.

    >>> print(format_rows(["a", "b"], [(1, None), ("x", 2.5), (3, 4)], max_rows=2, max_chars=99))
    a | b
    1 | NULL
    x | 2.5
    [more rows exist; only 2 are shown]
    >>> format_rows(["a"], [], max_rows=2, max_chars=99)
    'a\\n(no rows)'
    """
    header = " | ".join(columns)[:max_chars]
    lines, size = [header], len(header)
    for number, row in enumerate(rows):
        if number == max_rows:
            lines.append(f"[more rows exist; only {max_rows} are shown]")
            break
        line = " | ".join(map(_cell, row))
        size += len(line) + 1
        if size > max_chars:
            lines.append(f"[cut after {number} rows: at most {max_chars} characters are shown; select less]")
            break
        lines.append(line)
    return "\n".join(lines if rows else [*lines, "(no rows)"])


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _MAX_CELL_CHARS else text[:_MAX_CELL_CHARS] + "..."


def run_from_argument() -> NoReturn:
    """Entry of the process: the configuration is its last argument, as JSON."""
    with contextlib.suppress(KeyboardInterrupt):
        main(json.loads(sys.argv[-1]))
    os._exit(0)
