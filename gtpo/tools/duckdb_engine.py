"""Hostile SQL on files of data: DuckDB reads them into memory once and is then locked.

DuckDB's own bounds do not hold in all its functions: `repeat('x', 2000000000)` takes 4 GB under a memory limit of
256 MB and does not heed an interrupt (DuckDB 2.0.0). So a query runs only in the process that `sql_worker` bounds.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_READERS = {
    ".csv": "read_csv(?)",
    ".json": "read_json(?)",
    ".jsonl": "read_json(?, format = 'newline_delimited')",
    ".parquet": "read_parquet(?)",
}
_TABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# no spilling to disk, one thread since the worker forks, and no folder of the user named in an error
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "threads": 1,
    "temp_directory": "",
    "home_directory": "/nonexistent",
    "secret_directory": "/nonexistent",
    "extension_directory": "/nonexistent",
}


class DuckdbEngine:
    """Queries of the files of `tables` ({table: path}), in memory.

    Raises ValueError for a table's name, a file's ending or content, OSError where it is no file.
    """

    def __init__(self, tables: Mapping[str, Path]) -> None:
        import duckdb

        self._duckdb = duckdb
        self._connection = duckdb.connect(":memory:", config=_CONFIG)
        self._tables = {table: self._load(table, path) for table, path in tables.items()}
        # from here on no file, no extension and no setting can be reached
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET lock_configuration = true")

    def _load(self, table: str, path: Path) -> list[str]:
        endings = [suffix for suffix in path.suffixes if suffix != ".gz"]
        reader = _READERS.get(endings[-1]) if endings else None
        if reader is None:
            raise ValueError(f"tables.{table} must be a {', '.join(_READERS)} file (.gz too), got {path}")
        if not _TABLE_NAME.fullmatch(table):
            raise ValueError(f"tables.{table} must have letters, digits and underscores in its name")
        if not path.is_file():
            raise FileNotFoundError(f"tables.{table} must be a file, got {path}")
        try:
            self._connection.execute(f'CREATE TABLE "{table}" AS SELECT * FROM {reader}', [str(path)])
        except self._duckdb.Error as error:
            raise ValueError(f"tables.{table}: {path} cannot be read: {_first_line(error)}") from None
        columns = self._connection.execute(f'DESCRIBE "{table}"').fetchall()
        return [f"{name} {_short_type(kind)}" for name, kind, *_ in columns]

    def tables(self) -> dict[str, list[str]]:
        """Every table with its columns as "name TYPE"."""
        return self._tables

    def query(self, sql: str, *, max_rows: int) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Columns and at most `max_rows` rows of one SELECT. Raises ValueError for what is refused or fails."""
        try:
            statements = self._duckdb.extract_statements(sql)
            if [statement.type for statement in statements] != [self._duckdb.StatementType.SELECT]:
                raise ValueError("query must be one SELECT statement")
            # a CTE may hold an INSERT or a DELETE, which is a SELECT to the parser
            self._connection.execute("BEGIN TRANSACTION READ ONLY")
            try:
                result = self._connection.execute(statements[0])
                return [column[0] for column in result.description], result.fetchmany(max_rows)
            finally:
                self._connection.execute("ROLLBACK")
        except self._duckdb.Error as error:
            raise ValueError(_first_line(error)) from None


def _short_type(kind: object) -> str:
    """The types of nested JSON can be longer than the model's context."""
    text = str(kind)
    return text if len(text) <= 40 else text[:40] + "..."


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
