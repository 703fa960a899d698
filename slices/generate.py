"""Generate: POST /api/generate and /v1/completions, forwarded unread.

No agent takes part here: a completion has no conversation that could ask for one.
"""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.relay import Forward


def routes(client: OllamaClient) -> list[Route]:
    paths = ("/api/generate", "/v1/completions")
    return [Route(path, Forward(client), name=path) for path in paths]
