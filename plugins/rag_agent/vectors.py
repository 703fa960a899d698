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
from collections.abc import Callable, Sequence
from heapq import nsmallest
from operator import mul

from kernel.agent import Context

from .index import Index, fields, logger, writing

LACKING = 0.1  # of all passages may have no vector; with more, chance decides what is found
NEAR = 100  # vectors that are multiplied
TRIES = 3  # batches in a row that may fail
PATIENCE = 5.0  # seconds that a question waits for the vectors of the last few passages

PASSAGES = "(SELECT coalesce(sum(passages), 0) FROM files)"
STATE = f"SELECT version, {PASSAGES}, (SELECT length(vector) FROM vectors LIMIT 1) FROM state"
ADD = "INSERT OR REPLACE INTO vectors SELECT ?, ?, ? FROM chunks WHERE id = ?"
WITHOUT = (
    "SELECT id, name || ', ' || heading || char(10) || text FROM chunks WHERE id > ?"
    " AND NOT EXISTS (SELECT 1 FROM vectors WHERE chunk = id) ORDER BY id LIMIT ?"
)


class Vectors:
    """The vectors of `model`, "" for none, which is asked for `batch` at a time.

    `report` is told how many vectors there are.
    """

    def __init__(self, index: Index, model: str, batch: int, report: Callable[[str], None]) -> None:
        self.index, self.model, self.batch, self.report = index, model, batch, report
        self._state, self._coded = (-1, 0, None), (list[int](), list[int]())  # ids and their codes
        self._task: asyncio.Task[None] | None = None

    async def of_question(self, context: Context, question: str) -> array[float] | None:
        """Return the question's vector, or None where words alone must do."""
        if not self.model:
            return None
        missing = await asyncio.to_thread(self.load)
        if missing:
            task = self.begin(context)
            if missing <= self.batch:
                await asyncio.wait({task}, timeout=PATIENCE)
                missing = await asyncio.to_thread(self.load)
        _, passages, size = self._state
        if size is None or missing > passages * LACKING:
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
        (ids, codes), own, scores = self._coded, code(vector), {}
        differ = [(own ^ other).bit_count() for other in codes]
        for place in nsmallest(NEAR, range(len(differ)), key=differ.__getitem__):
            find = "SELECT vector FROM vectors WHERE chunk = ?"
            for (data,) in db.execute(find, [ids[place]]):
                scores[ids[place]] = sum(map(mul, vector, array("f", data)))
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
        """Embed what has no vector; a batch that fails is left to the next question."""
        last = failed = 0
        while failed < TRIES and (rows := await asyncio.to_thread(self._without, last)):
            ids, texts = zip(*rows, strict=True)
            last = ids[-1]
            try:
                vectors = await self._embed(context, list(texts))
                await asyncio.to_thread(self.store, ids, vectors)
                failed = 0
            except Exception as exc:  # a background task: the next question goes on
                failed += 1
                facts = fields(model=self.model, error=f"{type(exc).__name__}: {exc}")
                logger.warning("passages have no vectors", extra=facts)
                self.report("passages get no vectors, the log says why")

    async def _embed(self, context: Context, texts: list[str]) -> list[array[float]]:
        """Return one vector for each text. Raises what `context.embed` raises, and ValueError."""
        vectors = [normalised(vector) for vector in await context.embed(texts, self.model)]
        if len(vectors) != len(texts) or len(set(map(len, vectors))) != 1:
            raise ValueError(
                f"{len(vectors)} vectors for {len(texts)} texts, or of several lengths"
            )
        return vectors

    def load(self) -> int:
        """Read what is stored, where it has changed; return how many passages have no vector."""
        with self.index.open() as db:
            state = db.execute(STATE).fetchone()
            if state != self._state:
                rows = db.execute("SELECT chunk, code FROM vectors").fetchall()
                codes = [int.from_bytes(data) for _, data in rows]
                self._state, self._coded = state, ([row for row, _ in rows], codes)
                self.report(f"{len(rows)} of {state[1]} passages have vectors")
        return int(self._state[1]) - len(self._coded[0])

    def _without(self, last: int) -> list[tuple[int, str]]:
        """Return id and text of the next passages that have no vector."""
        with self.index.open() as db:
            return db.execute(WITHOUT, [last, self.batch]).fetchall()

    def _clear(self) -> None:
        with self.index.open() as db, writing(db):
            db.execute("DELETE FROM vectors")

    def store(self, ids: Sequence[int], vectors: Sequence[array[float]]) -> None:
        with self.index.open() as db, writing(db):
            for chunk, vector in zip(ids, vectors, strict=True):
                bits = code(vector).to_bytes((len(vector) + 7) // 8)
                db.execute(ADD, [chunk, bits, vector.tobytes(), chunk])
            ((have, passages),) = db.execute(f"SELECT count(*), {PASSAGES} FROM vectors")
        self.report(f"{have} of {passages} passages have vectors")


def normalised(vector: Sequence[float]) -> array[float]:
    """Return a vector of the same direction and the length 1. Raises ValueError, TypeError."""
    length = math.hypot(*vector)
    if not vector or not length < math.inf:
        raise ValueError(f"a vector of {len(vector)} numbers and the length {length}")
    return array("f", [value / (length or 1.0) for value in vector])


def code(vector: array[float]) -> int:
    """Return one bit for each number: whether it is above their mean."""
    mean = sum(vector) / len(vector)
    return int("".join("1" if value > mean else "0" for value in vector), 2)
