"""Guards: which requests may pass without the agents that nothing may pass without, and which of
those that no agent sees a key with `models` may send.

A guard is an always-on agent with `on_error = "abort"`. It sees the chat endpoints, which judge
themselves. Of all other requests those pass that carry no text for a model, and those to a path
that every guard concerned lists in its `exempt`. This is an allow-list: an endpoint that is not
known here is refused.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope, Send

from kernel import relay
from kernel.access import check_model
from kernel.client import OllamaClient
from kernel.dialects import dumps, loads_once
from kernel.errors import NotAllowed, UpstreamError
from kernel.log import info
from kernel.plugin import Plugin
from kernel.presets import Presets
from kernel.registry import PluginRegistry, refusal

# Ollama reads no body there, or none that reaches a model (server/routes.go)
NO_TEXT = ("GET", "HEAD", "DELETE", "OPTIONS")
LOOKS = ("GET", "HEAD", "OPTIONS")
OPEN = ("/api/show", "/api/pull", "/api/push", "/api/me", "/api/signout")
# Where `model` names the model that is asked. Elsewhere it may name another: /api/create makes it.
ASKS = frozenset(
    "/api/generate /api/embed /api/embeddings /v1/embeddings /v1/completions"
    " /v1/images/generations".split()
)
LOADING = ("model", "keep_alive", "options", "stream")


@dataclass(frozen=True, slots=True)
class Guards:
    """Judges the requests that no agent sees."""

    registry: PluginRegistry
    max_body: int  # bytes; a larger body cannot be read
    presets: Presets = field(default_factory=lambda: Presets({}))

    async def admit(self, scope: Scope, upload: relay.Upload) -> bytes | None:
        """Return the body to send, None for the client's own. Raises NotAllowed.

        Where the decision depended on the body, it is the one that was judged, encoded anew.
        """
        path = scope["path"]  # unescaped once, as Ollama's router reads it
        guards, known = self.concerned(path, None), info(scope)
        if scope["method"] in NO_TEXT or path in OPEN:
            guards = []
        bound = known.key.models and scope["method"] not in LOOKS
        if not (guards or bound):
            return None
        body = await upload.read(self.max_body)
        payload = read(body or b"")
        if bound:
            check_model(known, payload.get("model") if path in (*ASKS, "/api/show") else None)
        if path == "/api/generate" and is_loading(payload):
            return dumps(payload)
        if path in ASKS and isinstance(model := payload.get("model"), str):
            guards = self.concerned(path, self.presets.names(model))
        if guards:
            raise refusal(guards[0], path)
        return dumps(payload)

    def concerned(self, path: str, models: list[str] | None) -> list[Plugin]:
        """Return the guards of the models (None: any) that do not exempt a path."""
        return [g for g in self.registry.guards(models) if not is_exempt(g, path)]


@dataclass(frozen=True, slots=True)
class Forward:
    """An ASGI endpoint that forwards a request unchanged if the guards admit it."""

    client: OllamaClient
    guards: Guards

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self.guards.admit(scope, relay.Upload.of(scope, receive))
            await relay.forward(self.client, scope, receive, send, body)
        except (NotAllowed, UpstreamError) as exc:
            await relay.refuse(scope, send, exc)


def is_exempt(guard: Plugin, path: str) -> bool:
    """Tell whether a guard exempts a path or one above it; Ollama redirects from unclean paths."""
    exempt = tuple(f"{each.rstrip('/')}/" for each in guard.config.exempt)
    return posixpath.normpath(path) == path and f"{path}/".startswith(exempt)


def read(body: bytes) -> dict[str, Any]:
    """Return the object in a body, {} where Ollama could interpret it differently than we do."""
    try:
        value: dict[str, Any] = loads_once(body)
        misspelt = [key for key in value.keys() if key != "model" == key.casefold()]
    except (ValueError, RecursionError, AttributeError):  # not JSON, too deep, not an object
        return {}
    return {} if misspelt else value


def is_loading(payload: Mapping[str, Any]) -> bool:
    """Tell whether a request only loads or unloads a model: all else in it is empty."""
    return bool(payload) and not any(v for key, v in payload.items() if key not in LOADING)
