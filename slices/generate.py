"""Generate: what a model is asked in other ways than a chat, forwarded unread.

POST /api/generate, /v1/completions, /v1/messages and /v1/responses. No agent takes part here: a
completion has no conversation that could ask for one. Where a guard is set up it is refused, then.
"""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.forward import Forward
from kernel.models import Presets
from kernel.registry import PluginRegistry


def routes(client: OllamaClient, registry: PluginRegistry, presets: Presets) -> list[Route]:
    paths = ("/api/generate", "/v1/completions", "/v1/messages", "/v1/responses")
    return [Route(path, Forward(client, presets, registry), name=path) for path in paths]
