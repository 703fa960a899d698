"""Naive: the forwarder that one writes in ten minutes, to measure against.

    python naive.py PORT UPSTREAM

Starlette and httpx as their documentation shows them: one AsyncClient for all, a StreamingResponse,
no limit on connections and no time-out. It keeps no log, which the proxy does.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
NOT_FORWARDED = ("host", "connection", "transfer-encoding")


def create_app(upstream: str) -> Starlette:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    client = httpx.AsyncClient(base_url=upstream, timeout=None, limits=limits)

    async def forward(request: Request) -> StreamingResponse:
        sent = client.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode()),
            headers=[pair for pair in request.headers.items() if pair[0] not in NOT_FORWARDED],
            content=await request.body(),
        )
        answer = await client.send(sent, stream=True)
        headers = {k: v for k, v in answer.headers.items() if k not in NOT_FORWARDED}
        closing = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, headers, None, closing)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[Route("/{path:path}", forward, methods=METHODS)], lifespan=lifespan)


if __name__ == "__main__":
    app = create_app(sys.argv[2])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
