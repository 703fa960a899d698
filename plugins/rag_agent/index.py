"""Index: the passages of files, their words and their vectors, in the agent's store.

All proxies with the same settings share one index; `~` in an SQL text stands for its id, with which
the names of its tables end. To write files, or vectors, a proxy needs the lease of that: one has it
at a time, and another gets it when that one did not renew it for LEASE seconds.

Every transaction leaves the index whole: one file's passages, or one batch of vectors; a proxy that
is killed loses that one. The index can be deleted at any time. Downwards: the tables, the lease,
what is written, what is read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kernel.agent import Schema, Store

logger = logging.getLogger("plugins.rag")  # this module's own name differs from start to start

T = TypeVar("T")
Execute = Callable[..., Awaitable[list[Any]]]  # one statement and its values -> rows

LEASE = 5.0  # seconds
UNUSED = 7 * 86_400.0  # seconds after which an index that no proxy follows is deleted
AT_ONCE = 500  # rows in one statement

WORK = (
    "CREATE TABLE work (name TEXT PRIMARY KEY, owner TEXT DEFAULT '', until DOUBLE PRECISION,"
    " version BIGINT)"
)
CLOCK = "CREATE VIEW clock AS SELECT {} AS now"  # one for all proxies
SCHEMA = Schema(
    file="index.db",
    durable=False,
    sqlite=[WORK, CLOCK.format("(julianday('now') - 2440587.5) * 86400.0")],
    postgresql=[WORK, CLOCK.format("extract(epoch FROM clock_timestamp())::float8")],
)
# The id of a passage is that of its file and, in the lower 32 bits, its number there. No id comes
# again: a vector that comes late finds no other text.
FILES = (
    "CREATE TABLE files~ (id {}, path BYTEA UNIQUE, name TEXT, stamp TEXT, digest TEXT,"
    " guess TEXT, problem TEXT, passages INTEGER, words INTEGER)"
)
VIEW = (
    "CREATE VIEW passages~ AS SELECT w.rowid AS id, path, name, heading, text"
    " FROM words~ AS w {} JOIN files~ AS f ON f.id = w.rowid >> 32"
)
TABLES = {
    "sqlite": [
        FILES.format("INTEGER PRIMARY KEY AUTOINCREMENT"),
        "CREATE VIRTUAL TABLE words~ USING fts5 (title, body, heading UNINDEXED, text UNINDEXED,"
        " tokenize = 'porter ascii')",
        "CREATE TABLE vectors~ (passage INTEGER PRIMARY KEY, code BYTEA, vector BYTEA)",
        "CREATE INDEX codes~ ON vectors~ (code)",  # to read them without the vectors
        "CREATE TRIGGER forget~ AFTER DELETE ON files~ BEGIN"
        " DELETE FROM words~ WHERE rowid BETWEEN old.id << 32 AND (old.id + 1 << 32) - 1;"
        " DELETE FROM vectors~ WHERE passage BETWEEN old.id << 32 AND (old.id + 1 << 32) - 1; END",
        VIEW.format("CROSS"),
    ],
    "postgresql": [
        FILES.format("BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"),
        "CREATE TABLE words~ (rowid BIGINT PRIMARY KEY, title TEXT, body TEXT, heading TEXT,"
        " text TEXT, size INTEGER GENERATED ALWAYS AS"
        " ((length(title || body) - length(replace(title || body, ' ', ''))) / 2) STORED,"
        " file BIGINT GENERATED ALWAYS AS (rowid >> 32) STORED REFERENCES files~"
        " ON DELETE CASCADE)",
        "CREATE INDEX ON words~ (file)",
        "CREATE INDEX ON words~ USING gin (((title || body)::tsvector))",
        'CREATE TABLE counts~ (word TEXT COLLATE "C" PRIMARY KEY, passages BIGINT)'
        " WITH (fillfactor = 50)",  # to count them in the other one is slow
        "CREATE TABLE vectors~ (passage BIGINT PRIMARY KEY REFERENCES words~ ON DELETE CASCADE,"
        " code BIT VARYING, vector BYTEA)",
        "ALTER TABLE vectors~ ALTER vector SET STORAGE EXTERNAL",  # nothing to compress
        VIEW.format(""),
    ],
}
PARTS = ("VIEW passages", "TABLE vectors", "TABLE words", "TABLE files", "TABLE IF EXISTS counts")
NEW = "INSERT INTO work (name, until, version) SELECT $1, now, $2 FROM clock"
KNOWN = (
    "SELECT version, now - until FROM work, clock WHERE name IN ('files~', 'vectors~')"
    " ORDER BY name"
)
TAKE = (
    "UPDATE work SET owner = $2, until = now + $3, version = version + $4 FROM clock"
    " WHERE name = $1 AND (owner IN ('', $2) OR until NOT BETWEEN now AND now + $3)"
    " RETURNING version"
)
RELEASE = "UPDATE work SET owner = '' WHERE name = $1 AND owner = $2"
OLD = "SELECT name FROM work, clock WHERE until < now - $1 AND name LIKE 'files%'"
ADD_FILE = (
    "INSERT INTO files~ (path, name, stamp, digest, guess, problem, passages, words)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id"
)
COUNT_WORDS = (
    "INSERT INTO counts~ (word, passages) SELECT lexeme, count(*) * $2"
    " FROM words~, unnest((title || body)::tsvector)"
    " WHERE file = (SELECT id FROM files~ WHERE path = $1) GROUP BY lexeme"
    " ON CONFLICT (word) DO UPDATE SET passages = counts~.passages + excluded.passages"
)
ADD = "INSERT INTO words~ (rowid, title, body, heading, text) VALUES "
FETCH = "SELECT id, path, name, heading, text FROM passages~ WHERE id IN "


class Taken(Exception):
    """Another proxy has the lease."""


class Passage(NamedTuple):
    """A text, and where it stands."""

    path: bytes
    name: str  # as sources name the file
    heading: str  # "Decisions > Meeting of 12 May", or ""
    text: str

    @property
    def source(self) -> str:
        return f"{self.name}, {self.heading}" if self.heading else self.name


class Index:
    """The index `name` in a store. Every method raises StoreError."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.server = store.engine == "postgresql"
        self._me = secrets.token_hex(8)

    def sql(self, text: str) -> str:
        return re.sub(r"\b~", f"_{self.name}", text)  # and not in an operator

    @asynccontextmanager
    async def transaction(self, lock: str | None = None) -> AsyncIterator[Execute]:
        """Make one transaction of the block; yield what runs a statement in it."""
        async with self.store.transaction(lock) as db:

            async def execute(sql: str, *values: Any) -> list[Any]:
                return await db.execute(self.sql(sql), *values)

            yield execute

    async def execute(self, sql: str, *values: Any) -> list[Any]:
        async with self.transaction() as execute:
            return await execute(sql, *values)

    async def known(self) -> tuple[int, int, float]:
        """Return the versions of files and of vectors, and for how long nobody led the files.

        The tables are made where they are not there. No version comes again in tables made anew.
        """
        while not (rows := await self.execute(KNOWN)):
            async with self.transaction(lock="tables") as execute:
                if not await execute(KNOWN):
                    for statement in TABLES[self.store.engine]:
                        await execute(statement)
                    for name in ("files~", "vectors~"):
                        await execute(NEW, self.sql(name), secrets.randbits(48))
        (files, idle), (vectors, _) = rows
        return files, vectors, idle

    @asynccontextmanager
    async def leading(self, what: str) -> AsyncIterator[None]:
        """Have the lease of "files" or "vectors" in the block. Raises Taken."""
        await self.renew(what)
        try:
            yield
        finally:
            await self.execute(RELEASE, self.sql(f"{what}~"), self._me)

    @asynccontextmanager
    async def writing(self, what: str, change: int = 1) -> AsyncIterator[Execute]:
        """Make one transaction of the block, and a new version. Raises Taken."""
        async with self.transaction() as execute:
            if not await execute(TAKE, self.sql(f"{what}~"), self._me, LEASE, change):
                raise Taken
            yield execute

    async def renew(self, what: str) -> None:
        async with self.writing(what, 0):
            pass

    async def during(self, what: str, work: Awaitable[T]) -> T:
        """Wait for something, and keep the lease meanwhile. Raises Taken."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=LEASE / 3))[0]:
                await self.renew(what)
            return await task
        finally:
            task.cancel()

    async def put(self, file: Sequence[Any], rows: Sequence[Sequence[str]], words: int) -> None:
        """Put a file's passages in the place of those that it had. Raises Taken.

        `file` is its path in bytes, name, stamp, digest, the encoding that was guessed, and why it
        is left out; a row is title, body, headings and text of a passage, the first two as words.
        """
        async with self.writing("files") as execute:
            await self._delete(execute, file[0])
            ((number,),) = await execute(ADD_FILE, *file, len(rows), words)
            numbered = [(number << 32 | place, *row) for place, row in enumerate(rows)]
            for start in range(0, len(rows), AT_ONCE):
                some = numbered[start : start + AT_ONCE]
                await execute(ADD + places(len(some), 5), *chain.from_iterable(some))
            if self.server:
                await execute(COUNT_WORDS, file[0], 1)

    async def forget(self, path: str) -> None:
        """Delete a file. Raises Taken."""
        async with self.writing("files") as execute:
            await self._delete(execute, os.fsencode(path))

    async def _delete(self, execute: Execute, path: bytes) -> None:
        if self.server:
            await execute(COUNT_WORDS, path, -1)
        await execute("DELETE FROM files~ WHERE path = $1", path)

    async def clean(self) -> None:
        """Delete indexes that no proxy follows."""
        async with self.transaction(lock="tables") as execute:
            for (name,) in await execute(OLD, UNUSED):
                ending = name.removeprefix("files")
                for part in PARTS:
                    await execute(f"DROP {part}{ending}")
                await execute("DELETE FROM work WHERE name LIKE $1", f"%{ending}")


async def fetch(
    execute: Execute, ids: Sequence[int], within: Path | None, most: int
) -> dict[str, Passage]:
    """Return the first passages that are still there, `most` at most, by their text: no copies.

    Where `within` is given, they are those of one folder.
    """
    found: dict[str, Passage] = {}
    for start in range(0, len(ids), 2 * most):
        some = ids[start : start + 2 * most]
        rows = await execute(FETCH + places(1, len(some)), *some)
        read = {row[0]: Passage(*row[1:]) for row in rows}
        for passage in filter(None, map(read.get, some)):
            if not within or within in Path(os.fsdecode(passage.path)).parents:
                found.setdefault(" ".join(f"{passage.heading} {passage.text}".split()), passage)
            if len(found) == most:
                return found
    return found


def places(rows: int, columns: int) -> str:
    """Return the places of values: "($1, $2), ($3, $4)"."""
    numbers = [[f"${row * columns + n}" for n in range(1, columns + 1)] for row in range(rows)]
    return ", ".join(f"({', '.join(some)})" for some in numbers)
