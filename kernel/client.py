"""Client: everything that is sent to Ollama goes through here.

`forward` hands a client's request on as it is and gives an `Answer` of our own; `ask` is for
agents and `/health`, which want JSON. No read time-out (a cold model loads for minutes, silently),
no limit on connections (queueing is Ollama's), no redirect followed, no proxy of the environment.
Every `httpx.TransportError` leaves this file as one of our errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import httpx

from kernel.config import Upstream
from kernel.errors import UpstreamConnectionError, UpstreamError, UpstreamTimeout

Headers = list[tuple[bytes, bytes]]
Body = bytes | AsyncIterable[bytes] | None

# What may be sent again when a kept connection turns out to be dead
SAFE = ("GET", "HEAD", "OPTIONS")
REPEATABLE = (
    b"/api/chat /api/generate /api/embed /api/embeddings /api/show"
    b" /v1/chat/completions /v1/completions /v1/embeddings".split()
)


class KeptConnectionDied(httpx.NetworkError):
    """The connection was not a new one, and broke off before an answer began."""


@dataclass(slots=True)
class Answer:
    """Ollama's answer: iterate over its body as the bytes come, and close it on every way out.

    Iterating raises UpstreamError when the body ends before it is complete.
    """

    status: int
    headers: Headers  # as they came, in order, duplicates and all
    _body: httpx.AsyncByteStream
    _url: str

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with translated(self._url):
            async for chunk in self._body:
                yield chunk

    def header(self, name: bytes) -> bytes:
        """Return the first value of a header, by its name in lower case, or nothing."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    async def aclose(self) -> None:
        """Close the exchange, as often as you like; what was not read to its end is cut off."""
        await self._body.aclose()


class OllamaClient:
    """One upstream; enter it before use, leave it to close what is kept alive."""

    def __init__(self, upstream: Upstream, connect_timeout: float) -> None:
        self.upstream = upstream
        self._connect_timeout = connect_timeout
        self._timeouts = httpx.Timeout(None, connect=connect_timeout).as_dict()
        # The transport alone, without httpx's client: that follows cookies, redirects and .netrc.
        self._transport = httpx.AsyncHTTPTransport(
            verify=upstream.scheme == "https",  # the CA bundle takes 80 ms to load
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._transport.aclose()

    async def forward(
        self,
        method: str,
        target: bytes,
        headers: Headers,
        body: Body = None,
    ) -> Answer:
        """Send a request as it is and return when its answer begins.

        `target` is the raw path and query; Host is added. Raises UpstreamConnectionError,
        UpstreamTimeout or UpstreamError; what iterating over `body` raises comes out unchanged.
        """
        # httpx would quote and normalise a URL; the extension keeps the target's bytes.
        extensions = {"timeout": self._timeouts, "target": self.upstream.base.encode() + target}
        host = (b"host", self.upstream.authority.encode())
        send = partial(self._send, method, [host, *headers], body, extensions)
        with translated(self.upstream.url):
            try:
                return await send()
            except KeptConnectionDied:
                # Nothing of an answer came, perhaps because nobody was there any more to read the
                # request. Once more, where the bytes are still here and running twice does no harm.
                path = target.partition(b"?")[0]
                if isinstance(body, AsyncIterable) or not (method in SAFE or path in REPEATABLE):
                    raise
                return await send()

    async def _send(
        self, method: str, headers: Headers, body: Body, extensions: dict[str, Any]
    ) -> Answer:
        connected: list[str] = []

        async def trace(event: str, info: object) -> None:
            connected.extend([event] if event.startswith("connection.connect_") else [])

        url, extensions = self.upstream.url, {**extensions, "trace": trace}
        request = httpx.Request(method, url, headers=headers, content=body, extensions=extensions)
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx.NetworkError, httpx.RemoteProtocolError) as exc:
            raise exc if connected else KeptConnectionDied(str(exc)) from exc
        assert isinstance(response.stream, httpx.AsyncByteStream)
        return Answer(response.status_code, response.headers.raw, response.stream, url)

    async def version(self) -> str:
        """Return Ollama's version. Raises UpstreamError, also when it takes as long as connecting
        may: this is asked to learn whether Ollama is alive."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                return str((await self.ask("/api/version"))["version"])
        except TimeoutError as exc:
            raise UpstreamTimeout(f"no answer from Ollama at {self.upstream.url} in time") from exc
        except (LookupError, TypeError) as exc:
            raise UpstreamError(f"what answers at {self.upstream.url} is no Ollama") from exc

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET `path`, or POST `body` to it, and return the JSON of the answer.

        Raises UpstreamError, with Ollama's own text, for an answer that is none.
        """
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        headers = [(b"accept-encoding", b"identity"), (b"content-type", b"application/json")]
        async with aclosing(await self.forward(method, path.encode(), headers, data)) as answer:
            content = b"".join([chunk async for chunk in answer])
        try:
            if answer.status == 200:
                return json.loads(content)
        except ValueError as exc:
            raise UpstreamError(f"{path} answered something that is no JSON: {exc}") from exc
        text = content[:500].decode(errors="replace")
        raise UpstreamError(f"{path} answered {answer.status}: {text}")


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Raise httpx's errors as ours."""
    try:
        yield
    except httpx.ConnectTimeout as exc:
        raise UpstreamTimeout(f"no connection to Ollama at {url} in time") from exc
    except httpx.ConnectError as exc:
        text = f"nothing answers at {url}: is Ollama running there? upstream.url says where it is"
        raise UpstreamConnectionError(text) from exc
    except (httpx.TransportError, httpx.StreamError) as exc:
        raise UpstreamError(f"Ollama at {url} broke off: {exc or type(exc).__name__}") from exc
