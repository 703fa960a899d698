"""Health: GET /health, 200 when Ollama answers and 503 when it does not.

`GET /health?live` is 200 while the proxy serves, whatever Ollama does. What asks for the health of
many servers has no key: where one is needed, it is told the status alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kernel.client import OllamaClient
from kernel.errors import UpstreamError
from kernel.log import info
from kernel.plugin import loaded
from kernel.readable import answer
from kernel.registry import PluginRegistry

KEYLESS = ["/health"]


def routes(client: OllamaClient, registry: PluginRegistry, *, keys: bool) -> list[Route]:
    """`keys` says that a key is needed to see more than the status."""
    endpoint = partial(health, client, registry, keys)
    return [Route("/health", endpoint, methods=["GET"], name="health")]


async def health(
    client: OllamaClient, registry: PluginRegistry, keys: bool, request: Request
) -> Response:
    """Return status, upstream (url, and version or error) and agents."""
    if "live" in request.query_params:
        return answer(request, {"status": "ok"})
    upstream = {"url": client.upstream.url}
    try:
        upstream["version"] = await client.version()
    except UpstreamError as exc:
        upstream["error"] = str(exc)
    status, code = ("error", 503) if "error" in upstream else ("ok", 200)
    body: dict[str, Any] = {"status": status}
    if not keys or info(request.scope).user:
        body |= {"upstream": upstream, "agents": loaded(registry.plugins)}
    return answer(request, body, code)
