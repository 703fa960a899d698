"""Pass-through: every path that no other slice has, with every method, forwarded unread.

It is the router's default and no route, so that no path escapes it: a pattern would miss `*`, an
escaped newline, and other forms. Guards refuse what may carry text to a model.
"""

from __future__ import annotations

from starlette.types import ASGIApp

from kernel.client import OllamaClient
from kernel.guards import Forward, Guards


def endpoint(client: OllamaClient, guards: Guards) -> ASGIApp:
    return Forward(client, guards)
