"""Stores: the same face before SQLite and before PostgreSQL, also when these fail."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, nullcontext, suppress
from pathlib import Path

import pytest

import osp
from kernel.agent import Schema, Store, StoreError
from kernel.config import HOME, Config, ServerConfig, load
from kernel.errors import ConfigError
from kernel.postgres import PLACES, Postgres
from kernel.sqlite import SQLite
from tests.postgres import Cluster
from tests.support import OpenStore

TABLE = "CREATE TABLE counts (name TEXT PRIMARY KEY, n INTEGER)"
GROW = "ALTER TABLE counts ADD COLUMN note TEXT DEFAULT 'new'"
PUT, ALL = "INSERT INTO counts (name, n) VALUES ($1, $2)", "SELECT name, n FROM counts"

Open = Callable[..., Store]


@pytest.fixture
def open_it(open_store: OpenStore) -> Open:
    """Open the store of one agent, with these tables."""
    return lambda *schema: open_store("it", Schema(schema or [TABLE], schema or [TABLE]))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Store]:
    server = Postgres(url)
    try:
        yield server.store("it", Schema(postgresql=[TABLE]))
    finally:
        await server.close()


async def test_values_go_in_and_come_out_as_they_were(open_it: Open) -> None:
    store = open_it("CREATE TABLE kept (a TEXT, b BYTEA, c DOUBLE PRECISION, d BIGINT)")
    row = ("'; DROP TABLE kept; -- $1 % ? :x", b"\0\xff", 0.5, 2**40)

    assert await store.execute("INSERT INTO kept VALUES ($1, $2, $3, $4)", *row) == []
    assert await store.execute("SELECT * FROM kept WHERE a = $1 AND $1 <> $2", row[0], "") == [row]


async def test_nothing_is_made_before_its_first_use(tmp_path: Path) -> None:
    store = SQLite("it", tmp_path / "data", Schema(sqlite=[TABLE]))
    Postgres("postgresql://127.0.0.1:1/none").store("it", Schema())

    assert os.listdir(tmp_path) == []
    assert await store.execute(ALL) == []


async def test_a_transaction_keeps_all_or_nothing(open_it: Open) -> None:
    store = open_it()

    async with store.transaction() as db:
        await db.execute(PUT, "a", 1)
        await db.execute(PUT, "b", 2)
    with pytest.raises(ZeroDivisionError):
        async with store.transaction() as db:
            await db.execute(PUT, "c", 3)
            raise ZeroDivisionError

    assert await store.execute(ALL) == [("a", 1), ("b", 2)]


async def test_a_statement_that_fails_says_nothing_of_its_values(
    open_it: Open, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_it()
    caplog.set_level("DEBUG", "kernel.store")
    await store.execute(PUT, "secret", 1)

    for sql, values in ((PUT, ("secret", 2)), ("SELECT secret FROM counts", ())):
        with pytest.raises(StoreError) as failure:
            async with store.transaction() as db:
                await db.execute(PUT, f"before {sql}", 1)
                await db.execute(sql, *values)
        assert re.match(r"\S+: \w+", str(failure.value)) and "secret" not in str(failure.value)
    assert "secret" in str([vars(record)["fields"] for record in caplog.records])  # at debug
    assert await store.execute(ALL) == [("secret", 1)]


async def test_blocks_with_one_lock_come_one_after_the_other(open_it: Open) -> None:
    stores = [open_it() for _ in range(3)]
    await stores[0].execute(PUT, "a", 0)

    async def add(store: Store) -> None:
        async with store.transaction(lock="a") as db:
            ((n,),) = await db.execute("SELECT n FROM counts WHERE name = 'a'")
            await db.execute("UPDATE counts SET n = $1", n + 1)

    await asyncio.gather(*(add(store) for store in stores * 10))
    assert await stores[0].execute(ALL) == [("a", 30)]


async def test_a_task_that_is_cancelled_leaves_nothing_behind(open_it: Open) -> None:
    store, inside = open_it(), asyncio.Event()

    async def begin() -> None:
        async with store.transaction(lock="a") as db:
            await db.execute(PUT, "a", 1)
            inside.set()
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(begin()) for _ in range(2 * PLACES)]
    await inside.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

    async with store.transaction(lock="a") as db:
        assert await db.execute(ALL) == []


# Migrations


async def test_proxies_that_start_at_once_make_the_tables_once(open_it: Open) -> None:
    schema = TABLE, "INSERT INTO counts VALUES ('made', 1)", GROW
    stores = [open_it(*schema) for _ in range(8)]

    found = await asyncio.gather(*(store.execute(ALL) for store in stores))

    assert found == [[("made", 1)]] * 8


async def test_two_versions_work_side_by_side(
    open_it: Open, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, next_old = open_it(TABLE), open_it(TABLE, GROW), open_it(TABLE)
    await old.execute(PUT, "a", 1)

    assert await new.execute("SELECT name, note FROM counts") == [("a", "new")]
    assert not caplog.records
    for store in (old, next_old):
        await store.execute(PUT, f"b{id(store)}", 2)
    assert len(await new.execute(ALL)) == 3
    warnings = {record.getMessage() for record in caplog.records}
    assert warnings == {"store is newer than this proxy: update it"}


async def test_a_migration_that_fails_is_not_half_done_and_is_tried_again(open_it: Open) -> None:
    broken, mended = open_it(TABLE, "CREATE nonsense"), open_it(TABLE, GROW)

    for _ in range(2):
        with pytest.raises(StoreError):
            await broken.execute(ALL)
    assert await mended.execute("SELECT note FROM counts") == []


# SQLite


async def test_the_loop_goes_on_while_another_process_has_the_file(tmp_path: Path) -> None:
    store = SQLite("it", tmp_path, Schema(sqlite=[TABLE]))
    await store.execute(ALL)
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        tasks = [asyncio.create_task(store.execute(PUT, str(n), n)) for n in range(20)]
        done, _ = await asyncio.wait(tasks, timeout=0.2)
        assert not done
        other.execute("COMMIT")

    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert len(await store.execute(ALL)) == 20


async def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"no database at all" * 100)
    damaged = SQLite("it", tmp_path, Schema())
    full = SQLite("it", tmp_path, Schema(sqlite=[TABLE], file="full.db"))
    await full.execute(ALL)

    with pytest.raises(StoreError, match=r"store\.db: DatabaseError: file is not a database"):
        await damaged.execute("SELECT 1")
    with pytest.raises(StoreError, match="database or disk is full"):
        async with full.transaction() as db:
            await db.execute("PRAGMA max_page_count = 1")
            for n in range(100):
                await db.execute(PUT, "x" * 1000 + str(n), n)
    assert await full.execute(ALL) == []


async def test_a_damaged_file_stays_unless_it_may_be_lost(tmp_path: Path) -> None:
    for durable in (True, False):
        store = SQLite("it", tmp_path, Schema([TABLE], file=f"{durable}.db", durable=durable))
        await store.execute(PUT, "a", 1)
        store.file.write_bytes(b"no database at all" * 1000)
        with pytest.raises(StoreError, match="file is not a database"):
            await store.execute(ALL)

        with pytest.raises(StoreError) if durable else nullcontext():
            assert await store.execute(ALL) == []


# PostgreSQL


KILL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'osp'"


async def test_connections_that_died_are_replaced(database: str, postgres: Cluster) -> None:
    async with connected(database) as store:
        await store.execute(PUT, "a", 1)
        await asyncio.gather(*(store.execute("SELECT pg_sleep(0.05)") for _ in range(PLACES)))
        assert len(postgres.execute(KILL)) == PLACES

        assert await store.execute(ALL) == [("a", 1)]


async def test_a_server_that_goes_away_is_said_and_found_again(
    database: str, postgres: Cluster
) -> None:
    async with connected(database) as store:
        await store.execute(PUT, "a", 1)
        with pytest.raises(StoreError, match="PostgreSQL: "):
            async with store.transaction() as db:
                await db.execute(PUT, "b", 2)
                postgres.stop()
        try:
            with pytest.raises(StoreError, match="Connection refused"):
                await store.execute(ALL)
        finally:
            postgres.start()

        assert await store.execute(ALL) == [("a", 1)]


async def test_a_replica_that_only_reads_is_read(database: str, postgres: Cluster) -> None:
    async with connected(database) as store:
        await store.execute(PUT, "a", 1)
    name = database.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    async with connected(database) as store:
        assert await store.execute(ALL) == [("a", 1)]
        with pytest.raises(StoreError, match="ReadOnlySqlTransaction: cannot execute INSERT in a"):
            await store.execute(PUT, "b", 2)


async def test_a_disk_that_is_full_is_said_and_nothing_is_half_written(
    database: str, postgres: Cluster
) -> None:
    name = database.rpartition("/")[2]
    async with connected(database) as store:
        await store.execute(PUT, "a", 1)
        postgres.execute(FULL, name)

        with pytest.raises(StoreError, match="DiskFull: could not extend file"):
            async with store.transaction() as db:
                await db.execute("UPDATE counts SET n = 2")
                await db.execute(PUT, "b", 2)
        assert await store.execute(ALL) == [("a", 1)]


# The server's own error, where a disk cannot be filled for a test
FULL = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
  'BEGIN RAISE ''could not extend file'' USING ERRCODE = ''disk_full''; END';
CREATE TRIGGER full_disk BEFORE INSERT ON osp_it.counts EXECUTE FUNCTION fail();
"""


async def test_an_error_that_an_agent_ignores_keeps_nothing_silently(database: str) -> None:
    async with connected(database) as store:
        with pytest.raises(StoreError, match="nothing was kept"):
            async with store.transaction() as db:
                await db.execute(PUT, "a", 1)
                with suppress(StoreError):
                    await db.execute(PUT, "a", 1)


async def test_connections_that_are_open_make_the_tables_once(database: str) -> None:
    """They remember that there was no schema of that name."""
    server = Postgres(database)
    await asyncio.gather(*(server.check() for _ in range(2 * PLACES)))
    for name in "abcdef":
        store = server.store(name, Schema(postgresql=[TABLE]))
        found = await asyncio.gather(*(store.execute(ALL) for _ in range(PLACES)))
        assert found == [[]] * PLACES
    await server.close()


async def test_agents_do_not_see_each_others_tables(database: str) -> None:
    server = Postgres(database)
    one, other = (server.store(name, Schema(postgresql=[TABLE])) for name in ("one", "an-other"))
    await one.execute(PUT, "a", 1)

    assert await other.execute(ALL) == []
    await server.close()


def wrong(url: str) -> str:
    """Return the error for an address, or for what is behind it."""

    async def check() -> None:
        config = Config(server=ServerConfig(store=url))
        assert "secret" not in repr(config)
        registry = osp.create_registry(config, {})
        assert registry.database
        await registry.database.check()

    with pytest.raises((ConfigError, StoreError)) as failure:
        asyncio.run(check())
    return str(failure.value)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://osp:secret@db/osp", "server.store: this is wrong here, it must be postgresql://"),
        ("postgresql://osp:secret%zz@db/osp", "server.store: this is wrong here"),
        ("postgresql://osp:secret@db:port/osp", "PostgreSQL: "),
        ("postgresql://osp:secret@127.0.0.1:1/osp", "Connection refused"),
        ("postgresql://osp:secret@no-such-host.invalid/osp", "no-such-host.invalid"),
        ("$SECRET", "server.store: $SECRET is not set in the environment"),
    ],
)
def test_a_wrong_address_is_said_without_its_password(url: str, text: str) -> None:
    said = wrong(url)

    assert text in said and "secret" not in said


def test_a_wrong_password_is_not_shown(postgres: Cluster) -> None:
    said = wrong(postgres.url().replace(postgres.password, "secret"))

    assert 'password authentication failed for user "osp"' in said and "secret" not in said


def test_a_value_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "osp.toml"
    file.write_text('[server]\nstore = ["postgresql://osp:secret@db/osp"]\n')

    with pytest.raises(ConfigError, match="server: store: this is wrong here") as failure:
        load(file, {}, {})
    assert "secret" not in str(failure.value)


def test_without_psycopg_the_line_that_mends_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernel.postgres")
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(ConfigError, match=r"pip install .*'psycopg\[binary\]'"):
        osp.create_registry(Config(server=ServerConfig(store="postgresql://db/osp")), {})


LEAN = """
import json, sys
import osp
from kernel.config import load
osp.create_app(load(None, {"OSP_PLUGINS": "time"}, {}))
heavy = {"psycopg", "sqlite3", "kernel.sqlite", "kernel.postgres"}
print(json.dumps(sorted(heavy & {*sys.modules})))
"""


def test_who_uses_no_store_pays_for_none() -> None:
    said = subprocess.run([sys.executable, "-c", LEAN], cwd=HOME, capture_output=True, check=True)

    assert json.loads(said.stdout) == []
