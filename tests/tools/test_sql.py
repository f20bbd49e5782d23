"""The sql tool: answers, limits, and what hostile queries cannot do, on both engines."""

import asyncio
import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gtpo.tools import ToolSet
from gtpo.types import ToolCall, ToolResult, ToolStatus

ROWS = [("ulm", 161, "minster"), ("bonn", 64, None), ("kiel", 12, "canal\nport")]
ENGINES = ("sqlite", "duckdb")


def write_data(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "cities.db")) as connection:
        connection.execute("CREATE TABLE cities (name TEXT, height INTEGER, sight TEXT)")
        connection.executemany("INSERT INTO cities VALUES (?, ?, ?)", ROWS)
        connection.commit()
    rows = [dict(zip(("name", "height", "sight"), row, strict=True)) for row in ROWS]
    (folder / "cities.json").write_text(json.dumps(rows))


def table_of(folder: Path, engine: str) -> dict[str, Any]:
    if engine == "sqlite":
        return {"database": str(folder / "cities.db")}
    return {"tables": {"cities": str(folder / "cities.json")}}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ToolSet]]:
    folder = tmp_path_factory.mktemp("sql")
    write_data(folder)
    options = table_of(folder, request.param) | {"timeout_s": 30.0, "max_rows": 2, "max_chars": 300}
    tools = ToolSet(["sql"], {"sql": options})
    yield request.param, tools
    asyncio.run(tools.close())
    # nothing was written beside the data
    assert sorted(path.name for path in folder.iterdir()) == ["cities.db", "cities.json"]


def query(tools: ToolSet, *queries: str) -> list[ToolResult]:
    return asyncio.run(tools.toolbox(None).execute([ToolCall("sql", {"query": text}) for text in queries]))


def test_answers(engine: tuple[str, ToolSet]) -> None:
    kind, tools = engine
    description = tools.schemas[0]["function"]["description"]
    integer, text = ("INTEGER", "TEXT") if kind == "sqlite" else ("BIGINT", "VARCHAR")
    assert f"Tables: cities(name {text}, height {integer}, sight {text})" in description
    results = query(
        tools,
        "SELECT name, sight FROM cities WHERE height > 50 ORDER BY name",
        "SELECT count(*) AS n, max(height) AS top FROM cities;",
        "SELECT sight FROM cities WHERE name = 'kiel'",
        "SELECT name FROM cities WHERE height > 1000",
        "WITH tall AS (SELECT * FROM cities WHERE height > 100) SELECT name FROM tall",
        "SELECT name FROM cities ORDER BY height",
    )
    assert [result.status for result in results] == [ToolStatus.OK] * 6
    assert [result.text for result in results] == [
        "name | sight\nbonn | NULL\nulm | minster",
        "n | top\n3 | 161",
        "sight\ncanal\\nport",
        "name\n(no rows)",
        "name\nulm",
        "name\nkiel\nbonn\n[more rows exist; only 2 are shown]",
    ]


HOSTILE = {
    "both": [
        "INSERT INTO cities VALUES ('x', 1, 'y')",
        "DELETE FROM cities",
        "UPDATE cities SET height = 0",
        "DROP TABLE cities",
        "CREATE TABLE other (a INTEGER)",
        "ATTACH 'other.db' AS other",
        "SELECT 1; DROP TABLE cities",
        "BEGIN",
        "VACUUM",
        "",
        "SELEC 1",
        "SELECT nothing FROM cities",
        "SELECT 1 " + "-" * 11_000,
    ],
    "sqlite": [
        "PRAGMA journal_mode = WAL",
        "PRAGMA table_info(cities)",
        "SELECT load_extension('libc.so.6')",
        "CREATE TEMP TABLE t AS SELECT 1",
        "SELECT zeroblob(1000000000)",
        "SELECT readfile('/etc/passwd')",
        "REINDEX",
        "EXPLAIN DELETE FROM cities",
    ],
    "duckdb": [
        "COPY cities TO 'copy.csv'",
        "EXPORT DATABASE 'copy'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT content FROM read_text('/proc/self/environ')",
        "SELECT * FROM glob('/*')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET memory_limit = '100GB'",
        "SET enable_external_access = true",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "WITH gone AS (DELETE FROM cities RETURNING *) SELECT * FROM gone",
        "SELECT getenv('HOME')",
        "SELECT repeat('x', 2000000000)",
        "SELECT list_resize([1], 1000000000)",
    ],
}


def test_hostile_queries_get_a_message_and_change_nothing(engine: tuple[str, ToolSet]) -> None:
    kind, tools = engine
    texts = HOSTILE["both"] + HOSTILE[kind]
    for text, result in zip(texts, query(tools, *texts), strict=True):
        assert result.status is ToolStatus.ERROR, (text, result)
        assert result.text and len(result.text) < 400 and str(Path.home()) not in result.text, text
    (after,) = query(tools, "SELECT count(*), sum(height) FROM cities")
    assert after.text.endswith("\n3 | 237")


ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(
    "text",
    [
        ENDLESS,
        "{sqlite: SELECT count(*) FROM cities a, cities b, cities c, cities d, cities e, cities f, cities g, cities h, "
        "cities i, cities j, cities k, cities l, cities m, cities n, cities o, cities p, cities q, cities r}"
        "{duckdb: SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))}",
    ],
)
def test_endless_queries_are_stopped(tmp_path: Path, kind: str, text: str) -> None:
    write_data(tmp_path)
    tools = ToolSet(["sql"], {"sql": table_of(tmp_path, kind) | {"timeout_s": 0.3}})
    if text.startswith("{"):
        text = text.partition(f"{{{kind}: ")[2].partition("}")[0]
    (result,) = query(tools, text)
    assert result.status is ToolStatus.TIMEOUT
    assert result.text == "the query took longer than 0.3 seconds and was stopped"
    asyncio.run(tools.close())


def test_a_query_that_is_killed_is_no_fault_of_the_call_and_ends_with_the_tool(tmp_path: Path) -> None:
    write_data(tmp_path)
    others = children()
    tools = ToolSet(["sql"], {"sql": table_of(tmp_path, "sqlite") | {"timeout_s": 60.0, "max_concurrent": 3}})
    (worker,) = children() - others

    def start() -> asyncio.Task[list[ToolResult]]:
        return asyncio.ensure_future(tools.toolbox(None).execute([ToolCall("sql", {"query": ENDLESS})]))

    async def forks(num: int) -> set[int]:
        async with asyncio.timeout(60):
            while len(found := children(worker)) != num:
                await asyncio.sleep(0.01)
        return found

    async def run() -> list[ToolResult]:
        # the second fork is made while the first one's answer is awaited
        first = start()
        (pid,) = await forks(1)
        second = start()
        (other,) = await forks(2) - {pid}
        os.kill(pid, signal.SIGKILL)
        (killed,) = await first
        left = os.pidfd_open(other)
        await tools.close()
        assert select.select([left], [], [], 60)[0] == [left]
        os.close(left)
        return [killed, *await second]

    killed, closed = asyncio.run(run())
    assert (killed.status, killed.text) == (ToolStatus.INFRA_ERROR, "the query was ended from outside: Killed")
    assert closed.status is ToolStatus.INFRA_ERROR


def test_no_more_queries_run_than_there_are_cores(engine: tuple[str, ToolSet]) -> None:
    _, tools = engine
    (source, _, slots) = tools._sources[0]
    assert source.max_concurrent == len(os.sched_getaffinity(0)) and slots is not None


def test_a_database_in_wal_mode_is_read_as_it_lies_there(tmp_path: Path) -> None:
    write_data(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "cities.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO cities VALUES ('rom', 136, 'dome')")
        connection.commit()
        # its changes are not in the file yet
        with pytest.raises(ValueError, match=r"database must be at rest, got .* with changes in cities\.db-wal"):
            ToolSet(["sql"], {"sql": table_of(tmp_path, "sqlite")})
    files = sorted(path.name for path in tmp_path.iterdir())
    tools = ToolSet(["sql"], {"sql": table_of(tmp_path, "sqlite")})
    (result,) = query(tools, "SELECT count(*) AS n FROM cities")
    asyncio.run(tools.close())
    assert (result.text, sorted(path.name for path in tmp_path.iterdir())) == ("n\n4", files)


@pytest.mark.parametrize("before", ["pass", "confinement.keep_capabilities()"])
def test_a_query_that_took_over_its_process_would_reach_nothing(tmp_path: Path, before: str) -> None:
    (tmp_path / "open.txt").write_text("data")
    attempts = f"""
import os, socket, sys
from gtpo.sandbox import confinement
from gtpo.tools import sql_worker
{before}
assert not sql_worker._lock_in({{"readable": [{str(tmp_path / "open.txt")!r}, "/nowhere"]}})
print(open({str(tmp_path / "open.txt")!r}).read())
for attempt in (
    lambda: open({str(tmp_path / "secret.txt")!r}),
    lambda: open({str(tmp_path / "open.txt")!r}, "w"),
    lambda: open({str(tmp_path / "new.txt")!r}, "w"),
    socket.socket,
    os.fork,
    lambda: os.kill(os.getppid(), 0),
    lambda: os.execv(sys.executable, ["python"]),
):
    try:
        attempt()
    except PermissionError:
        print("refused")
"""
    (tmp_path / "secret.txt").write_text("secret")
    done = subprocess.run([sys.executable, "-c", attempts], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["data", *["refused"] * 7]


def test_long_answers_are_cut(engine: tuple[str, ToolSet]) -> None:
    _, tools = engine
    wide, names = query(
        tools, f"SELECT {', '.join(['name || name || name'] * 60)} FROM cities", f"SELECT 1 AS {'a' * 400}"
    )
    assert wide.text.endswith("[cut after 0 rows: at most 300 characters are shown; select less]")
    assert names.text.startswith("a" * 300 + "\n")


def test_queries_of_many_trajectories_run_at_once(engine: tuple[str, ToolSet]) -> None:
    _, tools = engine

    async def run() -> list[list[ToolResult]]:
        calls = [ToolCall("sql", {"query": f"SELECT {number} AS n"}) for number in range(8)]
        return await asyncio.gather(*(tools.toolbox(None).execute([call]) for call in calls))

    assert [results[0].text for results in asyncio.run(run())] == [f"n\n{number}" for number in range(8)]


def test_a_worker_that_died_is_replaced_and_ends_with_the_tool(tmp_path: Path) -> None:
    write_data(tmp_path)
    others = children()
    tools = ToolSet(["sql"], {"sql": table_of(tmp_path, "sqlite")})
    (pid,) = children() - others
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert query(tools, "SELECT max(height) AS top FROM cities")[0].text == "top\n161"
    (new,) = children() - others
    assert new != pid
    asyncio.run(tools.close())
    assert children() == others


def children(of: int | None = None) -> set[int]:
    """Processes of this one, or of another, whose command line names the worker."""
    of = of or os.getpid()
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == of and b"sql_worker" in path.joinpath("cmdline").read_bytes():
                found.add(int(path.name))
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either database .* or tables .* must be given, not both"),
        ({"database": "a", "tables": {}}, "must be given, not both"),
        ({"database": "{tmp}/none.db"}, "database must be a file, got .*none.db"),
        (
            {"database": "{tmp}/cities.json"},
            "database must be a SQLite file, got .*cities.json: file is not a database",
        ),
        ({"database": "{tmp}/empty.db"}, "database must have a table, got none"),
        ({"tables": {"t": "{tmp}/cities.db"}}, r"tables\.t must be a \.csv, .* file"),
        ({"tables": {"t": "{tmp}/none.csv"}}, r"tables\.t must be a file, got .*none\.csv"),
        ({"tables": {"t": "{tmp}/broken.json"}}, r"tables\.t: .*broken\.json cannot be read"),
        ({"tables": {"a b": "{tmp}/cities.json"}}, r"tables\.a b must have letters, digits and underscores"),
        ({"database": "a", "max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"database": "a", "timeout_s": 0}, "timeout_s must be above 0, got 0"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_data(tmp_path)
    others = children()
    (tmp_path / "empty.db").touch()
    (tmp_path / "broken.json").write_text("[{")
    options = json.loads(json.dumps(options).replace("{tmp}", str(tmp_path)))
    with pytest.raises(ValueError, match=f"tools.sql: .*{message}"):
        ToolSet(["sql"], {"sql": options})
    assert children() == others
