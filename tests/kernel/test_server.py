"""The server side: requests that offer an upgrade, on both parsers, however they are split."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import demo
from kernel.server import SETTINGS

UPGRADE = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"
SIZED = b"POST /1 HTTP/1.1\r\n" + UPGRADE + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /2 HTTP/1.1\r\n" + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED += b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
BARE = b"GET /3 HTTP/1.1\r\n" + UPGRADE + b"\r\n"
EMPTY = b"POST /4 HTTP/1.1\r\n" + UPGRADE + b"Content-Length: 0\r\n\r\n"
PLAIN = b"POST /5 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nok"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the path and the body that was read."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    said = json.dumps([scope["path"], body.decode()]).encode()
    length = (b"content-length", str(len(said)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": said, "more_body": False})


@asynccontextmanager
async def connected(parser: Any) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    async with demo.serve(echo, **{**SETTINGS, "http": parser}) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        yield reader, writer
        writer.close()


async def said(reader: asyncio.StreamReader) -> Any:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
    assert head.startswith(b"HTTP/1.1 200 "), head
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return json.loads(await reader.readexactly(length))


@pytest.mark.parametrize("parser", [SETTINGS["http"], "h11"], ids=["httptools", "h11"])
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
async def test_an_offered_upgrade_is_served_as_if_it_had_not_been(parser: Any, size: int) -> None:
    answers = []
    async with connected(parser) as (reader, writer):
        for request in (SIZED, PLAIN, CHUNKED, SIZED, BARE, EMPTY, PLAIN):
            for at in range(0, len(request), size):
                writer.write(request[at : at + size])
                await writer.drain()
                await asyncio.sleep(0)  # let it be a packet of its own
            answers.append(await said(reader))

    texts = {"/1": "hello", "/2": "abcde", "/3": "", "/4": "", "/5": "ok"}
    assert answers == [[path, texts[path]] for path in "/1 /5 /2 /1 /3 /4 /5".split()]


async def test_requests_behind_an_upgrade_in_the_same_packet_are_served() -> None:
    async with connected(SETTINGS["http"]) as (reader, writer):
        writer.write(SIZED + CHUNKED + BARE + PLAIN)
        answers = [await said(reader) for _ in range(4)]

    assert answers == [["/1", "hello"], ["/2", "abcde"], ["/3", ""], ["/5", "ok"]]


async def test_garbage_behind_an_upgrade_is_a_400() -> None:
    async with connected(SETTINGS["http"]) as (reader, writer):
        writer.write(CHUNKED[: CHUNKED.index(b"3\r\n")] + b"no size\r\n")

        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


def test_httptools_serves_where_it_is_installed() -> None:
    pytest.importorskip("httptools")

    assert SETTINGS["http"].__name__ == "Protocol"
