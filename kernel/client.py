"""Client: everything that is sent to Ollama goes through here.

`forward` hands a client's request on as it is and gives its answer as it comes; `ask` is for
agents and `/health`, which want JSON. No read time-out (a cold model loads for minutes, silently),
no limit on connections (queueing is Ollama's), no redirect followed, no proxy of the environment.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any, Self

from kernel.config import Upstream
from kernel.connection import Answer, Body, Headers, Transport
from kernel.errors import UpstreamError, UpstreamTimeout


class OllamaClient:
    """One upstream; leave it to close what is kept alive."""

    def __init__(self, upstream: Upstream, connect_timeout: float) -> None:
        self.upstream = upstream
        self._connect_timeout = connect_timeout
        self._transport = Transport(upstream, connect_timeout)
        self._host = (b"host", upstream.authority.encode())
        self._base = upstream.base.encode()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._transport.close()

    async def forward(
        self, method: str, target: bytes, headers: Headers, body: Body = None
    ) -> Answer:
        """Send a request as it is and return when its answer begins.

        `target` is the raw path and query; Host is added. Raises UpstreamConnectionError,
        UpstreamTimeout or UpstreamError; what iterating over `body` raises comes out unchanged.
        """
        return await self._transport.open(
            method.encode(), self._base + target, [self._host, *headers], body
        )

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
