"""Plugins: GET /plugins, every agent, loaded, disabled or failed, and why.

The text of an error may name a path or a value of the settings: it is shown to those who have a
key and, where none is set up, to this machine. Others see its type, file and line.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kernel.access import is_operator
from kernel.foreign import safe_text
from kernel.metrics import Metrics
from kernel.plugin import Plugin
from kernel.readable import answer
from kernel.registry import PluginRegistry

CONFIG = ("arguments", "always", "priority", "models", "on_error", "exempt")  # keys that are shown


def routes(registry: PluginRegistry, *, metrics: Metrics | None = None) -> list[Route]:
    return [Route("/plugins", partial(plugins, registry, metrics), methods=["GET"], name="plugins")]


async def plugins(registry: PluginRegistry, metrics: Metrics | None, request: Request) -> Response:
    operator = is_operator(request.scope)
    listed = [about(name, p, metrics, operator) for name, p in registry.plugins.items()]
    return answer(request, {"plugins": listed})


def about(name: str, plugin: Plugin, metrics: Metrics | None, operator: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": name,
        "status": plugin.status,
        "description": plugin.description,
        "folder": str(plugin.folder),
        "hooks": plugin.hooks,
        "tools": plugin.tools,
        "progress": safe_text(lambda: getattr(plugin.agent, "progress", "")),
    }
    shown |= {key: getattr(plugin.config, key) for key in CONFIG}
    if metrics:
        shown["counts"] = metrics.agent(plugin.name)
    if error := plugin.error:
        shown["error"] = {"type": error.kind, "where": error.where}
        shown["error"] |= {"text": str(error)} if operator else {}
    return shown
