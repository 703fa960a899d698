"""Client: everything that is sent to Ollama, and the connections that are kept for it.

`forward` sends a client's request on and returns its answer as it comes; `ask` is for agents and
`/health`, which want JSON. No read time-out (a cold model loads for minutes, silently), no limit
on connections (Ollama queues), no redirect followed, no proxy of the environment.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from contextlib import aclosing
from functools import partial
from typing import Any, Self

from kernel.address import Upstream
from kernel.connection import Answer, Body, Connection, Headers, request_head
from kernel.errors import UpstreamConnectionError, UpstreamError, UpstreamTimeout

Dials = list[asyncio.Task[Connection]]

KEPT = 64  # idle connections
NEXT_ADDRESS = 0.25  # seconds until the next address of a name is tried, too (RFC 8305)
SAFE = ("GET", "HEAD", "OPTIONS")
# Running one of these twice does no harm
REPEATABLE = frozenset(
    b"/api/chat /api/generate /api/embed /api/embeddings /api/show /v1/chat/completions"
    b" /v1/completions /v1/embeddings /v1/messages /v1/responses".split()
)
NO_NAME = "no such name: {url} cannot be looked up ({exc}); is upstream.url right?"
FAILURES: list[tuple[type[Exception], str]] = [
    (TimeoutError, "no connection to {url} in time; is upstream.url right, is a firewall between?"),
    (ConnectionRefusedError, "nothing answers at {url}: is Ollama running there? See upstream.url"),
    (socket.gaierror, NO_NAME),
    (UnicodeError, NO_NAME),
    (
        ssl.SSLCertVerificationError,
        "the certificate of {url} is not trusted ({exc}); SSL_CERT_FILE may name it",
    ),
    (ssl.SSLError, "{url} does not speak TLS ({exc}); does upstream.url have to begin with http:?"),
    (Exception, "cannot connect to {url}: {exc}"),
]


class OllamaClient:
    """One upstream; leave it to close the idle connections. Times are in seconds."""

    def __init__(self, upstream: Upstream, connect_timeout: float, keep: float = 60.0) -> None:
        self.upstream = upstream
        self._connect_timeout = connect_timeout
        self._keep_seconds = keep
        self._host = (b"host", upstream.authority.encode())
        self._base = upstream.base.encode()
        self._ssl = ssl.create_default_context() if upstream.scheme == "https" else None
        self._idle: list[Connection] = []  # the one used last stands last
        self._sweeper: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._sweeper:
            self._sweeper.cancel()
        while self._idle:
            self._idle.pop().transport.abort()

    async def forward(
        self, method: str, target: bytes, headers: Headers, body: Body = None
    ) -> Answer:
        """Send a request as it is and return when its answer begins.

        `target` is the raw path and query; Host is added. A body that comes in pieces gets a new
        connection. Raises UpstreamConnectionError, UpstreamTimeout or UpstreamError; what iterating
        over `body` raises comes out unchanged.
        """
        repeatable = method in SAFE or target.partition(b"?")[0] in REPEATABLE
        streams = not (body is None or isinstance(body, bytes))
        kept = None if streams else self._kept(quiet=not repeatable)
        answer = Answer(kept or await self._connect(), method)
        head = request_head(method, self._base + target, [self._host, *headers], body)
        try:
            await answer.begin(head, body)
        except UpstreamError:
            # Ollama closed a kept connection at the same moment: once more on a new one
            if not kept or answer.began or not repeatable:
                raise
            answer = Answer(await self._connect(), method)
            await answer.begin(head, body)
        return answer

    async def version(self) -> str:
        """Return Ollama's version, within the time that connecting may take.

        Raises UpstreamError, UpstreamTimeout among them: it is asked whether Ollama is alive.
        """
        try:
            async with asyncio.timeout(self._connect_timeout):
                return str((await self.ask("/api/version"))["version"])
        except TimeoutError as exc:
            raise UpstreamTimeout(f"no answer from Ollama at {self.upstream.url} in time") from exc
        except (LookupError, TypeError) as exc:
            raise UpstreamError(f"what answers at {self.upstream.url} is not Ollama") from exc

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET `path`, or POST `body` to it, and return the JSON of the answer.

        Raises UpstreamError, with Ollama's own text when the status is not 200.
        """
        async with aclosing(await self.stream(path, body)) as answer:
            content = b"".join([chunk async for chunk in answer])
        try:
            return json.loads(content)
        except ValueError as exc:
            raise UpstreamError(f"{path} answered something other than JSON: {exc}") from exc

    async def stream(self, path: str, body: dict[str, Any] | None = None) -> Answer:
        """Ask as `ask` does, and return the answer as it comes; the caller closes it."""
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        headers = [(b"accept-encoding", b"identity"), (b"content-type", b"application/json")]
        answer = await self.forward(method, path.encode(), headers, data)
        if answer.status == 200:
            return answer
        async with aclosing(answer):
            text = b"".join([chunk async for chunk in answer])[:500].decode(errors="replace")
        raise UpstreamError(f"{path} answered {answer.status}: {text}")

    # Connections

    def _kept(self, *, quiet: bool) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing() and (not quiet or connection.is_quiet()):
                return connection
            connection.transport.abort()
        return None

    def _keep(self, connection: Connection) -> None:
        if len(self._idle) >= KEPT:
            return connection.transport.abort()
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if not self._sweeper:
            self._sweeper = connection.loop.call_later(self._keep_seconds, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long, and come again when the next one is due."""
        now, self._sweeper = time.monotonic(), None
        while self._idle and now - self._idle[0].idle_since >= self._keep_seconds:
            self._idle.pop(0).transport.abort()
        if self._idle:
            seconds = self._idle[0].idle_since + self._keep_seconds - now
            self._sweeper = asyncio.get_running_loop().call_later(seconds, self._sweep)

    async def _connect(self) -> Connection:
        """Connect to the first address that answers. Raises UpstreamError with the cause."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                return await self._race()
        except (OSError, UnicodeError) as exc:
            text = next(text for kind, text in FAILURES if isinstance(exc, kind))
            text = text.format(url=self.upstream.url, exc=exc)
            late = isinstance(exc, TimeoutError)
            raise (UpstreamTimeout if late else UpstreamConnectionError)(text) from exc

    async def _race(self) -> Connection:
        """Try each address as soon as the one before failed, or after a moment (happy eyeballs)."""
        loop, to = asyncio.get_running_loop(), self.upstream
        dials: Dials = []
        winner: Connection | None = None
        try:
            for info in await loop.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM):
                dials.append(loop.create_task(self._dial(info[4][0], dials[-1:], len(dials))))
            for dial in asyncio.as_completed(dials):
                try:
                    return (winner := await dial)
                except OSError as exc:
                    error = exc
            raise error
        finally:
            for task in dials:
                if not task.cancel() and not task.exception() and task.result() is not winner:
                    task.result().transport.abort()

    async def _dial(self, host: Any, before: Dials, nth: int) -> Connection:
        if before:
            await asyncio.wait(before, timeout=nth * NEXT_ADDRESS)
        loop, made = asyncio.get_running_loop(), partial(Connection, self.upstream.url, self._keep)
        name = self.upstream.host if self._ssl else None
        _, connection = await loop.create_connection(
            made, host, self.upstream.port, ssl=self._ssl, server_hostname=name
        )
        return connection
