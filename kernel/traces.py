"""Traces: which requests run now, and what the latest did; in memory alone.

What is known of a request stands in its `RequestInfo`; here it is kept for a while. Texts are kept
only if the operator wants them: cut, so that all together are bounded, and never of a request that
a guard refused. `Traces` is an ASGI layer inside of the log, which can stop what runs.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections import deque
from collections.abc import Awaitable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kernel import dialects, relay
from kernel.client import OllamaClient
from kernel.config import PageConfig
from kernel.dialects.every import DIALECTS
from kernel.errors import BrokenAnswer, Stopped, UpstreamError
from kernel.log import RequestInfo, info
from kernel.models import canonical

logger = logging.getLogger(__name__)

TEXTS = 2**22  # bytes of all texts together
CUT = 200  # characters of a path, a model's name or a User-Agent
STREAMS = (b"application/x-ndjson", b"text/event-stream")
BY_PATH = {dialect.path: dialect for dialect in DIALECTS}
KEPT = (b"user-agent", b"host")  # headers
FULL = "the prompt filled the model's whole context, and its beginning was cut off"
CURE = "a preset with options = { num_ctx = ... } makes it larger"


@dataclass(slots=True, eq=False)
class Trace:
    """One request: what is known of it, and its texts."""

    known: RequestInfo
    scope: Scope
    task: asyncio.Task[Any] | None  # while it runs
    time: float  # of its start, in seconds since 1970
    ended: float = 0.0
    stopping: bool = False
    full: bool = False
    request: bytes = b""
    answer: bytes = b""


class Traces:
    """Keeps a trace of each request that goes through its `layer`."""

    def __init__(self, config: PageConfig, client: OllamaClient) -> None:
        self.config = config
        self._client = client
        self._share = TEXTS // config.requests if config.bodies else 0  # of one request
        self.running: dict[int, Trace] = {}
        self.latest: deque[Trace] = deque(maxlen=config.requests)  # the newest last
        self._contexts: dict[str, int] = {}  # of models that were seen in memory
        self._checks: set[asyncio.Task[None]] = set()

    def layer(self, app: ASGIApp, own: Collection[str]) -> ASGIApp:
        """Return an app that does what `app` does, and keeps traces of it.

        Not of the paths that are the proxy's `own`, nor of what its page looks up for itself (a GET
        with the header X-OSP-Quiet): they would push out what somebody wants to see.
        """
        exact, below = frozenset(own), tuple(p.partition("{")[0] for p in own if "{" in p)

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in exact or scope["path"].startswith(below):
                return await app(scope, receive, send)
            known = info(scope)
            if b"x-osp-quiet" in known.noted and scope["method"] == "GET":
                return await app(scope, receive, send)
            trace = Trace(known, scope, asyncio.current_task(), time.time())
            self.running[id(known)] = trace
            if self._share:
                receive, send = self._keeping(trace, receive, send)
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:
                if not (trace.stopping and trace.task):
                    raise
                trace.task.uncancel()
                await self._end(trace, send)

        return traced

    def _keeping(self, trace: Trace, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Return both with texts kept that go through them."""
        known, known.room = trace.known, self._share

        async def received() -> Message:
            message = await receive()
            trace.request += known.kept(message.get("body", b""))
            return message

        def sent(message: Message) -> Awaitable[None]:
            trace.answer += known.kept(message.get("body", b""))
            return send(message)

        return received, sent

    def find(self, request_id: str) -> Trace | None:
        """Return a trace, the latest of that id."""
        traces = [*self.running.values(), *reversed(self.latest)]
        return next((each for each in traces if each.known.request_id == request_id), None)

    def stop(self, request_id: str) -> bool:
        """Stop a request as if its client had left; tell whether it runs."""
        for trace in self.running.values():
            if trace.known.request_id == request_id and trace.task:
                trace.stopping = True
                return trace.task.cancel()
        return False

    async def _end(self, trace: Trace, send: Send) -> None:
        """Tell the client that its request was stopped: never as if the answer were complete."""
        stopped, path = Stopped("stopped at the proxy"), trace.scope["path"]
        if not trace.known.status:
            return await relay.refuse(trace.scope, send, stopped)
        if dict(trace.known.answered).get(b"content-type") in STREAMS:
            error = dialects.error_object(path, stopped.status, str(stopped))
            await relay.send_chunk(send, BY_PATH.get(path, DIALECTS[0]).encode_error(error))
        raise BrokenAnswer(str(stopped))

    def ended(self, known: RequestInfo) -> None:
        """Take a request from those that run to the latest."""
        trace = self.running.pop(id(known), None)
        if trace is None:
            return
        trace.task, known.headers, known.answered = None, [], []
        trace.ended = time.time()
        trace.scope = {key: trace.scope[key] for key in ("method", "path")}
        known.noted = {name: known.noted[name] for name in KEPT if name in known.noted}
        known.outcome = "stopped" if trace.stopping else known.outcome
        if known.refused:
            trace.request = trace.answer = b""
        self.latest.append(trace)
        prompt = known.tokens.prompt
        if prompt and prompt >= self._contexts.get(canonical(known.model), 1):
            task = asyncio.create_task(self._check(trace))
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)

    async def _check(self, trace: Trace) -> None:
        """Mark a trace, and warn, if the prompt filled the model's whole context."""
        known = trace.known
        try:
            listed = (await self._client.ask("/api/ps"))["models"]
            lengths = {canonical(m["model"]): int(m["context_length"]) for m in listed}
        except (UpstreamError, LookupError, TypeError, ValueError):  # an older Ollama
            return
        self._contexts = lengths
        if known.tokens.prompt >= lengths.get(canonical(known.model), 2**62):
            trace.full = True
            fields = {"request_id": known.request_id, "model": known.model[:CUT]}
            fields |= {"tokens": str(known.tokens.prompt), "cure": CURE}
            logger.warning(FULL, extra={"fields": fields})


def about(trace: Trace) -> dict[str, Any]:
    """Return what a trace tells without its texts; times are milliseconds, but for `time`."""
    known, scope, now = trace.known, trace.scope, time.perf_counter()
    began = known.phases[0][1]
    seconds = known.seconds or now - began
    prompt, answer, lasted = known.tokens
    lasted = lasted or (seconds - known.first if known.first else 0)
    dialect = BY_PATH.get(scope["path"])
    agents = [part.split(";") for part in known.agents.split(", ") if part]
    tools = [
        {"agent": agent, "tool": tool, "outcome": outcome, "ms": ms(spent)}
        for agent, tool, outcome, spent in known.tools
    ]
    return {
        "id": known.request_id,
        "time": round(trace.time, 3),
        "method": scope["method"][:CUT],
        "path": scope["path"][:CUT],
        "dialect": dialect.name if dialect else "",
        "model": known.model[:CUT],
        "user": known.user,
        "client": b"".join(known.noted.get(b"user-agent", ()))[:CUT].decode("latin-1"),
        "phase": "done" if known.seconds else known.phases[-1][0],
        "status": known.status,
        "outcome": known.outcome if known.seconds else "",
        "ms": ms(seconds),
        "first_ms": ms(known.first),
        "phases": [*phases_of(known, began + seconds)],
        "agents": [{"name": n, "outcome": o, "ms": int(t[:-2])} for n, o, t in agents],
        "agents_ms": sum(int(spent[:-2]) for _, _, spent in agents),
        "tools": tools,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "tokens_per_second": round(answer / lasted, 1) if answer and lasted > 0 else 0,
        "pieces": known.pieces,
        "hints": [*known.hints, *([f"{FULL}; {CURE}"] if trace.full else [])],
        "full": trace.full,
    }


def phases_of(known: RequestInfo, end: float) -> Iterator[dict[str, Any]]:
    for (name, began), (_, ended) in pairwise([*known.phases, ("", end)]):
        yield {"name": name, "ms": ms(ended - began)}


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def whole(trace: Trace, *, texts: bool) -> dict[str, Any]:
    """Return all that a trace tells; `texts` says that who asks may read them."""
    known, kept = trace.known, texts and bool(trace.request)
    steps = []
    for step in known.steps:
        entry: dict[str, Any] = {"agent": step.agent, "outcome": step.outcome}
        entry |= {"ms": ms(step.seconds), "before": step.sizes[0], "after": step.sizes[1]}
        if kept:
            entry |= {"before_text": text(step.before), "after_text": text(step.after)}
        steps.append(entry)
    more = {"request": text(trace.request), "answer": text(trace.answer)} if kept else {}
    return about(trace) | {"steps": steps, "curl": curl(trace, texts=kept)} | more


def text(data: bytes) -> str:
    return data.decode(errors="replace")


def curl(trace: Trace, *, texts: bool) -> str:
    """Return the line for a shell that repeats a request."""
    host = b"".join(trace.known.noted.get(b"host", ())).decode("latin-1") or "localhost:11435"
    words = ["curl", f"http://{host}{trace.scope['path']}"]
    if trace.scope["method"] != "GET":
        words += ["-X", trace.scope["method"]] if trace.scope["method"] != "POST" else []
        words += ["-d", text(trace.request) if texts else "@body.json"]
    return shlex.join(words)
