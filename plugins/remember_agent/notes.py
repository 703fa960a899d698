"""Notes: those of each user, in one SQLite file that is its owner's alone.

They are found by their words (FTS5, ranked by bm25). Each call opens the file for itself, so that
threads and processes can share it, and makes it where it is gone. A damaged file is an error: what
somebody wrote is never thrown away. A number is never used again: a forgotten note leaves its row.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from kernel.agent import beginning, index_words, telling_words

PATIENCE = 10.0  # seconds to wait for another process
WORDS = 200  # of a prompt that are looked for; a pasted text has thousands
SCHEMA = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS kept USING fts5 (words, text UNINDEXED, user UNINDEXED,"
    " number UNINDEXED, tokenize = 'porter ascii')"
)
ALL = "SELECT number, text FROM kept WHERE user = ? ORDER BY rowid"
# bm25 is smaller for what fits better; of two that fit alike, the newer one comes first.
FIND = (
    "SELECT number, text FROM kept WHERE kept MATCH ? AND user = ?"
    " ORDER BY bm25(kept), rowid DESC LIMIT ?"
)


class Note(NamedTuple):
    """One note, and its number among those of its user; a forgotten one has no text."""

    number: int
    text: str


class Notes:
    """The notes in `file`. Every method raises sqlite3.Error."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.all("")  # what is wrong with the file shows here
        except sqlite3.DatabaseError as exc:
            cure = "put a copy in its place, or move it away to begin without notes"
            raise type(exc)(f"{file}: {exc}; {cure}") from exc

    def add(self, user: str, text: str, most: int) -> tuple[int, bool]:
        """Keep a note; return its number, and whether it is new.

        What is noted twice keeps its number; it is 0 if the user has `most` notes already.
        """
        text = text.encode("utf-8", "replace").decode()  # half a character is text in JSON
        with self._open() as db:
            notes = read(db, ALL, user)
            numbers = {note.text: note.number for note in notes if note.text}
            if text in numbers or len(numbers) >= most or not text:
                return numbers.get(text, 0), False
            number = max((note.number for note in notes), default=0) + 1
            db.execute(
                "INSERT INTO kept VALUES (?, ?, ?, ?)", [index_words(text), text, user, number]
            )
            return number, True

    def all(self, user: str) -> list[Note]:
        """Return the notes, the oldest first."""
        with self._open() as db:
            return [note for note in read(db, ALL, user) if note.text]

    def find(self, user: str, text: str, most: int) -> list[Note]:
        """Return up to `most` notes that share words with a text, the best first.

        Where none does, those that share a word's beginning.
        """
        words = telling_words(text)[:WORDS] or [""]  # which finds nothing
        exact = " OR ".join(f'"{word}"' for word in words)
        alike = " OR ".join(f'"{beginning(word)}"*' for word in words)
        with self._open() as db:
            return read(db, FIND, exact, user, most) or read(db, FIND, alike, user, most)

    def forget(self, user: str, number: int) -> str:
        """Take a note's text out of the file and return it; "" if there is no such note."""
        with self._open() as db:
            text = dict(read(db, ALL, user)).get(number, "")
            if text:
                clear = "UPDATE kept SET words = '', text = '' WHERE user = ? AND number = ?"
                db.execute(clear, [user, number])
                db.execute("INSERT INTO kept (kept) VALUES ('optimize')")  # its words, too
            return text

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, in which nobody else reads or writes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch(mode=0o600)  # SQLite gives its other files the mode of this one
        with closing(sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)) as db, db:
            db.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
            db.execute("BEGIN IMMEDIATE")
            db.execute(SCHEMA)
            yield db


def read(db: sqlite3.Connection, select: str, *values: object) -> list[Note]:
    return [Note(*row) for row in db.execute(select, values)]
