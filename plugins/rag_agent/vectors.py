"""Vectors: what passages mean, as an embedding model sees it, and which are near a question.

Only a request reaches the model. So it is a question that begins the work: a task, which outlives
it, embeds what has no vector yet. Until that is done, and whenever the model fails, passages are
found by their words alone. Downwards: a question, the task, what is stored, arithmetic.

20,000 vectors are too many to multiply in Python. So each has a code with one bit for each number,
and only where codes differ least from the question's is the rest read. SQLite's are compared here,
in memory; PostgreSQL compares its own, with an index (HNSW) where it has the extension pgvector.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from heapq import nsmallest
from operator import mul

from kernel.agent import Context, StoreError

from .index import Execute, Index, Taken, logger, places

LACKING = 0.1  # of all passages may have no vector; with more, chance decides what is found
NEAR = 100  # vectors that are multiplied
STOP = 3.0  # seconds to wait for what is being written
PATIENCE = 5.0  # seconds that a question waits for the vectors of the last few passages

COUNT = (
    "SELECT coalesce(sum(passages), 0), (SELECT count(*) FROM vectors~),"
    " (SELECT length(vector) FROM vectors~ LIMIT 1) FROM files~"
)
ADD = "INSERT INTO vectors~ SELECT id, {}, $2 FROM passages~ WHERE id = $3 ON CONFLICT DO NOTHING"
WITHOUT = (
    "SELECT id, name, heading, text FROM passages~ WHERE id > $1"
    " AND NOT EXISTS (SELECT 1 FROM vectors~ WHERE passage = id) ORDER BY id LIMIT $2"
)
FIND = "SELECT passage, vector FROM vectors~ WHERE passage IN "
BEST = "SELECT passage, vector FROM vectors~ ORDER BY {} LIMIT $2"
BY_INDEX = BEST.format("code::bit({0}) <~> $1::bit({0})")
ONE_BY_ONE = BEST.format("bit_count(code # $1::varbit)")
PLANNING = f"SET LOCAL enable_seqscan TO on; SET LOCAL hnsw.ef_search TO {2 * NEAR}"
HAS_INDEX = "SELECT to_regclass($1)::text"
EXTENSION = "CREATE EXTENSION IF NOT EXISTS vector"
HNSW = "CREATE INDEX near~ ON vectors~ USING hnsw ((code::bit({})) bit_hamming_ops)"


class Vectors:
    """The vectors of `model`, "" for none, which is asked for `batch` at a time."""

    def __init__(self, index: Index, model: str, batch: int) -> None:
        self.index, self.model, self.batch = index, model, batch
        self.state = ""  # how many vectors there are, for a person to read
        self._codes = dict[int, int]()  # by the ids of passages
        self._known = (-1, -1)  # the versions of what was counted, and of the codes
        self._counts: tuple[int, int, int | None] = (0, 0, None)
        self._hastened = False  # it was tried to have an index of pgvector
        self._last = 0  # the last passage that was sent to the model
        self._task: asyncio.Task[None] | None = None

    async def of_question(self, context: Context, question: str) -> array[float] | None:
        """Return the question's vector, or None where words alone must do."""
        if not self.model:
            return None
        passages, have, size = await self.count()
        if have < passages:
            task = self.begin(context)
            await asyncio.wait({task}, timeout=PATIENCE if passages - have <= self.batch else 0)
            passages, have, size = await self.count()
        if not size or passages - have > passages * LACKING:
            return None
        try:
            (vector,) = await self._embed(context, [question])
        except Exception as exc:  # whatever the model did: the words are still there
            context.log.warning("question has no vector: %s", type(exc).__name__)
            return None
        if size == 4 * len(vector):
            return vector
        with suppress(Taken, StoreError):
            await self._clear()  # the model has changed
        return None

    async def near(self, execute: Execute, vector: array[float]) -> list[int]:
        """Return the ids of the nearest passages, the nearest first."""
        own = code(vector)
        if self.index.server:
            ((index,),) = await execute(HAS_INDEX, self.index.sql("near~"))
            await execute(PLANNING)
            rows = await execute((BY_INDEX if index else ONE_BY_ONE).format(len(own)), own, NEAR)
        else:
            codes = self._codes  # another request may empty it meanwhile
            if not codes:
                rows = await execute("SELECT passage, code FROM vectors~")
                codes = self._codes = {passage: int.from_bytes(data) for passage, data in rows}
            some = await asyncio.to_thread(alike, codes, int(own, 2))
            rows = await execute(FIND + places(1, len(some)), *some)
        return await asyncio.to_thread(ranked, rows, vector)

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=STOP)

    def begin(self, context: Context) -> asyncio.Task[None]:
        """Go on with the vectors that are missing, and return the task that does it."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._fill(context))
        return self._task

    async def _fill(self, context: Context) -> None:
        """Embed what has no vector until a batch fails: the next question goes on behind it."""
        try:
            async with self.index.leading("vectors"):
                while rows := await self._without():
                    self._last = rows[-1][0]
                    texts = [f"{name}, {heading}\n{text}" for _, name, heading, text in rows]
                    work = self._embed(context, texts)
                    vectors = await self.index.during("vectors", work)
                    await self.store([row[0] for row in rows], vectors)
                    await self.hasten()  # with few: nothing is written while it is made
        except Taken:  # another proxy does it
            pass
        except Exception as exc:  # a background task
            logger.warning("passages have no vectors: %s: %s", type(exc).__name__, exc)

    async def _embed(self, context: Context, texts: list[str]) -> list[array[float]]:
        """Return one vector for each text. Raises what `context.embed` raises, and ValueError."""
        vectors = [normalised(vector) for vector in await context.embed(texts, self.model)]
        if len(set(map(len, vectors))) != 1:
            raise ValueError("no vectors, or of several lengths")
        return vectors

    async def count(self) -> tuple[int, int, int | None]:
        """Return how many passages there are, how many have a vector, and the bytes of one."""
        known = (await self.index.known())[:2]
        if known != self._known:
            (self._counts,) = await self.index.execute(COUNT)
            self._known, self._codes = known, {}  # near() reads them anew
            self.state = "{1} of {0} passages have vectors".format(*self._counts)
        return self._counts

    async def _without(self) -> list[tuple[int, str, str, str]]:
        """Return the next passages that have no vector, again from the first one."""
        after = await self.index.execute(WITHOUT, self._last, self.batch)
        return after or await self.index.execute(WITHOUT, 0, self.batch)

    async def _clear(self) -> None:
        self._hastened = False
        async with self.index.writing("vectors") as execute:
            await execute("DELETE FROM vectors~")
            await execute("DROP INDEX IF EXISTS near~")  # it is for one length

    async def store(self, ids: Sequence[int], vectors: Sequence[array[float]]) -> None:
        """Keep vectors; those of passages that are gone are left out. Raises Taken."""
        add = ADD.format("$1::varbit" if self.index.server else "$1")
        async with self.index.writing("vectors") as execute:
            for passage, vector in zip(ids, vectors, strict=True):
                bits = code(vector)
                own = bits if self.index.server else int(bits, 2).to_bytes((len(bits) + 7) // 8)
                await execute(add, own, vector.tobytes(), passage)
        await self.count()

    async def hasten(self) -> None:
        """Make the index of pgvector, where that can be had: without it the search takes longer."""
        _, _, size = await self.count()
        if self._hastened or not self.index.server or not size:
            return
        self._hastened = True  # one that cannot be had is not asked for again and again
        if (await self.index.execute(HAS_INDEX, self.index.sql("near~")))[0][0] is None:
            with suppress(StoreError):
                await self.index.execute(EXTENSION)
                await self.index.execute(HNSW.format(size // 4))


def alike(codes: dict[int, int], own: int) -> list[int]:
    """Return the ids of the codes that differ least."""
    return nsmallest(NEAR, codes, key=lambda it: (own ^ codes[it]).bit_count())


def ranked(rows: list[tuple[int, bytes]], vector: array[float]) -> list[int]:
    scores = {passage: sum(map(mul, vector, array("f", data))) for passage, data in rows}
    return sorted(scores, key=scores.__getitem__, reverse=True)


def normalised(vector: Sequence[float]) -> array[float]:
    """Return a vector of the same direction and the length 1. Raises ValueError, TypeError."""
    length = math.hypot(*vector)
    if not vector or not length < math.inf:
        raise ValueError(f"a vector of {len(vector)} numbers and the length {length}")
    return array("f", [value / (length or 1.0) for value in vector])


def code(vector: array[float]) -> str:
    """Return one bit for each number: whether it is above their mean."""
    mean = sum(vector) / len(vector)
    return "".join("1" if value > mean else "0" for value in vector)
