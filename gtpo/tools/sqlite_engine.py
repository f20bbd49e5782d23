"""Hostile SQL on a SQLite file: read-only, one statement, no other file, bounded values.

Time and memory are bounded by the process of `sql_worker` that a query runs in.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

# All that a SELECT asks for. Everything else is refused: writing, ATTACH, PRAGMA, transactions, temporary tables.
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_REFUSED_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"})
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 40_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 50_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
}


class SqliteEngine:
    """Queries of `database`, each on a connection of its own, so that nothing lasts from one to the next.

    Raises ValueError where `database` is no SQLite database with tables, OSError where it is no file.
    """

    def __init__(self, database: Path) -> None:
        if not database.is_file():
            raise FileNotFoundError(f"database must be a file, got {database}")
        place = database.resolve()
        # A reader of a database in WAL mode writes files beside it, unless it is told that nobody else has it open.
        with place.open("rb") as file:
            in_wal_mode = file.read(20)[18:] == b"\2\2"
        log = place.with_name(f"{place.name}-wal")
        if in_wal_mode and log.exists() and log.stat().st_size:
            raise ValueError(
                f"database must be at rest, got {database} with changes in {log.name}: close what has it open, or run "
                f'sqlite3 {database} "PRAGMA wal_checkpoint(TRUNCATE)"'
            )
        self._uri = f"file:{quote(str(place))}?mode=ro{'&immutable=1' if in_wal_mode else ''}"
        try:
            with closing(self._connect()) as connection:
                self._tables = _read_tables(connection)
        except sqlite3.Error as error:
            raise ValueError(f"database must be a SQLite file, got {database}: {error}") from error
        if not self._tables:
            raise ValueError(f"database must have a table, got none in {database}")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._uri, uri=True, isolation_level=None)

    def tables(self) -> dict[str, list[str]]:
        """Every table and view with its columns as "name TYPE"."""
        return self._tables

    def query(self, sql: str, *, max_rows: int) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Columns and at most `max_rows` rows of one SELECT. Raises ValueError for what is refused or fails."""
        with closing(self._connect()) as connection:
            connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
            # views and schemas of a hostile database may not call what a query may not
            connection.execute("PRAGMA trusted_schema = OFF")
            # sorts stay in memory, which is bounded, and leave no file
            connection.execute("PRAGMA temp_store = MEMORY")
            for limit, value in _LIMITS.items():
                connection.setlimit(limit, value)
            connection.set_authorizer(_authorize)
            try:
                cursor = connection.execute(sql)
                rows = cursor.fetchmany(max_rows)
            except (sqlite3.Error, sqlite3.Warning) as error:
                raise ValueError(_advice(str(error))) from None
            if cursor.description is None:
                raise ValueError("query must be a SELECT statement that returns rows")
            return [column[0] for column in cursor.description], rows


def _authorize(action: int, first: str | None, second: str | None, *place: str | None) -> int:
    if action not in _ALLOWED:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _REFUSED_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _advice(message: str) -> str:
    if message == "not authorized":
        return "not authorized: only one SELECT statement that reads the tables is allowed"
    return message


def _read_tables(connection: sqlite3.Connection) -> dict[str, list[str]]:
    found = connection.execute(
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER BY name"
    )
    tables = {}
    for (table,) in found.fetchall():
        columns = connection.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchall()
        tables[table] = [f"{name} {kind}".strip() for name, kind in columns]
    return tables
