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
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from kernel.agent import beginning, index_words

logger = logging.getLogger("plugins.rag")  # this module's own name differs from start to start

PATIENCE = 10.0  # seconds to wait for another thread or process that writes
ROOM = 2**32  # ids of passages for each file
# IOERR is what remains when the file alone was deleted under somebody who was writing.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
# With AUTOINCREMENT no id comes again: a vector that comes late finds no other text.
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE,
  name TEXT, stamp TEXT, guess TEXT, problem TEXT, passages INT);
CREATE TABLE IF NOT EXISTS chunks
  (id INTEGER PRIMARY KEY, path BLOB, name TEXT, heading TEXT, text TEXT, digest BLOB);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5
  (title, text, tokenize = 'porter ascii');
CREATE TABLE IF NOT EXISTS vectors (chunk INTEGER PRIMARY KEY, code BLOB, vector BLOB);
CREATE TABLE IF NOT EXISTS state (version INT);  -- another one after each change
INSERT INTO state SELECT abs(random() / 2) WHERE NOT EXISTS (SELECT 1 FROM state);
COMMIT;
"""
# File names and headings say what a text is about: a word counts double there.
FIND = (
    "SELECT rowid, -rank FROM words WHERE words MATCH ? AND rank MATCH 'bm25(2, 1)' ORDER BY rank"
)
COUNT = "SELECT count(*) FROM words WHERE words MATCH ?"
ROWS = 10_000  # passages to rank, as often as a word is in one: what bounds the time
WORDS = 40  # of a question that are looked up; a pasted text has thousands


class Damaged(Exception):
    """The file was damaged and has been removed: what follows works on an empty one."""


class Passage(NamedTuple):
    """A text, and where it stands."""

    path: bytes
    name: str  # as sources name the file
    heading: str  # "Decisions > Meeting of 12 May", or ""
    text: str
    digest: bytes  # copies have the same

    @property
    def source(self) -> str:
        return f"{self.name}, {self.heading}" if self.heading else self.name


class Index:
    """The SQLite file `file`; any thread may open it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """Open the file, made where it is not there. Raises Damaged, and sqlite3.Error."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            connect = sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)
            with closing(connect) as db:
                prepare(db)
                yield db
                if db.total_changes:  # or closing would do it, and keep everybody out meanwhile
                    db.execute("PRAGMA wal_checkpoint")
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            logger.warning("index is damaged, making it anew", extra=fields(error=exc))
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{self.file}{suffix}").unlink(missing_ok=True)
            raise Damaged from exc


def is_damage(error: sqlite3.DatabaseError) -> bool:
    # Without a code it comes from Python, which could not decode a text.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in DAMAGED


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables, unless they are there."""
    db.execute("PRAGMA synchronous = NORMAL")
    if db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'state'").fetchone()[0]:
        return
    with suppress(sqlite3.OperationalError):  # another process is there first, and does the same
        db.execute("PRAGMA journal_mode = WAL")
    db.executescript(SCHEMA)


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Make one transaction of the block, and roll it back when the block fails."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE state SET version = version + 1")
        yield


def put(
    db: sqlite3.Connection, path: str, file: Sequence[str], rows: Sequence[tuple[str, str]]
) -> None:
    """Put a file's passages, (headings, text), in the place of those that it had.

    `file` is its name, its stamp, the encoding that was guessed, and why it is left out.
    """
    where, title = os.fsencode(path), os.path.splitext(file[0])[0]
    words = [[index_words(f"{title} {heading}"), index_words(text)] for heading, text in rows]
    with writing(db):
        drop(db, path)
        values = [where, *file, len(rows)]
        cursor = db.execute("INSERT INTO files VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)
        for row, passage in enumerate(rows):
            item = (cursor.lastrowid or 0) * ROOM + row
            digest = blake2b(" ".join("\n".join(passage).split()).encode(errors="replace")).digest()
            values = [item, where, file[0], *passage, digest]
            db.execute("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", values)
            db.execute(
                "INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", [item, *words[row]]
            )


def forget(db: sqlite3.Connection, paths: Iterable[str]) -> None:
    """Take files and their passages out."""
    with writing(db):
        for path in paths:
            drop(db, path)


def drop(db: sqlite3.Connection, path: str) -> None:
    delete = "DELETE FROM files WHERE path = ? RETURNING id"
    for (file,) in db.execute(delete, [os.fsencode(path)]).fetchall():
        for table, key in (("chunks", "id"), ("words", "rowid"), ("vectors", "chunk")):
            ends = [file * ROOM, (file + 1) * ROOM - 1]
            db.execute(f"DELETE FROM {table} WHERE {key} BETWEEN ? AND ?", ends)


def fetch(db: sqlite3.Connection, ids: Iterable[int], within: Path | None) -> Iterator[Passage]:
    """Yield the passages that are still there, in one folder if it is given, no text twice."""
    seen: set[bytes] = set()
    for item in ids:
        find = "SELECT path, name, heading, text, digest FROM chunks WHERE id = ?"
        for passage in map(Passage._make, db.execute(find, [item])):
            inside = not within or within in Path(os.fsdecode(passage.path)).parents
            if inside and passage.digest not in seen:
                seen.add(passage.digest)
                yield passage


def by_words(db: sqlite3.Connection, words: Sequence[str], share: float) -> Iterator[int]:
    """Yield the ids of the passages that share words with a question, the best first.

    It ends where a score is less than `share` of the best one's.
    """
    best = 0.0
    for row, score in db.execute(FIND, [query(db, words)]):
        best = best or score
        if score < share * best:
            return
        yield row


def query(db: sqlite3.Connection, words: Sequence[str]) -> str:
    """Return telling words as an FTS5 query: the rarest, one of which must be there.

    They are quoted, so that none is an operator. The empty word finds nothing.
    """
    longest = sorted(words, key=len, reverse=True)[:WORDS]
    counted = sorted(found_as(db, word) for word in longest) or [(0, '""')]
    sums = accumulate(count for count, _ in counted)
    few = [term for (_, term), sum_ in zip(counted, sums, strict=True) if sum_ <= ROWS]
    return " OR ".join(few or [counted[0][1]])


def found_as(db: sqlite3.Connection, word: str) -> tuple[int, str]:
    """Return how many passages have a word, and how to find it.

    A word that is nowhere in this form is looked for by its beginning.
    """
    for term in (f'"{word}"', f'"{beginning(word)}"*'):
        (count,) = db.execute(COUNT, [term]).fetchone()
        if count:
            break
    return count, term


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the fields of a log line in the form that the proxy's log writes them."""
    return {"fields": values}
