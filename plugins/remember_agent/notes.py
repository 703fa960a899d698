"""Notes: those of each user, in the agent's store.

They are found by their words (SQLite's FTS5, ranked by bm25), in whichever database they are: those
of one user, a few hundred, are indexed in memory as they are searched. So results and order are the
same everywhere, and depend on no other user's notes. A number is never used again: a forgotten note
leaves its row.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from kernel.agent import Schema, Store, beginning, index_words, telling_words

WORDS = 200  # of a prompt that are looked for; a pasted text has thousands
SCHEMA = Schema(
    file="notes.db",
    # Files from before there were stores have this table, and older proxies search in it.
    sqlite=[
        "CREATE VIRTUAL TABLE IF NOT EXISTS kept USING fts5 (words, text UNINDEXED,"
        " user UNINDEXED, number UNINDEXED, tokenize = 'porter ascii')"
    ],
    postgresql=[
        'CREATE TABLE kept (words TEXT, text TEXT, "user" TEXT, number INTEGER,'
        ' PRIMARY KEY ("user", number))'
    ],
)
ALL = 'SELECT number, text, words FROM kept WHERE "user" = $1 ORDER BY number'
ADD = 'INSERT INTO kept (words, text, "user", number) VALUES ($1, $2, $3, $4)'
CLEAR = "UPDATE kept SET words = '', text = '' WHERE \"user\" = $1 AND number = $2"
INDEX = "CREATE VIRTUAL TABLE notes USING fts5 (words, tokenize = 'porter ascii')"
# bm25 is smaller for what fits better; of two that fit alike, the newer one comes first.
FIND = "SELECT rowid FROM notes WHERE notes MATCH ? ORDER BY bm25(notes), rowid DESC LIMIT ?"


class Note(NamedTuple):
    """One note, and its number among those of its user; a forgotten one has no text."""

    number: int
    text: str
    words: str = ""


class Notes:
    """The notes in a store. Every method raises StoreError."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def add(self, user: str, text: str, most: int) -> tuple[int, bool]:
        """Keep a note; return its number, and whether it is new.

        What is noted twice keeps its number; it is 0 if the user has `most` notes already.
        """
        async with self.store.transaction(lock=user) as db:
            notes = [Note(*row) for row in await db.execute(ALL, user)]
            numbers = {note.text: note.number for note in notes if note.text}
            if text in numbers or len(numbers) >= most or not text:
                return numbers.get(text, 0), False
            number = notes[-1].number + 1 if notes else 1
            await db.execute(ADD, index_words(text), text, user, number)
            return number, True

    async def all(self, user: str) -> list[Note]:
        """Return the notes, the oldest first."""
        return [Note(*row) for row in await self.store.execute(ALL, user) if row[1]]

    async def find(self, user: str, text: str, most: int) -> list[Note]:
        """Return up to `most` notes that share words with a text, the best first.

        Where none does, those that share a word's beginning.
        """
        notes = await self.all(user)
        words = telling_words(text)[:WORDS] or [""]  # which finds nothing
        return await asyncio.to_thread(best, notes, words, most)

    async def forget(self, user: str, number: int) -> str:
        """Take a note's text out of the store and return it; "" if there is no such note."""
        async with self.store.transaction(lock=user) as db:
            notes = [Note(*row) for row in await db.execute(ALL, user)]
            if text := {note.number: note.text for note in notes}.get(number, ""):
                await db.execute(CLEAR, user, number)
                if self.store.engine == "sqlite":
                    await db.execute("INSERT INTO kept (kept) VALUES ('optimize')")  # its words
            return text


def best(notes: Sequence[Note], words: Sequence[str], most: int) -> list[Note]:
    """Return the notes that hold some of the words, or else words that begin alike."""
    by_number = {note.number: note for note in notes}
    exact = " OR ".join(f'"{word}"' for word in words)
    alike = " OR ".join(f'"{beginning(word)}"*' for word in words)
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(INDEX)
        rows = [(note.number, note.words) for note in notes]
        db.executemany("INSERT INTO notes (rowid, words) VALUES (?, ?)", rows)
        found = db.execute(FIND, [exact, most]).fetchall() or db.execute(FIND, [alike, most])
        return [by_number[number] for (number,) in found]
