"""Rules: which pages may be read, judged before anything is sent.

A URL must be plainly spelled, its host and port must be in the operator's lists, and each address
of that host must be public, or in a network that the operator opened. A spelling that two programs
could read differently is refused and never repaired. No message names a host or an address: a
redirect may have led there, and whoever asked shall not learn what stands in our network.
"""

from __future__ import annotations

import re
import ssl
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any, TypeVar
from urllib.parse import quote, urljoin

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
T = TypeVar("T")

LONGEST = 2000  # characters of a URL
NO_HOSTS = (
    "no host is open to this agent yet; its operator lists them in osp.toml:"
    ' [agents.web.settings] hosts = ["example.org", "*.example.org"]'
)
DEFAULT_PORTS = {"http": 80, "https": 443}

# What programs read differently: browsers take \ for / and drop tabs and line ends.
DOUBTFUL = re.compile(r"[\x00-\x20\x7f\\]")
URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:[/?][^#]*)?)(?:#.*)?",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)
LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
# The last label is no number, or it would be an address: 2130706433, 0x7f.1 and 127.1 are all
# 127.0.0.1 (https://url.spec.whatwg.org/#ends-in-a-number-checker).
NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{LABEL}\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z){LABEL}")

# What the registries of special addresses hold that no page is read from
# (https://www.iana.org/assignments/iana-ipv4-special-registry and -ipv6-). Our own list, because
# that of `ipaddress` differs between the versions of Python, and counts multicast as global.
SPECIAL: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared, behind a provider's NAT
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # Azure's own services for a virtual machine
            "169.254.0.0/16",  # link-local; 169.254.169.254 gives away a cloud's keys
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocols
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # protocols; Teredo among them, which holds an IPv4 address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which holds an IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)
# Of IPv6 only this is given out: loopback, mapped, unique local and link-local are elsewhere.
UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits: that one is judged


class FetchError(Exception):
    """A page that cannot be read; its text is for the user, and `status` for the client."""

    status = 422


class Refused(FetchError):
    """A page that may not be read."""

    status = 403


class BadURL(FetchError):
    """A URL that is none, or that is spelled in a way that could mean two things."""

    status = 400


@dataclass(frozen=True, slots=True)
class Place:
    """A URL, taken apart and spelled in one way."""

    scheme: str
    host: str  # in lower case, an IPv6 address without its brackets
    port: int
    target: str  # path and query, ASCII

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator allows, as values that have been checked."""

    hosts: frozenset[str]  # names in lower case, "*.example.org", addresses
    ports: frozenset[int]
    private: tuple[Network, ...]  # not public, and open all the same
    max_bytes: int  # of a page
    timeout: float  # seconds, from the name of its host to its last byte
    tls: ssl.SSLContext

    def admit(self, url: str) -> Place:
        """Return the place that a URL names. Raises BadURL and Refused."""
        place = parse(url)
        if not self.hosts:
            raise Refused(NO_HOSTS)
        if not self.lists(place.host):
            raise Refused("its host is not one of those that the operator lists in settings.hosts")
        if place.port not in self.ports:
            raise Refused("its port is not one of those that the operator lists in settings.ports")
        return place

    def redirect(self, place: Place, location: str) -> Place:
        """Return where a page leads to. Raises Refused, whatever is wrong with it."""
        # Bytes that are no ASCII came to us as Latin-1; and many servers send spaces.
        location = quote(location, safe=string.punctuation, encoding="latin-1", errors="replace")
        try:
            target = self.admit(urljoin(place.url, location))
        except (FetchError, ValueError) as exc:
            why = exc if isinstance(exc, FetchError) else "its URL is none"
            raise Refused(f"it redirects to a page that is refused: {why}") from exc
        if (place.scheme, target.scheme) == ("https", "http"):
            raise Refused("it redirects from https to http")
        return target

    def lists(self, host: str) -> bool:
        """Tell whether a host is listed; `*.example.org` means all below it, at any depth."""
        parts = host.split(".")
        above = {f"*.{'.'.join(parts[n:])}" for n in range(1, len(parts))}
        return host in self.hosts or not above.isdisjoint(self.hosts)

    def allows(self, address: Address) -> bool:
        return is_public(address) or any(address in network for network in self.private)


def parse(url: str) -> Place:
    """Return a URL taken apart. Raises BadURL, which says what would be right."""
    if len(url) > LONGEST:
        raise BadURL(f"its URL is longer than {LONGEST} characters")
    if DOUBTFUL.search(url):
        raise BadURL("its URL has a space, a control character or a backslash in it")
    found = URL.fullmatch(url)
    if not found:
        raise BadURL("its URL must be like https://example.org/page, without a user in it")
    scheme, host = found["scheme"].lower(), parse_host(found["host"].lower())
    port = int(found["port"] or DEFAULT_PORTS[scheme])
    path, mark, query = found["target"].partition("?")
    target = quote(f"{path or '/'}{mark}{query}", safe="!$%&'()*+,/:;=?@[]~")
    return Place(scheme, host, port, target)


def parse_host(text: str) -> str:
    """Return a name, or an address as `ipaddress` spells it. Raises BadURL."""
    if NAME.fullmatch(text):
        return text
    try:
        return str(IPv6Address(text[1:-1]) if text.startswith("[") else IPv4Address(text))
    except ValueError as exc:
        raise BadURL("its host must be a name like example.org or an address like 1.2.3.4") from exc


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the open internet.

    A network of one's own that has public addresses cannot be told from it.
    """
    if address in NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    given_out = address.version == 4 or address in UNICAST
    return given_out and not any(address in network for network in SPECIAL)


def parse_rules(settings: Mapping[str, Any]) -> Rules:
    """Return the rules of the agent's settings. Raises ValueError, which names the setting."""
    for key in ("max_bytes", "max_chars", "timeout"):
        if not settings[key] > 0:
            raise ValueError(f"settings: {key}: {settings[key]} must be above 0")
    return Rules(
        hosts=frozenset(parsed(settings, "hosts", parse_entry)),
        ports=frozenset(parsed(settings, "ports", int)),
        private=tuple(parsed(settings, "private", ip_network)),
        max_bytes=settings["max_bytes"],
        timeout=settings["timeout"],
        tls=ssl.create_default_context(),
    )


def parsed(settings: Mapping[str, Any], key: str, parse: Callable[[Any], T]) -> list[T]:
    """Return the items of a setting that is a list."""
    if not isinstance(settings[key], list):
        raise ValueError(f"settings: {key}: {settings[key]!r} must be a list")
    try:
        return [parse(item) for item in settings[key]]
    except ValueError as exc:
        raise ValueError(f"settings: {key}: {exc}") from exc


def parse_entry(entry: str) -> str:
    """Return an item of `settings.hosts` as `lists` compares it. Raises ValueError."""
    name = str(entry).lower()
    if NAME.fullmatch(name.removeprefix("*.")):
        return name
    try:
        return str(ip_address(name))
    except ValueError as exc:
        raise ValueError(f"{entry!r} must be a name, *. and a name, or an address") from exc
