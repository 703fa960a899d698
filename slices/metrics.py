"""Metrics: GET /metrics, the collector's numbers for Prometheus."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from kernel.metrics import Metrics


def routes(collector: Metrics) -> list[Route]:
    return [Route("/metrics", partial(metrics, collector), methods=["GET"], name="metrics")]


async def metrics(collector: Metrics, request: Request) -> PlainTextResponse:
    media_type = "text/plain; version=0.0.4"
    return PlainTextResponse(collector.text(), media_type=media_type)
