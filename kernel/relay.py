"""Relay: carries a request to Ollama and its answer to the client, as both come.

Nothing is collected on the way, and the upstream is closed on every way out: when the answer has
ended, when the client leaves in whatever phase, when anything fails. An answer that the upstream
breaks off is never ended as if it were whole.

There is one consumer of `receive()` at a time: `Upload` reads the body, and when that is read
`Watch` waits for the client's leaving, which nobody would notice otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Self

from starlette.types import Receive, Scope, Send

from kernel import dialects
from kernel.client import OllamaClient
from kernel.connection import Answer, Body, Headers
from kernel.errors import BrokenAnswer, ClientDisconnected, OSPError, UpstreamError
from kernel.log import facts

# RFC 9110 section 7.6.1, with the older names that Ollama's own proxy strips
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive proxy-authenticate proxy-authorization te trailer"
    b" transfer-encoding upgrade".split()
)


async def forward(
    client: OllamaClient,
    scope: Scope,
    upload: Upload,
    receive: Receive,
    send: Send,
    body: Body = None,
) -> None:
    """Send the client's own request, or `body` in the place of its body, and relay the answer.

    Raises UpstreamError as long as nothing was answered, and ClientDisconnected.
    """
    target, headers = target_of(scope), request_headers(scope, client)
    if body is not None:
        headers = [pair for pair in headers if pair[0] != b"content-length"]
    elif upload.expected:
        body = await upload.at_once()
    with Watch(receive, after=upload):
        async with aclosing(await client.forward(scope["method"], target, headers, body)) as answer:
            last = await relay(answer, send)
    await send_end(send, last)


async def relay(answer: Answer, send: Send, extra: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Send an answer on as its bytes come, and return the last ones, which leave with its end.

    Raises BrokenAnswer.
    """
    await start(send, answer.status, [*response_headers(answer), *extra])
    try:
        while chunk := await answer.read():
            if answer.complete:
                return chunk
            await send_chunk(send, chunk)
    except UpstreamError as exc:
        raise BrokenAnswer(str(exc)) from exc
    return b""


class Upload:
    """The request's body: an async iterator of its bytes, or read at once up to a limit."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        framing = (b"content-length", b"transfer-encoding")
        self.expected = any(name in framing for name, _ in scope["headers"])
        self.done = asyncio.Event()
        self._receive = receive
        self._kept: list[bytes] = []
        if not self.expected:
            self.done.set()

    async def read(self, limit: int) -> bytes | None:
        """Return the whole body, or None if it is longer than `limit` bytes.

        Iterating afterwards still gives all of it. Raises ClientDisconnected.
        """
        size = 0
        while size <= limit and not self.done.is_set():
            self._kept.append(await self._next())
            size += len(self._kept[-1])
        return b"".join(self._kept) if size <= limit else None

    async def at_once(self) -> bytes | Self:
        """Return the body as bytes where it came in one message, else this, to iterate over."""
        if not self.done.is_set() and not self._kept:
            self._kept.append(await self._next())
        return b"".join(self._kept) if self.done.is_set() else self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._kept:
            yield self._kept.pop(0)
        while not self.done.is_set():
            if chunk := await self._next():
                yield chunk

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        if not message.get("more_body", False):
            self.done.set()
        return bytes(message.get("body", b""))


class Watch:
    """Cancel the block inside when the client leaves; it then ends with ClientDisconnected.

    It waits until `after` is read, because only one may call `receive()`, and then a moment more:
    most answers are there before it would begin, and they cost no task.
    """

    GRACE = 0.02  # seconds

    def __init__(self, receive: Receive, after: Upload) -> None:
        self._receive = receive
        self._after = after
        self._left = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._block = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self.GRACE, self._begin)
        return self

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        await self._after.done.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        assert self._block
        self._block.cancel()

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        # Nothing is awaited here, so a cancel of ours has always arrived inside the block.
        self._timer.cancel()
        if self._watcher:
            self._watcher.cancel()
        if self._left and self._block and isinstance(exc, asyncio.CancelledError):
            if self._block.uncancel() == 0:  # and nobody else cancelled it, too
                raise ClientDisconnected from exc


def target_of(scope: Scope) -> bytes:
    """Return path and query as the client wrote them."""
    path, query = scope["raw_path"], scope["query_string"]
    return bytes(path + b"?" + query if query else path)


def request_headers(scope: Scope, client: OllamaClient) -> Headers:
    """Return the headers that go upstream: the client's own, less Host and the hop-by-hop ones.

    `Expect` was answered here. A page of our own origin is one of Ollama's own origin to Ollama.
    """
    dropped = ends_here(scope["headers"]) | {b"host", b"expect"}
    kept = [pair for pair in scope["headers"] if pair[0] not in dropped]
    if not any(name == b"origin" for name, _ in kept):
        return kept
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    ours = {b"http://" + host, b"https://" + host}
    theirs = f"{client.upstream.scheme}://{client.upstream.authority}".encode()
    return [
        (name, theirs if name == b"origin" and value in ours else value) for name, value in kept
    ]


def response_headers(answer: Answer) -> Headers:
    """Return the headers that go to the client: Ollama's own, less the hop-by-hop ones."""
    dropped = ends_here(answer.headers)
    if answer.status in (204, 304) or answer.header(b"transfer-encoding"):
        dropped |= {b"content-length"}  # it is not the body's: uvicorn would take it for that
    return [pair for pair in answer.headers if pair[0] not in dropped]


def ends_here(headers: Headers) -> frozenset[bytes]:
    """Return the names of hop-by-hop headers: the known ones and those that `Connection` lists."""
    listed = [value for name, value in headers if name == b"connection"]
    return HOP_BY_HOP.union(*(value.lower().replace(b" ", b"").split(b",") for value in listed))


async def start(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_chunk(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def send_end(send: Send, chunk: bytes = b"") -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": False})


async def respond(scope: Scope, send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send an answer of our own, with the CORS headers that Ollama would have given."""
    length = (b"content-length", b"%d" % len(body))
    await start(send, status, [*headers, length, *facts(scope).cors])
    await send_end(send, body)


async def refuse(
    scope: Scope, send: Send, exc: OSPError, extra: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Send an error in the dialect of the path."""
    if isinstance(exc, UpstreamError):
        facts(scope).outcome = "upstream_failed"
    content_type, body = dialects.error(scope["path"], exc.status, str(exc))
    await respond(scope, send, exc.status, [(b"content-type", content_type), *extra], body)
