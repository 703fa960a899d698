"""Embeddings: POST /api/embed, /api/embeddings and /v1/embeddings, forwarded unread.

Guards refuse them, unless they exempt the path.
"""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.guards import Forward, Guards


def routes(client: OllamaClient, guards: Guards) -> list[Route]:
    paths = ("/api/embed", "/api/embeddings", "/v1/embeddings")
    return [Route(path, Forward(client, guards), name=path) for path in paths]
