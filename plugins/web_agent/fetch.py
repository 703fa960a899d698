"""Fetch: reads one page over a socket of its own, and trusts nobody on the way.

The name of the host is resolved once, each of its addresses is judged, and the connection goes to
one of those and no other: a name that leads elsewhere a moment later (DNS rebinding) gains nothing.
TLS is verified for the name. A redirect starts all over. One deadline and one measure of bytes hold
for everything that comes in, so that neither drips nor floods get anywhere; what is encoded is
refused, for a small answer can unpack to a huge page. No cookies, no referrer, no proxy.
"""

from __future__ import annotations

import io
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from ipaddress import ip_address
from typing import Any

from .rules import Address, FetchError, Place, Refused, Rules

Resolve = Callable[..., Iterable[Any]]  # as socket.getaddrinfo

REDIRECTS = 3
REDIRECTING = (301, 302, 303, 307, 308)
HEAD = 2**16  # bytes of an answer's head, and as many more for its framing
TYPES = (
    "text/html",
    "application/xhtml+xml",
    "text/plain",
    "text/markdown",
    "application/json",
)
REQUEST = (
    "GET {target} HTTP/1.1\r\n"
    "Host: {authority}\r\n"
    "User-Agent: ollama-smart-proxy\r\n"
    "Accept: {types}\r\n"
    "Accept-Encoding: identity\r\n"
    "Connection: close\r\n\r\n"
)
CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    url: str  # at the end of the redirects
    kind: str  # one of TYPES; "" for a redirect
    charset: str  # of the header, or ""
    body: bytes
    location: str = ""  # of a redirect


class Wire(io.RawIOBase):
    """What comes in over a socket, until the time is up or there is no room for more."""

    def __init__(self, connection: socket.socket, ends: float) -> None:
        self.connection = connection
        self.ends = ends
        self.room = HEAD  # bytes

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return what HTTPResponse wants of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(left(self.ends))
        count = self.connection.recv_into(buffer)
        self.room -= count
        if self.room < 0:
            raise FetchError("it sends more than it should")
        return count


def left(ends: float) -> float:
    """Return the seconds until `ends`, which time.monotonic() counts. Raises TimeoutError."""
    seconds = ends - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def fetch(url: str, rules: Rules, resolve: Resolve = socket.getaddrinfo) -> Answer:
    """Return the page behind a URL and its redirects. Raises FetchError."""
    ends = time.monotonic() + rules.timeout
    place = rules.admit(url)
    for _ in range(REDIRECTS + 1):
        answer = attempt(place, rules, resolve, ends)
        if not answer.location:
            return answer
        place = rules.redirect(place, answer.location)
    raise FetchError(f"it redirects more than {REDIRECTS} times")


def attempt(place: Place, rules: Rules, resolve: Resolve, ends: float) -> Answer:
    """Return what one place answers; whatever goes wrong becomes a FetchError."""
    try:
        connection = connect(find(place, rules, resolve, ends), place.port, ends)
        with secure(connection, place, rules, ends) as connection:
            return ask(connection, place, rules, ends)
    except TimeoutError as exc:
        raise FetchError(f"it was not there within {rules.timeout:g} seconds") from exc
    except ssl.SSLCertVerificationError as exc:
        raise FetchError("its certificate is not valid for it") from exc
    except (OSError, HTTPException, ValueError) as exc:  # ValueError: a chunk of -5 bytes
        raise FetchError("its server broke off, or does not speak HTTP") from exc


def find(place: Place, rules: Rules, resolve: Resolve, ends: float) -> list[Address]:
    """Return the addresses of a host, if all of them may be read from."""
    try:
        infos = in_time(lambda: resolve(place.host, place.port, type=socket.SOCK_STREAM), ends)
    except (socket.gaierror, UnicodeError) as exc:
        raise FetchError("its host was not found") from exc
    addresses = [ip_address(info[4][0]) for info in infos]
    if not all(map(rules.allows, addresses)):
        raise Refused("its host has an address that is not public")
    return addresses


def in_time(work: Callable[[], Iterable[Any]], ends: float) -> Iterable[Any]:
    """Return what `work` returns. In a thread, for nothing else ends the wait for a resolver."""
    future: Future[Iterable[Any]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except (OSError, UnicodeError) as exc:  # it belongs to whoever waits
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future.result(left(ends))


def connect(addresses: list[Address], port: int, ends: float) -> socket.socket:
    """Return a connection to the first address that takes one."""
    for number, address in enumerate(addresses):
        with suppress(OSError):  # the next one may be in reach: many have no IPv6
            return dial(address, port, left(ends) / (len(addresses) - number))
    raise FetchError("its server does not answer")


def dial(address: Address, port: int, seconds: float) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        connection.connect((str(address), port))
    except OSError:
        connection.close()
        raise
    return connection


def secure(connection: socket.socket, place: Place, rules: Rules, ends: float) -> socket.socket:
    """Return the connection, with TLS around it where the place wants that."""
    if place.scheme == "http":
        return connection
    with connection:  # wrap_socket takes the socket out of it, or fails
        connection.settimeout(left(ends))
        return rules.tls.wrap_socket(connection, server_hostname=place.host)


def ask(connection: socket.socket, place: Place, rules: Rules, ends: float) -> Answer:
    """Send the request and return the answer, read no further than it is of use."""
    request = REQUEST.format(target=place.target, authority=place.authority, types=", ".join(TYPES))
    connection.sendall(request.encode("ascii"))
    wire = Wire(connection, ends)
    with HTTPResponse(wire, method="GET") as response:  # type: ignore[arg-type]  # makefile is all
        response.begin()
        location = response.headers.get("location", "")
        if response.status in REDIRECTING and location:
            return Answer(place.url, "", "", b"", location)
        kind, charset = judge(response)
        wire.room = HEAD + 2 * rules.max_bytes  # a page in small chunks is longer on the wire
        return Answer(place.url, kind, charset, read(response, rules.max_bytes))


def judge(response: HTTPResponse) -> tuple[str, str]:
    """Return type and charset of an answer that can be a page. Raises FetchError."""
    if response.status != 200:
        raise FetchError(f"its server answered {response.status}")
    headers = response.headers
    codings = headers.get_all("content-encoding", []) + headers.get_all("transfer-encoding", [])
    if any(coding.strip().lower() not in ("identity", "chunked", "") for coding in codings):
        raise FetchError("it came compressed, which we had asked it not to be")
    declared = headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise FetchError("it is no HTML, plain text, Markdown or JSON")
    charset = CHARSET.search(declared)
    return kind, charset[1] if charset else ""


def read(response: HTTPResponse, most: int) -> bytes:
    """Return the whole body. Raises FetchError if it is too long, or shorter than announced."""
    announced = response.length or 0  # it counts down while it is read
    body = response.read(most + 1) if announced <= most else b""
    if max(announced, len(body)) > most:
        raise FetchError(f"it is longer than {most} bytes")
    if response.length:
        raise FetchError("its server broke off in the middle")
    return body
