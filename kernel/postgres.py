"""Postgres: a store in one PostgreSQL for many proxies; each agent has a schema of its own there.

Connections are opened as they are needed and kept. One that died while it was idle is replaced, so
a database that was away is found again; one that does not answer fails at once and with its reason,
instead of holding a chat. The address holds a password: it is in no log, error or repr. Nothing is
prepared and nothing set for a session, so a pooler (PgBouncer) may stand between. Needs psycopg 3,
which does not run on the event loop of Windows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from kernel.errors import ConfigError, StoreError
from kernel.store import DONE, MIGRATIONS, NOTE, Row, Schema, Store, Transaction, failure, pending

PLACES = 4  # transactions at the same time: the server has about 100 places for all proxies
OPTIONS = {"connect_timeout": "5", "tcp_user_timeout": "10000", "application_name": "osp"}
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
FORM = "it must be postgresql://user:password@host:5432/database"

Link = psycopg.AsyncConnection[Row]


@contextmanager
def reported() -> Iterator[None]:
    """Raise what goes wrong as StoreError, without what an SQL text or a value says."""
    try:
        yield
    except psycopg.Error as exc:
        safe = isinstance(exc, psycopg.OperationalError | psycopg.InternalError)
        text = " ".join((exc.diag.message_primary or str(exc)).split())
        raise failure("PostgreSQL", exc, text, safe=safe) from exc


async def fetched(link: Link, sql: str, *values: Any) -> list[Row]:
    with reported():
        cursor = await link.execute(sql, values or None)
        return await cursor.fetchall() if cursor.description else []


class Postgres:
    """The database at a `postgresql://` address. Raises ConfigError for one that cannot be read."""

    def __init__(self, url: str) -> None:
        try:
            self._how: dict[str, Any] = {**OPTIONS, **conninfo_to_dict(url)}
        except psycopg.Error:
            raise ConfigError(f"server.store: this is wrong here, {FORM}") from None
        self._idle: list[Link] = []
        self._places = asyncio.Semaphore(PLACES)

    def store(self, agent: str, schema: Schema) -> PostgresStore:
        return PostgresStore(self, agent, schema)

    @asynccontextmanager
    async def transaction(self, begin: str) -> AsyncIterator[Transaction]:
        """Make one transaction of the block. Raises StoreError."""
        async with self._places:
            with reported():
                link = await self._begun(begin)
                try:
                    yield Transaction(partial(fetched, link))
                    if (await link.execute("COMMIT")).statusmessage != "COMMIT":
                        raise StoreError("PostgreSQL: a statement failed, so nothing was kept")
                except BaseException:
                    await link.close()  # rolls back, and waits for nothing
                    raise
                self._idle.append(link)

    async def check(self) -> None:
        """Raise StoreError if the database does not answer."""
        async with self.transaction("BEGIN"):
            pass

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    async def _begun(self, begin: str) -> Link:
        """Return a connection in a transaction: a kept one that did not die since, or a new one."""
        while True:
            kept = bool(self._idle)
            link = self._idle.pop() if kept else await self._connected()
            try:
                await link.execute(begin)
                return link
            except BaseException as exc:
                await link.close()
                if not (kept and isinstance(exc, psycopg.OperationalError)):
                    raise

    async def _connected(self) -> Link:
        return await psycopg.AsyncConnection.connect(
            **self._how,
            autocommit=True,
            prepare_threshold=None,
            cursor_factory=psycopg.AsyncRawCursor,
        )


class PostgresStore(Store):
    """The store of `agent`: the schema `osp_agent`."""

    engine = "postgresql"

    def __init__(self, database: Postgres, agent: str, schema: Schema) -> None:
        self.database = database
        self.agent = agent
        self.name = f'"osp_{agent}"'  # the agent's name is of letters, digits, _ and -
        self.begin = f"BEGIN; SET LOCAL search_path TO {self.name}, public"
        if not schema.durable:
            self.begin += "; SET LOCAL synchronous_commit TO off"
        self.statements = schema.postgresql
        self._migrated = False

    @asynccontextmanager
    async def transaction(self, lock: str | None = None) -> AsyncIterator[Transaction]:
        """See Store."""
        if not self._migrated:
            await self._migrate()
        async with self.database.transaction(self.begin) as db:
            if lock is not None:
                await db.execute(LOCK, f"{self.name} {lock}")
            yield db

    async def _migrate(self) -> None:
        """Do the statements that are not done, one proxy at a time; where none is left, only read.

        So a replica that only reads, or a role that may make nothing, is enough from then on.
        """
        async with self.database.transaction(self.begin) as db:
            if await self._pending(db):
                await db.execute(LOCK, self.name)
                # What another proxy made meanwhile is not in this connection's cache: look again
                await db.execute("SELECT FROM pg_namespace LIMIT 0")
                await db.execute(f"CREATE SCHEMA IF NOT EXISTS {self.name}")
                await db.execute(MIGRATIONS)
                for number, statement in await self._pending(db):
                    await db.execute(statement)
                    await db.execute(NOTE, number)
        self._migrated = True

    async def _pending(self, db: Transaction) -> list[tuple[int, str]]:
        ((table,),) = await db.execute("SELECT to_regclass($1)::text", f"{self.name}.migrations")
        ((done,),) = await db.execute(DONE) if table else ((0,),)
        return pending(self.agent, self.statements, done)
