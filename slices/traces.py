"""Traces: GET /traces, what runs and what the latest requests did, and one of them, whole.

A key with limits sees its own requests. Texts are kept only with `page.bodies = true`. They are for
those who have a key and, where none is needed, for this machine. `POST /traces/ID/stop` ends a
request that runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from kernel.access import is_operator
from kernel.dialects import dumps
from kernel.log import WAITING, RequestInfo, info
from kernel.models import canonical
from kernel.readable import answer
from kernel.traces import Traces, about, whole

FILTERS = ("model", "agent", "user", "status", "since")
TICK = 1.0  # seconds between two events of the stream
Shown = dict[str, Any]


def routes(traces: Traces) -> list[Route]:
    endpoint = Endpoint(traces)
    return [
        Route("/traces", endpoint.latest, methods=["GET"], name="traces"),
        Route("/traces/stream", endpoint.stream, methods=["GET"], name="traces-stream"),
        Route("/traces/{id}", endpoint.one, methods=["GET"], name="trace"),
        Route("/traces/{id}/stop", endpoint.stop, methods=["POST"], name="trace-stop"),
    ]


@dataclass(frozen=True, slots=True)
class Endpoint:
    traces: Traces

    async def latest(self, request: Request) -> Response:
        """Return running and finished requests, the newest first; the filters are ANDed."""
        asked = request.query_params
        unknown = [key for key in asked if key not in FILTERS]
        if unknown:
            text = f"unknown filter {unknown[0]!r}; known are {', '.join(FILTERS)}"
            return answer(request, {"error": text}, 400)
        traces, ended = self.traces.seen_by(info(request.scope))
        finished = [*map(about, ended)]
        running = await self.running(traces)
        body: Shown = {"now": time.time(), "bodies": self.traces.config.bodies}
        body |= {"running": [each for each in running if fits(each, asked)]}
        body |= {"finished": [each for each in finished if fits(each, asked)]}
        return answer(request, body)

    async def stream(self, request: Request) -> Response:
        """Return an event for each second, with what runs and what has ended since."""
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        return StreamingResponse(self.events(info(request.scope)), headers=headers)

    async def events(self, viewer: RequestInfo) -> AsyncIterator[bytes]:
        since = time.time()
        while True:
            now, (running, ended) = time.time(), self.traces.seen_by(viewer)
            body: Shown = {"now": now, "running": await self.running(running)}
            body |= {"finished": [about(each) for each in ended if each.ended >= since]}
            since = now
            yield b"data: " + dumps(body) + b"\n\n"
            await asyncio.sleep(TICK)

    async def running(self, traces: list[RequestInfo]) -> list[Shown]:
        """Return what is told of them; where the model is not in memory, one waits for that."""
        shown = [*map(about, traces)]
        waiting = [each for each in shown if each["phase"] == WAITING and each["model"]]
        if waiting:
            loaded = await self.traces.in_memory()
            for each in waiting:
                if loaded is not None and canonical(each["model"]) not in loaded:
                    each["phase"] = "loading the model"
        return shown

    async def one(self, request: Request) -> Response:
        viewer = info(request.scope)
        trace = self.traces.find(request.path_params["id"], viewer)
        if trace is None:
            return answer(request, {"error": "there is no such request any more"}, 404)
        texts = is_operator(request.scope) or viewer.key.is_limited  # which sees its own alone
        return answer(request, whole(trace, texts=texts))

    async def stop(self, request: Request) -> Response:
        name = request.path_params["id"]
        if self.traces.cancel(name, info(request.scope)):
            return answer(request, {"stopped": name})
        return answer(request, {"error": "there is no such request that runs"}, 404)


def fits(shown: Shown, asked: Any) -> bool:
    """Tell whether a trace is one of those that are asked for; names may have a *."""
    tests = {
        "model": [shown["model"], shown["model"].removesuffix(":latest")],
        "agent": [agent["name"] for agent in shown["agents"]],
        "user": [shown["user"]],
        "status": [str(shown["status"]), f"{shown['status'] // 100}xx", shown["outcome"]],
    }
    names = all(
        any(fnmatchcase(value.lower(), asked[key].lower()) for value in values)
        for key, values in tests.items()
        if key in asked
    )
    return names and shown["time"] >= number(asked.get("since", "0"))


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
