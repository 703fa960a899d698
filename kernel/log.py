"""Log: structured logging, and the one line that each request leaves.

A line is an event and its fields: `key=value` for a person, one JSON object for a machine. No
prompt, no key and no query string is ever a field; values are quoted, so that a header cannot
forge a line. `AccessLog` is the outermost ASGI layer: it gives a request its id and its `Facts`,
which everybody on the way may fill in, and in the end logs and counts them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from asyncio import CancelledError
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from os import urandom
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kernel.errors import BrokenAnswer, ClientDisconnected
from kernel.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PLAIN = re.compile(r"[\w.:/;+-]+", re.ASCII)
LONGEST = 500  # signs of a path or a model's name in the log: both are the client's
PAUSE = 0.05  # seconds in which lines are gathered: to write each alone costs as much as to make it
ENCODER = json.JSONEncoder(default=str)
TAIL = 1024  # bytes at the end of an answer in which its counters stand


@dataclass(slots=True)
class Facts:
    """What is known of one request, in `scope["osp"]`."""

    request_id: str
    status: int = 0  # 0: nothing was answered
    outcome: str = "ok"
    model: str = ""
    agents: str = ""  # as X-OSP-Agents says it
    user: str = ""  # who sent the key: a digest of it
    foreign: bool = False  # a web page sent it that Ollama would refuse: no agent for it
    cors: list[tuple[bytes, bytes]] = field(default_factory=list)  # for answers of our own


def facts(scope: Scope) -> Facts:
    """Return the facts of the request that `scope` describes."""
    known = scope["osp"]
    assert isinstance(known, Facts)
    return known


def cors_headers(scope: Scope) -> dict[str, str]:
    """Return the CORS headers of an answer of our own, as Starlette's responses take them."""
    return {name.decode(): value.decode("latin-1") for name, value in facts(scope).cors}


class AccessLog:
    """Log and count every request; metrics name the paths in `routes`, all else is `other`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = frozenset(routes)
        self._prefix = urandom(4).hex()
        self._count = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        known = scope["osp"] = Facts(self.request_id(scope))
        began, first = time.perf_counter(), 0.0
        head, tail = b"", b""

        async def observed(message: Message) -> None:
            nonlocal first, head, tail
            if message["type"] == "http.response.start":
                first = time.perf_counter() - began
                known.status = message["status"]
                own = (b"x-request-id", known.request_id.encode())
                message = {**message, "headers": [*message["headers"], own]}
            elif body := message.get("body"):
                head = head or body[:TAIL]
                tail = (tail + body[-TAIL:])[-TAIL:]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except ClientDisconnected:
            known.outcome = "client_closed"
        except BaseException as exc:
            outcomes = {BrokenAnswer: "upstream_broke", CancelledError: "stopped"}
            known.outcome = outcomes.get(type(exc), "failed")
            raise
        finally:
            seconds = time.perf_counter() - began
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.request(route, known.status, seconds, first or seconds)
            if known.status == 200:
                self.metrics.tokens(head, tail)
            log_request(scope, known, seconds)

    def request_id(self, scope: Scope) -> str:
        """Return the client's id where it is harmless, else one of our own."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return str(value, "ascii")
        return f"{self._prefix}-{next(self._count)}"


def log_request(scope: Scope, known: Facts, seconds: float) -> None:
    fields = {
        "request_id": known.request_id,
        "method": scope["method"],
        "path": scope["path"][:LONGEST],
        "status": known.status,
        "ms": round(seconds * 1000, 1),
        "outcome": known.outcome,
    }
    if known.model:
        fields["model"] = known.model = known.model[:LONGEST]
    if known.agents:
        fields["agents"] = known.agents
    logger.info("request", extra={"fields": fields})


class Handler(logging.StreamHandler[TextIO]):
    """Writes a line at once, but what follows within `PAUSE` together; warnings never wait."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        self._written = 0.0
        self._due = False

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
        if record.levelno > logging.INFO or record.created - self._written > PAUSE:
            return self.flush()
        if not self._due:
            try:
                asyncio.get_running_loop().call_later(PAUSE, self.flush)
                self._due = True
            except RuntimeError:  # a thread, or nothing runs any more
                self.flush()

    def flush(self) -> None:
        with self.lock or nullcontext():
            records, self._records = self._records, []
            self._due, self._written = False, time.time()
            lines = [self._line(record) for record in records]
            with suppress(OSError, ValueError):  # nobody reads it any more
                self.stream.write("".join(lines))
                self.stream.flush()

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record) + self.terminator
        except Exception:  # an agent's line, say, with too few arguments: the others are written
            self.handleError(record)
            return ""


class TextFormatter(logging.Formatter):
    """One line for a person: time, level where it matters, event, `key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        fields = "".join(f" {key}={quoted(value)}" for key, value in fields_of(record).items())
        event = record.getMessage().replace("\n", "\\n")
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{event}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One line for a machine: a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **fields_of(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return ENCODER.encode(line)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


def quoted(value: object) -> str:
    """Return a value as one word; anything that could break out of a line is escaped."""
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def not_ours(record: logging.LogRecord) -> bool:
    """Drop uvicorn's traceback for the connections that we break on purpose."""
    ours = (BrokenAnswer, CancelledError)
    return not (record.exc_info and isinstance(record.exc_info[1], ours))


def configure(level: str, style: str) -> None:
    """Send everything to stderr; the caller is `main()`, because this is process-wide."""
    person = style == "text" or (style == "auto" and sys.stderr.isatty())
    handler = Handler()
    handler.setFormatter(TextFormatter() if person else JsonFormatter())
    handler.addFilter(not_ours)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What no line of ours says is not looked up (the logging HOWTO, "Optimization")
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for name in ("uvicorn", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
