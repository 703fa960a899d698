"""Rules: which pages may be read, judged before anything is sent.

A URL must be plainly spelled, its host and port must be in the operator's lists, and each address
of that host must be public, or in a network that the operator opened. A spelling that two programs
could read differently is refused and never repaired. No message names a host or an address: a
redirect may have led there, and the client must not learn what stands in the operator's network.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import httpx

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

NO_HOSTS = (
    "no host is open to this agent yet; its operator lists them in osp.toml:"
    ' [agents.web.settings] hosts = ["example.org", "*.example.org"]'
)
SHAPE = "its URL must be like https://example.org/page: no user, space or backslash, no odd host"
# Browsers take a backslash for / and drop tabs and line ends, other programs do not. ASCII: with
# IGNORECASE a long s would be an s.
URL = re.compile(
    r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?(?:[/?#][^\x00-\x20\x7f\\]{0,2000})?",
    re.IGNORECASE | re.ASCII,
)
LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
# The last label is no number, or it would be an address: 2130706433, 0x7f.1 and 127.1 are all
# 127.0.0.1 (https://url.spec.whatwg.org/#ends-in-a-number-checker).
NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{LABEL}\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z){LABEL}")

# The networks that no page is read from, of the registries of special addresses
# (https://www.iana.org/assignments/iana-ipv4-special-registry and -ipv6-): the list of `ipaddress`
# differs between versions of Python. 168.63.129.16 is Azure's own; Teredo (in 2001::/23) and 6to4
# (2002::/16) hold an IPv4 address.
SPECIAL = (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12"
    " 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24"
    " 203.0.113.0/24 224.0.0.0/3 2001::/23 2001:db8::/32 2002::/16 3fff::/20"
)
NETWORKS = [ip_network(text) for text in SPECIAL.split()]
# Of IPv6 only this is given out: loopback, mapped, unique local and link-local are elsewhere.
UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits: that one is judged


class FetchError(Exception):
    """A page that cannot be read, or may not: the text is for the user, the status for clients."""

    def __init__(self, why: str, status: int = 422) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator allows, as values that have been checked."""

    hosts: frozenset[str]  # names in lower case, "*.example.org", addresses
    ports: frozenset[int]
    private: tuple[Network, ...]  # not public, and open all the same
    max_bytes: int  # of a page
    timeout: float  # seconds, from the name of its host to its last byte
    tls: ssl.SSLContext

    def admit(self, text: str) -> httpx.URL:
        """Return a URL that may be read, spelled in one way. Raises FetchError."""
        url = parse(text)
        if not self.hosts:
            raise FetchError(NO_HOSTS, 403)
        host, unlisted = host_of(url), "is not one of those that the operator lists in settings"
        above = {f"*{host[dot.start() :]}" for dot in re.finditer(r"\.", host)}
        if self.hosts.isdisjoint({host, *above}):
            raise FetchError(f"its host {unlisted}.hosts", 403)
        if port_of(url) not in self.ports:
            raise FetchError(f"its port {unlisted}.ports", 403)
        return url

    def redirect(self, url: httpx.URL, location: str) -> httpx.URL:
        """Return where a page leads to. Raises FetchError, always a 403."""
        try:
            target = self.admit(str(url.join(location)))
        except (FetchError, ValueError, httpx.InvalidURL) as exc:
            why = exc if isinstance(exc, FetchError) else SHAPE
            raise FetchError(f"it redirects to a page that is refused: {why}", 403) from exc
        if (url.scheme, target.scheme) == ("https", "http"):
            raise FetchError("it redirects from https to http", 403)
        return target

    def allows(self, address: Address) -> bool:
        return is_public(address) or any(address in network for network in self.private)


def parse(text: str) -> httpx.URL:
    """Return a URL without its fragment. Raises FetchError, which says what would be right."""
    try:
        url = httpx.URL(text).copy_with(fragment=None) if URL.fullmatch(text) else None
        if url and (NAME.fullmatch(host_of(url)) or ip_address(host_of(url))):
            return url
    except (ValueError, httpx.InvalidURL):
        pass
    raise FetchError(SHAPE, 400)


def host_of(url: httpx.URL) -> str:
    """Return the host in lower case; an address as `ipaddress` spells it."""
    host = url.raw_host.decode()
    return str(IPv6Address(host)) if ":" in host else host


def port_of(url: httpx.URL) -> int:
    return {"http": 80, "https": 443}[url.scheme] if url.port is None else url.port


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the open internet.

    A network of the operator's own that has public addresses cannot be told from it.
    """
    if address in NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    given_out = address.version == 4 or address in UNICAST
    return given_out and not any(address in network for network in NETWORKS)


def parse_rules(settings: Mapping[str, Any]) -> Rules:
    """Return the rules of the agent's settings. Raises ValueError, which names the setting."""
    for key in ("max_bytes", "max_chars", "timeout", "results"):
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


def parsed(settings: Mapping[str, Any], key: str, parse: Callable[[Any], Any]) -> list[Any]:
    """Return the items of a setting that is a list."""
    if not isinstance(settings[key], list):
        raise ValueError(f"settings: {key}: {settings[key]!r} must be a list")
    try:
        return [parse(item) for item in settings[key]]
    except ValueError as exc:
        raise ValueError(f"settings: {key}: {exc}") from exc


def parse_entry(entry: str) -> str:
    """Return an item of `settings.hosts` as `admit` compares it. Raises ValueError."""
    name = str(entry).lower()
    return name if NAME.fullmatch(name.removeprefix("*.")) else str(ip_address(name))
