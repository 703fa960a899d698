"""The listening side: which requests are taken, which refused, and how answers end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import demo
from kernel.errors import BrokenAnswer
from kernel.http1 import HEAD_LIMIT, LINES_LIMIT
from kernel.server import SETTINGS
from tests.support import lifespan

END = b"\r\n\r\n"
HOST = b"Host: x\r\n"
UPGRADE = HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\n" + HOST

TAKEN: dict[str, tuple[bytes, tuple[str, str, str]]] = {
    "a length": (POST + b"Content-Length: 2\r\n\r\nab", ("POST", "/p", "ab")),
    "chunks": (POST + CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", ("POST", "/p", "abc")),
    "capitals": (POST + b"TRANSFER-ENCODING:CHUNKED\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
                 ("POST", "/p", "0123456789")),
    "extensions": (POST + CHUNKED + b"1;x=y\r\na\r\n1 \r\nb\r\n0;z\r\n\r\n", ("POST", "/p", "ab")),
    "trailers": (POST + CHUNKED + b"1\r\na\r\n0\r\nX-OSP-Agents: /t\r\nY: z\r\n\r\n",
                 ("POST", "/p", "a")),
    "bare LF": (b"POST /p HTTP/1.1\nHost: x\nContent-Length: 1\n\na", ("POST", "/p", "a")),
    "a folded line": (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n \tc\r\n\r\n", ("GET", "/", "")),
    "a folded length": (POST + b"Content-Length:\r\n 1\r\n\r\na", ("POST", "/p", "a")),
    "one length twice": (POST + b"Content-Length: 1\r\n" * 2 + b"\r\na", ("POST", "/p", "a")),
    "length with zeros": (POST + b"Content-Length: 001\r\n\r\na", ("POST", "/p", "a")),
    "UTF-8": ("GET /é/日?ü HTTP/1.1\r\nHost: x\r\n\r\n".encode(), ("GET", "/é/日?ü", "")),
    "an unknown method": (b"fOo! / HTTP/1.1\r\n" + HOST + b"\r\n", ("fOo!", "/", "")),
    "upgrade, a length": (b"POST /u HTTP/1.1\r\n" + UPGRADE + b"Content-Length: 5\r\n\r\nhello",
                          ("POST", "/u", "hello")),
    "upgrade, chunks": (b"POST /u HTTP/1.1\r\n" + UPGRADE + CHUNKED + b"1\r\na\r\n0\r\n\r\n",
                        ("POST", "/u", "a")),
    "upgrade, no body": (b"GET /u HTTP/1.1\r\n" + UPGRADE + b"\r\n", ("GET", "/u", "")),
    "absolute": (b"GET HTTP://h:1/a//b?c HTTP/1.1\r\nHost: x\r\n\r\n", ("GET", "/a//b?c", "")),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", ("OPTIONS", "*", "")),
    "line breaks before": (b"\r\n\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", ("GET", "/", "")),
}  # fmt: skip
REFUSED: dict[str, tuple[bytes, int]] = {
    **{f"target {target.decode()}": (b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n", 400)
       for target in (b"x:/api/chat", b"http:/api/chat", b"http:///a", b"a.b-c+d:/api/delete",
                      b"api/chat", b"?a", b"ftp://h/a", b"http://u@h/a", b"h:80",
                      b"/a\tb", b"**", b"#/a")},
    **{f"framing {lines.decode()!r}": (POST + lines + b"\r\n", 400)
       for lines in (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
                     b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
                     b"Content-Length: 1\r\nContent-Length: 2\r\n",
                     b"Content-Length: 1\r\nContent-Length: 01\r\n",
                     b"Content-Length: 1, 1\r\n", b"Content-Length: +1\r\n",
                     b"Content-Length: -1\r\n", b"Content-Length: 0x1\r\n",
                     b"Content-Length:\r\n", b"Content-Length: 1_0\r\n",
                     b"Content-Length: 99999999999999999999\r\n", b"Content-Length : 1\r\n",
                     b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding: chunked\x0b\r\n",
                     b"A: b\rc\r\n", b"A: b\x00\r\n",
                     b"no colon\r\n", b": no name\r\n", b"(: a\r\n", HOST)},
    **{f"coding {coding.decode()}": (POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n", 501)
       for coding in (b"gzip", b"gzip, chunked", b"chunked, chunked", b"identity", b"", b"xchunked",
                      b'"chunked"')},
    "two codings": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n", 501),
    "chunks in 1.0": (b"POST / HTTP/1.0\r\n" + CHUNKED, 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "a malformed host": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "a first line that is folded": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\n\n", 400),
    "another version": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 400),
    **{f"chunk {chunk.decode()!r}": (POST + CHUNKED + chunk, 400)
       for chunk in (b"g\r\n", b"-1\r\n", b"0x1\r\n", b"1\na\r\n", b"1\r\nab\r\n", b"\r\n",
                     b" 1\r\n", b"11111111111111111\r\n", b"1\r\na\n", b"0\r\nno colon\r\n")},
}  # fmt: skip


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with method, target and body, or as the path says."""
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    assert b"x-osp-agents" not in dict(scope["headers"])
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    body, more = b"", scope["path"] != "/unread"
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    texts = [scope["method"], (scope["raw_path"] + query).decode(), body.decode()]
    answer = json.dumps(texts).encode()
    if scope["path"] == "/raises":
        raise ValueError("secret")
    headers = [(b"content-length", b"%d" % len(answer))] if scope["path"] != "/streams" else []
    status = 204 if scope["path"] == "/204" else 200
    injected = [(b"a", b"b\r\nc: d")] if scope["path"] == "/injects" else []
    await send({"type": "http.response.start", "status": status, "headers": headers + injected})
    if scope["path"] == "/breaks" or scope["path"] == "/streams" and scope["query_string"]:
        await send({"type": "http.response.body", "body": answer[:3], "more_body": True})
        raise BrokenAnswer
    answer = b"" if status == 204 else answer
    await send({"type": "http.response.body", "body": answer, "more_body": False})


@pytest.fixture(scope="module")
async def port() -> AsyncIterator[int]:
    async with demo.serve(app, **SETTINGS) as url:
        yield int(url.rpartition(":")[2])


async def exchange(port: int, *parts: bytes, eof: bool = False) -> bytes:
    """Send packets and return what comes back until the connection ends or nothing more comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.002)  # a packet of its own
    if eof:
        writer.write_eof()
    came = b""
    with anyio.move_on_after(5), anyio.CancelScope() as scope:
        while data := await reader.read(2**16):
            came += data
            if not eof and complete(came):
                scope.cancel()
    writer.close()
    return came


def complete(came: bytes) -> bool:
    head, _, body = came.partition(END)
    sized = head.lower().partition(b"content-length: ")[2].split(b"\r")[0]
    return bool(sized) and len(body) >= int(sized) and b"connection: close" not in head.lower()


async def at_every_cut(port: int, raw: bytes, check: Callable[[bytes], Any]) -> None:
    packets = [filter(None, (raw[:cut], raw[cut:])) for cut in range(len(raw))]
    for came in await asyncio.gather(*(exchange(port, *parts) for parts in packets)):
        check(came)


@pytest.mark.parametrize("kind", TAKEN)
async def test_what_go_takes_is_taken_however_it_is_split(port: int, kind: str) -> None:
    raw, expected = TAKEN[kind]

    def check(came: bytes) -> None:
        head, _, body = came.partition(END)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and json.loads(body) == list(expected)

    await at_every_cut(port, raw, check)


@pytest.mark.parametrize("kind", REFUSED)
async def test_what_is_ambiguous_is_refused_however_it_is_split(port: int, kind: str) -> None:
    raw, status = REFUSED[kind]

    def check(came: bytes) -> None:
        assert came.startswith(b"HTTP/1.1 %d " % status) and came.count(b"HTTP/1.1 ") == 1
        assert b"connection: close\r\n" in came

    await at_every_cut(port, raw, check)


async def test_requests_that_are_sent_ahead_are_answered_in_their_order(port: int) -> None:
    raws, expected = zip(*TAKEN.values(), strict=True)

    came = await exchange(port, b"".join(raws), eof=True)

    bodies = [json.loads(part.partition(END)[2]) for part in came.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [list(each) for each in expected]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"A: %b\r\n" % (b"x" * HEAD_LIMIT), 431),
        (b"A: b\r\n" * LINES_LIMIT, 431),
        (b"x" * 257 + b": b\r\n", 400),
        (b"A: %b\r\n" % (b"x" * (HEAD_LIMIT - 1000)), 200),
        (b"A: b\r\n" * (LINES_LIMIT - 10), 200),
    ],
)
async def test_a_head_has_limits(port: int, head: bytes, status: int) -> None:
    came = await exchange(port, b"GET / HTTP/1.1\r\n" + HOST + head + b"\r\n")

    assert came.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    "body",
    [b"0\r\n" + b"A: b\r\n" * 20_000, b"0\r\nA: %b" % (b"x" * 9000), b"1;%b" % (b"x" * 9000)],
)
async def test_trailers_and_extensions_have_limits(port: int, body: bytes) -> None:
    assert (await exchange(port, POST + CHUNKED + body)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("raw", "lines", "ends"),
    [
        (b"GET /streams HTTP/1.0\r\n\r\n", [b"connection: close"], b'["GET", "/streams", ""]'),
        (b"GET / HTTP/1.0\r\n\r\n", [b"connection: close"], b'["GET", "/", ""]'),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [b"connection: keep-alive"], b'""]'),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [b"connection: close"], b'""]'),
        (
            b"GET /streams HTTP/1.1\r\nHost: x\r\n\r\n",
            [b"transfer-encoding: chunked"],
            b"0\r\n\r\n",
        ),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", [b"content-length: 17"], END),
        (b"HEAD /streams HTTP/1.1\r\nHost: x\r\n\r\n", [], END),
        (b"GET /204 HTTP/1.1\r\nHost: x\r\n\r\n", [], END),
        (b"GET /raises HTTP/1.1\r\nHost: x\r\n\r\n", [b"connection: close"], b"Server Error"),
        (b"GET /injects HTTP/1.1\r\nHost: x\r\n\r\n", [b"connection: close"], b"Server Error"),
    ],
)
async def test_an_answer_ends_as_its_client_can_tell(
    port: int, raw: bytes, lines: list[bytes], ends: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    came = await exchange(port, raw, eof=True)  # half closed, as by `nc -N`

    head = came.partition(END)[0].split(b"\r\n")
    framing = (b"connection:", b"transfer-", b"content-length: 17")
    assert [line for line in head if line.startswith(framing)][-1:] == lines and came.endswith(ends)
    assert "secret" not in caplog.text


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("target", [b"/breaks", b"/streams?breaks"])
async def test_a_broken_answer_never_ends_as_if_it_were_whole(
    port: int, version: bytes, target: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET %b HTTP/%b\r\nHost: x\r\n\r\n" % (target, version))
    try:
        came = await reader.read()
    except ConnectionResetError:
        came = b""
        assert target != b"/breaks" and version == b"1.0"
    else:
        assert (target, version) != (b"/streams?breaks", b"1.0")
    writer.close()

    assert not came.endswith((b"0\r\n\r\n", b"]"))


@pytest.mark.parametrize(
    ("target", "continues"), [(b"/p", True), (b"/unread", False)], ids=["read", "unread"]
)
async def test_a_client_is_told_to_continue_when_its_body_is_asked_for(
    port: int, target: bytes, continues: bool
) -> None:
    head = b"POST %b HTTP/1.1\r\n%bContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head % (target, HOST))
    first = await reader.readuntil(END)
    writer.write(b"a")
    answer = await reader.readuntil(b"]")
    writer.close()

    assert first.startswith(b"HTTP/1.1 100 Continue\r\n") is continues
    assert (b"connection: close" in first + answer) is not continues


async def test_an_answer_ahead_of_its_requests_body_ends_the_connection(port: int) -> None:
    """The client can read it, though it sends on."""
    head = b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % 2**24
    came = await exchange(port, head, b"x" * 2**24, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

    assert b"connection: close\r\n" in came and came.endswith(b'["POST", "/unread", ""]')


async def test_a_client_that_leaves_ahead_of_its_answer_cancels_the_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In an upload that nobody reads, and with a second request behind the first."""
    caplog.set_level(logging.DEBUG)
    began, left = asyncio.Event(), asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # may await
            left.set()

    get = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    upload = POST + b"Content-Length: 99999999\r\n\r\n" + b"x" * 3_000_000
    async with demo.serve(waits, **SETTINGS) as url:
        for raw in (get, get + get, get * 9000, upload, POST + CHUNKED + b"1"):
            began.clear()
            left.clear()
            _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(raw)
            await began.wait()
            await writer.drain()
            writer.transport.abort()
            with anyio.fail_after(1):
                await left.wait()


GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
SLOW = b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n"  # its answer ends only while the server stops


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", GET), (GET, GET), (SLOW, GET), (GET[:20], GET[20:])]
    + [(b"", b""), (GET, b""), (SLOW, b"")],
)
async def test_while_the_server_stops_a_request_on_its_way_is_the_last(
    before: bytes, after: bytes
) -> None:
    ends = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/slow":
            return await app(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"]", "more_body": True})
        await ends.wait()
        await send({"type": "http.response.body"})

    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(demo.serve(slow, **SETTINGS))
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(before)
        if before.endswith(END):
            assert b"connection: close" not in await reader.readuntil(b"]")
        await exchange(int(url.rpartition(":")[2]), GET)  # so the first has been accepted, too
        stop = asyncio.create_task(stack.aclose())
        await asyncio.sleep(0)  # it begins
        ends.set()
        if before == SLOW:
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(after)
        with anyio.fail_after(5):
            came = await reader.read()
        writer.close()
        await stop

    assert bool(after) is came.startswith(b"HTTP/1.1 200 OK\r\n")
    assert bool(after) is (b"connection: close\r\n" in came) is came.endswith(b'["GET", "/", ""]')
