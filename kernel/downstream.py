"""Downstream: one client's connection, and the requests that come on it one after the other.

    Protocol   bytes in; what is sent ahead of an answer waits as bytes. When the client leaves it
               cancels the task of its request, once
    Cycle      one request as ASGI has it: `receive` and `send`

An offered upgrade (Java's client offers `Upgrade: h2c` with every POST) is not taken.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import traceback
from typing import Any

from starlette.types import Message

from kernel import http1
from kernel.errors import BrokenAnswer

logger = logging.getLogger(__name__)

IDLE = 120  # seconds that a connection without a request lives
# Seconds for what is on its way: an answer to a client that has closed its sending half, a request
# to a server that stops.
GRACE = 0.25
# Bytes that wait for the app before the client has to. The connection's end may stand behind them:
# where reading pauses, a client that leaves is not noticed.
AHEAD = 2**22


class Protocol(asyncio.Protocol):
    """One connection of a client."""

    transport: Any  # uvloop's is no asyncio.Transport
    _idle_check: asyncio.TimerHandle

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
        self.app = config.loaded_app
        self.loop = asyncio.get_running_loop()
        self.cycle: Cycle | None = None  # whose answer is not complete
        self.keep_alive = True
        self.writable = asyncio.Event()  # else the client has to read first
        self.writable.set()
        self.heard = asyncio.Event()  # something has come, or will not come
        self._connections = server_state.connections
        self._pending = bytearray()
        self._scanned = 0  # bytes of an unfinished head that were searched for its end
        self._ended = False  # the client has said all, or what it says is dropped

    # What the loop calls

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.client = transport.get_extra_info("peername")
        self._connections.add(self)
        self._idle_since = self.loop.time()
        self._check_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._idle_check.cancel()
        self.writable.set()
        if self.cycle:
            self.cycle.leave()

    def eof_received(self) -> bool:
        """Keep the connection for the answer to a whole request, for a moment.

        Go cancels the request then: a client that has left looks like one that has only said all.
        """
        self._ended = True
        if self.cycle:
            self.loop.call_later(GRACE, lambda: self.cycle and self.transport.abort())
        return self.cycle is not None and self.cycle.body.done

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        if not self._ended:
            self._pending += data
            self._advance()

    # Reading

    def _advance(self) -> None:
        """Take the next head and what has come of its body."""
        try:
            if self._pending and not self.cycle:
                self._take_head()
            if self.cycle:
                self.cycle.body.feed(self._pending)
        except http1.Refused as refused:
            return self.fail(refused)
        self.heard.set()
        self.check_reading()

    def _take_head(self) -> None:
        while self._pending.startswith((b"\r", b"\n")):  # old clients send them behind a body
            del self._pending[0]
        end = http1.END.search(self._pending, max(self._scanned - 2, 0))
        if not end:
            self._scanned = len(self._pending)
            if self._scanned > http1.HEAD_LIMIT:
                raise http1.Refused(431)
            return
        head = bytes(self._pending[: end.end()])
        del self._pending[: end.end()]
        self._scanned = 0
        self.cycle = Cycle(self, http1.read_head(head, self.client))

    def check_reading(self) -> None:
        """Pause reading while too much waits for the app."""
        waits = len(self._pending) + (len(self.cycle.body.data) if self.cycle else 0)
        if waits > AHEAD:
            self.transport.pause_reading()
        elif not self._ended:
            self.transport.resume_reading()

    # The end of an answer, and of the connection

    def finished(self, keep_alive: bool) -> None:
        """Go on with the next request, or close."""
        self.cycle, self._idle_since = None, self.loop.time()
        if keep_alive and (self._pending or not self._ended):
            self._advance()
            if not self.keep_alive:
                self.shutdown()
        else:
            self._close()

    def fail(self, refused: http1.Refused) -> None:
        """Answer with an error; an answer that has begun is broken off so that it looks broken."""
        cycle, self.cycle = self.cycle, None
        if cycle:
            cycle.leave()
        if not (cycle and cycle.started):
            self.transport.write(refused.answer())
        elif not cycle.has_end:  # a FIN would end it, but not a reset
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self._close()

    def _close(self) -> None:
        """Let the client read the answer first: to close while it sends is a reset to it."""
        self._pending.clear()
        self.check_reading()
        self._ended = True
        self.transport.write_eof()
        self.loop.call_later(2 * GRACE, self.transport.close)

    def shutdown(self) -> None:
        """Say `connection: close` from now on, and close once no request is to be expected.

        A request may be on its way for GRACE seconds after the connection began or an answer ended:
        most clients send it at once, and what crosses our FIN is lost. uvicorn calls this when it
        stops.
        """
        self.keep_alive = False
        if not self.cycle:
            self._idle_check.cancel()
            self._idle_check = self.loop.call_at(self._idle_since + GRACE, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not (self.cycle or self._pending):
            self.transport.close()

    def _check_idle(self) -> None:
        left = self._idle_since + IDLE - self.loop.time()
        if left <= 0 and not self.cycle:
            self.transport.close()
        self._idle_check = self.loop.call_later(max(left, 1), self._check_idle)


class Cycle:
    """One request and its answer."""

    def __init__(self, protocol: Protocol, request: http1.Request) -> None:
        self.protocol = protocol
        self.request = request
        self.body = request.body
        self.started = False  # bytes of the answer have left
        self.has_end = True  # else the end of the connection is the answer's end
        self._read = False  # the app knows the body's end
        self._over = False  # the answer is complete, or the client has left
        self._corked = b""  # the answer's head, which leaves with the first bytes of its body
        self.task = protocol.loop.create_task(self._run(protocol.app))

    async def _run(self, app: Any) -> None:
        status = 503
        try:
            await app(self.request.scope, self.receive, self.send)
            if not self._over:
                raise RuntimeError("the app left its answer unfinished")
        except (BrokenAnswer, asyncio.CancelledError):
            pass
        except Exception as exc:
            # Without the exception's text, which may hold a prompt.
            fields = {"error": type(exc).__name__, "stack": traceback.format_tb(exc.__traceback__)}
            logger.error("request failed", extra={"fields": fields})
            status = 500
        del self.request.scope  # the app leaves there what refers to this object
        if not self._over:
            self.protocol.fail(http1.Refused(status))

    def leave(self) -> None:
        """Cancel the app's task, because the client has left."""
        self._over = True
        self.protocol.heard.set()
        self.task.cancel()

    async def receive(self) -> Message:
        if self.request.awaits_continue and not self.started:
            self.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.request.awaits_continue = False
        while not (self._over or self.body.data or self.body.done and not self._read):
            self.protocol.heard.clear()
            await self.protocol.heard.wait()
        if self._over:
            return {"type": "http.disconnect"}
        data = bytes(self.body.data)
        self.body.data.clear()
        self._read = self.body.done
        self.protocol.check_reading()
        return {"type": "http.request", "body": data, "more_body": not self._read}

    async def send(self, message: Message) -> None:
        if self._over:
            return  # the client has left
        if message["type"] == "http.response.start":
            return self._start(message["status"], message["headers"])
        self._send_body(message.get("body", b""), more=message.get("more_body", False))
        if not self.protocol.writable.is_set():
            await self.protocol.writable.wait()

    def _start(self, status: int, headers: http1.Headers) -> None:
        """Build the answer's head; it leaves with what comes of the body in the same moment."""
        request, version = self.request, self.request.scope["http_version"]
        self._bodiless = request.scope["method"] == "HEAD" or status in (204, 304)
        sized = self._bodiless or any(name == b"content-length" for name, _ in headers)
        self._chunked = not sized and version == "1.1"
        self.has_end = sized or self._chunked
        request.keep_alive &= self.has_end and self.protocol.keep_alive and self.body.done
        own = [(b"transfer-encoding", b"chunked")] if self._chunked else []
        if not request.keep_alive or version == "1.0":
            own.append((b"connection", b"keep-alive" if request.keep_alive else b"close"))
        self._corked = http1.answer_head(status, [*headers, *own])
        self.protocol.loop.call_soon(self._write)

    def _send_body(self, data: bytes, *, more: bool) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data += b"" if more else b"0\r\n\r\n"
        self._write(b"" if self._bodiless else data)
        if not more:
            self._over = True
            self.protocol.heard.set()
            self.protocol.finished(self.request.keep_alive)

    def _write(self, data: bytes = b"") -> None:
        """Write the data, behind the head if that has not left yet."""
        if (data or self._corked) and not self._over:
            head, self._corked, self.started = self._corked, b"", True
            self.protocol.transport.write(head + data)
