"""Embeddings: POST /api/embed, /api/embeddings and /v1/embeddings, forwarded unread."""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.forward import Forward
from kernel.models import Presets


def routes(client: OllamaClient, presets: Presets) -> list[Route]:
    paths = ("/api/embed", "/api/embeddings", "/v1/embeddings")
    return [Route(path, Forward(client, presets), name=path) for path in paths]
