"""Queue: lets some requests ask a model at once, and the others wait for their turn.

Ollama has a queue, too, but it is first in, first out, so that a script with a hundred prompts
holds a person up. Here the lowest `priority` of a key goes first; among equals each key has its
turn (start-time fair queueing: Goyal, Vin and Cheng, 1996).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

from kernel.log import QUEUED, WAITING, RequestInfo
from kernel.metrics import Metrics


class FairQueue:
    """`parallel` is how many requests may ask at once."""

    def __init__(self, parallel: int, metrics: Metrics) -> None:
        self._free = parallel
        self._metrics = metrics
        self._waiting: list[tuple[float, int, int, asyncio.Future[None]]] = []  # a heap
        self._turn = 0  # of the latest that got a place
        self._turns: dict[str, int] = {}  # the latest of each key
        self._arrivals = count()

    async def enter(self, known: RequestInfo) -> Callable[[], None]:
        """Wait for a place; return what gives it up.

        What a request asks while it has one, an agent's question for example, needs no place of its
        own: it would wait for itself.
        """
        if known.places:
            return lambda: None
        turn = max(self._turn, self._turns.get(known.user, -1) + 1)
        self._turns[known.user] = turn
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (known.key.priority, turn, next(self._arrivals), ready))
        self._advance()
        with self._metrics.waiting(known.user):
            await self._wait(known, ready)
        known.places += 1
        return lambda: self._leave(known)

    async def _wait(self, known: RequestInfo, ready: asyncio.Future[None]) -> None:
        if ready.done():
            return
        known.enter(QUEUED)
        try:
            await ready
        except asyncio.CancelledError:  # the client has left
            if not ready.cancelled():  # and its turn came at the same moment
                self._free += 1
                self._advance()
            raise
        known.enter(WAITING)

    def _leave(self, known: RequestInfo) -> None:
        known.places -= 1
        self._free += 1
        self._advance()

    def _advance(self) -> None:
        while self._free and self._waiting:
            _, turn, _, ready = heappop(self._waiting)
            if not ready.done():  # else its client has left
                self._free -= 1
                self._turn = max(self._turn, turn)
                ready.set_result(None)
