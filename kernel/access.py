"""Access: who may come in. Plain ASGI, and done before a byte of the body is read.

Ollama checks `Host` against DNS rebinding and `Origin` against foreign web pages. The upstream is
sent a Host of its own, so the first check is ours to repeat (allowedHost in Ollama's
server/routes.go); the second stays Ollama's, but a page that it would refuse gets no agent and
none of our own endpoints. Then come keys and closed paths, where the operator set them.
"""

from __future__ import annotations

import binascii
import hmac
import ipaddress
import posixpath
import re
import secrets
import socket
from base64 import b64decode
from collections.abc import Awaitable, Collection, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from kernel.config import KEY_NAME, KEY_NAMED, AccessConfig, Key
from kernel.errors import ConfigError, NotAllowed
from kernel.log import SECRETS, RequestInfo, info
from kernel.models import matches
from kernel.relay import refuse, respond

# What Go calls loopback, unspecified or private; Python's is_private means more
NEAR = "127.0.0.0/8 ::1 0.0.0.0 :: 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
NETWORKS = [*map(ipaddress.ip_network, NEAR.split())]
ORIGINS = (  # envconfig.AllowedOrigins in Ollama's sources
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:.*)?"
    r"|(app|file|tauri|vscode-webview|vscode-file)://.*"
)
MISSING = "a key is needed here"
UNKNOWN = "the key that was sent is none of those in [keys]"
FORMS = "send Authorization: Bearer KEY, x-api-key: KEY, or KEY as the password of Basic"
# With Basic a browser would ask over our page; Claude Code would try again for minutes
CHALLENGE = [(b"www-authenticate", b"Bearer"), (b"x-should-retry", b"false")]
LONGEST = 300  # bytes of an origin that is copied into an answer: a name has 253 at most
# As Go's net.SplitHostPort does it: [::1] without a port stays as it is, and then is no address.
SPLIT = re.compile(r"\[([^\[\]]*)\]:[^:\[\]]*|([^:\[\]]*):[^:\[\]]*")


class Access:
    """Refuse what may not come in. `own` are the paths that the proxy answers itself.

    `keyless` are those of them that need no key, because without one they tell nothing. `loopback`
    says that only this machine can connect.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: AccessConfig,
        keys: Mapping[str, Key],
        loopback: bool,
        own: Collection[str],
        keyless: Collection[str] = (),
    ) -> None:
        self.app = app
        self.deny = access.deny
        self.keys = [(name, key, digest(key.key.encode())) for name, key in keys.items()]
        self.loopback = loopback
        self.own = frozenset(own)
        self.keyless = frozenset(keyless)
        self.below = tuple(path.partition("{")[0] for path in own if "{" in path)
        self.names = {"", "localhost", socket.gethostname().lower()}
        self.names.update(map(str.lower, access.hosts))
        # Only * is a wildcard; fnmatch would read [::1] as a character class.
        likes = [re.escape(origin).replace(r"\*", ".*") for origin in access.origins]
        self.origins = re.compile("|".join([ORIGINS, *likes]))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            try:
                self.check(scope, info(scope))
            except NotAllowed as exc:
                if not str(exc):
                    return respond(scope, send, exc.status, [], b"")  # as Ollama does
                return refuse(scope, send, exc, CHALLENGE if exc.status == 401 else ())
        return self.app(scope, receive, send)

    def check(self, scope: Scope, known: RequestInfo) -> None:
        """Raise NotAllowed, with no text where Ollama's answer has no body."""
        own = scope["path"] in self.own or scope["path"].startswith(self.below)
        if self.loopback or own:
            self.check_host(known.host, own)
        for origin in known.origins:
            self.check_origin(origin, known, own)
        if self.deny:
            check_path(scope["path"], self.deny)
        if self.keys:
            self.check_key(scope, known)
            if known.key.deny:
                check_path(scope["path"], known.key.deny, f" to the key {known.user}")

    def check_host(self, host: str, own: bool) -> None:
        name, near = read_host(host)
        if near or name in self.names or name.endswith((".localhost", ".local", ".internal")):
            return
        if not is_mine(name):
            cure = f'{name} is not allowed here: access.hosts = ["{name}"] allows it'
            raise NotAllowed(cure if own else "")

    def check_origin(self, origin: bytes, known: RequestInfo, own: bool) -> None:
        """Leave in `known` what the origin may do."""
        text = origin.decode("latin-1")
        if text in (f"http://{known.host}", f"https://{known.host}"):
            return
        if len(text) <= LONGEST and self.origins.fullmatch(text):
            known.cors = [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        elif own:
            raise NotAllowed
        else:
            known.foreign = True

    def check_key(self, scope: Scope, known: RequestInfo) -> None:
        """Take the key out of the headers that go upstream; raise NotAllowed without one."""
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in known.noted:
            return
        sent = [value for name in SECRETS for value in known.noted.get(name, ())]
        given = [digest(secret_of(value)) for value in sent]
        # Every comparison is made, so that the time taken tells nothing.
        hits = [
            (name, key)
            for name, key, due in self.keys
            for value in given
            if hmac.compare_digest(due, value)
        ]
        if hits:
            known.user, known.key = hits[0]
            known.headers = [pair for pair in known.headers if pair[0] not in SECRETS]
        elif scope["path"] not in self.keyless:
            raise NotAllowed(f"{UNKNOWN if sent else MISSING}; {FORMS}", status=401)


def digest(secret: bytes) -> bytes:
    return sha256(secret).digest()


def secret_of(value: bytes) -> bytes:
    """Return the key in a header: all of it, behind `Bearer`, or the password of `Basic`."""
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() != b"basic":
        return value
    try:
        return b64decode(rest).partition(b":")[2]
    except binascii.Error:
        return b""


def check_path(path: str, deny: Collection[str], whom: str = "") -> None:
    """Raise NotAllowed for a closed path, and for what is below it."""
    # Ollama's router unescapes, and cleans what has // or .. in it
    clean = posixpath.normpath("/" + unquote(path).lstrip("/"))
    for closed in deny:
        if f"{clean}/".startswith(closed.rstrip("/") + "/"):
            raise NotAllowed(f"{closed} is closed here{whom}")


def check_model(known: RequestInfo, model: object) -> None:
    """Raise NotAllowed if the key may not ask this model; None is one that cannot be seen."""
    allowed = known.key.models
    if allowed and not (isinstance(model, str) and matches(model, allowed)):
        which = "a model that cannot be seen here" if model is None else repr(model)
        raise NotAllowed(f"the key {known.user} may ask {', '.join(allowed)}, and not {which}")


def may_use(known: RequestInfo, agent: str) -> bool:
    """Tell whether the key may ask for an agent."""
    allowed = known.key.agents
    return not allowed or any(fnmatchcase(agent, pattern.lower()) for pattern in allowed)


def fresh_key(name: str) -> str:
    """Return the lines for osp.toml with a key that nobody has. Raises ConfigError for its name."""
    if not KEY_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name: {KEY_NAMED}")
    return f'[keys.{name}]\nkey = "osp-{secrets.token_urlsafe(24)}"\n'


def is_operator(scope: Scope) -> bool:
    """Tell whether a request may see everything: it has a key without limits or, where no key is
    needed, comes from this machine.
    """
    host = scope["client"][0] if scope["client"] else ""
    mine = host == "::1" or host.removeprefix("::ffff:").startswith("127.")
    return (mine or bool(info(scope).user)) and not info(scope).key.is_limited


@lru_cache(maxsize=100)
def read_host(host: str) -> tuple[str, bool]:
    """Return the name in a Host header, and whether it is an address that is not public.

    The name has no port, or is all of it where Go sees no port.
    """
    split = SPLIT.fullmatch(host)
    name = ((split[1] or split[2] or "") if split else host).lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name, False
    address = getattr(address, "ipv4_mapped", None) or address
    return name, any(address in network for network in NETWORKS)


def is_mine(name: str) -> bool:
    """Tell whether a name is an address of this machine: only those can be bound."""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            socket.inet_pton(family, name)  # bind() would look a name up
            probe.bind((name, 0))
        except OSError:
            return False
    return True


def is_loopback(listener: socket.socket) -> bool:
    """Tell whether only this machine can connect to a socket, whatever the setting's text was."""
    address = ipaddress.ip_address(listener.getsockname()[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
