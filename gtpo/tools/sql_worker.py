"""The process that holds a database: each query runs in a fork of it, which the kernel bounds in time and memory.

Nothing of the trainer is here: it starts by a clean exec with an empty environment, and ends when the trainer does.
What comes back of a query is text.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

# more than the longest query, as JSON
MAX_REQUEST_BYTES = 150_000
_MAX_CELL_CHARS = 500


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
        control.send(json.dumps({"tables": engine.tables()}).encode())
        # the kernel reaps the forks
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            request, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 1)
            if not request:
                os._exit(0)
            if os.fork() == 0:
                control.close()
                _answer(engine, json.loads(request), descriptors[0], config)
            os.close(descriptors[0])


def _open(config: Mapping[str, Any]) -> SqlEngine:
    if config["database"] is not None:
        from gtpo.tools.sqlite_engine import SqliteEngine

        return SqliteEngine(Path(config["database"]))
    from gtpo.tools.duckdb_engine import DuckdbEngine

    return DuckdbEngine({table: Path(path) for table, path in config["tables"].items()})


def _answer(engine: SqlEngine, sql: str, reply_fd: int, config: Mapping[str, Any]) -> NoReturn:
    """Runs one query in this fork and ends it. Out of time the kernel ends it first, by the default of SIGALRM."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + config["memory_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        signal.setitimer(signal.ITIMER_REAL, config["timeout_s"])
        try:
            columns, rows = engine.query(sql, max_rows=config["max_rows"] + 1)
            text = format_rows(columns, rows, max_rows=config["max_rows"], max_chars=config["max_chars"])
            answer = {"text": text}
        except (ValueError, RecursionError) as error:
            answer = {"error": str(error)[: config["max_chars"]]}
        except MemoryError:
            answer = {"error": f"the query needs more than {config['memory_bytes'] // 2**20} MiB of memory"}
        with socket.socket(fileno=reply_fd) as reply:
            reply.sendall(json.dumps(answer).encode("utf-8", "backslashreplace"))
    finally:
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
