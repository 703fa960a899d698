"""SQLite: a store in a file that is its owner's alone.

Each transaction opens the file for itself, so that processes can share it, and makes it where it is
gone. A damaged file is an error; only one that need not be durable is removed. The disk is waited
for in one thread per store, never on the loop: what is queued there happens in order, also when a
task is cancelled.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kernel.store import DONE, MIGRATIONS, NOTE, Row, Schema, Store, Transaction, failure, pending

T = TypeVar("T")
PATIENCE = 10.0  # seconds to wait for another process
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class SQLite(Store):
    """The store of `agent` in `folder`; its transactions run one after the other."""

    engine = "sqlite"
    _db: sqlite3.Connection  # of the transaction that runs

    def __init__(self, agent: str, folder: Path, schema: Schema) -> None:
        self.agent = agent
        self.file = folder / schema.file
        self.schema = schema
        self._thread = ThreadPoolExecutor(1)
        self._turn = asyncio.Lock()  # a second transaction would wait in the thread of the first
        self._open = ExitStack()

    @asynccontextmanager
    async def transaction(self, lock: str | None = None) -> AsyncIterator[Transaction]:
        """See Store."""
        async with self._turn:
            try:
                await self._run(self._begin)
                yield Transaction(partial(self._run, self._execute))
                await self._run(self._execute, "COMMIT")
            finally:
                self._thread.submit(self._open.close)  # no wait: the task may be cancelled

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        """Do work in the thread. Raises StoreError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except sqlite3.Error as exc:
            code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            text = str(exc)
            if code & 0xFF in DAMAGED and self.schema.durable:
                text += "; put a copy in its place, or move it away to begin anew"
            elif code & 0xFF in DAMAGED:
                self._thread.submit(self._remove)
            # The general code is of SQL that is wrong: the text says where, and may quote a value.
            raise failure(self.file, exc, text, safe=code != sqlite3.SQLITE_ERROR) from exc

    def _begin(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch(mode=0o600)  # SQLite gives its other files the mode of this one
        db = sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)
        self._db = self._open.enter_context(closing(db))  # which rolls back
        db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        db.execute(f"PRAGMA synchronous = {'FULL' if self.schema.durable else 'OFF'}")
        db.execute("BEGIN IMMEDIATE")
        db.execute(MIGRATIONS)
        ((done,),) = db.execute(DONE)
        for number, statement in pending(self.agent, self.schema.sqlite, done):
            db.execute(statement)
            self._execute(NOTE, number)

    def _remove(self) -> None:
        self._open.close()
        for file in (f"{self.file}-journal", self.file):  # it would be played into the next file
            Path(file).unlink(missing_ok=True)

    def _execute(self, sql: str, *values: Any) -> list[Row]:
        return self._db.execute(sql, {str(n): v for n, v in enumerate(values, 1)}).fetchall()
