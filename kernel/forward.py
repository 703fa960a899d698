"""Forward: what names a model and is no chat, sent on without any agent.

A preset is replaced by its model. A guard had to see what its model is asked, and sees nothing
here: the request is refused. Without presets and guards it is forwarded unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from kernel import relay
from kernel.client import OllamaClient
from kernel.dialects import dumps, loads
from kernel.errors import NotAllowed, UpstreamError
from kernel.models import Presets
from kernel.registry import PluginRegistry

NAMING = ("model", "name")  # `name` is what /api/show once called it
READ = (*NAMING, "prompt")  # the keys that are looked at
LOADING = frozenset(("model", "keep_alive", "options", "stream"))


@dataclass(frozen=True, slots=True)
class Forward:
    """An ASGI endpoint that forwards a body which names a model; `registry` has its guards."""

    client: OllamaClient
    presets: Presets
    registry: PluginRegistry | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = relay.Upload(scope, receive)
        body = None
        try:
            guarded = self.registry and self.registry.guards()
            if scope["method"] == "POST" and (guarded or self.presets.named):
                read = await upload.read(self.presets.max_body)
                body = self.renamed(object_of(read or b""))
            await relay.forward(self.client, scope, upload, receive, send, body)
        except (NotAllowed, UpstreamError) as exc:
            await relay.refuse(scope, send, exc)

    def renamed(self, asked: dict[str, Any]) -> bytes | None:
        """Return a body that names a preset with its model, None for any other.

        Raises NotAllowed where a guard had to see it.
        """
        presets = {key: self.presets.find(asked.get(key)) for key in NAMING}
        models = {key: preset.model for key, preset in presets.items() if preset}
        model = models.get("model", asked.get("model"))
        if self.registry and not is_loading(asked):
            self.registry.check_guards(model if isinstance(model, str) else None)
        return dumps(asked | models) if models else None


def object_of(body: bytes) -> dict[str, Any]:
    """Return the object that a body is, or an empty one where Ollama may read it otherwise."""
    try:
        value = loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict) or any(misread(key) for key in value):
        return {}
    return value


def misread(key: str) -> bool:
    """Tell whether Go would take a key for a known one, whatever its case."""
    return key not in READ and key.casefold() in READ


def is_loading(asked: Mapping[str, Any]) -> bool:
    """Tell whether a request only loads or unloads a model.

    What else it says is empty then, as Ollama's own command sends it. A null is not: to Go it
    leaves the string as it was that stood under the same key before.
    """
    rest = [value for key, value in asked.items() if key not in LOADING]
    return bool(asked) and not any(value or value is None for value in rest)
