"""Upstreams that die, lie or hurry: what the client gets then, and what is never sent twice."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import anyio
import httpx
import pytest

from tests.kernel.test_relay import HOLDS, REQUESTS, VERSION, post
from tests.support import running, turn, write_agent

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Serve: TypeAlias = Callable[[Reader, Writer, bytes], Awaitable[None]]
Step: TypeAlias = bytes | asyncio.Event | Callable[[Writer], object]
Call: TypeAlias = tuple[str, str, bytes]

STATUS = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
EMPTY = STATUS + b"Content-Length: 0\r\n\r\n"
OK = STATUS + b"Content-Length: 2\r\n\r\nok"
MEGABYTE = 2**20
ASKS = """
class Asks(BaseAgent):
    async def on_request(self, payload):
        await self.context.chat([{"role": "user", "content": "x"}])
"""
LIMIT = 5  # seconds in which everything here is over, on the slowest machine

BODY = b'{"model":"x"}'
SAFE: list[Call] = [
    ("GET", "/api/tags", b""),
    ("GET", "/api/version/x", b""),
    ("POST", "/api/chat", REQUESTS["chat"][1]),
    ("POST", "/api/chat", REQUESTS["chat with an agent"][1]),
    ("POST", "/v1/chat/completions", REQUESTS["openai"][1]),
    ("POST", "/api/generate", BODY),
    ("POST", "/api/embed", BODY),
    ("POST", "/api/show", BODY),
    ("POST", "/v1/messages?beta=true", BODY),
    ("POST", "/v1/responses", BODY),
]
ONCE: list[Call] = [
    ("POST", "/api/pull", BODY),
    ("POST", "/api/create", BODY),
    ("DELETE", "/api/delete", BODY),
    ("POST", "/api/blobs/sha256:0", b"x" * 1000),
    ("POST", "/api/blobs/sha256:1", b"x" * MEGABYTE),
]


@dataclass
class House:
    """An upstream that keeps connections, and a proxy before it; `serve` is a test's own.

    It gets each request, after its head, until it closes the connection.
    """

    serve: Serve
    port: int = 0
    client: httpx.AsyncClient = field(init=False)
    _writers: dict[asyncio.Task[None] | None, Writer] = field(default_factory=dict)

    @property
    def url(self) -> httpx.URL:
        return self.client.base_url

    async def connected(self, reader: Reader, writer: Writer) -> None:
        self._writers[asyncio.current_task()] = writer
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /api/version "):  # the proxy asks at its start
                    writer.write(VERSION)
                else:
                    await self.serve(reader, writer, head)
        except (asyncio.IncompleteReadError, OSError):
            pass  # the proxy closed it
        finally:
            del self._writers[asyncio.current_task()]
            writer.close()

    async def open(self) -> None:
        address = ("127.0.0.1", self.port)
        self._server = await asyncio.start_server(self.connected, *address, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        await self.hang_up()

    async def hang_up(self) -> None:
        """Close every connection."""
        for writer in self._writers.values():
            writer.close()
        await until(lambda: not self._writers)


@asynccontextmanager
async def built(folder: Path, **agents: str) -> AsyncIterator[House]:
    """Build a house with these agents."""
    plugins = folder / "plugins"
    plugins.mkdir()
    for name, code in agents.items():
        write_agent(plugins, name, code)
    house = House(nothing)
    await house.open()
    async with running(f"http://127.0.0.1:{house.port}", plugins) as house.client:
        yield house
    await house.close()


class Script:
    """Answers the requests in turn, the last answer again and again; `got` are their bodies.

    Of the steps of an answer bytes are written, an event is waited for, a function gets the writer.
    """

    def __init__(self, *answers: tuple[Step, ...]) -> None:
        self.answers = list(answers)
        self.got: list[bytes] = []

    async def __call__(self, reader: Reader, writer: Writer, head: bytes) -> None:
        self.got.append(await body_after(reader, head))
        for step in self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]:
            if isinstance(step, bytes):
                writer.write(step)
            elif isinstance(step, asyncio.Event):
                await step.wait()
            else:
                step(writer)


async def nothing(reader: Reader, writer: Writer, head: bytes) -> None:
    writer.write(OK)


async def until(holds: Callable[[], object], seconds: float = LIMIT) -> None:
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # between two looks: a process tells nobody


@pytest.fixture(scope="module")
async def one_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with built(tmp_path_factory.mktemp("faults"), holds=HOLDS, asks=ASKS) as house:
        yield house


@pytest.fixture
async def house(one_house: House) -> House:
    """A house in which nobody speaks yet."""
    await one_house.hang_up()
    return one_house


@asynccontextmanager
async def connection(url: str | httpx.URL) -> AsyncIterator[tuple[Reader, Writer]]:
    at = httpx.URL(url)
    reader, writer = await asyncio.open_connection(at.host, at.port, limit=MEGABYTE)
    try:
        yield reader, writer
    finally:
        writer.close()


def fields_of(head: bytes) -> dict[bytes, bytes]:
    lines = head.split(b"\r\n")[1:-2]
    return {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}


async def body_after(reader: Reader, head: bytes) -> bytes:
    """Read the body that `head` announces, of a request or an answer."""
    known = fields_of(head)
    if b"transfer-encoding" not in known:
        return await reader.readexactly(int(known.get(b"content-length", 0)))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    assert await reader.readexactly(2) == b"\r\n"
    return body


async def answer_of(reader: Reader) -> tuple[bytes, bytes]:
    with anyio.fail_after(LIMIT):
        head = await reader.readuntil(b"\r\n\r\n")
        return head, await body_after(reader, head)


def close(writer: Writer) -> None:
    writer.close()


def reset(writer: Writer) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def stream_type(path: str) -> bytes:
    return b"text/event-stream" if path.startswith("/v1/") else b"application/x-ndjson"


def name_of(value: object) -> str | None:
    return "-".join(map(str, value[:2])) if isinstance(value, tuple) else None


async def sent(client: httpx.AsyncClient, call: Call) -> httpx.Response:
    method, path, body = call
    with anyio.fail_after(LIMIT):
        return await client.request(method, path, content=body)


# What dies between two requests


@pytest.mark.parametrize("dies", ["after each answer", "while idle", "with a reset", "restarts"])
@pytest.mark.parametrize("call", [*SAFE, *ONCE], ids=name_of)
async def test_a_kept_connection_that_died_costs_no_request(
    house: House, call: Call, dies: str
) -> None:
    kept: list[Writer] = []
    after = [close] if dies == "after each answer" else []
    house.serve = Script((OK, kept.append, *after))

    first = await sent(house.client, call)
    if dies == "restarts":
        await house.close()
        await house.open()
    elif not after:
        (reset if dies == "with a reset" else close)(kept[0])
    second = await sent(house.client, call)

    assert (first.status_code, second.status_code) == (200, 200)
    assert len(kept) == 2


@pytest.mark.parametrize("dies", [close, reset])
@pytest.mark.parametrize("call", SAFE, ids=name_of)
async def test_a_kept_connection_that_dies_under_a_request_is_replaced(
    house: House, call: Call, dies: Callable[[Writer], None]
) -> None:
    house.serve = script = Script((OK,), (dies,), (OK,))

    await sent(house.client, call)
    second = await sent(house.client, call)

    assert second.status_code == 200
    assert script.got == [script.got[0]] * 3


@pytest.mark.parametrize("dies", [close, reset])
@pytest.mark.parametrize("nth", [1, 2], ids=["new connection", "kept connection"])
@pytest.mark.parametrize("call", ONCE, ids=name_of)
async def test_what_must_not_run_twice_is_sent_once(
    house: House, call: Call, nth: int, dies: Callable[[Writer], None]
) -> None:
    turns: list[tuple[Step, ...]] = [(OK,), (dies,)]
    house.serve = script = Script(*turns[-nth:])

    answers = [await sent(house.client, call) for _ in range(nth)]

    assert answers[-1].status_code == 502
    assert len(script.got) == nth


@pytest.mark.parametrize("then", ["closes", "reads no more", "reads the rest"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_answer_before_the_upload_was_read_reaches_the_client(
    house: House, framing: str, then: str
) -> None:
    size = 16 * MEGABYTE
    over = asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        writer.write(STATUS + b"Content-Length: 6\r\n\r\nexists")
        if then == "reads the rest":
            await body_after(reader, head)
        elif then == "reads no more":
            await over.wait()
        writer.close()

    if framing == "length":
        framed, body = b"Content-Length: %d" % size, b"x" * size
    else:
        framed, body = CHUNKED.strip(), b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size)
    house.serve = serve
    async with connection(house.url) as (reader, writer):
        writer.write(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: localhost\r\n" + framed)
        writer.write(b"\r\n\r\n" + body)
        head, content = await answer_of(reader)
        with anyio.fail_after(LIMIT):
            await writer.drain()
        over.set()

    assert head.startswith(STATUS) and content == b"exists"


# What breaks off

LENGTH = b"Content-Length: 10\r\n\r\n{}\n"
BREAKS = {
    "before the head": b"",
    "in the status line": b"HTTP/1.1 2",
    "in the head": STATUS + b"Content-",
    "behind the head": STATUS + b"Content-Type: %s\r\n" + CHUNKED,
    "in a chunk": STATUS + b"Content-Type: %s\r\n" + CHUNKED + b"5\r\n{}",
    "between chunks": STATUS + b"Content-Type: %s\r\n" + CHUNKED + b"3\r\n{}\n\r\n",
    "before the last line": STATUS + b"Content-Type: %s\r\n" + CHUNKED + b"3\r\n{}\n\r\n0\r\n",
    "in a body with a length": STATUS + b"Content-Type: %s\r\n" + LENGTH,
    "in a body without any": STATUS + b"Content-Type: %s\r\n\r\n{}\n",
    "in a whole answer": STATUS + b"Content-Type: application/json\r\n" + LENGTH,
}


@pytest.mark.parametrize("how", [close, reset])
@pytest.mark.parametrize("at", BREAKS)
@pytest.mark.parametrize("kind", REQUESTS)
async def test_breaking_off_is_a_502_or_a_broken_connection_and_never_an_end(
    house: House, kind: str, at: str, how: Callable[[Writer], None]
) -> None:
    if at == "in a body without any" and how is close:
        return  # this is its end
    path, body = REQUESTS[kind]
    begin = BREAKS[at].replace(b"%s", stream_type(path))
    # The head of an answer that agents edit leaves with its first frame.
    framed = b"{}\n" in begin and not path.startswith("/v1/")
    headless = b"\r\n\r\n" not in begin or ("agent" in kind and not framed)
    seen = asyncio.Event()
    house.serve = Script((begin, how) if headless else (begin, seen, how))

    with anyio.fail_after(LIMIT):
        async with house.client.stream("POST", path, content=body) as answer:
            seen.set()
            if headless:
                error = json.loads(await answer.aread())["error"]
                assert isinstance(error, dict if path.startswith("/v1/") else str)
            else:
                with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                    await answer.aread()

    assert answer.status_code == (502 if headless else 200)


NONSENSE = {
    "another protocol": b"220 mail ESMTP\r\n\r\n",
    "zeros": bytes(1000),
    "status 999": b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
    "status 42": b"HTTP/1.1 42 Odd\r\nContent-Length: 0\r\n\r\n",
    "status 101": b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nfree bytes",
    "two lengths": STATUS + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
    "a length below zero": STATUS + b"Content-Length: -1\r\n\r\nok",
    "a coding that we cannot undo": STATUS + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "the same in two lines": STATUS
    + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a header without a name": STATUS + b": x\r\nContent-Length: 0\r\n\r\n",
    "a length, then chunks": STATUS + b"Content-Length: 2\r\n" + CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
    "chunks, then a length": STATUS
    + CHUNKED[:-2]
    + b"Content-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "two lengths, bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 3\n\nok!",
    "a length and chunks, bare LF": STATUS
    + b"Content-Length: 2\nTransfer-Encoding:\n chunked\n\nok",
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
    "a folded status line": b"HTTP/1.1 200 OK\r\n X: 1\r\nContent-Length: 2\r\n\r\nok",
    "a space before the colon": STATUS + b"Content-Length : 2\r\n\r\nok",
    "a head over a megabyte": STATUS + b"X-Big: %s\r\n\r\n" % (b"x" * MEGABYTE),
    "headers without end": STATUS + b"X-Many: x\r\n" * 100_000,
    "hints without end": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50_000,
    "a line without end": STATUS + b"x" * 2 * MEGABYTE,
}


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("kind", ["pass-through", "chat", "openai with an agent"])
async def test_nonsense_is_a_502_and_the_next_request_works(
    house: House, kind: str, nonsense: str
) -> None:
    path, body = REQUESTS[kind]
    house.serve = Script((NONSENSE[nonsense],), (OK,))

    first = await sent(house.client, ("POST", path, body))
    second = await sent(house.client, ("POST", path, body))

    assert (first.status_code, second.status_code) == (502, 200)
    assert isinstance(first.json()["error"], dict if path.startswith("/v1/") else str)


@pytest.mark.parametrize("kind", ["pass-through", "chat", "chat with an agent"])
async def test_nonsense_for_a_chunk_breaks_the_connection(house: House, kind: str) -> None:
    path, body = REQUESTS[kind]
    head = STATUS + b"Content-Type: application/x-ndjson\r\n" + CHUNKED
    house.serve = Script((head + b"3\r\n{}\n\r\nzz\r\n{}\n\r\n0\r\n\r\n",))

    with anyio.fail_after(LIMIT), pytest.raises(httpx.RemoteProtocolError):
        await house.client.post(path, content=body)


# What is odd, but HTTP

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
MANY = b"X-Many: %s\r\n" % (b"x" * 90) * 2000
ODD = {
    "hints before the answer": HINTS + HINTS + OK,
    "continue before the answer": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "trailers": STATUS + b"Trailer: X-Sum\r\n" + CHUNKED + b"2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n",
    "chunks with extensions": STATUS + CHUNKED + b'1;a="b"\r\no\r\n01\r\nk\r\n0;c\r\n\r\n',
    "a head of 200 kB": STATUS + b"X-Big: %s\r\nContent-Length: 2\r\n\r\nok" % (b"x" * 200_000),
    "2000 headers": STATUS + MANY + b"Content-Length: 2\r\n\r\nok",
    "bare LF": b"HTTP/1.1 200 OK\nX-A: b\nContent-Length: 2\n\nok",
    "bare LF, until it closes": b"HTTP/1.1 200 OK\n\nok",
    "a folded header": STATUS + b"X-A: b\r\n c\r\n\td\r\nContent-Length:\r\n 2\r\n\r\nok",
    "equal lengths": STATUS + b"Content-Length: 2\r\ncontent-length:  2\r\n\r\nok",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "an end by closing": STATUS + b"X-A: b\r\n\r\nok",
    "more than it said": OK + b"HTTP/1.1 418 Smuggled\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["pass-through", "chat", "openai with an agent"])
async def test_odd_answers_arrive_whole_and_the_next_request_works(
    house: House, kind: str, odd: str
) -> None:
    path, body = REQUESTS[kind]
    ends = odd in ("HTTP/1.0", "an end by closing", "bare LF, until it closes")
    house.serve = Script((ODD[odd], close) if ends else (ODD[odd],))

    async with connection(house.url) as (reader, writer):
        for _ in range(2):
            writer.write(post(path, body))
            head, content = await answer_of(reader)

            assert head.startswith(b"HTTP/1.1 200 ") and content == b"ok"
            assert fields_of(head).get(b"content-length", b"2") == b"2"
            assert b"x-sum: " not in head.lower()
            assert head.lower().count(b"x-many: ") == ODD[odd].count(b"X-Many: ")
            assert head.count(b"x" * 200_000) == ODD[odd].count(b"x" * 200_000)


@pytest.mark.parametrize(
    ("method", "answer", "length"),
    [
        ("HEAD", STATUS + b"Content-Length: 7\r\n\r\n", b"7"),
        ("HEAD", STATUS + CHUNKED, None),
        ("HEAD", b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\n", b"7"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", None),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", None),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", None),
        ("GET", EMPTY, b"0"),
    ],
)
async def test_bodiless_answers_keep_both_connections(
    house: House, method: str, answer: bytes, length: bytes | None
) -> None:
    peers = set()
    house.serve = Script((answer, lambda writer: peers.add(writer.get_extra_info("peername"))))

    async with connection(house.url) as (reader, writer):
        for _ in range(3):
            writer.write(b"%s /x HTTP/1.1\r\nHost: localhost\r\n\r\n" % method.encode())
            with anyio.fail_after(LIMIT):
                head = await reader.readuntil(b"\r\n\r\n")

            assert head.split(b" ")[1] == answer.split(b" ")[1]
            assert fields_of(head).get(b"content-length") == length

    assert len(peers) == 1


# Without `stream` the edited answer of the last one is whole, and leaves when all of it has come.
@pytest.mark.parametrize("kind", [kind for kind in REQUESTS if kind != "openai with an agent"])
async def test_an_answer_that_pauses_behind_its_head_is_waited_for(house: House, kind: str) -> None:
    path, body = REQUESTS[kind]
    seen = asyncio.Event()
    head = STATUS + b"Content-Type: %s\r\n" % stream_type(path) + CHUNKED
    house.serve = Script((head, seen, b"2\r\nok\r\n0\r\n\r\n"))

    with anyio.fail_after(LIMIT):
        async with house.client.stream("POST", path, content=body) as answer:
            seen.set()
            assert await answer.aread() == b"ok"


async def test_an_agent_is_told_when_the_model_breaks_off_and_the_chat_goes_on(
    house: House,
) -> None:
    house.serve = script = Script((STATUS + LENGTH, reset), (OK,))

    answer = await sent(house.client, ("POST", "/api/chat", json.dumps(turn("/asks y")).encode()))

    assert answer.status_code == 200 and answer.content == b"ok"
    assert answer.headers["X-OSP-Agents"].startswith("asks;error;")
    assert len(script.got) == 2
