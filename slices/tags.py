"""Tags: what models there are, forwarded as it is; routes of their own name it in the metrics."""

from __future__ import annotations

from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.guards import Forward, Guards

PATHS = ("/api/tags", "/api/show", "/v1/models", "/v1/models/{name:path}")


def routes(client: OllamaClient, guards: Guards) -> list[Route]:
    return [Route(path, Forward(client, guards), name=path) for path in PATHS]
