"""The sql tool: one read-only query a call, on a SQLite database or, through DuckDB, on files of data."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from gtpo.tools.base import ToolTimeout, ToolUnavailable
from gtpo.tools.function import FunctionTool
from gtpo.tools.source import ToolSource, optional_package, shared
from gtpo.tools.sql_worker import WALL_PER_CPU_S

_log = logging.getLogger(__name__)
# Stand-ins for the packages, so that the worker imports its own modules and not the trainer's.
_BOOTSTRAP = """
import json, sys, types
sys.path[:] = json.loads(sys.argv[1])
for name in ("gtpo", "gtpo.tools", "gtpo.sandbox"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [sys.argv[2] + name.removeprefix("gtpo").replace(".", "/")]
from gtpo.tools import sql_worker
sql_worker.run_from_argument()
"""
_MAX_QUERY_CHARS = 10_000
# how long after its deadline a query is waited for: the kernel ends it at the deadline
_GRACE_S = 10.0
_START_TIMEOUT_S = 120.0
_KINDS: dict[str, type[Exception]] = {"FileNotFoundError": FileNotFoundError, "ImportError": ImportError}


class SqlWorker:
    """A process that holds the database and forks for each query; started anew when it died.

    config: what `sql_worker.main` reads. Raises ValueError and OSError for a database that cannot be read.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._starting = threading.Lock()
        self.tables = self._start()

    def _start(self) -> dict[str, list[str]]:
        package = Path(__file__).parents[1]
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            config = json.dumps(self._config | {"control_fd": theirs.fileno(), "trainer_pid": os.getpid()})
            path = json.dumps([entry for entry in sys.path if entry])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-B", "-c", _BOOTSTRAP, path, package, config],
                env={"PYTHONUTF8": "1"} | {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            hello = json.loads(self._control.recv(1 << 20) or b'{"failed": "its process died at its start"}')
        except (OSError, ValueError) as error:
            self.stop()
            raise ToolUnavailable(f"the database's process did not start: {error}") from error
        if "failed" in hello:
            self.stop()
            raise _KINDS.get(hello.get("kind", ""), ValueError)(hello["failed"])
        for layer, reason in hello["missing"].items():
            _log.warning("sql: queries run without %s: %s", layer, reason)
        tables: dict[str, list[str]] = hello["tables"]
        return tables

    def stop(self) -> None:
        """End the process, and its queries with it."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def query(self, sql: str) -> str:
        """The answer as text. Raises ToolTimeout, ToolUnavailable, and ValueError for what is refused or fails."""
        timeout_s = self._config["timeout_s"]
        with self._send(json.dumps(sql).encode()) as reply:
            reply.settimeout(timeout_s * WALL_PER_CPU_S + _GRACE_S)
            data = b""
            try:
                while piece := reply.recv(1 << 16):
                    data += piece
                # the last line: what the fork answered, or how it ended
                answer = json.loads(data.rpartition(b"\n")[2])
            except (OSError, ValueError):
                raise ToolUnavailable("the database's process gave no answer") from None
        if "timeout" in answer:
            raise ToolTimeout(f"the query took longer than {timeout_s:g} seconds and was stopped")
        if "unavailable" in answer:
            raise ToolUnavailable(answer["unavailable"])
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    def _send(self, request: bytes) -> socket.socket:
        for attempt in range(2):
            ours, theirs = socket.socketpair()
            with theirs, self._starting:
                try:
                    socket.send_fds(self._control, [request], [theirs.fileno()])
                    return ours
                except OSError as error:
                    ours.close()
                    if attempt:
                        raise ToolUnavailable(f"the database's process died twice: {error}") from error
                    self.stop()
                    self._start()
        raise AssertionError("unreachable")


def sql_source(
    name: str,
    *,
    database: Path | None = None,
    tables: dict[str, Path] | None = None,
    description: str = "Run one read-only SQL query.",
    max_rows: int = 20,
    max_chars: int = 2000,
    memory_bytes: int = 256 * 2**20,
    timeout_s: float = 5.0,
) -> ToolSource:
    """A tool of kind "sql": `database` is a SQLite file, or `tables` names the .csv, .json, .jsonl or .parquet file of
    each table, which DuckDB reads into memory. The model reads the tables and their columns in the description.

    max_rows, max_chars: what a call returns at most; what was cut off is said. memory_bytes: of a query. timeout_s: CPU
    time of a query, which may take ten times that on a busy machine.
    """
    bounds = (("max_rows", max_rows, 1), ("max_chars", max_chars, 1), ("memory_bytes", memory_bytes, 2**24))
    for key, value, least in bounds:
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    if (database is None) == (tables is None):
        raise ValueError("either database (a SQLite file) or tables (files that DuckDB reads) must be given, not both")
    if tables is not None:
        optional_package("duckdb", tool="sql with tables")
    worker = SqlWorker(
        {
            "database": database and str(database),
            "tables": tables and {table: str(path) for table, path in tables.items()},
            "max_rows": max_rows,
            "max_chars": max_chars,
            "memory_bytes": memory_bytes,
            "timeout_s": timeout_s,
        }
    )

    def sql(query: str) -> str:
        """Query.

        Args:
            query: One SELECT statement.
        """
        if len(query) > _MAX_QUERY_CHARS:
            raise ValueError(f"query must have at most {_MAX_QUERY_CHARS} characters, got {len(query)}")
        return worker.query(query)

    async def close() -> None:
        worker.stop()

    listing = "; ".join(f"{table}({', '.join(columns)})" for table, columns in worker.tables.items())
    text = f"{description} Tables: {listing}"
    tool = FunctionTool(
        sql,
        name=name,
        description=text,
        timeout_s=timeout_s * WALL_PER_CPU_S + 2 * _GRACE_S,
        # bounded already: the names of columns, the rows, a line on what was left out
        max_chars=2 * max_chars + 200,
    )
    # more would only take turns
    return shared(tool, max_concurrent=len(os.sched_getaffinity(0)), close=close)
