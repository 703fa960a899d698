"""Vectors: what passages mean, as an embedding model sees it, and which are near a question.

Only a request reaches the model. So it is a question that begins the work: a task, which outlives
it, embeds what has no vector yet. Until that is done, and whenever the model fails, passages are
found by their words alone. Downwards: a question, the task, what is stored, arithmetic.

20,000 vectors are too many to multiply in Python. So each has a code with one bit for each number;
codes are held in memory, and only where they differ least from the question's is the rest read.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from array import array
from collections.abc import Sequence
from heapq import nsmallest
from operator import mul
from pathlib import Path

from kernel.agent import Context

from .index import logger, opened, writing

LACKING = 0.1  # of all passages may have no vector; with more, chance decides what is found
NEAR = 100  # vectors that are multiplied
PATIENCE = 5.0  # seconds that a question waits for the vectors of the last few passages

COUNT = (
    "SELECT coalesce(sum(passages), 0), (SELECT count(*) FROM vectors),"
    " (SELECT length(vector) FROM vectors LIMIT 1), (SELECT max(passage) FROM vectors) FROM files"
)
ADD = "INSERT OR REPLACE INTO vectors SELECT id, ?, ? FROM passages WHERE id = ?"
WITHOUT = (
    "SELECT id, name || ', ' || heading || char(10) || text FROM passages WHERE id > ?"
    " AND NOT EXISTS (SELECT 1 FROM vectors WHERE passage = id) ORDER BY id LIMIT ?"
)
FIND = "SELECT vector FROM vectors WHERE passage = ?"


class Vectors:
    """The vectors of `model`, "" for none, which is asked for `batch` at a time."""

    def __init__(self, file: Path, model: str, batch: int) -> None:
        self.file, self.model, self.batch = file, model, batch
        self.state = ""  # how many vectors there are, for a person to read
        self._codes = dict[int, int]()  # by the ids of passages
        self._known = (0, 0)  # how many vectors there were, and the newest
        self._last = 0  # the last passage that was sent to the model
        self._task: asyncio.Task[None] | None = None

    async def of_question(self, context: Context, question: str) -> array[float] | None:
        """Return the question's vector, or None where words alone must do."""
        if not self.model:
            return None
        passages, have, size = await asyncio.to_thread(self.count)
        if have < passages:
            task = self.begin(context)
            await asyncio.wait({task}, timeout=PATIENCE if passages - have <= self.batch else 0)
            passages, have, size = await asyncio.to_thread(self.count)
        if not size or passages - have > passages * LACKING:
            return None
        try:
            (vector,) = await self._embed(context, [question])
        except Exception as exc:  # whatever the model did: the words are still there
            context.log.warning("question has no vector: %s", type(exc).__name__)
            return None
        if size == 4 * len(vector):
            return vector
        await asyncio.to_thread(self._clear)  # the model has changed
        return None

    def near(self, db: sqlite3.Connection, vector: array[float]) -> list[int]:
        """Return the ids of the nearest passages, the nearest first."""
        codes = self._codes  # another thread may empty it meanwhile
        if not codes:
            rows = db.execute("SELECT passage, code FROM vectors")
            codes = self._codes = {passage: int.from_bytes(data) for passage, data in rows}
        own, scores = int.from_bytes(code(vector)), dict[int, float]()
        for passage in nsmallest(NEAR, codes, key=lambda it: (own ^ codes[it]).bit_count()):
            for (data,) in db.execute(FIND, [passage]):
                scores[passage] = sum(map(mul, vector, array("f", data)))
        return sorted(scores, key=scores.__getitem__, reverse=True)

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})

    def begin(self, context: Context) -> asyncio.Task[None]:
        """Go on with the vectors that are missing, and return the task that does it."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._fill(context))
        return self._task

    async def _fill(self, context: Context) -> None:
        """Embed what has no vector until a batch fails: the next question goes on behind it."""
        while rows := await asyncio.to_thread(self._without):
            ids, texts = zip(*rows, strict=True)
            self._last = ids[-1]
            try:
                await asyncio.to_thread(self.store, ids, await self._embed(context, list(texts)))
            except Exception as exc:  # a background task
                logger.warning("passages have no vectors: %s: %s", type(exc).__name__, exc)
                return

    async def _embed(self, context: Context, texts: list[str]) -> list[array[float]]:
        """Return one vector for each text. Raises what `context.embed` raises, and ValueError."""
        vectors = [normalised(vector) for vector in await context.embed(texts, self.model)]
        if len(set(map(len, vectors))) != 1:
            raise ValueError("no vectors, or of several lengths")
        return vectors

    def count(self) -> tuple[int, int, int | None]:
        """Return how many passages there are, how many have a vector, and the bytes of one."""
        with opened(self.file) as db:
            passages, have, size, newest = db.execute(COUNT).fetchone()
        if (have, newest) != self._known:
            self._known, self._codes = (have, newest), {}  # near() reads them anew
        self.state = f"{have} of {passages} passages have vectors"
        return passages, have, size

    def _without(self) -> list[tuple[int, str]]:
        """Return id and text of the next passages that have no vector, again from the first one."""
        with opened(self.file) as db:
            after = db.execute(WITHOUT, [self._last, self.batch]).fetchall()
            return after or db.execute(WITHOUT, [0, self.batch]).fetchall()

    def _clear(self) -> None:
        with opened(self.file) as db, writing(db):
            db.execute("DELETE FROM vectors")

    def store(self, ids: Sequence[int], vectors: Sequence[array[float]]) -> None:
        rows = [(code(v), v.tobytes(), passage) for passage, v in zip(ids, vectors, strict=True)]
        with opened(self.file) as db, writing(db):
            db.executemany(ADD, rows)
        self.count()


def normalised(vector: Sequence[float]) -> array[float]:
    """Return a vector of the same direction and the length 1. Raises ValueError, TypeError."""
    length = math.hypot(*vector)
    if not vector or not length < math.inf:
        raise ValueError(f"a vector of {len(vector)} numbers and the length {length}")
    return array("f", [value / (length or 1.0) for value in vector])


def code(vector: array[float]) -> bytes:
    """Return one bit for each number: whether it is above their mean."""
    mean = sum(vector) / len(vector)
    bits = int("".join("1" if value > mean else "0" for value in vector), 2)
    return bits.to_bytes((len(vector) + 7) // 8)
