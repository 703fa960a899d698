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
from dataclasses import dataclass
from heapq import nsmallest
from operator import mul

from kernel.agent import Context

from .index import Index, Passage, fields, logger, writing

LACKING = 0.1  # of all passages may have no vector; with more, chance decides what is found
NEAR = 100  # vectors that are multiplied
TRIES = 3  # batches in a row that may fail
PATIENCE = 5.0  # seconds that a question waits for the vectors of the last few passages

PASSAGES = "(SELECT coalesce(sum(passages), 0) FROM files)"
STATE = f"SELECT version, {PASSAGES} FROM state"
HAVE = f"SELECT count(*), {PASSAGES} FROM vectors WHERE model = ? AND dims = ?"
USUAL = "SELECT dims FROM vectors WHERE model = ? GROUP BY dims ORDER BY count(*) DESC LIMIT 1"
CODES = "SELECT chunk, code FROM vectors WHERE model = ? AND dims = ?"
VECTOR = "SELECT vector FROM vectors WHERE chunk = ? AND model = ? AND dims = ?"
ADD = "INSERT OR REPLACE INTO vectors SELECT ?, ?, ?, ?, ? FROM chunks WHERE rowid = ?"
WITHOUT = (
    "SELECT rowid, file, heading, text FROM chunks WHERE rowid > ? AND NOT EXISTS (SELECT 1 FROM"
    " vectors WHERE chunk = chunks.rowid AND model = ? AND dims = ?) ORDER BY rowid LIMIT ?"
)


@dataclass(frozen=True, slots=True)
class Codes:
    """What one version of the index has of the vectors of `dims` numbers."""

    version: int = -1
    dims: int = 0
    passages: int = 0  # with and without a vector
    ids: Sequence[int] = ()
    codes: Sequence[int] = ()

    @property
    def missing(self) -> int:
        return self.passages - len(self.ids)

    @property
    def enough(self) -> bool:
        return bool(self.ids) and self.missing <= self.passages * LACKING


class Vectors:
    """The vectors of `model`, "" for none, which is asked for `batch` at a time.

    `report` is told how many there are.
    """

    def __init__(self, index: Index, model: str, batch: int, report: Callable[[str], None]) -> None:
        self.index = index
        self.model = model
        self.batch = batch
        self.report = report
        self._codes = Codes()
        self._dims = 0  # numbers in a vector, as the model answered last
        self._task: asyncio.Task[None] | None = None

    async def of_question(self, context: Context, question: str) -> array[float] | None:
        """Return the question's vector, or None where words alone must do."""
        if not self.model:
            return None
        codes = await asyncio.to_thread(self.load)
        if codes.missing:
            task = self.begin(context)
            if codes.missing <= self.batch:
                await asyncio.wait({task}, timeout=PATIENCE)
                codes = await asyncio.to_thread(self.load)
        if not codes.enough:
            return None
        try:
            (vector,) = await self._embed(context, [question])
        except Exception as exc:  # whatever the model did: the words are still there
            context.log.warning("question has no vector: %s", exc)
            return None
        return vector

    def near(self, db: sqlite3.Connection, vector: array[float], most: int) -> list[int]:
        """Return the ids of up to `most` passages, the nearest first."""
        codes, own = self._codes, code(vector)
        differ = [(own ^ other).bit_count() for other in codes.codes]
        scores = {}
        for place in nsmallest(NEAR, range(len(differ)), key=differ.__getitem__):
            for (data,) in db.execute(VECTOR, [codes.ids[place], self.model, len(vector)]):
                scores[codes.ids[place]] = sum(map(mul, vector, array("f", data)))
        return sorted(scores, key=scores.__getitem__, reverse=True)[:most]

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
        try:
            while failed < TRIES and (rows := await asyncio.to_thread(self._without, last)):
                last = rows[-1][0]
                failed = 0 if await self._fill_in(context, rows) else failed + 1
        except Exception as exc:  # a background task: the next question begins it anew
            logger.warning("vectors cannot be stored", extra=fields(error=exc))

    async def _fill_in(self, context: Context, rows: Sequence[tuple[int, str]]) -> bool:
        """Embed one batch and keep its vectors; tell whether the model did its part."""
        try:
            vectors = await self._embed(context, [text for _, text in rows])
        except Exception as exc:  # whatever the model did: the next question asks again
            logger.warning("passages have no vectors", extra=fields(model=self.model, error=exc))
            self.report("passages get no vectors, the log says why")
            return False
        await asyncio.to_thread(self.store, [row for row, _ in rows], vectors)
        return True

    async def _embed(self, context: Context, texts: list[str]) -> list[array[float]]:
        """Return one vector for each text. Raises what `context.embed` raises, and ValueError."""
        vectors = [normalised(vector) for vector in await context.embed(texts, self.model)]
        lengths = {len(vector) for vector in vectors}
        if len(vectors) != len(texts) or len(lengths) != 1:
            raise ValueError(f"{len(vectors)} vectors of {lengths} numbers for {len(texts)} texts")
        self._dims = lengths.pop()
        return vectors

    def load(self) -> Codes:
        """Return what is stored, read anew where something has changed."""
        with self.index.open() as db:
            ((version, passages),) = db.execute(STATE)
            self._dims = self._dims or next((n for (n,) in db.execute(USUAL, [self.model])), 0)
            if (self._codes.version, self._codes.dims) != (version, self._dims):
                rows = db.execute(CODES, [self.model, self._dims]).fetchall()
                ids, codes = [row for row, _ in rows], [int.from_bytes(data) for _, data in rows]
                self._codes = Codes(version, self._dims, passages, ids, codes)
                self._tell(len(ids), passages)
        return self._codes

    def _without(self, last: int) -> list[tuple[int, str]]:
        """Return id and text of the next passages that have no vector."""
        with self.index.open() as db:
            rows = db.execute(WITHOUT, [last, self.model, self._dims, self.batch])
            return [(row, str(Passage(*passage))) for row, *passage in rows]

    def store(self, ids: Sequence[int], vectors: Sequence[array[float]]) -> None:
        with self.index.open() as db:
            with writing(db):
                for chunk, vector in zip(ids, vectors, strict=True):
                    bits = code(vector).to_bytes((len(vector) + 7) // 8)
                    row = [chunk, self.model, len(vector), bits, vector.tobytes()]
                    db.execute(ADD, [*row, chunk])
            ((have, passages),) = db.execute(HAVE, [self.model, self._dims])
        self._tell(have, passages)

    def _tell(self, have: int, passages: int) -> None:
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
