"""Pass-through: every path that no other slice has, with every method, forwarded unread.

It is the router's default and no route, so that no path escapes it: a pattern would miss `*`, a
newline that was percent-encoded, and whatever a client may think of next.
"""

from __future__ import annotations

from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from kernel import relay
from kernel.client import OllamaClient
from kernel.errors import UpstreamError


def endpoint(client: OllamaClient) -> ASGIApp:
    return partial(passthrough, client)


async def passthrough(client: OllamaClient, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await relay.forward(client, scope, relay.Upload(scope, receive), receive, send)
    except UpstreamError as exc:
        await relay.refuse(scope, send, exc)
