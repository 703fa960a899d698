"""Generate: what a model is asked in other ways than a chat, forwarded unread and without agents.

POST /api/generate and /v1/completions. Guards refuse them.
"""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.guards import Forward, Guards


def routes(client: OllamaClient, guards: Guards) -> list[Route]:
    return [Route(path, Forward(client, guards)) for path in ("/api/generate", "/v1/completions")]
