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
GRACE = 0.25  # seconds that an answer has when the client has closed its sending half
HIGH = 2**18  # bytes that wait for the app before the client has to
READ_AHEAD = 2**22  # bytes, where the app has not read for STALLED seconds: the connection's end
STALLED = 0.25  # may stand behind them
UNREAD = 2**26  # bytes of a body that may be dropped so that the next request can be read


class Protocol(asyncio.Protocol):
    """One connection of a client."""

    transport: Any  # uvloop's is no asyncio.Transport

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
        self.app = config.loaded_app
        self.loop = _loop or asyncio.get_running_loop()
        self.cycle: Cycle | None = None  # whose answer is not complete
        self.body: http1.Body | None = None  # which is not complete
        self.keep_alive = True
        self.writable = asyncio.Event()  # else the client has to read first
        self.writable.set()
        self._connections = server_state.connections
        self._pending = bytearray()
        self._scanned = 0  # bytes of an unfinished head that were searched for its end
        self._limit = HIGH
        self._paused: asyncio.TimerHandle | None = None  # reading, until the app has read
        # The client has closed its sending half; what still comes is dropped.
        self._ended = self._closing = False

    # What the loop calls

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        ends = {"client": "peername", "server": "sockname"}
        self.ends = {end: transport.get_extra_info(name) for end, name in ends.items()}
        self._connections.add(self)
        self._active = self.loop.time()
        self._idle_check = self.loop.call_later(IDLE, self._check_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self.resume_writing()
        for waiting in filter(None, (self._idle_check, self._paused)):
            waiting.cancel()
        if self.cycle:
            self.cycle.leave()

    def eof_received(self) -> bool:
        """Keep the connection for the answer to a whole request, for a moment.

        Go cancels the request then: a client that has left looks like one that has only said all.
        """
        self._ended = True
        self.loop.call_later(GRACE, lambda: self.cycle and self.transport.abort())
        return self.cycle is not None and self.body is None

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self._active = self.loop.time()
        if not self._closing:
            self._pending += data
            self._advance()

    # Reading

    def _advance(self) -> None:
        """Take the rest of a body and the next head out of what has come."""
        try:
            while self._pending and (self.body or not self.cycle):
                if not (self._take_body() if self.body else self._take_head()):
                    break
        except http1.Refused as refused:
            return self.refuse(refused)
        if self._pending or self.body or self._paused:
            self.check_reading()

    def _take_head(self) -> bool:
        end = http1.head_end(self._pending, max(self._scanned - 2, 0))
        if end < 0:
            self._scanned = len(self._pending)
            if self._scanned > http1.HEAD_LIMIT:
                raise http1.Refused(431)
            return False
        text = bytes(self._pending[:end]).lstrip(b"\r\n")
        del self._pending[:end]
        self._scanned = 0
        if text:
            head = http1.read_head(text)
            self.body = http1.Body(head.length) if head.length != 0 else None
            self.cycle = Cycle(self, head)
        return True

    def _take_body(self) -> bool:
        """Hand a piece to the app, or drop it after the answer, unless that takes too long."""
        assert self.body
        body, piece = self.body, self.body.feed(self._pending)
        if body.done:
            self.body = None
        if self.cycle:
            self.cycle.take(piece, more=not body.done)
        elif body.size + body.left > UNREAD:
            self._close_slowly()
        return body.done

    def check_reading(self) -> None:
        """Pause reading while too much waits for the app."""
        waits = len(self._pending) + (self.cycle.size if self.cycle else 0)
        if waits > self._limit and not self._paused:
            self._paused = self.loop.call_later(STALLED, self._read_ahead)
            self.transport.pause_reading()
        elif waits <= self._limit and self._paused:
            self._paused.cancel()
            self._paused = None
            self.transport.resume_reading()

    def _read_ahead(self) -> None:
        self._limit = READ_AHEAD
        self.check_reading()

    # The end of an answer, and of the connection

    def finished(self, keep_alive: bool) -> None:
        """Go on with the next request, or close."""
        self.cycle, self._active = None, self.loop.time()
        if self.transport.is_closing():
            return
        if not (keep_alive and self.keep_alive):
            return self._close_slowly() if self.body else self.shutdown()
        self._advance()
        if self._ended and not self.cycle:
            self.transport.close()

    def _close_slowly(self) -> None:
        """Let the client read the answer first: to close while it sends is a reset to it."""
        self._closing, self.body = True, None
        self._pending.clear()
        self.check_reading()
        self.transport.write_eof()
        self.loop.call_later(2 * GRACE, self.transport.close)

    def refuse(self, refused: http1.Refused) -> None:
        """Answer a request that cannot be served, where no answer has begun, and close."""
        cycle, self.cycle = self.cycle, None
        if not (cycle and cycle.started):
            self.transport.write(refused.answer())
        if cycle:
            cycle.leave()
        self._close_slowly()

    def reusable(self) -> bool:
        """Tell whether another request may follow, behind what is left of this one's body."""
        return self.keep_alive and not (self.body and self.body.left > UNREAD)

    def shutdown(self) -> None:
        """Take no other request. uvicorn calls this when it stops."""
        self.keep_alive = False
        if not self.cycle:
            self.transport.close()

    def _check_idle(self) -> None:
        left = self._active + IDLE - self.loop.time()
        if left > 0 or self.cycle:
            self._idle_check = self.loop.call_later(max(left, 1), self._check_idle)
        else:
            self.transport.close()


class Cycle:
    """One request and its answer."""

    def __init__(self, protocol: Protocol, head: http1.Head) -> None:
        self.protocol = protocol
        self.head = head
        self.size = 0  # bytes of the body that wait for the app
        self.started = False  # the answer
        self._keep_alive = head.keep_alive
        self._pieces: list[bytes] = []
        self._more = head.length != 0  # bytes of the body are to come
        self._read = False  # the app knows the body's end
        self._over = False  # the answer is complete, or the client has left
        self._awaits_continue = head.expects_continue
        self._waiter: asyncio.Future[None] | None = None
        self._corked = b""  # the answer's head, which leaves with the first bytes of its body
        self._chunked = False
        self._left: int | None = None  # bytes to come of an answer that has a length
        self.task = protocol.loop.create_task(self._run(protocol.app))

    async def _run(self, app: Any) -> None:
        try:
            await app(self.head.scope | self.protocol.ends, self.receive, self.send)
            if not self._over:
                raise RuntimeError("the app left its answer unfinished")
        except (BrokenAnswer, asyncio.CancelledError):
            self._break()
        except Exception as exc:
            # Without the exception's text, which may hold a prompt.
            fields = {"error": type(exc).__name__, "stack": traceback.format_tb(exc.__traceback__)}
            logger.error("request failed", extra={"fields": fields})
            if self.started or self._over:
                self._break()
            else:
                self.protocol.refuse(http1.Refused(500))

    # The request

    def take(self, piece: bytes, *, more: bool) -> None:
        """Keep a piece of the body for the app."""
        if piece:
            self._pieces.append(piece)
            self.size += len(piece)
        self._more = more
        self._wake()

    async def receive(self) -> Message:
        if self._awaits_continue and not self.started:
            self.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._awaits_continue = False
        while not (self._over or self._pieces) and (self._more or self._read):
            self._waiter = self.protocol.loop.create_future()
            await self._waiter
        if self._over:
            return {"type": "http.disconnect"}
        body = b"".join(self._pieces)
        self._pieces.clear()
        self.size = 0
        self._read = not self._more
        self.protocol.check_reading()
        return {"type": "http.request", "body": body, "more_body": self._more}

    def leave(self) -> None:
        """Cancel the app's task, because the client has left."""
        self._over = True
        self._wake()
        self.task.cancel()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # The answer

    async def send(self, message: Message) -> None:
        if self._over:
            return  # the client has left
        if message["type"] == "http.response.start":
            return self._start(message["status"], message["headers"])
        if not self.started:
            raise RuntimeError("the app sent a body without a head")
        self._write(message.get("body", b""), more=message.get("more_body", False))
        if not self.protocol.writable.is_set():
            await self.protocol.writable.wait()

    def _start(self, status: int, headers: http1.Headers) -> None:
        """Build the answer's head; it leaves with what comes of the body in the same moment."""
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
        if self.head.scope["method"] == "HEAD" or status in (204, 304):
            self._left = 0
        self._chunked = self._left is None and self.head.scope["http_version"] == "1.1"
        has_end = self._chunked or self._left is not None  # else the connection's end is its end
        # A client that was not told to continue may send its body or not.
        self._keep_alive &= has_end and self.protocol.reusable() and not self._awaits_continue
        own = [(b"transfer-encoding", b"chunked")] if self._chunked else []
        if not self._keep_alive or self.head.scope["http_version"] == "1.0":
            own.append((b"connection", b"keep-alive" if self._keep_alive else b"close"))
        self._corked, self.started = http1.answer_head(status, [*headers, *own]), True
        self.protocol.loop.call_soon(self._uncork)

    def _uncork(self, data: bytes = b"") -> None:
        if (data or self._corked) and not self._over:
            head, self._corked = self._corked, b""
            self.protocol.transport.write(head + data)

    def _write(self, body: bytes, *, more: bool) -> None:
        if self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body += b"" if more else b"0\r\n\r\n"
        elif self._left is not None:
            body = body if self.head.scope["method"] != "HEAD" else b""
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the answer has not the length that its head says")
        self._uncork(body)
        if not more:
            self._over = True
            self._wake()
            self.protocol.finished(self._keep_alive)

    def _break(self) -> None:
        """Close the connection so that the client cannot take the answer for a complete one."""
        if self._over:
            return
        self._uncork()
        if self.started and not self._chunked and self._left is None:  # it ends with a FIN
            sock = self.protocol.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._over = True
        self.protocol.transport.close()
