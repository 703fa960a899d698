"""Store: answers by key, in one SQLite file that is its owner's alone.

Each call opens the file for itself, so that threads and processes can share it. What is too old is
not found; what is too much goes, the oldest first. The file can be deleted at any time, with its
folder: one that is damaged is made anew.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("plugins.cache")  # this module's own name differs from start to start

PATIENCE = 10.0  # seconds to wait for another process that writes
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answers"
    " (number INTEGER PRIMARY KEY, key BLOB UNIQUE, stored REAL, answer BLOB)"
)
GET = "SELECT stored, answer FROM answers WHERE key = ?"
PUT = "INSERT OR REPLACE INTO answers (key, stored, answer) VALUES (?, ?, ?)"
EXPIRE = "DELETE FROM answers WHERE stored < ?"
# An answer that takes the place of another gets a new number, too: the newest has the highest.
TRIM = (
    "DELETE FROM answers WHERE number IN (SELECT number FROM (SELECT number,"
    " count(*) OVER newest AS entries, sum(length(answer)) OVER newest AS bytes"
    " FROM answers WINDOW newest AS (ORDER BY number DESC)) WHERE entries > ? OR bytes > ?)"
)
Step = tuple[str, Sequence[object]]  # a statement and its values


class Store:
    """The answers in `file`: at most `max_entries` and `max_bytes`, for `max_age` seconds."""

    def __init__(self, file: Path, max_age: float, max_entries: int, max_bytes: int) -> None:
        self.file, self.max_age = file, max_age
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self._run()  # what is wrong with the file shows here

    def get(self, key: bytes) -> str | None:
        """Return the answer, or None if there is none or it is too old. Raises sqlite3.Error."""
        for stored, answer in self._run((GET, [key])):
            # Later than now: the clock was wrong then or is now, so the age is unknown.
            if 0 <= time.time() - stored <= self.max_age:
                return str(answer, "utf-8", "surrogatepass")
        return None

    def put(self, key: bytes, text: str) -> None:
        """Keep an answer in place of the last one, if there is room. Raises sqlite3.Error."""
        now = time.time()
        answer = text.encode("utf-8", "surrogatepass")  # half a character is text in JSON
        if len(answer) <= self.max_bytes:
            trim = TRIM, [self.max_entries, self.max_bytes]
            self._run((PUT, [key, now, answer]), (EXPIRE, [now - self.max_age]), trim)

    def _run(self, *steps: Step) -> list[Any]:
        """Run statements as one transaction, and return the rows of the last one."""
        try:
            return self._transaction(steps)
        except sqlite3.DatabaseError as exc:
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in DAMAGED:
                raise
            logger.warning("cache is damaged, making it anew", extra={"fields": {"error": exc}})
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.file}{suffix}").unlink(missing_ok=True)
        return self._transaction(steps)

    def _transaction(self, steps: Sequence[Step]) -> list[Any]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch(mode=0o600)  # SQLite gives its other files the mode of this one
        with closing(sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)) as db:
            with suppress(sqlite3.OperationalError):  # another process does the same
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(SCHEMA)
            rows: list[Any] = []
            with db:
                db.execute("BEGIN")
                for step in steps:
                    rows = db.execute(*step).fetchall()
            return rows
