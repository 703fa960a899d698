"""Index: the chunks of a folder's texts, in one SQLite file that ranks them by words (FTS5, bm25).

Each search first reads what has changed in the folder: a file whose time or size is not the one
that was indexed. One file is one transaction, so that whoever dies in the middle leaves a usable
index. It can be deleted at any time: one that is damaged, or of another version, is made anew.
Downwards: the index, what the folder holds, how a question becomes a query.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import stat
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from .chunks import chunks

logger = logging.getLogger("plugins.rag")  # this module's own name differs from start to start

SUFFIXES = (".md", ".markdown", ".txt")
MAX_SIZE = 2_000_000  # bytes; a larger file is rather a log or a dump than something to read
WORDS = 200  # of a question that are looked for; a pasted text has thousands
PATIENCE = 10.0  # seconds to wait for another process that writes
ROOM = 2**20  # row ids of chunks for each file, more than MAX_SIZE can need
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
VERSION = 1  # of the tables, and of how texts are cut: raise it when either changes
SCHEMA = (
    "DROP TABLE IF EXISTS files",
    "DROP TABLE IF EXISTS chunks",
    "CREATE TABLE files (id INTEGER PRIMARY KEY, path BLOB UNIQUE, mtime_ns INT, size INT)",
    "CREATE VIRTUAL TABLE chunks USING fts5 "
    "(file, heading, text, tokenize = 'porter unicode61 remove_diacritics 2')",
    f"PRAGMA user_version = {VERSION}",
)
# File names and headings say what a text is about: a word counts double there.
SEARCH = (
    "SELECT file, heading, text FROM chunks WHERE chunks MATCH ?"
    " ORDER BY bm25(chunks, 2, 2, 1), file, rowid LIMIT ?"
)
# Left out are words that mean something in the other language: may, will, war, man, hat.
STOP_WORDS = frozenset(
    "a about an and any are as at be been but by can could did do does for from had has have how i"
    " if in is it its me my of on or our s should so t that the their there they this to us was we"
    " were what when where which who why with would you your"
    " aber als am auf aus bei bin bist da das dem den der des die du ein eine einem einen einer er"
    " es für haben hatte ich ihr im ist kann können mit nach nicht noch oder sich sie sind und uns"
    " unser unsere vom von wann warum was welche welcher wer wie wir wird wo wurde zu zum zur über"
    "".split()
)
Stamp = tuple[int, int]  # of a file: its mtime_ns and its size


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of a text, and where it stands."""

    file: str  # seen from the folder, with slashes
    heading: str  # "Decisions > Meeting of 12 May", or ""
    text: str

    @property
    def source(self) -> str:
        return f"{self.file}, {self.heading}" if self.heading else self.file


class Index:
    """The index of `folder`, a resolved path, in the SQLite file `file`."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder = folder
        self.file = file
        self._lock = threading.Lock()  # a second request needs what the first one is reading

    def update(self) -> None:
        """Read what has changed in the folder; raises what `search` raises."""
        self.search("", 0)

    def search(self, question: str, k: int) -> list[Passage]:
        """Return up to `k` passages that share words with the question, the best first.

        Raises FileNotFoundError when the folder is not there, and sqlite3.Error.
        """
        with self._lock:
            try:
                return self._search(question, k)
            except sqlite3.DatabaseError as exc:
                if not is_damage(exc):
                    raise
                logger.warning("index is damaged, making it anew", extra=fields(error=exc))
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{self.file}{suffix}").unlink(missing_ok=True)
            return self._search(question, k)

    def _search(self, question: str, k: int) -> list[Passage]:
        connection = sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)
        with closing(connection) as db:
            prepare(db)
            update(db, self.folder)
            return [Passage(*row) for row in db.execute(SEARCH, [query(question), k])]


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
            for statement in SCHEMA:
                db.execute(statement)


def version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def update(db: sqlite3.Connection, folder: Path) -> None:
    """Make the index say what the folder says."""
    rows = db.execute("SELECT path, mtime_ns, size FROM files").fetchall()
    known = {os.fsdecode(path): (mtime, size) for path, mtime, size in rows}
    found = dict(texts(folder))
    for path in known.keys() - found.keys():
        with db:
            db.execute("BEGIN IMMEDIATE")
            forget(db, path)
    for path, stamp in found.items():
        if known.get(path) != stamp:
            read(db, folder, path, stamp)


def read(db: sqlite3.Connection, folder: Path, path: str, stamp: Stamp) -> None:
    """Put one file into the index, in place of what it was.

    A file that is too large is remembered without chunks, and so named in the log once; one that
    cannot be read is not, because a change of its permissions does not change its stamp.
    """
    name = os.fsencode(Path(path).relative_to(folder).as_posix()).decode("utf-8", "replace")
    text = ""
    if stamp[1] > MAX_SIZE:
        logger.warning("file is too large", extra=fields(file=name, bytes=stamp[1], most=MAX_SIZE))
    else:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig", "replace")
        except OSError as exc:
            logger.warning("file cannot be read", extra=fields(file=name, error=exc.strerror))
            return
    with db:
        db.execute("BEGIN IMMEDIATE")
        forget(db, path)
        add = "INSERT INTO files (path, mtime_ns, size) VALUES (?, ?, ?)"
        first = (db.execute(add, [os.fsencode(path), *stamp]).lastrowid or 0) * ROOM
        rows = ((first + n, name, *chunk) for n, chunk in enumerate(chunks(text, name)))
        db.executemany("INSERT INTO chunks (rowid, file, heading, text) VALUES (?, ?, ?, ?)", rows)


def forget(db: sqlite3.Connection, path: str) -> None:
    for (row,) in db.execute("SELECT id FROM files WHERE path = ?", [os.fsencode(path)]).fetchall():
        ends = [row * ROOM, (row + 1) * ROOM - 1]
        db.execute("DELETE FROM chunks WHERE rowid BETWEEN ? AND ?", ends)
        db.execute("DELETE FROM files WHERE id = ?", [row])


def texts(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """Yield the path and the stamp of each text; hidden files and folders are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"settings: folder: there is no folder {folder}")
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = os.path.join(parent, name)
                with suppress(OSError):  # deleted since, or a link to nowhere
                    entry = os.stat(path)
                    if stat.S_ISREG(entry.st_mode) and inside(folder, path):
                        yield path, (entry.st_mtime_ns, entry.st_size)


def inside(folder: Path, path: str) -> bool:
    """Say whether a file is in the folder, and not only a link to one elsewhere."""
    return not os.path.islink(path) or Path(os.path.realpath(path)).is_relative_to(folder)


def query(question: str) -> str:
    """Return the question as an FTS5 query: its words, quoted, so that none is an operator.

    A question without words becomes the empty word, which finds nothing.
    """
    words = dict.fromkeys(re.findall(r"\w+", unicodedata.normalize("NFC", question).lower()))
    telling = [word for word in words if word not in STOP_WORDS] or list(words)
    return " OR ".join(f'"{word}"' for word in telling[:WORDS] or [""])


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the fields of a log line in the form that the proxy's log writes them."""
    return {"fields": values}
