"""Connection: one connection to Ollama, and the exchange that runs on it.

    Connection   idle or busy with one Answer; the client keeps it, or it is closed
    Answer       one exchange: sends the request, is what httptools calls as the answer comes

A connection is used again only if the answer is complete, the request was sent whole, both sides
keep it alive and no surplus byte came. `Answer.close` is the only way out of an exchange. It never
awaits, so a task may be cancelled anywhere. When the connection ends before the answer does, that
is an error. At most `HIGH` bytes wait in either direction.
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, cast

import httptools

from kernel.errors import UpstreamError
from kernel.http1 import END, FOLD, HEAD_LIMIT

Headers = list[tuple[bytes, bytes]]
Body = bytes | AsyncIterable[bytes] | None

HIGH = 2**18  # bytes of an answer that wait for the client before the upstream has to wait
CONTINUE = 1.0  # seconds to wait for "100 Continue" or an answer, as curl and Go do
PROBES = 15  # seconds between TCP keep-alive probes, as in Go: a NAT forgets silent connections
LENGTH, CODING = FRAMING = (b"content-length", b"transfer-encoding")
# A length that stands again further down
TWICE = re.compile(
    rb"(?ims)^content-length:[ \t]*(\d+)[ \t]*\n(?=.*^content-length:[ \t]*\1[ \t]*$)"
)


def probe(sock: Any) -> None:
    """Have the system find out whether the other side of a silent connection is still there."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # macOS has the second
        if option := getattr(socket, name, None):
            sock.setsockopt(socket.IPPROTO_TCP, option, PROBES)


class Connection(asyncio.Protocol):
    """One connection. `keep` is called with it when it may be used again."""

    transport: asyncio.Transport  # uvloop's is not a subclass, but behaves like one
    idle_since = 0.0  # time.monotonic()

    def __init__(self, url: str, keep: Callable[[Connection], None]) -> None:
        self.url = url
        self.keep = keep
        self.answer: Answer | None = None
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        probe(transport.get_extra_info("socket"))

    def is_quiet(self) -> bool:
        """Ask the system whether there is nothing to read: no answer, no end, no reset.

        The event loop may not have looked yet. Where there is no poll (Windows) return True.
        """
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def data_received(self, data: bytes) -> None:
        if self.answer:
            self.answer.feed(data)
        else:
            self.transport.abort()  # an answer without a request

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if self.answer:
            self.answer.end(exc)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()


class Answer:
    """Ollama's answer: read its body as the bytes come, and close it on every way out."""

    status = 0
    complete = False  # all of it has come; the next read returns the rest
    began = False  # a byte of it has come
    headers: Headers  # in order, duplicates included; names in lower case

    _at_end: Callable[[], None] | None = None
    _upload: asyncio.Task[None] | None = None  # sends the body, until it is sent whole
    _waiter: asyncio.Future[None] | None = None  # for something to come
    _error: Exception | None = None
    _head = b""  # as it came
    _size = 0  # bytes in _pieces
    _overhead = 0  # bytes of the head, or of what stands between two pieces of the body
    _reusable = False

    def __init__(self, connection: Connection, method: str) -> None:
        self._connection: Connection | None = connection
        self._url, self._method = connection.url, method
        self._pieces: list[bytes] = []  # what has come of the body since the last read
        self._parser: Any = httptools.HttpResponseParser(self)
        connection.answer = self

    def header(self, name: bytes) -> bytes:
        """Return the first value of a header, by its name in lower case, or b""."""
        return next((value for key, value in self.headers if key == name), b"")

    async def read(self) -> bytes:
        """Return all that has come of the body since the last read, b"" at its end.

        Raises UpstreamError when the body ends before it is complete.
        """
        while not self._pieces and not self.complete:
            await self._progress()
        if self._size > HIGH and self._connection:
            self._connection.transport.resume_reading()
        data, self._size = b"".join(self._pieces), 0
        self._pieces.clear()
        return data

    async def arrives(self, seconds: float) -> bool:
        """Wait for some of the body, or its end; tell whether it has come in time."""
        if not (self._pieces or self.complete or self._error):
            self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._waiter}, timeout=seconds)
        return bool(self._pieces or self.complete or self._error)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """End the exchange, any number of times. The connection is kept or closed."""
        connection, self._connection = self._connection, None
        self._parser = None  # it refers to this object: break the circle
        if self._upload:
            self._upload.cancel()
        if connection:
            connection.answer = None
            if self._reusable and not self._upload and not connection.transport.is_closing():
                connection.keep(connection)
            else:
                connection.transport.abort()
            if self._at_end:
                self._at_end()

    def at_end(self, call: Callable[[], None]) -> None:
        """Have `call` called once the exchange has ended; now, if it has."""
        if self._connection:
            self._at_end = call
        else:
            call()

    # The request

    async def begin(self, head: bytes, body: Body) -> None:
        """Send a request and wait for the head of the answer. Raises UpstreamError.

        A body that comes in pieces is sent by a task of its own.
        """
        assert self._connection
        try:
            if self._connection.transport.is_closing():  # perhaps it has said so before
                self.end(None)
            else:
                self._send(self._connection, head, body)
            while not self.status:
                await self._progress()
        except BaseException:
            self.close()
            raise

    def _send(self, connection: Connection, head: bytes, body: Body) -> None:
        if body is None or isinstance(body, bytes):
            return connection.transport.write(head + body if body else head)
        connection.transport.write(head)
        waits = b"\r\nexpect: 100-continue\r\n" in head
        self._upload = asyncio.create_task(self._send_body(connection, body, waits=waits))

    async def _send_body(
        self, connection: Connection, pieces: AsyncIterable[bytes], *, waits: bool
    ) -> None:
        try:
            if waits and self._waiter:
                await asyncio.wait({self._waiter}, timeout=CONTINUE)
            async for data in pieces:
                if not connection.is_quiet():
                    # An answer before its time, perhaps with a reset behind it. Let the loop read
                    # it (one round to look, one to call us) before this write fails.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                if connection.transport.is_closing():
                    return  # `end` was called and has said why
                connection.transport.write(data)
                await connection.writable.wait()
            self._upload = None
        except Exception as exc:  # the client's side failed: raise it where the answer is awaited
            self._fail(exc)

    # The answer, called by the connection and by httptools

    def feed(self, data: bytes) -> None:
        self.began = True
        self._overhead += len(data)
        if self._overhead > HEAD_LIMIT:
            return self._fail(f"sent more than {HEAD_LIMIT} bytes of headers")
        try:
            self._parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._reusable = False  # garbage, perhaps behind a complete answer
            if not self.complete:
                self._fail(f"answered what is not HTTP: {exc}")
        if self.complete:
            self.close()
        elif self._size > HIGH and self._connection:
            self._connection.transport.pause_reading()
        self._wake()

    def _parse(self, data: bytes) -> None:
        """Feed llhttp. A head that it refuses is fed again, when it is whole, in canonical form."""
        if not self.status:
            self._head += data
        if self._parser:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserError:
                if self.status or self._error or not self._head.startswith(b"HTTP/"):
                    raise
                self._parser = None
        if end := END.search(self._head):
            self._parser = httptools.HttpResponseParser(self)
            self._parser.feed_data(canonical(self._head[: end.end()]) + self._head[end.end() :])

    def on_message_begin(self) -> None:
        self._reusable = False  # surplus, if the answer is complete
        if not self.status:
            self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it is a trailer
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        codings = [value.lower() for name, value in self.headers if name == CODING]
        if self.status or 101 != status < 200:  # surplus, or "100 Continue" and the like
            return
        chunked = codings == [b"chunked"] and self._parser.get_http_version() == "1.1"
        if status == 101 or status > 599 or (codings and not chunked):
            return self._fail(f"answered with the status {status} in the codings {codings}")
        self.status = status
        if self._method == "HEAD":
            self.on_message_complete()

    def on_body(self, data: bytes) -> None:
        self._overhead = 0
        self._reusable = False  # until the end has come; and it is the end of an answer to HEAD
        if not self.complete:
            self._pieces.append(data)
            self._size += len(data)

    def on_message_complete(self) -> None:
        if self.status and not self.complete:
            self.complete, self._reusable = True, self._parser.should_keep_alive()

    def end(self, exc: Exception | None) -> None:
        """Take the end of the connection, which ends an answer without framing."""
        if exc or not self.status or any(name in FRAMING for name, _ in self.headers):
            return self._fail(f"broke off: {exc or 'it closed the connection'}")
        self.complete = True
        self.close()
        self._wake()

    # Waiting

    async def _progress(self) -> None:
        """Wait for something to happen. Raises what went wrong before."""
        if self._error:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception | str) -> None:
        if isinstance(error, str):
            error = UpstreamError(f"Ollama at {self._url} {error}")
        self._error = self._error or error
        self.close()
        self._wake()


def request_head(method: str, target: bytes, headers: Headers, body: Body) -> tuple[bytes, Body]:
    """Return a request's head, and its body as it is sent: without a length, in chunks."""
    lines = [b"%s %s HTTP/1.1" % (method.encode(), target)]
    lines += [name + b": " + value for name, value in headers]
    if body is not None and LENGTH not in dict(headers):
        if isinstance(body, bytes):
            lines.append(b"content-length: %d" % len(body))
        else:
            lines.append(CODING + b": chunked")
            body = in_chunks(body)
    return b"\r\n".join([*lines, b"", b""]), body


async def in_chunks(body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    async for data in body:
        if data:  # an empty chunk would be the last one
            yield b"%x\r\n%s\r\n" % (len(data), data)
    yield b"0\r\n\r\n"


def canonical(head: bytes) -> bytes:
    """Return a head as llhttp takes it.

    Go's net/http also takes lines that end in a bare LF, lines folded into several and a
    Content-Length that is repeated with the same value.
    """
    status, _, fields = head.replace(b"\r\n", b"\n").partition(b"\n")
    fields = TWICE.sub(b"", FOLD.sub(b" ", fields))
    return b"\n".join([status, fields]).replace(b"\n", b"\r\n")
