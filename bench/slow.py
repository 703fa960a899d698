"""Slow: many streams at the pace of a model, which wrk cannot look into.

    python slow.py URL BODY STREAMS SECONDS

Every frame says when the upstream sent it, by the clock of this machine. When all streams flow it
prints a line; SECONDS later another one, a JSON object: streams that are still open, and the
median and the 99th percentile of how old frames were when they came, in milliseconds. Then it
holds the streams open until its standard input ends. BODY is a file.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

SENT = re.compile(rb'"created_at":"([^"]{29}Z)"')  # a frame that two reads share is left out
OPENING = 25  # seconds in which all streams must have begun
TOGETHER = 50  # connections that are opened at the same time


class Stream(asyncio.Protocol):
    """One stream; it notes in `seen` which bytes came when."""

    def __init__(self, request: bytes, seen: list[tuple[float, bytes]]) -> None:
        self.request = request
        self.seen = seen
        self.flows = asyncio.Event()  # has begun and has not ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        self.seen.append((time.time(), data))
        self.flows.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.flows.clear()


async def watch(url: str, body: bytes, number: int, seconds: float) -> None:
    to = urlsplit(url)
    request = f"POST {to.path}?{to.query} HTTP/1.1\r\nhost: {to.netloc}\r\n"
    request += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    seen: list[tuple[float, bytes]] = []
    streams = [Stream(request.encode() + body, seen) for _ in range(number)]
    with suppress(TimeoutError):
        async with asyncio.timeout(OPENING):
            await connect(to.hostname or "", to.port or 80, streams)
            await asyncio.gather(*(stream.flows.wait() for stream in streams))
    await asyncio.sleep(seconds / 4)  # all flow now: let what their opening held up pass
    seen.clear()
    print("open", flush=True)  # noqa: T201
    await asyncio.sleep(seconds)
    flowing = sum(stream.flows.is_set() for stream in streams)
    ages = sorted(age for at, data in seen for age in ages_of(at, data)) or [float("nan")]
    result = {"streams": flowing, **{f"p{p}": ages[len(ages) * p // 100] for p in (50, 99)}}
    print(json.dumps(result), flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)


async def connect(host: str, port: int, streams: list[Stream]) -> None:
    loop = asyncio.get_running_loop()
    waiting = iter(streams)
    for first in range(0, len(streams), TOGETHER):
        some = range(first, min(first + TOGETHER, len(streams)))
        opening = (loop.create_connection(lambda: next(waiting), host, port) for _ in some)
        await asyncio.gather(*opening)


def ages_of(at: float, data: bytes) -> list[float]:
    """Return how old the frames in `data` were at the time `at`, in milliseconds."""
    times = (datetime.fromisoformat(sent.decode()).timestamp() for sent in SENT.findall(data))
    return [(at - sent) * 1000 for sent in times]


if __name__ == "__main__":
    body = Path(sys.argv[2]).read_bytes()
    asyncio.run(watch(sys.argv[1], body, int(sys.argv[3]), float(sys.argv[4])))
