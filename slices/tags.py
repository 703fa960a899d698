"""Tags: what models there are, GET /api/tags and /v1/models, with the operator's presets.

A preset stands there as a copy of its model's entry, and what asks about one (/api/show and
/v1/models/NAME) is asked about its model. Without presets the lists are Ollama's own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kernel import relay
from kernel.client import OllamaClient
from kernel.dialects import dumps, loads
from kernel.errors import UpstreamError
from kernel.forward import Forward
from kernel.models import Presets, canonical

Entry = dict[str, Any]

# Headers of a request that no longer fit: no body is sent, and the list is to be read
DROPPED = (b"accept-encoding", b"content-length")


def routes(client: OllamaClient, presets: Presets) -> list[Route]:
    return [
        Route("/api/tags", Tags(client, presets, "models", ("name", "model")), name="tags"),
        Route("/v1/models", Tags(client, presets, "data", ("id",)), name="models"),
        Route("/v1/models/{name:path}", Model(client, presets), name="model"),
        Route("/api/show", Forward(client, presets), name="show"),
    ]


@dataclass(frozen=True, slots=True)
class Tags:
    """A list of models: `key` is where it stands in the body, `names` what names an entry."""

    client: OllamaClient
    presets: Presets
    key: str
    names: tuple[str, ...]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.presets.named or scope["method"] != "GET":
            return await Forward(self.client, self.presets)(scope, receive, send)
        try:
            with relay.Watch(receive, after=relay.Upload(scope, receive)):
                last = await self.extended(scope, send)
            await relay.send_end(send, last)
        except UpstreamError as exc:
            await relay.refuse(scope, send, exc)

    async def extended(self, scope: Scope, send: Send) -> bytes:
        """Send the list, and return its last bytes."""
        headers = relay.request_headers(scope, self.client)
        headers = [pair for pair in headers if pair[0] not in DROPPED]
        async with aclosing(
            await self.client.forward("GET", relay.target_of(scope), headers)
        ) as answer:
            if answer.status != 200 or answer.header(b"content-encoding"):
                return await relay.relay(answer, send)
            body = b"".join([chunk async for chunk in answer])
        kept = [p for p in relay.response_headers(answer) if p[0] != b"content-length"]
        body = self.with_presets(body)
        await relay.start(send, 200, [*kept, (b"content-length", b"%d" % len(body))])
        return body

    def with_presets(self, body: bytes) -> bytes:
        try:
            listed = loads(body)
            listed[self.key] = [*listed[self.key], *self.added(listed[self.key])]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return body  # no list that we know
        return dumps(listed)

    def added(self, entries: list[Entry]) -> Iterator[Entry]:
        there = {canonical(entry[self.names[0]]): entry for entry in entries}
        for name, preset in self.presets.named.items():
            model = there.get(canonical(preset.model))
            if model and canonical(name) not in there:
                yield model | dict.fromkeys(self.names, name)


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of /v1/models, by its name."""

    client: OllamaClient
    presets: Presets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if preset := self.presets.find(scope["path_params"]["name"]):
            scope["raw_path"] = b"/v1/models/" + quote(preset.model, safe=":/").encode()
        await Forward(self.client, self.presets)(scope, receive, send)
