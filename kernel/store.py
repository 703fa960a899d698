"""Store: keeps what an agent has to remember: in SQLite, or in a PostgreSQL that proxies share.

An agent says in a `Schema` which tables it needs, and uses `self.store` without knowing which of
the two it is. Values are never part of an SQL text: `$1` is the first, on both. Nothing is opened
before its first use, and a database that was away is found again by the next use.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from kernel.errors import StoreError

logger = logging.getLogger(__name__)

Row = tuple[Any, ...]
# Which statements of a schema were done
MIGRATIONS = "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY)"
DONE = "SELECT coalesce(max(number), 0) FROM migrations"
NOTE = "INSERT INTO migrations VALUES ($1)"


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of an agent: SQL statements, for each engine.

    Each is run once, in their order, and its number is noted with it. To change a table append a
    statement; never edit one, remove one or put one between.
    """

    sqlite: Sequence[str] = ()
    postgresql: Sequence[str] = ()
    file: str = "store.db"  # of SQLite, in the agent's data_dir
    durable: bool = True  # False (a cache): a crash may cost the latest, a damaged file is removed


@dataclass(frozen=True, slots=True)
class Transaction:
    """`await execute(sql, *values)` runs one statement in it and returns its rows."""

    execute: Callable[..., Awaitable[list[Row]]]


class Store(Protocol):
    """The tables of one agent. Every method raises StoreError."""

    engine: str  # "sqlite" or "postgresql"

    def transaction(self, lock: str | None = None) -> AbstractAsyncContextManager[Transaction]:
        """Make one transaction of the block: all of it is kept, or after an exception nothing.

        Of all proxies, one at a time is in a block with the same `lock`.
        """

    async def execute(self, sql: str, *values: Any) -> list[Row]:
        """Run one statement, which is a transaction of its own, and return its rows."""
        async with self.transaction() as db:
            return await db.execute(sql, *values)


class Database(Protocol):
    """What has the stores of all agents, where it is not SQLite."""

    def store(self, agent: str, schema: Schema) -> Store: ...

    async def check(self) -> None:
        """Raise StoreError if it does not answer."""

    async def close(self) -> None: ...


def pending(agent: str, schema: Sequence[str], done: int) -> list[tuple[int, str]]:
    """Return the statements that are not done yet, with their numbers."""
    if done > len(schema):  # another proxy was updated already: its tables may do for this one
        fields = {"agent": agent, "store": done, "this proxy": len(schema)}
        logger.warning("store is newer than this proxy: update it", extra={"fields": fields})
    return [*enumerate(schema, 1)][done:]


def failure(where: object, exc: Exception, text: str, *, safe: bool) -> StoreError:
    """Return what an engine's exception means; a text that may hold a value is for debug only."""
    logger.debug("store failed", extra={"fields": {"store": str(where), "error": text}})
    return StoreError(f"{where}: {type(exc).__name__}{f': {text}' * safe}")
