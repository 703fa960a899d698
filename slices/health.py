"""Health: GET /health, 200 when Ollama answers and 503 when it does not, and what runs here.

`GET /health?live` is 200 while the proxy serves, whatever Ollama does.
"""

from __future__ import annotations

import time
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.errors import UpstreamError
from kernel.plugin import loaded
from kernel.registry import PluginRegistry


def routes(client: OllamaClient, registry: PluginRegistry) -> list[Route]:
    endpoint = partial(health, client, registry, time.monotonic())
    return [Route("/health", endpoint, methods=["GET"], name="health")]


async def health(
    client: OllamaClient, registry: PluginRegistry, started: float, request: Request
) -> JSONResponse:
    """Return status, upstream (url, version, latency in milliseconds), agents, uptime (seconds)."""
    if "live" in request.query_params:
        return JSONResponse({"status": "ok"})
    upstream: dict[str, object] = {"url": client.upstream.url}
    began = time.perf_counter()
    try:
        upstream["version"] = await client.version()
        upstream["latency_ms"] = round((time.perf_counter() - began) * 1000, 1)
    except UpstreamError as exc:
        upstream["error"] = str(exc)
    body = {
        "status": "error" if "error" in upstream else "ok",
        "upstream": upstream,
        "agents": loaded(registry.plugins),
        "uptime": round(time.monotonic() - started, 1),
    }
    status = 503 if "error" in upstream else 200
    return JSONResponse(body, status)
