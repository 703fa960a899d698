"""Server: what uvicorn is told, and the sockets that it listens on.

uvicorn brings the life of a server: lifespan, signals and the loop. A connection is a
`downstream.Protocol`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from kernel.access import is_mine
from kernel.config import Upstream
from kernel.connection import probe
from kernel.downstream import Protocol
from kernel.errors import ConfigError
from kernel.log import STOPPED
from kernel.systemd import tell

logger = logging.getLogger(__name__)

SETTINGS: dict[str, Any] = {
    "http": Protocol,
    "lifespan": "on",  # auto would hide what goes wrong in it
    "ws": "none",
    "log_config": None,
    "proxy_headers": False,
}


class Server(uvicorn.Server):
    """uvicorn, but a signal that was obeyed is not raised again, and a second one ends it all.

    `notify` is the address at which systemd wants to be told the state, or "".
    """

    def __init__(self, config: uvicorn.Config, notify: str = "") -> None:
        super().__init__(config)
        self.notify = notify

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        hang_up = getattr(signal, "SIGHUP", None)  # the terminal was closed
        if hang_up and signal.getsignal(hang_up) is signal.SIG_DFL:  # and it is no `nohup`
            asyncio.get_running_loop().add_signal_handler(hang_up, self.handle_exit, hang_up, None)
        for listener in sockets or ():
            # Accepted sockets inherit these. Without TCP_NODELAY, which asyncio sets only where a
            # socket's `proto` says TCP, the end of an answer waits 40 ms to be acknowledged.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            probe(listener)
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what the start made is looked at no more: 3 % of a request
        tell(self.notify, "READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open answers end for `timeout_graceful_shutdown` seconds, then break them off."""
        tell(self.notify, "STOPPING=1")
        for listener in self.servers:
            listener.close()
        connections: set[Any] = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        seconds = self.config.timeout_graceful_shutdown or 0
        if answers := self.open_answers():
            fields = {"open_answers": len(answers), "seconds": seconds}
            logger.info("stopping, open answers may end", extra={"fields": fields})
        end = time.monotonic() + seconds
        while connections and time.monotonic() < end:  # noqa: ASYNC110 (a plain set tells nobody)
            await asyncio.sleep(0.02)
        if late := self.open_answers():
            for task in late:
                task.cancel(STOPPED)
            await asyncio.wait(late, timeout=1)
        await self.lifespan.shutdown()

    def open_answers(self) -> list[asyncio.Task[None]]:
        connections: set[Any] = self.server_state.connections
        return [connection.cycle.task for connection in connections if connection.cycle]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True


class Paths(Router):
    """Starlette's router behind a look-up, which saves 6 to 9 % of a request to a known path."""

    def __init__(self, routes: Sequence[Route], **options: Any) -> None:
        super().__init__(routes, **options)
        plain = [route for route in routes if not route.methods and not route.param_convertors]
        self._apps = {route.path: route.app for route in plain}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        return self._apps.get(scope.get("path", ""), super().__call__)(scope, receive, send)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address, in any form that OLLAMA_HOST takes.

    An empty host and `::` are every address of both families; of a name's addresses the first
    IPv4 one counts, as in Go. Raises ConfigError.
    """
    name = host.strip().strip("\"'").strip("[]")
    both = name in ("", "::") and socket.has_dualstack_ipv6()
    try:
        found = socket.getaddrinfo(
            "::" if both else name or "0.0.0.0", port, type=socket.SOCK_STREAM
        )
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        text = f"cannot listen on {host}:{port}: {why}; --port takes another one"
        raise ConfigError(text) from exc


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return Upstream("http", host, port).url


def check_loop(listener: socket.socket, upstream: Upstream) -> None:
    """Raise ConfigError if the upstream is the very address that the proxy listens on."""
    host, port = listener.getsockname()[:2]
    try:
        theirs = {str(info[4][0]) for info in socket.getaddrinfo(upstream.host, upstream.port)}
    except OSError:
        return  # no such name: every request will say so
    everywhere = host in ("0.0.0.0", "::")
    mine = any(map(is_mine, theirs)) if everywhere else host in theirs
    if mine and port == upstream.port:
        raise ConfigError(f"upstream.url: {upstream.url} is this proxy itself, it must be Ollama")
