"""Plugins: GET /plugins, every agent, loaded, disabled or failed, and why.

Of an error its type, file and line are shown; its text is in the log, because it may hold a secret.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from kernel.log import cors_headers
from kernel.metrics import Metrics
from kernel.plugin import Plugin
from kernel.registry import PluginRegistry


def routes(registry: PluginRegistry, metrics: Metrics) -> list[Route]:
    endpoint = partial(plugins, registry, metrics)
    return [Route("/plugins", endpoint, methods=["GET"], name="plugins")]


async def plugins(registry: PluginRegistry, metrics: Metrics, request: Request) -> JSONResponse:
    listed = [described(name, plugin, metrics) for name, plugin in registry.plugins.items()]
    return JSONResponse({"plugins": listed}, headers=cors_headers(request.scope))


def described(name: str, plugin: Plugin, metrics: Metrics) -> dict[str, Any]:
    config = plugin.config
    facts: dict[str, Any] = {
        "name": name,
        "status": plugin.status,
        "description": plugin.description,
        "folder": str(plugin.folder),
        "arguments": dict(config.arguments),
        "hooks": plugin.hooks,
        "always": config.always,
        "priority": config.priority,
        "models": list(config.models),
        "on_error": config.on_error,
        "progress": plugin.agent.progress if plugin.agent else "",
        "counts": metrics.agent(plugin.name),
    }
    if plugin.error:
        facts["error"] = {"type": plugin.error.kind, "where": plugin.error.where}
    return facts
