"""Notes: those of each user, in one SQLite file that is its owner's alone.

They are found by their words (FTS5, ranked by bm25). Each call opens the file for itself, so that
threads and processes can share it. A damaged file is an error: what somebody wrote is never thrown
away. Downwards: the notes, how the file is opened, how a text becomes a query.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 10.0  # seconds to wait for another process that writes
WORDS = 200  # of a prompt that are looked for; a pasted text has thousands
SCHEMA = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS notes USING fts5 (text, user UNINDEXED, number UNINDEXED,"
    " tokenize = 'porter unicode61 remove_diacritics 2')"
)
ALL = "SELECT number, text FROM notes WHERE user = ? ORDER BY rowid"
# bm25 is smaller for what fits better; of two that fit alike, the newer one comes first.
FIND = (
    "SELECT number, text FROM notes WHERE notes MATCH ? AND user = ?"
    " ORDER BY bm25(notes), rowid DESC LIMIT ?"
)
# These are in every note and in every question. Left out of the list are words that mean something
# in the other language: may, will, war, man, hat.
STOP_WORDS = frozenset(
    "a about an and any are as at be been but by can could did do does for from had has have how i"
    " if in is it its me my of on or our s should so t that the their there they this to us was we"
    " were what when where which who why with would you your"
    " aber als am auf aus bei bin bist da das dem den der des die du ein eine einem einen einer er"
    " es für haben hatte ich ihr im ist kann können mein meine meinem meinen meiner mit nach nicht"
    " noch oder sich sie sind und uns unser unsere vom von wann warum was welche welcher wer wie"
    " wir wird wo wurde zu zum zur über"
    "".split()
)


@dataclass(frozen=True, slots=True)
class Note:
    """One note, and its number among those of its user."""

    number: int
    text: str


class Notes:
    """The notes in `file`. Every method raises sqlite3.Error."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with self._open():  # what is wrong with the file shows here
            pass

    def add(self, user: str, text: str, most: int) -> int | None:
        """Keep a note and return its number; None if the user has `most` already.

        What is noted twice keeps its number.
        """
        text = text.encode("utf-8", "replace").decode()  # half a character is text in JSON
        with self._open() as db, writing(db):
            notes = read(db, ALL, user)
            numbers = {note.text: note.number for note in notes}
            if text in numbers or len(notes) >= most:
                return numbers.get(text)
            number = max(numbers.values(), default=0) + 1
            db.execute("INSERT INTO notes VALUES (?, ?, ?)", [text, user, number])
            return number

    def all(self, user: str) -> list[Note]:
        """Return the notes, the oldest first."""
        with self._open() as db:
            return read(db, ALL, user)

    def find(self, user: str, text: str, most: int) -> list[Note]:
        """Return up to `most` notes that share words with a text, the best first."""
        with self._open() as db:
            return read(db, FIND, query(text), user, most)

    def forget(self, user: str, number: int) -> str | None:
        """Remove a note from the file and return its text; None if there is no such note."""
        with self._open() as db, writing(db):
            text = {note.number: note.text for note in read(db, ALL, user)}.get(number)
            if text is not None:
                db.execute("DELETE FROM notes WHERE user = ? AND number = ?", [user, number])
                db.execute("INSERT INTO notes (notes) VALUES ('optimize')")  # its words, too
            return text

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.file.touch(mode=0o600)  # SQLite gives its other files the mode of this one
        with closing(sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)) as db:
            with suppress(sqlite3.OperationalError):  # another process does the same
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
            db.execute(SCHEMA)
            yield db


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Make one transaction of the block, in which nobody else writes."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


def read(db: sqlite3.Connection, select: str, *values: object) -> list[Note]:
    return [Note(*row) for row in db.execute(select, values)]


def query(text: str) -> str:
    """Return a text as an FTS5 query: its telling words, quoted, so that none is an operator.

    A text without such words becomes the empty word, which finds nothing.
    """
    words = dict.fromkeys(re.findall(r"\w+", unicodedata.normalize("NFC", text).lower()))
    telling = [word for word in words if word not in STOP_WORDS]
    return " OR ".join(f'"{word}"' for word in telling[:WORDS] or [""])
