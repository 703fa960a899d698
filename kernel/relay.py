"""Relay: carries a request to Ollama and its answer to the client, as both come.

Nothing is collected on the way. The upstream is closed on every way out: when the answer has
ended, when anything fails, when the client leaves, which cancels the task that runs the app. An
answer that Ollama breaks off is never ended as if it were complete.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from kernel import dialects
from kernel.client import OllamaClient
from kernel.connection import FRAMING, Answer, Body, Headers
from kernel.errors import (
    Aborted,
    BrokenAnswer,
    ClientDisconnected,
    NotAllowed,
    OSPError,
    UpstreamError,
)
from kernel.log import HOP_BY_HOP, info

Extra = Sequence[tuple[bytes, bytes]]  # headers of the proxy's own

LENGTH = FRAMING[0]


async def forward(
    client: OllamaClient, scope: Scope, receive: Receive, send: Send, body: Body = None
) -> None:
    """Send the client's own request, or `body` in the place of its body, and relay the answer.

    Raises UpstreamError as long as nothing was answered, then BrokenAnswer, and ClientDisconnected.
    """
    headers = request_headers(scope, client)
    if body is not None:
        headers = [pair for pair in headers if pair[0] != LENGTH]
    else:
        upload = Upload.of(scope, receive)
        body = await upload.begin()
        if upload.expects_continue:
            headers = [*headers, (b"expect", b"100-continue")]
    target = target_of(scope)
    info(scope).waits = True
    sent = client.forward(scope["method"], target, headers, body, info(scope))
    async with aclosing(await sent) as answer:
        await relay(answer, scope, send)


async def relay(answer: Answer, scope: Scope, send: Send, extra: Extra = ()) -> None:
    """Send an answer, with `extra` headers, as its bytes come, and its end. Raises BrokenAnswer."""
    info(scope).relayed = True
    await start(send, answer.status, [*response_headers(answer), *extra])
    try:
        while chunk := await answer.read():
            if answer.complete:
                return await send_end(send, chunk)
            await send_chunk(send, chunk)
    except UpstreamError as exc:
        raise BrokenAnswer(str(exc)) from exc
    await send_end(send)


class Upload:
    """The body of a request: an async iterator of its pieces, or read up to a limit.

    There is one for a request, because each message of `receive()` comes once.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = dict(scope["headers"])
        self._receive = receive
        self._pieces: list[bytes] = []  # received, not yet iterated over
        self._done = not any(name in headers for name in FRAMING)
        expects = headers.get(b"expect", b"").lower()
        self.expects_continue = not self._done and expects == b"100-continue"

    @classmethod
    def of(cls, scope: Scope, receive: Receive) -> Upload:
        """Return the upload of this request."""
        upload: Upload = scope.get("osp.upload") or cls(scope, receive)
        scope["osp.upload"] = upload
        return upload

    async def read(self, limit: int) -> bytes | None:
        """Return the whole body, or None if it is longer than `limit` bytes.

        Iterating afterwards still gives all of it. Raises ClientDisconnected.
        """
        while not self._done and sum(map(len, self._pieces)) <= limit:
            await self._next()
        body = b"".join(self._pieces)
        return body if len(body) <= limit else None

    async def begin(self) -> Body:
        """Return the body as it is sent on: None if it is empty, bytes if all is here, else this.

        The first `receive()` tells a client that expects it to continue, so it is left to Ollama.
        """
        if not (self._done or self._pieces or self.expects_continue):
            await self._next()
        return (b"".join(self._pieces) or None) if self._done else self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._pieces or not self._done:
            if not self._pieces:
                await self._next()
            yield self._pieces.pop(0)

    async def _next(self) -> None:
        self.expects_continue = False
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        self._done = not message.get("more_body", False)
        self._pieces.append(bytes(message.get("body", b"")))


def target_of(scope: Scope) -> bytes:
    """Return path and query as the client wrote them."""
    path, query = scope["raw_path"], scope["query_string"]
    return bytes(path + b"?" + query if query else path)


def request_headers(scope: Scope, client: OllamaClient) -> Headers:
    """Return the headers that go upstream: the client's own, less those that end here.

    A page of the proxy's own origin becomes one of Ollama's own origin.
    """
    request = info(scope)
    if not request.origins:
        return request.headers
    own = {f"{scheme}://{request.host}".encode("latin-1") for scheme in ("http", "https")}
    theirs = f"{client.upstream.scheme}://{client.upstream.authority}".encode()
    return [
        (name, theirs if name == b"origin" and value in own else value)
        for name, value in request.headers
    ]


def response_headers(answer: Answer) -> Headers:
    """Return the headers that go to the client: Ollama's own, less the hop-by-hop ones."""
    kept, listed = [], [LENGTH] if answer.status in (204, 304) else []  # they have no body
    for pair in answer.headers:
        if pair[0] not in HOP_BY_HOP:
            kept.append(pair)
        elif pair[0] == b"connection":
            listed += pair[1].lower().replace(b" ", b"").split(b",")
    return [pair for pair in kept if pair[0] not in listed] if listed else kept


async def start(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_chunk(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def send_end(send: Send, chunk: bytes = b"") -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": False})


async def respond(scope: Scope, send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send an answer of the proxy's own."""
    await start(send, status, [*headers, (LENGTH, b"%d" % len(body))])
    await send_end(send, body)


async def refuse(scope: Scope, send: Send, exc: OSPError, extra: Extra = ()) -> None:
    """Send an error in the dialect of the path."""
    if isinstance(exc, UpstreamError):
        info(scope).outcome = "upstream_failed"
    if isinstance(exc, NotAllowed | Aborted):
        info(scope).forget()
    content_type, body = dialects.error(scope["path"], exc.status, str(exc))
    await respond(scope, send, exc.status, [(b"content-type", content_type), *extra], body)
