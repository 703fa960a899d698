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
from urllib.parse import unquote_to_bytes

from kernel.config import Upstream
from kernel.connection import Answer, Body, Connection, Headers, request_head
from kernel.errors import UpstreamConnectionError, UpstreamError, UpstreamTimeout
from kernel.log import RequestInfo
from kernel.queue import FairQueue

KEPT = 64  # idle connections
NEXT_ADDRESS = 0.25  # seconds until the next address of a name is tried, too (RFC 8305)
AUTHORIZATION = b"authorization"
SAFE = ("GET", "HEAD", "OPTIONS")
# Running one of these twice does no harm
REPEATABLE = frozenset(
    b"/api/chat /api/generate /api/embed /api/embeddings /api/show /v1/chat/completions"
    b" /v1/completions /v1/embeddings /v1/messages /v1/responses".split()
)
FAILURES: list[tuple[Any, str]] = [
    (TimeoutError, "no connection to {url} in time; is upstream.url right, is a firewall between?"),
    (ConnectionRefusedError, "nothing answers at {url}: is Ollama running there? See upstream.url"),
    ((socket.gaierror, UnicodeError), "no such name: {url} ({exc}); is upstream.url right?"),
    (ssl.SSLCertVerificationError, "{url} is not trusted ({exc}); SSL_CERT_FILE may help"),
    (ssl.SSLError, "{url} does not speak TLS ({exc}); does upstream.url have to begin with http:?"),
    (Exception, "cannot connect to {url}: {exc}"),
]


class OllamaClient:
    """One upstream; leave it to close the idle connections. Times are in seconds.

    In `queue` wait the requests that ask a model. `credentials`, if there are any, are sent in the
    place of what clients send as `Authorization`.
    """

    def __init__(
        self,
        upstream: Upstream,
        connect_timeout: float,
        keep: float = 60.0,
        queue: FairQueue | None = None,
        credentials: str = "",
    ) -> None:
        self.upstream = upstream
        self._credentials = [(AUTHORIZATION, credentials.encode())] if credentials else []
        self._connect_timeout = connect_timeout
        self._keep_seconds = keep
        self._queue = queue
        self._host = (b"host", upstream.authority.encode())
        self._base = upstream.base.encode()
        self._ssl = ssl.create_default_context() if upstream.scheme == "https" else None
        self._idle: list[Connection] = []  # the one used last stands last

    async def __aenter__(self) -> Self:
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._sweeper.cancel()
        while self._idle:
            self._idle.pop().transport.abort()

    async def forward(
        self,
        method: str,
        target: bytes,
        headers: Headers,
        body: Body = None,
        known: RequestInfo | None = None,
    ) -> Answer:
        """Send a request as it is and return when its answer begins.

        `target` is the raw path and query; Host is added. A body that comes in pieces gets a new
        connection. Where there is a queue, `known` waits for its turn to ask a model, and has a
        place until the answer is complete or closed. Raises UpstreamConnectionError,
        UpstreamTimeout or UpstreamError; what iterating over `body` raises comes out unchanged.
        """
        if self._queue and known and method == "POST" and asks_model(target):
            leave = await self._queue.enter(known)
            try:
                answer = await self.forward(method, target, headers, body)
            except BaseException:
                leave()
                raise
            answer.at_end(leave)
            return answer
        repeatable = method in SAFE or target.partition(b"?")[0] in REPEATABLE
        streams = not (body is None or isinstance(body, bytes))
        kept = None if streams else self._kept(quiet=not repeatable)
        answer = Answer(kept or await self._connect(), method)
        if self._credentials:
            headers = [pair for pair in headers if pair[0] != AUTHORIZATION] + self._credentials
        head, body = request_head(method, self._base + target, [self._host, *headers], body)
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

    async def ask(
        self, path: str, body: dict[str, Any] | None = None, known: RequestInfo | None = None
    ) -> Any:
        """GET `path`, or POST `body` to it, and return the JSON of the answer.

        Raises UpstreamError, with Ollama's own text when the status is not 200.
        """
        content = await whole(await self.stream(path, body, known))
        try:
            return json.loads(content)
        except ValueError as exc:
            raise UpstreamError(f"{path} answered something other than JSON: {exc}") from exc

    async def stream(
        self, path: str, body: dict[str, Any] | None = None, known: RequestInfo | None = None
    ) -> Answer:
        """Ask as `ask` does, and return the answer as it comes; the caller closes it."""
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        headers = [(b"accept-encoding", b"identity"), (b"content-type", b"application/json")]
        answer = await self.forward(method, path.encode(), headers, data, known)
        if answer.status == 200:
            return answer
        text = (await whole(answer))[:500].decode(errors="replace")
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

    async def _sweep(self) -> None:
        """Close what has been idle for too long."""
        while True:
            await asyncio.sleep(self._keep_seconds / 20)
            old = time.monotonic() - self._keep_seconds
            while self._idle and self._idle[0].idle_since < old:
                self._idle.pop(0).transport.abort()

    async def _connect(self) -> Connection:
        """Connect to the first address that answers. Raises UpstreamError with the cause.

        No other connection stays, nor this one where the client leaves in this very moment.
        """
        loop, to, dials = asyncio.get_running_loop(), self.upstream, list[asyncio.Task[Any]]()
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._connect_timeout):
                found = await loop.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
                connection = await self._dial([str(address[0]) for *_, address in found], dials)
                return connection
        except (OSError, UnicodeError) as exc:
            text = next(text for kinds, text in FAILURES if isinstance(exc, kinds))
            error = UpstreamTimeout if isinstance(exc, TimeoutError) else UpstreamConnectionError
            raise error(text.format(url=to.url, exc=exc)) from exc
        finally:
            while dials:  # emptied: their exceptions refer to this frame
                made = dials[-1].done() and not dials[-1].exception() and dials[-1].result()[1]
                if made and made is not connection:
                    made.transport.abort()
                dials.pop().cancel()

    async def _dial(self, hosts: list[str], dials: list[asyncio.Task[Any]]) -> Connection:
        """Return the first connection that one of `dials` makes; they are added. Raises OSError.

        An address is tried as soon as one before failed, or after a moment (happy eyeballs).
        """
        loop, to = asyncio.get_running_loop(), self.upstream
        made = partial(Connection, to.url, self._keep)
        name = to.host if self._ssl else None
        connect = partial(loop.create_connection, made, ssl=self._ssl, server_hostname=name)
        while hosts or not all(dial.done() for dial in dials):
            if hosts:
                dials.append(loop.create_task(connect(hosts.pop(0), to.port)))
            await asyncio.wait(
                [dial for dial in dials if not dial.done()],
                timeout=NEXT_ADDRESS if hosts else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            winners = (dial for dial in dials if dial.done() and not dial.exception())
            if winner := next(winners, None):
                connection: Connection = winner.result()[1]
                return connection
        raise dials[-1].exception() or OSError("no address")


def asks_model(target: bytes) -> bool:
    """Tell whether a POST to a raw path and query makes a model work."""
    path = unquote_to_bytes(target.partition(b"?")[0])
    return path != b"/api/show" and (path in REPEATABLE or path == b"/v1/images/generations")


async def whole(answer: Answer) -> bytes:
    """Return the body of an answer."""
    async with aclosing(answer):
        return b"".join([chunk async for chunk in answer])
