"""Index: the passages of files, their words and their vectors, in one SQLite file.

Every transaction leaves it whole: one file's passages, or one batch of vectors; a process that is
killed loses that one. It can be deleted at any time: a file that is damaged is removed and made
anew. Downwards: the file, what is written into it, and how passages are found by their words.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from kernel.agent import beginning, index_words

logger = logging.getLogger("plugins.rag")  # this module's own name differs from start to start

PATIENCE = 10.0  # seconds to wait for another thread or process that writes
# IOERR is what remains when the file alone was deleted under somebody who was writing.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
# The id of a passage is that of its file and, in the lower 32 bits, its number there. With
# AUTOINCREMENT no id comes again: a vector that comes late finds no other text.
SCHEMA = """
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE,
  name TEXT, stamp TEXT, guess TEXT, problem TEXT, passages INT);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5
  (title, body, heading UNINDEXED, text UNINDEXED, tokenize = 'porter ascii');
CREATE TABLE IF NOT EXISTS vectors (passage INTEGER PRIMARY KEY, code BLOB, vector BLOB);
CREATE INDEX IF NOT EXISTS codes ON vectors (code);  -- to read them without the vectors
CREATE TRIGGER IF NOT EXISTS forget AFTER DELETE ON files BEGIN
  DELETE FROM words WHERE rowid BETWEEN old.id << 32 AND (old.id + 1 << 32) - 1;
  DELETE FROM vectors WHERE passage BETWEEN old.id << 32 AND (old.id + 1 << 32) - 1;
END;
CREATE VIEW IF NOT EXISTS passages AS SELECT words.rowid AS id, path, name, heading, text
  FROM words CROSS JOIN files ON files.id = words.rowid >> 32;
"""
# File names and headings say what a text is about: a word counts double there.
FIND = "SELECT rowid FROM words WHERE words MATCH ? AND rank MATCH 'bm25(2, 1)' ORDER BY rank"
COUNT = "SELECT count(*) FROM words WHERE words MATCH ?"
ROWS = 5_000  # passages to rank, as often as a word is in one: what bounds the time
WORDS = 40  # of a question that are looked up; a pasted text has thousands


class Damaged(Exception):
    """The file was damaged and has been removed: what follows works on an empty one."""


class Passage(NamedTuple):
    """A text, and where it stands."""

    path: bytes
    name: str  # as sources name the file
    heading: str  # "Decisions > Meeting of 12 May", or ""
    text: str

    @property
    def source(self) -> str:
        return f"{self.name}, {self.heading}" if self.heading else self.name


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    """Open an index, made where it is not there. Raises Damaged, and sqlite3.Error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as db:
            with suppress(sqlite3.OperationalError):  # another process is there first
                db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)
            yield db
    except sqlite3.DatabaseError as exc:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in DAMAGED:
            raise
        logger.warning("index is damaged, making it anew: %s", exc)
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        raise Damaged from exc


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Make one transaction of the block."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


def put(db: sqlite3.Connection, file: Sequence[object], rows: Sequence[tuple[str, str]]) -> None:
    """Put a file's passages, (headings, text), in the place of those that it had.

    `file` is its path in bytes, its name, its stamp, the encoding that was guessed, and why it is
    left out.
    """
    title = os.path.splitext(str(file[1]))[0]
    found = [(index_words(f"{title} {row[0]}"), index_words(row[1]), *row) for row in rows]
    with writing(db):
        db.execute("DELETE FROM files WHERE path = ?", file[:1])
        values = [None, *file, len(rows)]
        number = db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values).lastrowid or 0
        add = "INSERT INTO words (rowid, title, body, heading, text) VALUES (?, ?, ?, ?, ?)"
        db.executemany(add, [(item, *row) for item, row in enumerate(found, number << 32)])


def fetch(
    db: sqlite3.Connection, ids: Iterable[int], within: Path | None, most: int
) -> dict[str, Passage]:
    """Return the first passages that are still there, `most` at most, by their text: no copies.

    Where `within` is given, they are those of one folder.
    """
    found: dict[str, Passage] = {}
    for item in ids:
        find = "SELECT path, name, heading, text FROM passages WHERE id = ?"
        for passage in map(Passage._make, db.execute(find, [item])):
            if not within or within in Path(os.fsdecode(passage.path)).parents:
                found.setdefault(" ".join(f"{passage.heading} {passage.text}".split()), passage)
        if len(found) == most:
            break
    return found


def by_words(db: sqlite3.Connection, words: Sequence[str]) -> Iterator[int]:
    """Yield the ids of the passages that hold one of the rarest of some words, the best first.

    Words are quoted, so that none is an operator. The empty word finds nothing.
    """
    longest = sorted(words, key=len, reverse=True)[:WORDS] or [""]
    counted = sorted(found_as(db, word) for word in longest)
    sums = accumulate(count for count, _ in counted)
    few = [term for (_, term), total in zip(counted, sums, strict=True) if total <= ROWS]
    for (item,) in db.execute(FIND, [" OR ".join(few or [counted[0][1]])]):
        yield item


def found_as(db: sqlite3.Connection, word: str) -> tuple[int, str]:
    """Return how many passages have a word, and how to find it.

    A word that is nowhere in this form is looked for by its beginning.
    """
    for term in (f'"{word}"', f'"{beginning(word)}"*'):
        (count,) = db.execute(COUNT, [term]).fetchone()
        if count:
            break
    return count, term
