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
from collections.abc import Awaitable, Collection
from functools import lru_cache
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from kernel.config import AccessConfig
from kernel.errors import NotAllowed
from kernel.log import Headers, RequestInfo, info
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
LONGEST = 300  # bytes of an origin that is copied into an answer: a name has 253 at most
# As Go's net.SplitHostPort does it: [::1] without a port stays as it is, and then is no address.
SPLIT = re.compile(r"\[([^\[\]]*)\]:[^:\[\]]*|([^:\[\]]*):[^:\[\]]*")
SECRETS = (b"authorization", b"x-api-key")


class Access:
    """Refuse what may not come in. `own` are the paths that the proxy answers itself.

    `loopback` says that only this machine can connect.
    """

    def __init__(
        self, app: ASGIApp, access: AccessConfig, loopback: bool, own: Collection[str]
    ) -> None:
        self.app = app
        self.access = access
        self.loopback = loopback
        self.own = frozenset(own)
        self.names = {"", "localhost", socket.gethostname().lower()}
        self.names.update(map(str.lower, access.hosts))
        # Only * is a wildcard; fnmatch would read [::1] as a character class.
        likes = (re.escape(origin).replace(r"\*", ".*") for origin in (*ORIGINS, *access.origins))
        self.origins = re.compile("|".join(likes))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            try:
                self.check(scope, info(scope))
            except NotAllowed as exc:
                if not str(exc):
                    return respond(scope, send, exc.status, [], b"")  # as Ollama does
                return refuse(scope, send, exc)
        return self.app(scope, receive, send)

    def check(self, scope: Scope, known: RequestInfo) -> None:
        """Raise NotAllowed, with no text where Ollama's answer has no body."""
        own = scope["path"] in self.own
        if self.loopback or own:
            self.check_host(host_name(known.host), own)
        for origin in known.origins:
            self.check_origin(origin.decode("latin-1"), known, own)
        if self.access.deny:
            self.check_path(scope["path"])
        if self.access.keys:
            self.check_key(scope, known)

    def check_host(self, name: str, own: bool) -> None:
        if name in self.names or name.endswith((".localhost", ".local", ".internal")):
            return
        if not is_near(name):
            cure = f'{name} is not allowed here: access.hosts = ["{name}"] allows it'
            raise NotAllowed(cure if own else "")

    def check_origin(self, origin: str, known: RequestInfo, own: bool) -> None:
        """Leave in `known` what the origin may do."""
        if origin in (f"http://{known.host}", f"https://{known.host}"):
            return
        if len(origin) <= LONGEST and self.origins.fullmatch(origin):
            allow = (b"access-control-allow-origin", origin.encode("latin-1"))
            known.cors = [allow, (b"vary", b"Origin")]
        elif own:
            raise NotAllowed
        else:
            known.foreign = True

    def check_path(self, path: str) -> None:
        # Ollama's router unescapes, and cleans what has // or .. in it
        clean = posixpath.normpath("/" + unquote(path).lstrip("/"))
        for closed in self.access.deny:
            if clean == closed or clean.startswith(closed.rstrip("/") + "/"):
                raise NotAllowed(f"{closed} is closed here")

    def check_key(self, scope: Scope, known: RequestInfo) -> None:
        """Take the key out of the headers, so that it goes no further; NotAllowed without one."""
        headers = scope["headers"]
        if scope["method"] == "OPTIONS" and values(headers, b"access-control-request-method"):
            return
        sent = [value for name in SECRETS for value in values(headers, name)]
        given = [re.sub(r"(?i)^bearer +", "", value) for value in sent]
        # Every comparison is made, so that the time taken tells nothing.
        hits = [key for key in self.access.keys for value in given if same(key, value)]
        if not hits:
            text = "a key is needed here: Authorization: Bearer KEY, or x-api-key: KEY"
            raise NotAllowed(text, status=401)
        known.user = hashlib.sha256(hits[0].encode()).hexdigest()[:16]
        scope["headers"] = [pair for pair in headers if pair[0] not in SECRETS]
        known.headers = [pair for pair in known.headers if pair[0] not in SECRETS]


def values(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]


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


def is_loopback(listener: socket.socket) -> bool:
    """Tell whether only this machine can connect to a socket, whatever the setting's text was."""
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
