"""The relay on raw sockets: bytes both ways, and every way in which one side leaves the other."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import anyio
import httpx
import pytest

from tests.support import running, turn, write_agent

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Serve = Callable[[Reader, Writer, bytes], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
VERSION = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"version":"0"}'
REQUESTS = {
    "pass-through": ("/api/pull", b'{"model":"x"}'),
    "generate": ("/api/generate", b'{"model":"x"}'),
    "embed": ("/api/embed", b'{"model":"x"}'),
    "chat": ("/api/chat", json.dumps(turn("x")).encode()),
    "chat with an agent": ("/api/chat", json.dumps(turn("/holds x")).encode()),
    "openai": ("/v1/chat/completions", json.dumps(turn("x")).encode()),
    "openai with an agent": ("/v1/chat/completions", json.dumps(turn("/holds x")).encode()),
}
HOLDS = """
class Holds(BaseAgent):
    async def on_response(self, response):
        return response
"""


@asynccontextmanager
async def before(serve: Serve, plugins: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run a proxy before an upstream that answers each request with raw bytes."""

    async def connected(reader: Reader, writer: Writer) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if not head.startswith(b"GET /api/version "):  # the proxy asks at its start
                    await serve(reader, writer, head)
                    break
                writer.write(VERSION)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with running(url, plugins) as client:
            yield client


@asynccontextmanager
async def raw(serve: Serve, plugins: Path) -> AsyncIterator[tuple[Reader, Writer]]:
    """Do so, and yield a connection of a client."""
    async with before(serve, plugins) as client:
        host, port = client.base_url.host, client.base_url.port
        reader, writer = await asyncio.open_connection(host, port)
        try:
            yield reader, writer
        finally:
            writer.close()


async def sent_on(plugins: Path, request: bytes) -> tuple[list[bytes], bytes]:
    """Return the heads that the upstream gets for a request, and the head of the answer."""
    heads: list[bytes] = []

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        heads.append(head)
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")

    async with raw(serve, plugins) as (reader, writer):
        writer.write(request)
        return heads, await reader.readuntil(b"\r\n\r\n")


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_leaving_in_an_upload_that_ollama_does_not_read_closes_the_upstream(
    plugins: Path,
) -> None:
    size, began, left, closed = 4_000_000, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        began.set()
        await left.wait()
        while await reader.read(size):
            pass
        closed.set()

    async with raw(serve, plugins) as (_, writer):
        writer.write(post("/api/blobs/x", b"x" * size)[:-1])
        await writer.drain()
        await began.wait()
        writer.close()
        left.set()
        with anyio.fail_after(1):
            await closed.wait()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CREATED = b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n"


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("new", [True, False])
async def test_it_is_ollama_that_tells_a_client_to_continue(
    plugins: Path, framing: bytes, new: bool
) -> None:
    body = b"whole" if b"Length" in framing else b"5\r\nwhole\r\n0\r\n\r\n"
    got = []

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        assert b"\r\nexpect: 100-continue\r\n" in head
        writer.write(CONTINUE if new else b"")
        got.append(await reader.readexactly(len(body) if new else 0))
        writer.write(CREATED + b"\r\n")

    async with raw(serve, plugins) as (reader, writer):
        writer.write(b"POST /api/blobs/x HTTP/1.1\r\nHost: localhost\r\n" + framing)
        writer.write(b"\r\nExpect: 100-continue\r\n\r\n")
        for head in (CONTINUE, CREATED) if new else (CREATED,):
            with anyio.fail_after(0.5):  # no time-out was waited for
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(head)
            writer.write(body)

    assert got == [body if new else b""]


@pytest.mark.parametrize("kind", REQUESTS)
async def test_where_nobody_listens_the_client_hears_what_to_do(plugins: Path, kind: str) -> None:
    write_agent(plugins, "holds", HOLDS)
    path, body = REQUESTS[kind]

    async with running("http://127.0.0.1:1", plugins) as client:
        answer = await client.post(path, content=body)

    assert answer.status_code == 502
    assert "nothing answers at http://127.0.0.1:1: is Ollama running there?" in answer.text


async def test_what_is_sent_arrives_as_it_was_sent(plugins: Path) -> None:
    request = (
        b"PROPFIND //a/%2F/../b%0a?q=%20&ts=1&& HTTP/1.1\r\nHost: localhost:1\r\n"
        b"X-Two: 1\r\nAccept: a\r\nX-Two: 2\r\nTE: trailers\r\nX-Hop: 1\r\n"
        b"Connection: x-hop, keep-alive\r\nAccept-Encoding: br\r\n"
        b"Expect: 100-continue\r\nX-OSP-Agents: /holds\r\nX-Osp-Other: 1\r\n\r\n"
    )

    [head], _ = await sent_on(plugins, request)

    assert re.fullmatch(
        rb"PROPFIND //a/%2F/\.\./b%0a\?q=%20&ts=1&& HTTP/1.1\r\nhost: 127.0.0.1:\d+\r\n"
        rb"x-two: 1\r\naccept: a\r\nx-two: 2\r\naccept-encoding: br\r\n\r\n",
        head,
    )


@pytest.mark.parametrize(
    ("target", "host", "sent"),
    [
        (b"/x#y", b"localhost", b"/x#y"),
        (b"/x?a#b?c", b"localhost", b"/x?a#b?c"),
        (b"http://localhost:1/x?y", b"evil.example", b"/x?y"),
        (b"http://evil.example/x", b"localhost", None),
    ],
)
async def test_a_target_goes_on_as_bytes_and_its_authority_counts_more_than_host(
    plugins: Path, target: bytes, host: bytes, sent: bytes | None
) -> None:
    heads, answer = await sent_on(plugins, b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, host))

    status = answer.split(b" ")[1]
    targets = [head.split(b" ")[1] for head in heads]
    assert (targets, status) == (([sent], b"200") if sent else ([], b"403"))


async def test_what_is_answered_arrives_as_it_was_answered(plugins: Path) -> None:
    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        writer.write(
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /x\r\nVary: a\r\nDate: then\r\n"
            b"Vary: b\r\nKeep-Alive: 5\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n"
            b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x00\xff"
        )

    async with raw(serve, plugins) as (reader, writer):
        writer.write(b"GET /api/chat/ HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: r\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(4)

    first, headers = head.split(b"\r\n", 1)
    assert first + b"\r\n" + headers.lower() == (
        b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /x\r\nvary: a\r\ndate: then\r\nvary: b\r\n"
        b"content-encoding: gzip\r\ncontent-length: 4\r\nx-request-id: r\r\n\r\n"
    )
    assert body == b"\x1f\x8b\x00\xff"


@pytest.mark.parametrize("headers", [{"Content-Length": "11"}, {}])
async def test_a_body_goes_on_before_it_is_complete(plugins: Path, headers: dict[str, str]) -> None:
    first = asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        await reader.readuntil(b"first")
        first.set()
        await reader.readuntil(b"second")
        writer.write(CREATED + b"\r\n")

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await first.wait()
        yield b"second"

    async with before(serve, plugins) as client:
        with anyio.fail_after(2):
            answer = await client.post("/api/blobs/x", content=body(), headers=headers)

    assert answer.status_code == 201
