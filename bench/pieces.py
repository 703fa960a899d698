"""Pieces: less than the proxy, to see what each of its parts costs.

    python pieces.py PORT PIECE UPSTREAM

`answer` is the server with an app that answers at once, `relay` the server with nothing but
`relay.forward` and the client: no access check, no log line, no routes.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel import relay
from kernel.client import OllamaClient
from kernel.config import parse_upstream
from kernel.log import RequestInfo
from kernel.server import SETTINGS, Server, listen


def create_app(piece: str, upstream: str) -> ASGIApp:
    client = OllamaClient(parse_upstream(upstream), 5.0)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        known = scope["osp"] = RequestInfo("bench")
        known.read(scope["headers"])
        await relay.forward(client, scope, receive, send)

    return {"answer": answer, "relay": forward}[piece]


def main(port: int, piece: str, upstream: str) -> None:
    settings = {**SETTINGS, "lifespan": "off"}
    config = uvicorn.Config(create_app(piece, upstream), **settings)
    with listen("127.0.0.1", port) as listener:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
