"""Access: who may come in. Plain ASGI, and done before a byte of the body is read.

Ollama checks `Host` against DNS rebinding and `Origin` against foreign web pages. The upstream is
sent a Host of its own, so the first check is ours to repeat (allowedHost in Ollama's
server/routes.go); the second stays Ollama's, but a page that it would refuse gets no agent and
none of our own endpoints. Then come keys and closed paths, where the operator set them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import posixpath
import re
import socket
from collections.abc import Collection
from functools import lru_cache
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from kernel.config import AccessConfig
from kernel.errors import BadRequest, NotAllowed
from kernel.log import facts
from kernel.relay import refuse, respond

PRIVATE = [
    ipaddress.ip_network(net)  # what Go's IsPrivate means; Python's is_private means more
    for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]
ORIGINS = [  # envconfig.AllowedOrigins in Ollama's sources
    *(f"{scheme}://{host}{port}" for scheme in ("http", "https")
      for host in ("localhost", "127.0.0.1", "0.0.0.0") for port in ("", ":*")),
    "app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*",
]  # fmt: skip
PLAIN = (b"content-type", b"text/plain; charset=utf-8")
LONGEST = 300  # of an origin that is copied into an answer: a name has 253 at most
# As Go's net.SplitHostPort does it: [::1] without a port stays as it is, and then is no address.
SPLIT = re.compile(r"\[([^\[\]]*)\]:[^:\[\]]*|([^:\[\]]*):[^:\[\]]*")
VALID = re.compile(r"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")  # httpguts.ValidHostHeader
SECRETS = (b"authorization", b"x-api-key")


class Access:
    """Refuse what may not come in. `own` are the paths that the proxy answers itself."""

    def __init__(
        self, app: ASGIApp, access: AccessConfig, listen: str, own: Collection[str]
    ) -> None:
        self.app = app
        self.access = access
        self.loopback = is_loopback(listen)
        self.own = frozenset(own)
        self.names = {socket.gethostname().lower(), *map(str.lower, access.hosts)}
        # A * stands for anything and no other sign for more than itself: fnmatch would read [::1].
        likes = (re.escape(origin).replace(r"\*", ".*") for origin in (*ORIGINS, *access.origins))
        self.origins = re.compile("|".join(likes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            unfold(scope)
            try:
                self.check_host_and_origin(scope)
                self.check_path(scope["path"])
                self.check_key(scope)
            except BadRequest as exc:  # net/http's words, and like it the end of the connection
                headers = [PLAIN, (b"connection", b"close")]
                return await respond(scope, send, 400, headers, f"400 Bad Request{exc}".encode())
            except NotAllowed as exc:
                if not str(exc):
                    return await respond(scope, send, exc.status, [], b"")  # as Ollama does
                return await refuse(scope, send, exc)
        await self.app(scope, receive, send)

    def check_host_and_origin(self, scope: Scope) -> None:
        """Raise BadRequest or an empty NotAllowed; leave in the facts what the origin may do."""
        hosts = values(scope, b"host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            raise BadRequest("" if hosts else ": missing required Host header")
        host = hosts[0] if hosts else ""
        if not VALID.fullmatch(host):
            raise BadRequest(": malformed Host header")
        own, known = scope["path"] in self.own, facts(scope)
        if (self.loopback or own) and not self.allowed_host(host_name(host)):
            raise NotAllowed
        for origin in values(scope, b"origin"):
            if origin in (f"http://{host}", f"https://{host}"):
                continue
            if len(origin) <= LONGEST and self.origins.fullmatch(origin):
                allow = (b"access-control-allow-origin", origin.encode("latin-1"))
                known.cors = [allow, (b"vary", b"Origin")]
            elif own:
                raise NotAllowed
            else:
                known.foreign = True

    def allowed_host(self, name: str) -> bool:
        if name in ("", "localhost") or name in self.names:
            return True
        return name.endswith((".localhost", ".local", ".internal")) or is_near(name)

    def check_path(self, path: str) -> None:
        if not self.access.deny:
            return
        # Ollama's router unescapes, and cleans what has // or .. in it
        clean = posixpath.normpath("/" + unquote(path).lstrip("/"))
        for closed in self.access.deny:
            if clean == closed or clean.startswith(closed.rstrip("/") + "/"):
                raise NotAllowed(f"{closed} is closed here")

    def check_key(self, scope: Scope) -> None:
        """Take the key out of the headers, so that it goes no further; NotAllowed without one."""
        if not self.access.keys:
            return
        if scope["method"] == "OPTIONS" and values(scope, b"access-control-request-method"):
            return
        sent = [value for name in SECRETS for value in values(scope, name)]
        given = [re.sub(r"(?i)^bearer +", "", value) for value in sent]
        # Every comparison is made, so that the time taken tells nothing.
        hits = [key for key in self.access.keys for value in given if same(key, value)]
        if not hits:
            text = "a key is needed here: Authorization: Bearer KEY, or x-api-key: KEY"
            raise NotAllowed(text, status=401)
        facts(scope).user = hashlib.sha256(hits[0].encode()).hexdigest()[:16]
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in SECRETS]


def unfold(scope: Scope) -> None:
    """Turn a target in absolute form into path and Host, which it overrides (RFC 9112, 3.2.2)."""
    _, absolute, rest = scope["raw_path"].partition(b"://")
    if absolute and not scope["raw_path"].startswith(b"/"):
        authority, _, path = rest.partition(b"/")
        scope["raw_path"] = b"/" + path
        scope["path"] = unquote(scope["raw_path"].decode("latin-1"))
        others = [pair for pair in scope["headers"] if pair[0] != b"host"]
        scope["headers"] = [(b"host", authority), *others]


def values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def same(key: str, value: str) -> bool:
    return hmac.compare_digest(key.encode(), value.encode("latin-1"))


@lru_cache(maxsize=100)
def host_name(host: str) -> str:
    """Return the name of a Host header without its port, and all of it where Go sees no port."""
    split = SPLIT.fullmatch(host)
    return ((split[1] or split[2] or "") if split else host).lower()


def is_near(name: str) -> bool:
    """Tell whether a name is an address of this machine or of a private network."""
    address, private = address_of(name)
    return private or bool(address and is_mine(address))


@lru_cache(maxsize=100)
def address_of(name: str) -> tuple[str, bool]:
    """Return the address that a name is, else nothing, and whether it is no public one."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return "", False
    address = getattr(address, "ipv4_mapped", None) or address
    private = address.is_loopback or address.is_unspecified
    return str(address), private or any(address in net for net in PRIVATE)


def is_mine(address: str) -> bool:
    """Tell whether an address is one of this machine's: only those can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_loopback(listen: str) -> bool:
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return listen == "localhost"
