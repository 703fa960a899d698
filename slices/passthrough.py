"""Pass-through: every path that no other slice has, with every method, forwarded unread.

It is the router's default and no route, so that no path escapes it: a pattern would miss `*`, a
newline that was percent-encoded, and whatever a client may think of next.
"""

from __future__ import annotations

from kernel.client import OllamaClient
from kernel.relay import Forward


def endpoint(client: OllamaClient) -> Forward:
    return Forward(client)
