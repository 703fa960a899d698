"""Client: a load of the bench's own, for what wrk cannot do and for where it is missing.

    python client.py rate URL BODY CONNECTIONS SECONDS
    python client.py slow URL BODY STREAMS SECONDS

`rate` asks over and over on each connection, anew when an answer is complete. `slow` opens many
streams and looks how old each frame is when it comes: a frame carries the wall clock of the
upstream, which is this machine's, too. BODY is a file. The last line printed is a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn

SENT = re.compile(rb'"created_at":"([^"]{29}Z)"')  # one that two reads share is left out
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
OPENING = 25  # seconds that the streams may take to begin
TOGETHER = 50  # connections that are opened at the same time
SETTLING = 1  # seconds between the last stream's beginning and the first look


class Asking(asyncio.Protocol):
    """Asks over and over; `took` is the seconds of each answer."""

    def __init__(self, question: bytes) -> None:
        self.question = question
        self.took: list[float] = []
        self.failed = 0
        self.data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.data.clear()
        self.began = time.perf_counter()
        self.transport.write(self.question)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if is_complete(self.data):
            self.took.append(time.perf_counter() - self.began)
            self.failed += not self.data.startswith(b"HTTP/1.1 200 ")
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failed += exc is not None or len(self.data) > 0


class Listening(asyncio.Protocol):
    """Asks once and notes in `seen` which bytes of the stream came when."""

    def __init__(self, question: bytes, seen: list[tuple[float, bytes]]) -> None:
        self.question = question
        self.seen = seen
        self.alive = asyncio.Event()  # the stream has begun and has not ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self.question)

    def data_received(self, data: bytes) -> None:
        self.seen.append((time.time(), data))
        self.alive.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive.clear()


async def rate(url: str, body: bytes, connections: int, seconds: float) -> dict[str, Any]:
    """Return how many answers came, how long that took, and how long one took in milliseconds."""
    asking = [Asking(question(url, body)) for _ in range(connections)]
    began = time.perf_counter()
    await connect(url, asking)
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - began
    took = sorted(1000 * second for each in asking for second in each.took)
    failed = sum(each.failed for each in asking)
    return {"count": len(took), "seconds": elapsed, "failed": failed, **percentiles(took)}


async def slow(url: str, body: bytes, streams: int, seconds: float) -> dict[str, Any]:
    """Return how old frames were, in milliseconds; lines say when the looking begins and ends."""
    seen: list[tuple[float, bytes]] = []
    listening = [Listening(question(url, body), seen) for _ in range(streams)]
    with suppress(TimeoutError):
        async with asyncio.timeout(OPENING):
            await connect(url, listening)
            await asyncio.gather(*(each.alive.wait() for each in listening))
    await asyncio.sleep(SETTLING)
    seen.clear()
    say("open")
    await asyncio.sleep(seconds)
    say("seen")
    ages = sorted(
        1000 * (at - seconds_of(sent)) for at, data in seen for sent in SENT.findall(data)
    )
    return {"streams": sum(each.alive.is_set() for each in listening), **percentiles(ages)}


async def connect(url: str, protocols: Sequence[asyncio.Protocol]) -> None:
    loop, to = asyncio.get_running_loop(), urlsplit(url)

    def one(protocol: asyncio.Protocol) -> Coroutine[Any, Any, Any]:
        return loop.create_connection(lambda: protocol, to.hostname or "", to.port or 80)

    for first in range(0, len(protocols), TOGETHER):
        await asyncio.gather(*map(one, protocols[first : first + TOGETHER]))


def question(url: str, body: bytes) -> bytes:
    to = urlsplit(url)
    head = f"POST {to.path}?{to.query} HTTP/1.1\r\nhost: {to.netloc}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def is_complete(answer: bytearray) -> bool:
    """Tell whether an answer with a length, or in chunks, has come whole."""
    end = answer.find(b"\r\n\r\n") + 4
    length = LENGTH.search(answer, 0, end)
    if length:
        return len(answer) >= end + int(length[1])
    return end > 3 and answer.endswith(b"\r\n0\r\n\r\n")


def seconds_of(sent: bytes) -> float:
    return datetime.fromisoformat(sent.decode()).timestamp()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def percentiles(sorted_values: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile; not a number where there is no value."""
    if not sorted_values:
        return {"p50": float("nan"), "p99": float("nan")}
    return {f"p{p}": sorted_values[len(sorted_values) * p // 100] for p in (50, 99)}


def main(what: str, url: str, body: str, number: str, seconds: str) -> None:
    measure = {"rate": rate, "slow": slow}[what]
    data = Path(body).read_bytes()
    loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()  # uvloop's if it is here
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        say(json.dumps(runner.run(measure(url, data, int(number), float(seconds)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
