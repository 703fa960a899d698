"""Index: the passages of a folder's files, their words and their vectors, in one SQLite file.

Every transaction leaves it whole: one file's passages, or one batch of vectors; so whoever is
killed in the middle loses that one. It can be deleted at any time: a file that is damaged is
removed, and one of another version is made anew. Downwards: the file, what is written into it, and
what is read.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

logger = logging.getLogger("plugins.rag")  # this module's own name differs from start to start

PATIENCE = 10.0  # seconds to wait for another thread or process that writes
ROOM = 2**32  # row ids of passages for each file
# IOERR is what remains when the file alone was deleted under somebody who was writing.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
VERSION = 2  # of the tables, and of how texts are cut: raise it when either changes
TABLES = ("files", "chunks", "vectors", "state")
SCHEMA = (
    # With AUTOINCREMENT no id comes again: a vector that comes late finds no other text.
    "CREATE TABLE files (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, stamp TEXT,"
    " problem TEXT, passages INT)",
    "CREATE VIRTUAL TABLE chunks USING fts5"
    " (file, heading, text, tokenize = 'porter unicode61 remove_diacritics 2')",
    # File names and headings say what a text is about: a word counts double there.
    "INSERT INTO chunks (chunks, rank) VALUES ('rank', 'bm25(2, 2, 1)')",
    "CREATE TABLE vectors"
    " (chunk INTEGER PRIMARY KEY, model TEXT, dims INT, code BLOB, vector BLOB)",
    "CREATE INDEX codes ON vectors (model, dims, chunk, code)",
    "CREATE TABLE state (version INT)",  # another one after each change
    "INSERT INTO state VALUES (abs(random() / 2))",
    f"PRAGMA user_version = {VERSION}",
)
Row = tuple[str, str, str]  # of a passage: its file as sources name it, its headings, its text


class Damaged(Exception):
    """The file was damaged and has been removed: what follows works on an empty one."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of a text, and where it stands."""

    file: str  # seen from the folder, with slashes
    heading: str  # "Decisions > Meeting of 12 May", or ""
    text: str

    @property
    def source(self) -> str:
        return f"{self.file}, {self.heading}" if self.heading else self.file

    def __str__(self) -> str:
        return f"{self.source}\n{self.text}"


class Index:
    """The SQLite file `file`; any thread may open it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._removed = 0  # times

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """Open the file, made where it is not there. Raises Damaged, and sqlite3.Error."""
        removed = self._removed
        try:
            with closing(self._connect()) as db:
                prepare(db)
                yield db
                if db.total_changes:  # or closing would do it, and keep everybody out meanwhile
                    db.execute("PRAGMA wal_checkpoint")
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            self._remove(removed, exc)
            raise Damaged from exc

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)

    def _remove(self, removed: int, error: Exception) -> None:
        with self._lock:
            if self._removed > removed:  # by another thread, which met the same damage
                return
            self._removed += 1
            logger.warning("index is damaged, making it anew", extra=fields(error=error))
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{self.file}{suffix}").unlink(missing_ok=True)


def is_damage(error: sqlite3.DatabaseError) -> bool:
    # Without a code it comes from Python, which could not decode a text.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in DAMAGED


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables, unless they are there in this version."""
    db.execute("PRAGMA synchronous = NORMAL")
    if version(db) == VERSION:
        return
    with suppress(sqlite3.OperationalError):  # another process is there first, and does the same
        db.execute("PRAGMA journal_mode = WAL")
    with db:
        db.execute("BEGIN IMMEDIATE")
        if version(db) != VERSION:
            for statement in (*(f"DROP TABLE IF EXISTS {table}" for table in TABLES), *SCHEMA):
                db.execute(statement)


def version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Make one transaction of the block, and roll it back when the block fails."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE state SET version = version + 1")
        yield


def known(db: sqlite3.Connection, *, with_left_out: bool) -> dict[str, str]:
    """Return the stamp of each file by its path."""
    rows = db.execute("SELECT path, stamp FROM files WHERE problem = '' OR ?", [with_left_out])
    return {os.fsdecode(path): stamp for path, stamp in rows}


def counts(db: sqlite3.Connection) -> tuple[int, int, list[tuple[str, str]]]:
    """Return the numbers of files and of passages, and (path, problem) of what was left out."""
    rows = db.execute("SELECT path, problem FROM files WHERE problem <> '' ORDER BY path")
    problems = [(os.fsdecode(path), problem) for path, problem in rows]
    find = "SELECT count(*), coalesce(sum(passages), 0) FROM files WHERE problem = ''"
    return (*db.execute(find).fetchone(), problems)


def put(db: sqlite3.Connection, path: str, stamp: str, problem: str, rows: Sequence[Row]) -> None:
    """Put a file's passages in the place of those that it had."""
    with writing(db):
        drop(db, path)
        add = "INSERT INTO files (path, stamp, problem, passages) VALUES (?, ?, ?, ?)"
        file = db.execute(add, [os.fsencode(path), stamp, problem, len(rows)]).lastrowid or 0
        add = "INSERT INTO chunks (rowid, file, heading, text) VALUES (?, ?, ?, ?)"
        db.executemany(add, ((file * ROOM + n, *row) for n, row in enumerate(rows)))


def forget(db: sqlite3.Connection, paths: Iterable[str]) -> None:
    """Take files and their passages out."""
    with writing(db):
        for path in paths:
            drop(db, path)


def drop(db: sqlite3.Connection, path: str) -> None:
    delete = "DELETE FROM files WHERE path = ? RETURNING id"
    for (file,) in db.execute(delete, [os.fsencode(path)]).fetchall():
        ends = [file * ROOM, (file + 1) * ROOM - 1]
        db.execute("DELETE FROM chunks WHERE rowid BETWEEN ? AND ?", ends)
        db.execute("DELETE FROM vectors WHERE chunk BETWEEN ? AND ?", ends)


def fetch(db: sqlite3.Connection, ids: Iterable[int], most: int) -> list[Passage]:
    """Return the passages of the first `most` ids, of one at least, that are still there."""
    find = "SELECT file, heading, text FROM chunks WHERE rowid = ?"
    rows = (row for item in ids for row in db.execute(find, [item]))
    return [Passage(*row) for row in islice(rows, max(1, most))]


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the fields of a log line in the form that the proxy's log writes them."""
    return {"fields": values}
