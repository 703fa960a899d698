"""Log: structured logging, and the one line that each request leaves.

A line is an event and its fields: `key=value` for a person, one JSON object for a machine. No
prompt, no key and no query string is ever a field; values are quoted, so that a header cannot
forge a line. `AccessLog` is the outermost ASGI layer: it reads the headers once, gives the request
its id and its `RequestInfo`, which the others fill in, and in the end logs and counts it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from asyncio import CancelledError, Task
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kernel.config import Key
from kernel.errors import BrokenAnswer, ClientDisconnected
from kernel.metrics import Metrics, Tokens
from kernel.systemd import Line, for_journal

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
Fields = Mapping[str, Any]
Write = Callable[[Fields], None]  # writes the line of one request

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PLAIN = re.compile(r"[\w.:/;+-]+", re.ASCII)
LONGEST = 500  # characters of a path or a model's name in the log: the client chooses both
TAIL = 1024  # Ollama's token counters are within the last bytes of an answer
STOPPED = "the server stops"  # what a cancellation says that is not a client's leaving
QUEUED, WAITING = "waiting for its turn", "waiting for the model"  # phases of a request
OUTCOMES: dict[type[BaseException], str] = {  # of what ends a request early; all else "failed"
    CancelledError: "client_closed",  # the server cancels the request of a client that left
    ClientDisconnected: "client_closed",
    BrokenAnswer: "upstream_broke",
}

# RFC 9110 section 7.6.1, with the older names that Ollama's own proxy strips
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive proxy-authenticate proxy-authorization te trailer"
    b" transfer-encoding upgrade".split()
)
DROPPED = HOP_BY_HOP | {b"expect", b"host"}
SECRETS = (b"authorization", b"x-api-key")
NOTED = frozenset(
    b"host origin connection user-agent x-request-id x-osp-agents x-osp-quiet"
    b" access-control-request-method".split()
).union(SECRETS)


@dataclass(frozen=True, slots=True)
class Step:
    """What one agent's request hook made of the payload; sizes are bytes."""

    agent: str
    outcome: str
    seconds: float
    sizes: tuple[int, int]  # before and after
    before: bytes = b""  # where texts are kept
    after: bytes = b""


class RequestInfo:
    """One request, in `scope["osp"]`: its headers in one pass, and what became of it.

    Most of it stays at its default, which costs nothing here: each request has one of these.
    """

    method = path = ""
    status = 0  # 0: the client left before an answer
    outcome = "ok"
    model = ""
    agents = ""  # the text of X-OSP-Agents of the answer
    user = ""  # the name of the key that was sent
    key = Key()  # what it opens
    foreign = False  # sent by a web page that Ollama would refuse: no agent takes part
    cors: Headers = []  # for answers of our own
    relayed = False  # the answer is Ollama's: no CORS headers of ours, and its tokens count
    # What traces show
    task: Task[Any] | None = None  # while it runs and can be stopped
    stopping = False
    began = ended = 0.0  # in seconds since 1970
    start = 0.0  # time.perf_counter at its beginning
    waits = False  # for Ollama: all of it was sent
    phases: tuple[tuple[str, float], ...] = ()  # of one that agents touch: a name, its beginning
    seconds = 0.0  # 0: it runs
    first = 0.0  # seconds until the answer began
    tokens: Tokens = (0, 0, 0.0)
    answered: Headers = []  # headers of the answer
    places = 0  # that it has among those that ask a model
    pieces = 0  # lines of the answer that were sent
    full = False  # the prompt filled the model's context
    steps: tuple[Step, ...] = ()  # what request hooks did
    tools: tuple[tuple[str, str, str, float], ...] = ()  # agent, tool, outcome, seconds
    hints: tuple[str, ...] = ()
    room = 0  # bytes of texts that may still be kept
    request = answer = b""  # texts that are kept
    client = asked = b""  # its User-Agent, and the Host that it asked for

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.headers: Headers = []  # end to end, without Host: they go upstream
        self.noted: dict[bytes, list[bytes]] = {}  # values of those in NOTED

    def enter(self, phase: str) -> None:
        if not self.seconds:
            self.phases = (*self.phases, (phase, time.perf_counter()))

    def hint(self, text: str) -> None:
        """Say why something did not happen that somebody may have wanted."""
        self.hints += (text,)
        logger.info("hint", extra={"fields": {"request_id": self.request_id, "hint": text}})

    def kept(self, text: bytes) -> bytes:
        """Return what of a text may be kept."""
        text = text[: self.room]
        self.room -= len(text)
        return text

    def forget(self) -> None:
        """Keep no text of this request."""
        self.room = 0
        self.request = self.answer = b""
        self.steps = tuple(replace(step, before=b"", after=b"") for step in self.steps)

    def read(self, headers: Headers) -> None:
        """Sort the request's headers."""
        for pair in headers:
            if pair[0] not in DROPPED and pair[0][:6] != b"x-osp-":
                self.headers.append(pair)
            if pair[0] in NOTED:
                self.noted.setdefault(pair[0], []).append(pair[1])
        for sent in self.noted.get(b"connection", ()):
            listed = sent.lower().replace(b" ", b"").split(b",")
            self.headers = [pair for pair in self.headers if pair[0] not in listed]
        for sent in self.noted.get(b"x-request-id", ()):
            if REQUEST_ID.fullmatch(sent):
                self.request_id = sent.decode()

    @property
    def host(self) -> str:
        return b"".join(self.noted.get(b"host", ())).decode("latin-1")

    @property
    def origins(self) -> list[bytes]:
        return self.noted.get(b"origin", [])

    @property
    def commands(self) -> str | None:
        """The text of the X-OSP-Agents headers of the request."""
        sent = self.noted.get(b"x-osp-agents")
        return b" ".join(sent).decode(errors="replace") if sent else None


def info(scope: Scope) -> RequestInfo:
    """Return what is known of the request that `scope` describes."""
    known: RequestInfo = scope["osp"]
    return known


def record(fields: Fields) -> None:
    """Write the line of a request as a record of `logging`."""
    logger.info("request", extra={"fields": fields})


class Tracing(Protocol):
    """What keeps the requests, if anything does."""

    def begin(self, known: RequestInfo, receive: Receive, send: Send) -> tuple[Receive, Send]: ...

    async def stop(self, known: RequestInfo, scope: Scope, send: Send) -> None: ...

    def end(self, known: RequestInfo) -> None: ...


class AccessLog:
    """Log and count every request; metrics name the paths in `routes`, all else is `other`.

    A route may end in a parameter: `/v1/models/{name:path}` is its label, too. `write` writes the
    line: a LogRecord would cost 8 % of what forwarding a request costs.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Collection[str],
        write: Write,
        metrics: Metrics | None = None,
        traces: Tracing | None = None,
    ) -> None:
        self.app = app
        self.write = write
        self.traces = traces
        self.metrics = metrics or Metrics()
        self.routes = frozenset(routes)
        self.starts = {route.partition("{")[0]: route for route in routes if "{" in route}
        self._prefix = os.urandom(4).hex()
        self._count = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        known = scope["osp"] = RequestInfo(f"{self._prefix}-{next(self._count)}")
        known.method, known.path = scope["method"], scope["path"]
        known.read(scope["headers"])
        began = known.start = time.perf_counter()
        head, tail = b"", b""

        def observed(message: Message) -> Awaitable[None]:
            nonlocal head, tail
            if message["type"] == "http.response.start":
                known.first = time.perf_counter() - began
                if known.phases:
                    known.enter("streaming")
                known.status = message["status"]
                known.answered = message["headers"] = answer_headers(known, message["headers"])
            elif known.relayed and (body := message.get("body")):
                known.pieces += body.count(b"\n")
                head = head or body[:TAIL]
                tail = body if len(body) >= TAIL else (tail + body)[-TAIL:]
            return send(message)

        if self.traces:
            receive, send = self.traces.begin(known, receive, send)
        try:
            await self.app(scope, receive, observed)
        except BaseException as exc:
            stopped = STOPPED in exc.args or known.stopping
            known.outcome = "stopped" if stopped else OUTCOMES.get(type(exc), "failed")
            if self.traces and known.stopping and isinstance(exc, CancelledError):
                await self.traces.stop(known, scope, observed)
            elif not isinstance(exc, ClientDisconnected):
                raise
        finally:
            seconds = known.seconds = time.perf_counter() - began
            route, first = self.route(scope["path"]), known.first or seconds
            self.metrics.request(route, known.status, seconds, first, known.user)
            if known.relayed and 200 <= known.status < 300:
                known.tokens = self.metrics.tokens(head, tail, known.user)
            if logger.isEnabledFor(logging.INFO):
                self.write(fields_of(known, seconds))
            if self.traces:
                self.traces.end(known)

    def route(self, path: str) -> str:
        if path in self.routes:
            return path
        return next((r for start, r in self.starts.items() if path.startswith(start)), "other")


def answer_headers(known: RequestInfo, headers: Headers) -> Headers:
    """Return an answer's headers with the request's id, and with CORS where it is our own.

    An id that Ollama sent stays.
    """
    if known.relayed and b"x-request-id" in dict(headers):
        return headers
    cors = [] if known.relayed else known.cors
    return [*headers, *cors, (b"x-request-id", known.request_id.encode())]


def fields_of(known: RequestInfo, seconds: float) -> dict[str, Any]:
    fields = {
        "request_id": known.request_id,
        "method": known.method,
        "path": known.path[:LONGEST],
        "status": known.status,
        "ms": round(seconds * 1000, 1),
        "outcome": known.outcome,
    }
    more = {"user": known.user, "model": known.model[:LONGEST], "agents": known.agents}
    return fields | {name: text for name, text in more.items() if text}


class Formatter(logging.Formatter):
    """Makes a line of a record, as `text_line` or `json_line` has it."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(vars(record).get("fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return self.line(record.created, record.levelname.lower(), record.getMessage(), fields)


def text_line(created: float, level: str, event: str, fields: Fields) -> str:
    """Return a line for a person: time, level where it matters, event, `key=value`.

    Without `created` it has no time.
    """
    clock = time.strftime("%H:%M:%S ", time.localtime(created)) if created else ""
    named = event if level == "info" else f"{level}: {event}"
    words = [f" {key}={quoted(fields[key])}" for key in fields if key != "exception"]
    stack = f"\n{fields['exception']}" if "exception" in fields else ""
    return clock + named.replace("\n", "\\n") + "".join(words) + stack


def json_line(created: float, level: str, event: str, fields: Fields) -> str:
    """Return a line for a machine: one JSON object. JSONEncoder takes 4 % of a request longer.

    Without `created` it has no time.
    """
    clock = f'"time": {created:.3f}, ' if created else ""
    more = "".join([f', "{name}": {as_json(value)}' for name, value in fields.items()])
    return f'{{{clock}"level": "{level}", "event": {as_json(event)}{more}}}'


def as_json(value: object) -> str:
    if type(value) is str:
        return encode_basestring_ascii(value)
    return str(value) if type(value) in (int, float) else json.dumps(value, default=str)


def quoted(value: object) -> str:
    """Return a value as one word; anything that could break out of a line is escaped."""
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def configure(level: str, style: str, journal: str = "") -> Write:
    """Send everything to stderr, and return what writes the lines of requests there.

    `journal` is $JOURNAL_STREAM. The caller is `main()`, because this is process-wide.
    """
    person = style == "text" or (style == "auto" and sys.stderr.isatty())
    stderr = sys.stderr.fileno()
    line = for_journal(text_line if person else json_line, stderr, journal)
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(line))
    logging.basicConfig(handlers=[handler], force=True)  # of others warnings: httpx logs URLs
    for name in ("osp", "kernel", "slices", "plugins", *([""] if level == "error" else [])):
        logging.getLogger(name).setLevel(level.upper())

    def write(fields: Fields) -> None:
        with suppress(OSError):  # the other end is closed
            os.write(stderr, f"{line(time.time(), 'info', 'request', fields)}\n".encode())

    return write
