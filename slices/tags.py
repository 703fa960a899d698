"""Tags: the lists of models, GET /api/tags and /v1/models, forwarded unread."""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.relay import Forward


def routes(client: OllamaClient) -> list[Route]:
    return [Route(path, Forward(client), name=path) for path in ("/api/tags", "/v1/models")]
