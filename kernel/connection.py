"""Transport: the fast lane to one origin, plain or TLS, over connections that are kept alive.

    Transport    the idle connections, last used first; connects, and repeats what died on one
    Connection   idle ──lend──► busy with one Answer ──complete──► idle
                                        └──anything else──► closed
    Answer       one exchange: the request as it is sent, the answer as it comes
    parsers      httptools, or h11 where that is missing: fed with bytes, they call the Answer

A connection is used again only if the answer was complete, the request was sent whole, both sides
keep it alive, and not a byte came too many. There is one way out of an exchange, `_detach`, and it
awaits nothing: cancelling anywhere is safe. The end of a connection where it does not belong is a
broken answer, never a short one. Nothing is buffered beyond `HIGH` bytes each way.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Protocol, cast

import h11

from kernel.config import Upstream
from kernel.errors import UpstreamConnectionError, UpstreamError, UpstreamTimeout

try:
    import httptools
except ImportError:
    httptools = None  # type: ignore[assignment]

Headers = list[tuple[bytes, bytes]]
Body = bytes | AsyncIterable[bytes] | None

HIGH = 2**18  # bytes of an answer that wait for the client before the upstream has to
HEAD_LIMIT = 2**20  # bytes of a head, as Go allows
FRAMING = (b"content-length", b"transfer-encoding")
IDLE = 64  # connections that are kept
# What may be sent again when a kept connection turns out to be dead
SAFE = (b"GET", b"HEAD", b"OPTIONS")
REPEATABLE = tuple(
    b"/api/chat /api/generate /api/embed /api/embeddings /api/show"
    b" /v1/chat/completions /v1/completions /v1/embeddings".split()
)


class Transport:
    """One origin; `close` it in the end."""

    def __init__(self, upstream: Upstream, connect_timeout: float) -> None:
        self.upstream = upstream
        self.idle: list[Connection] = []
        self._timeout = connect_timeout
        self._ssl = ssl.create_default_context() if upstream.scheme == "https" else None

    async def open(self, method: bytes, target: bytes, headers: Headers, body: Body) -> Answer:
        """Send a request as it is, and return when its answer begins. Raises UpstreamError."""
        connection = self._kept()
        try:
            return await self._exchange(connection, method, target, headers, body)
        except BrokeOff as exc:
            # Nothing of an answer came, perhaps because nobody was there any more to read the
            # request. Once more, where the bytes are still here and running twice does no harm.
            twice = method in SAFE or target.partition(b"?")[0].endswith(REPEATABLE)
            if connection is None or exc.begun or isinstance(body, AsyncIterable) or not twice:
                raise
            return await self._exchange(None, method, target, headers, body)

    async def _exchange(
        self, kept: Connection | None, method: bytes, target: bytes, headers: Headers, body: Body
    ) -> Answer:
        connection = kept or await self._connect()
        answer = Answer(connection, method)
        try:
            answer.send(request_head(method, target, headers, body), body)
            await answer.begun()
        except BaseException:
            await answer.aclose()
            raise
        return answer

    def _kept(self) -> Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing() and connection.is_quiet():
                return connection
            connection.transport.abort()
        return None

    async def _connect(self) -> Connection:
        loop, to = asyncio.get_running_loop(), self.upstream
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), to.host, to.port, ssl=self._ssl
                )
        except TimeoutError as exc:
            raise UpstreamTimeout(f"no connection to Ollama at {to.url} in time") from exc
        except OSError as exc:
            text = f"nothing answers at {to.url}: is Ollama running there?"
            raise UpstreamConnectionError(f"{text} upstream.url says where it is") from exc
        return connection

    def close(self) -> None:
        while self.idle:
            self.idle.pop().transport.abort()


class BrokeOff(UpstreamError):
    """The connection ended; `begun` says whether a byte of the answer had come."""

    begun = False


def request_head(method: bytes, target: bytes, headers: Headers, body: Body) -> bytes:
    """Return the head of a request; a body without a length is sent in chunks."""
    lines = [method + b" " + target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in headers]
    if body is not None and not any(name == b"content-length" for name, _ in headers):
        sized = isinstance(body, bytes)
        lines += [b"content-length: %d" % len(body) if sized else b"transfer-encoding: chunked"]  # type: ignore[arg-type]
    return b"\r\n".join([*lines, b"", b""])


class Connection(asyncio.Protocol):
    """One connection: idle, or busy with one answer."""

    transport: asyncio.Transport  # uvloop's is none, but behaves like one
    _poll: Any = None

    def __init__(self, owner: Transport) -> None:
        self.owner = owner
        self.answer: Answer | None = None
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def is_quiet(self) -> bool:
        """Ask the system whether there is nothing to read: no answer, no end, no reset.

        The loop may not have looked yet. Where there is no poll (Windows) say yes.
        """
        return self._poll is None or not self._poll.poll(0)

    def data_received(self, data: bytes) -> None:
        if self.answer:
            self.answer.feed(data)
        else:
            self.transport.abort()  # nobody asked

    def eof_received(self) -> None:
        if self.answer:
            self.answer.end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if self.answer:
            self.answer.end(exc or ConnectionResetError("connection lost"))
        elif self in self.owner.idle:
            self.owner.idle.remove(self)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()


class Answer:
    """Ollama's answer: iterate over its body as the bytes come, and close it on every way out.

    Iterating raises UpstreamError when the body ends before it is complete.
    """

    status = 0
    complete = False  # all of it has come; what was not read yet is one read
    headers: Headers  # as they came, in order, duplicates and all; names in lower case

    def __init__(self, connection: Connection, method: bytes) -> None:
        self._connection: Connection | None = connection
        self._upstream = connection.owner.upstream
        self._loop = connection.loop
        self._parser: Parser | None = make_parser(self, method)
        self._bodiless = method == b"HEAD"
        self._pump: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._came = self._keep = self._paused = False
        self._until_close = False  # the answer has no framing: the connection's end is its end
        self._sent = True
        connection.answer = self

    def header(self, name: bytes) -> bytes:
        """Return the first value of a header, by its name in lower case, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")

    async def begun(self) -> None:
        while not self.status:
            await self._progress()

    async def read(self) -> bytes:
        """Return what has come of the body since the last read, nothing at its end."""
        while not self._size:
            if self.complete:
                return b""
            await self._progress()
        data, self._size = b"".join(self._chunks), 0
        self._chunks.clear()
        if self._paused and self._connection:
            self._paused = False
            self._connection.transport.resume_reading()
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def aclose(self) -> None:
        """End the exchange, as often as you like; what was not read to its end is cut off."""
        self._detach(reusable=False)

    # The request

    def send(self, head: bytes, body: Body) -> None:
        """Begin to send; a body that comes in pieces is sent by a task of its own."""
        assert self._connection
        if isinstance(body, AsyncIterable):
            self._sent = False
            self._connection.transport.write(head)
            chunked = b"\r\ntransfer-encoding: chunked\r\n" in head
            self._pump = asyncio.create_task(self._upload(self._connection, body, chunked))
        else:
            self._connection.transport.write(head + (body or b""))

    async def _upload(
        self, connection: Connection, body: AsyncIterable[bytes], chunked: bool
    ) -> None:
        try:
            async for data in body:
                if not connection.is_quiet():
                    # An answer before its time, and perhaps a reset behind it: let the loop read
                    # (it looks in one round and calls in the next) before a write would fail.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                if connection.transport.is_closing():
                    return  # what the other side said, or did not, is told by the reading half
                framed = b"%x\r\n%s\r\n" % (len(data), data) if chunked else data
                connection.transport.write(framed)
                await connection.writable.wait()
            if chunked and not connection.transport.is_closing():
                connection.transport.write(b"0\r\n\r\n")
            self._sent = True
        except Exception as exc:  # the client's side broke: whoever waits for the answer hears it
            self._fail(exc)

    # The answer, called by the connection and by the parser

    def feed(self, data: bytes) -> None:
        assert self._parser
        self._came = True
        try:
            self._parser.feed(data)
        except UpstreamError as exc:
            if not self.complete:
                return self._fail(UpstreamError(f"Ollama at {self._upstream.url} {exc}"))
            self._keep = False  # garbage behind a whole answer
        if self.complete:
            self._detach(reusable=self._keep and self._sent)
        elif self._size > HIGH and not self._paused and self._connection:
            self._paused = True
            self._connection.transport.pause_reading()
        self._wake()

    def end(self, exc: Exception | None) -> None:
        """Take the end of the connection; a clean one ends an answer that has no other end."""
        if not exc and self._until_close:
            self.complete = True
            self._detach(reusable=False)
            return self._wake()
        error = BrokeOff(
            f"Ollama at {self._upstream.url} broke off: {exc or 'it closed the connection'}"
        )
        error.begun = self._came
        self._fail(error)

    def on_head(self, status: int, headers: Headers) -> None:
        """Take the head of the answer itself, not of a 1xx before it. Raises UpstreamError."""
        framing = [pair for pair in headers if pair[0] in FRAMING]
        codings = [value.lower() for name, value in framing if name == b"transfer-encoding"]
        if status == 101 or not 100 <= status <= 599:
            raise UpstreamError(f"answered the status {status}")
        if codings not in ([], [b"chunked"]):
            raise UpstreamError(f"answered in the coding {b', '.join(codings)!r}")
        self.headers, self.status = headers, status
        self._until_close = not framing
        if self._bodiless:
            self.on_complete(keep=True)

    def on_body(self, data: bytes) -> None:
        if self.complete:
            self._keep = False  # a HEAD with a body
        else:
            self._chunks.append(data)
            self._size += len(data)

    def on_complete(self, keep: bool) -> None:
        self._keep = keep and (self._keep or not self.complete)
        self.complete = True

    def on_surplus(self) -> None:
        self._keep = False

    # Waiting, and the way out

    async def _progress(self) -> None:
        """Wait for something to happen. Raises what went wrong."""
        if self._error:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, exc: Exception) -> None:
        self._error = self._error or exc
        self._detach(reusable=False)
        self._wake()

    def _detach(self, *, reusable: bool) -> None:
        """Let go of the connection: it becomes idle, or is closed at once."""
        connection, self._connection = self._connection, None
        if self._parser:  # it refers to us: without this the collector had to find out
            self._parser.drop()
            self._parser = None
        if self._pump:
            self._pump.cancel()
        if connection is None:
            return
        connection.answer = None
        owner = connection.owner
        if reusable and len(owner.idle) < IDLE and not connection.transport.is_closing():
            owner.idle.append(connection)
        else:
            connection.transport.abort()


class Parser(Protocol):
    def feed(self, data: bytes) -> None: ...

    def drop(self) -> None: ...


def make_parser(answer: Answer, method: bytes) -> Parser:
    return HttptoolsParser(answer) if httptools else H11Parser(answer, method)


class HttptoolsParser:
    """llhttp, which knows nothing of HEAD and of the end of a connection."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._parser: Any = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._size = 0
        self._final = False

    def feed(self, data: bytes) -> None:
        if not self._final:
            self._size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            raise UpstreamError("switched protocols, which nobody asked for") from exc
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            if isinstance(cause, UpstreamError):
                raise cause from None
            raise UpstreamError(f"answered what is no HTTP: {exc}") from exc
        if not self._final and self._size > HEAD_LIMIT:
            raise UpstreamError(f"answered with a head of more than {HEAD_LIMIT} bytes")

    def drop(self) -> None:
        self._parser = None

    def on_message_begin(self) -> None:
        if self._final:
            self._answer.on_surplus()
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._final or (100 <= status < 200 and status != 101):
            return
        self._final = True
        self._answer.on_head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        self._answer.on_body(data)

    def on_message_complete(self) -> None:
        if self._final:
            self._answer.on_complete(self._parser.should_keep_alive())


class H11Parser:
    """The parser that uvicorn always brings; it is told what was asked, so that it knows HEAD."""

    def __init__(self, answer: Answer, method: bytes) -> None:
        self._answer = answer
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
        asked = method if method != b"CONNECT" else b"GET"
        self._parser.send(h11.Request(method=asked, target="/", headers=[("host", "x")]))
        self._parser.send(h11.EndOfMessage())

    def feed(self, data: bytes) -> None:
        try:
            self._parser.receive_data(data)
            while (event := self._parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                self._take(event)
        except h11.RemoteProtocolError as exc:
            raise UpstreamError(f"answered what is no HTTP: {exc}") from exc
        if self._parser.trailing_data[0] and self._parser.their_state in (h11.DONE, h11.MUST_CLOSE):
            self._answer.on_surplus()

    def drop(self) -> None:
        """Nothing here refers to the parser."""

    def _take(self, event: Any) -> None:
        if isinstance(event, h11.Response):
            self._answer.on_head(event.status_code, list(event.headers))
        elif isinstance(event, h11.Data):
            self._answer.on_body(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            self._answer.on_complete(self._parser.their_state is h11.DONE)
