"""Server: the listening side, on uvicorn, for `osp.py`, the tests and the bench.

A request that offers an upgrade (`Upgrade: h2c`, as Java's client does with every POST) is served
as if it had not. h11 does so by itself; httptools stops behind the head and uvicorn loses the body,
so `Protocol` goes on with a new parser, which is told the framing and then reads the rest.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from kernel.access import is_mine
from kernel.config import Upstream
from kernel.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "lifespan": "on",  # auto would hide what goes wrong in it
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "date_header": False,
    "proxy_headers": False,
    "ws": "none",
    "timeout_keep_alive": 75,  # clients keep connections longer than uvicorn's 5 seconds
    "h11_max_incomplete_event_size": 2**20,  # Go takes headers of a megabyte, too
}


class Server(uvicorn.Server):
    """uvicorn, but a signal that was obeyed is not raised again, and a second one ends it all.

    SIGHUP reloads: it calls what the app's lifespan yields as `reload`. But where it means that the
    terminal was closed from which the proxy was started, it stops.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if hasattr(signal, "SIGHUP"):
            started_by_hand = os.isatty(0)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._hang_up, started_by_hand)
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is here now stays: no collection need look at it again

    def _hang_up(self, started_by_hand: bool) -> None:
        if started_by_hand and not os.isatty(0):
            return self.handle_exit(signal.SIGHUP, None)
        if reload := self.lifespan.state.get("reload"):  # else it is about to be loaded
            self._reloading = asyncio.create_task(reload())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True


class Paths(Router):
    """Starlette's router with a look-up before it: most of our routes are a path and an app."""

    def __init__(self, routes: Sequence[Route], **options: Any) -> None:
        super().__init__(routes, **options)
        plain = [route for route in routes if not route.methods and not route.param_convertors]
        self._apps = {route.path: route.app for route in plain}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._apps.get(scope["path"]) if scope["type"] == "http" else None
        await (app or super().__call__)(scope, receive, send)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as exc:
        text = f"cannot listen on {host}:{port}: {exc.strerror or exc}; --port takes another one"
        raise ConfigError(text) from exc
    # What it accepts has it, too. asyncio sets it only where a socket's `proto` says TCP, and
    # without it the last bytes of an answer wait for the client's acknowledgement, some 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return Upstream("http", host, port).url


def check_loop(listener: socket.socket, upstream: Upstream) -> None:
    """Raise ConfigError if the upstream is the very address that the proxy listens on."""
    host, port = listener.getsockname()[:2]
    try:
        theirs = {info[4][0] for info in socket.getaddrinfo(upstream.host, upstream.port)}
    except OSError:
        return  # no such name: every request will say so
    everywhere = host in ("0.0.0.0", "::") and any(map(is_mine, map(str, theirs)))
    if port == upstream.port and (host in theirs or everywhere):
        raise ConfigError(f"upstream.url: {upstream.url} is this proxy itself, it must be Ollama")


try:
    import httptools
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    SETTINGS["http"] = "h11"
else:

    class Protocol(HttpToolsProtocol):
        """uvicorn's connection on httptools, which takes no upgrade."""

        transport: Any

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.transport = Held(transport, self.loop)

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            try:
                self._feed(data)
            except httptools.HttpParserError:
                self.send_400_response("400 Bad Request")  # as Go says it

        def _feed(self, data: bytes) -> None:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offered:
                self.parser = httptools.HttpRequestParser(Rest(self))
                head = b"POST / HTTP/1.1\r\n%s\r\n" % self._framing()
                self._feed(head + data[offered.args[0] :])

        def on_headers_complete(self) -> None:
            """Keep the bytes of the target, as h11 does; uvicorn drops what it does not use."""
            self.transport.hold()
            super().on_headers_complete()
            path, _, query = self.url.partition(b"?")
            self.scope["raw_path"], self.scope["query_string"] = path, query

        def on_message_complete(self) -> None:
            if not (self.parser.should_upgrade() and self._framing()):  # else its body comes yet
                super().on_message_complete()

        def _framing(self) -> bytes:
            names = (b"content-length", b"transfer-encoding")
            return b"".join(b"%s: %s\r\n" % pair for pair in self.headers if pair[0] in names)

    class Held:
        """A transport that keeps the head of an answer until the body comes, in the same round of
        the loop or not: uvicorn writes both alone, and each time the client would be woken."""

        def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
            self._transport = transport
            self._loop = loop
            self._next = False  # the next bytes are a head
            self._head = b""
            self.is_closing = transport.is_closing

        def hold(self) -> None:
            self._next = True

        def write(self, data: bytes) -> None:
            if self._next:
                self._next, self._head = False, self._head + data
                self._loop.call_soon(self._flush)
            elif self._head:
                head, self._head = self._head, b""
                self._transport.write(head + data)
            else:
                self._transport.write(data)

        def _flush(self) -> None:
            if self._head and not self.is_closing():
                self.write(b"")

        def close(self) -> None:
            self._flush()
            self._transport.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

    class Rest:
        """What the second parser calls: its first head is made up, all else is the connection's."""

        def __init__(self, protocol: Protocol) -> None:
            self._protocol = protocol
            self._heads = 0
            self.on_body = protocol.on_body
            self.on_message_complete = protocol.on_message_complete

        def on_message_begin(self) -> None:
            self._heads += 1
            if self._heads > 1:
                self._protocol.on_message_begin()

        def on_url(self, url: bytes) -> None:
            if self._heads > 1:
                self._protocol.on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._heads > 1:
                self._protocol.on_header(name, value)

        def on_headers_complete(self) -> None:
            if self._heads > 1:
                self._protocol.on_headers_complete()

    SETTINGS["http"] = Protocol
