"""Upstream: the canned Ollama of main.go for machines without Go, and slower than it.

    python canned.py HOST:PORT

The same answers to the same questions; see there. Plain asyncio, because nothing else is needed.
"""

from __future__ import annotations

import asyncio
import re
import sys
from datetime import UTC, datetime

START = b'{"model":"bench","created_at":"%s","message":{"role":"assistant","content":"'
LAST = (
    b'"},"done":true,"done_reason":"stop","total_duration":4883583458,"load_duration":1334875,'
    b'"prompt_eval_count":26,"prompt_eval_duration":342546000,"eval_count":200,'
    b'"eval_duration":4535599000}'
)
FRAME = START + b' word"},"done":false}\n'
END = START + LAST + b"\n"
TEXT = b"The sky is blue because air scatters short waves of light more than long ones, and blue is"
WHOLE = START + TEXT + b" the shortest that we see well." + LAST
VERSION = b'{"version":"0.0.0"}'

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
STREAM_HEAD += b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request after the other, until the client hangs up."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            await reader.readexactly(int(length[1]) if length else 0)
            await answer(head.split(b" ", 2)[1], writer)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def answer(target: bytes, writer: asyncio.StreamWriter) -> None:
    frames, every = number(rb"frames", target), number(rb"every", target)
    if frames:
        return await stream(writer, frames, every / 1000)
    body = VERSION if target == b"/api/version" else WHOLE % now()
    writer.write(HEAD % len(body) + b"\r\n" + body)
    await writer.drain()


def now() -> bytes:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z".encode()


def number(key: bytes, target: bytes) -> int:
    found = re.search(rb"[?&]%s=(\d+)" % key, target)
    return int(found[1]) if found else 0


async def stream(writer: asyncio.StreamWriter, frames: int, every: float) -> None:
    writer.write(STREAM_HEAD)
    for _ in range(frames):
        writer.write(chunk(FRAME % now()))
        await writer.drain()
        if every:
            await asyncio.sleep(every)
    writer.write(chunk(END % now()) + b"0\r\n\r\n")
    await writer.drain()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(address: str) -> None:
    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(converse, host, int(port), backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
