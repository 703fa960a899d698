"""Traces: which requests run now, and what the latest did; in memory alone.

What is known of a request stands in its `RequestInfo`; here it is kept for a while. Texts are kept
only if the operator wants them: cut, so that all together are bounded, and never of a request that
a guard refused. A request that runs can be stopped.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections import deque
from collections.abc import Awaitable, Collection
from typing import Any, Self

from starlette.types import Message, Receive, Scope, Send

from kernel import dialects, relay
from kernel.client import OllamaClient
from kernel.config import PageConfig
from kernel.dialects.every import DIALECTS
from kernel.errors import BrokenAnswer, Stopped, UpstreamError
from kernel.log import WAITING, RequestInfo
from kernel.models import canonical

logger = logging.getLogger(__name__)

TEXTS = 2**22  # bytes of all texts together
CUT = 200  # characters of a path, a model's name or a User-Agent
STREAMS = (b"application/x-ndjson", b"text/event-stream")
BY_PATH = {dialect.path: dialect for dialect in DIALECTS}
LOOK = 1.0  # seconds: at most so often, and so long, Ollama is asked how large contexts are
UNKNOWN = 2**62  # a context's size in an older Ollama
FULL = "the prompt filled the model's whole context, and its beginning was cut off"
CURE = "a preset with options = { num_ctx = ... } makes it larger"


class Traces:
    """Keeps what is known of the latest requests, and of those that run."""

    def __init__(self, config: PageConfig, client: OllamaClient) -> None:
        self.config = config
        self._client = client
        self._own: frozenset[str] = frozenset()
        self._below: tuple[str, ...] = ()
        self._share = TEXTS // config.requests if config.bodies else 0  # of one request
        self.running: dict[int, RequestInfo] = {}
        self.latest: deque[RequestInfo] = deque(maxlen=config.requests)  # the newest last
        self._contexts: dict[str, int] = {}  # of the models in memory, when looked at last
        self._next_look = 0.0
        self._looks: set[asyncio.Task[None]] = set()

    def without(self, own: Collection[str]) -> Self:
        """Keep nothing of requests to the proxy's own paths; return the same object."""
        self._own = frozenset(own)
        self._below = tuple(path.partition("{")[0] for path in own if "{" in path)
        return self

    def begin(self, known: RequestInfo, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Note that a request runs; return what keeps its texts while they come.

        What the page looks up for itself (a GET with the header X-OSP-Quiet) would push out what
        somebody wants to see.
        """
        own = known.path in self._own or known.path.startswith(self._below)
        if own or (b"x-osp-quiet" in known.noted and known.method == "GET"):
            return receive, send
        self.running[id(known)] = known
        known.task, known.began = asyncio.current_task(), time.time()
        if not self._share:
            return receive, send
        known.room = self._share

        async def received() -> Message:
            message = await receive()
            known.request += known.kept(message.get("body", b""))
            return message

        def sent(message: Message) -> Awaitable[None]:
            known.answer += known.kept(message.get("body", b""))
            return send(message)

        return received, sent

    def seen_by(self, viewer: RequestInfo) -> tuple[list[RequestInfo], list[RequestInfo]]:
        """Return what runs and what ended, the newest first; a key with limits sees its own."""
        running, ended = [*self.running.values()], [*reversed(self.latest)]
        if viewer.key.is_limited:
            running = [one for one in running if one.user == viewer.user]
            ended = [one for one in ended if one.user == viewer.user]
        return running, ended

    def find(self, request_id: str, viewer: RequestInfo) -> RequestInfo | None:
        """Return a request that `viewer` may see, the latest of that id."""
        running, ended = self.seen_by(viewer)
        return next((one for one in running + ended if one.request_id == request_id), None)

    def cancel(self, request_id: str, viewer: RequestInfo) -> bool:
        """Stop a request as if its client had left; tell whether it runs."""
        known = self.find(request_id, viewer)
        if known is None or known.task is None:
            return False
        known.stopping = True
        return known.task.cancel()

    async def stop(self, known: RequestInfo, scope: Scope, send: Send) -> None:
        """Tell the client that its request was stopped: never as if the answer were complete."""
        if known.task:
            known.task.uncancel()
        stopped = Stopped("stopped at the proxy")
        if not known.status:
            return await relay.refuse(scope, send, stopped)
        if dict(known.answered).get(b"content-type") in STREAMS:
            error = dialects.error_object(known.path, stopped.status, str(stopped))
            await relay.send_chunk(send, BY_PATH.get(known.path, DIALECTS[0]).encode_error(error))
        raise BrokenAnswer(str(stopped))

    def end(self, known: RequestInfo) -> None:
        """Take a request from those that run to the latest."""
        if self.running.pop(id(known), None) is None:
            return
        known.task, known.ended = None, time.time()
        known.client, known.asked = client_of(known)
        known.headers = known.answered = []
        known.noted = {}
        self.latest.append(known)
        if not known.tokens[0]:
            return
        if time.monotonic() < self._next_look:
            return self._mark(known)
        self._next_look = time.monotonic() + LOOK
        task = asyncio.create_task(self._look(known))
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def _look(self, known: RequestInfo) -> None:
        self._contexts = await self.in_memory() or {}
        self._mark(known)

    async def in_memory(self) -> dict[str, int] | None:
        """Return the models in Ollama's memory, and how large their contexts are.

        Ask for a second at most; None: it does not say.
        """
        try:
            async with asyncio.timeout(LOOK):
                listed = (await self._client.ask("/api/ps"))["models"]
            return {canonical(m["model"]): int(m.get("context_length", UNKNOWN)) for m in listed}
        except (UpstreamError, TimeoutError, LookupError, TypeError, ValueError, AttributeError):
            return None

    def _mark(self, known: RequestInfo) -> None:
        """Mark a request, and warn, if the prompt filled the model's whole context."""
        fits = known.tokens[0] < min(self._contexts.values(), default=UNKNOWN)  # as nearly all do
        if not fits and known.tokens[0] >= self._contexts.get(canonical(known.model), UNKNOWN):
            known.full = True
            fields = {"request_id": known.request_id, "model": known.model[:CUT]}
            fields |= {"tokens": str(known.tokens[0]), "cure": CURE}
            logger.warning(FULL, extra={"fields": fields})


def client_of(known: RequestInfo) -> tuple[bytes, bytes]:
    """Return the User-Agent and the Host of a request."""
    agent, host = known.noted.get(b"user-agent"), known.noted.get(b"host")
    return (agent[0][:CUT] if agent else known.client), (host[0][:CUT] if host else known.asked)


def about(known: RequestInfo) -> dict[str, Any]:
    """Return what a trace tells without its texts; times are milliseconds, but for `time`."""
    seconds = known.seconds or time.perf_counter() - known.start
    phases = phases_of(known)
    ends = [*(began for _, began in phases[1:]), known.start + seconds]
    prompt, answer, lasted = known.tokens
    lasted = lasted or (seconds - known.first if known.first else 0)
    dialect = BY_PATH.get(known.path)
    agents = [part.split(";") for part in known.agents.split(", ") if part]
    tools = [
        {"agent": agent, "tool": tool, "outcome": outcome, "ms": ms(spent)}
        for agent, tool, outcome, spent in known.tools
    ]
    return {
        "id": known.request_id,
        "time": round(known.began, 3),
        "method": known.method[:CUT],
        "path": known.path[:CUT],
        "dialect": dialect.name if dialect else "",
        "model": known.model[:CUT],
        "user": known.user,
        "client": client_of(known)[0].decode("latin-1"),
        "phase": "done" if known.seconds else phases[-1][0],
        "status": known.status,
        "outcome": known.outcome if known.seconds else "",
        "ms": ms(seconds),
        "first_ms": ms(known.first),
        "phases": [
            {"name": name, "ms": ms(end - began)}
            for (name, began), end in zip(phases, ends, strict=True)
        ],
        "agents": [{"name": n, "outcome": o, "ms": int(t[:-2])} for n, o, t in agents],
        "agents_ms": sum(int(spent[:-2]) for _, _, spent in agents),
        "tools": tools,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "tokens_per_second": round(answer / lasted, 1) if answer and lasted > 0 else 0,
        "pieces": known.pieces,
        "hints": [*known.hints, *([f"{FULL}; {CURE}"] if known.full else [])],
        "full": known.full,
    }


def phases_of(known: RequestInfo) -> list[tuple[str, float]]:
    """Return the phases so far, each with its beginning."""
    if known.phases:
        return [("reading", known.start), *known.phases]
    begun = [(WAITING if known.waits else "reading", known.start)]
    return begun + ([("streaming", known.start + known.first)] if known.first else [])


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def whole(known: RequestInfo, *, texts: bool) -> dict[str, Any]:
    """Return all that a trace tells; `texts` says that who asks may read them."""
    kept = texts and bool(known.request)
    steps = []
    for step in known.steps:
        entry: dict[str, Any] = {"agent": step.agent, "outcome": step.outcome}
        entry |= {"ms": ms(step.seconds), "before": step.sizes[0], "after": step.sizes[1]}
        if kept:
            entry |= {"before_text": text(step.before), "after_text": text(step.after)}
        steps.append(entry)
    more = {"request": text(known.request), "answer": text(known.answer)} if kept else {}
    return about(known) | {"steps": steps, "curl": curl(known, texts=kept)} | more


def text(data: bytes) -> str:
    return data.decode(errors="replace")


def curl(known: RequestInfo, *, texts: bool) -> str:
    """Return the line for a shell that repeats a request."""
    host = client_of(known)[1].decode("latin-1") or "localhost:11435"
    words = ["curl", f"http://{host}{known.path}"]
    if known.method != "GET":
        words += ["-X", known.method] if known.method != "POST" else []
        words += ["-d", text(known.request) if texts else "@body.json"]
    return shlex.join(words)
