"""Fetch: reads one page, and trusts no part of the way to it.

The name of the host is resolved once, each of its addresses is judged, and httpx connects to one of
those addresses, not to the name: a name that leads elsewhere a moment later (DNS rebinding) gains
nothing. TLS is verified for the name. Each redirect goes through the same. One deadline and one
limit of bytes hold for all of it; compressed answers are refused, because a small one can unpack to
a huge page. No cookies, no referrer, no proxy.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any

import httpx

from .rules import Address, FetchError, Rules, host_of, port_of

Resolve = Callable[..., Iterable[Any]]  # like socket.getaddrinfo
Answer = tuple[httpx.Response, bytes]

REDIRECTS = 3
TYPES = ("text/html", "application/xhtml+xml", "text/plain", "text/markdown", "application/json")
HEADERS = {
    "accept": ", ".join(TYPES),
    "accept-encoding": "identity",
    "connection": "close",
    "user-agent": "ollama-smart-proxy",
}


async def fetch(
    text: str, rules: Rules, resolve: Resolve = socket.getaddrinfo
) -> tuple[httpx.URL, httpx.Response, bytes]:
    """Return URL, head and body of the page at the end of all redirects. Raises FetchError."""
    url = rules.admit(text)
    try:
        async with asyncio.timeout(rules.timeout):
            for _ in range(REDIRECTS + 1):
                response, body = await attempt(url, rules, await find(url, rules, resolve))
                if not response.has_redirect_location:
                    return url, response, body
                url = rules.redirect(url, response.headers["location"])
    except TimeoutError as exc:
        raise FetchError(f"it was not there within {rules.timeout:g} seconds") from exc
    raise FetchError(f"it redirects more than {REDIRECTS} times")


async def find(url: httpx.URL, rules: Rules, resolve: Resolve) -> list[Address]:
    """Return the addresses of a host, if all of them may be read from."""
    stream = socket.SOCK_STREAM
    try:
        infos = await asyncio.to_thread(resolve, host_of(url), port_of(url), type=stream)
    except (socket.gaierror, UnicodeError) as exc:
        raise FetchError("its host was not found") from exc
    addresses = [ip_address(info[4][0]) for info in infos]
    if not all(map(rules.allows, addresses)):
        raise FetchError("its host has an address that is not public", 403)
    return addresses


async def attempt(url: httpx.URL, rules: Rules, addresses: list[Address]) -> Answer:
    """Return what the first address that takes a connection answers."""
    why = "its server does not answer"
    names = {"headers": {"host": url.netloc}, "extensions": {"sni_hostname": host_of(url)}}
    for address in addresses:  # many hosts have an IPv6 address that this machine does not reach
        try:
            at = url.copy_with(host=str(address))
            return await get(at, rules, rules.timeout / len(addresses) / 2, **names)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            if "CERTIFICATE_VERIFY_FAILED" in str(exc):
                why = "its certificate is not valid for it"
    raise FetchError(why)


async def get(url: httpx.URL, rules: Rules, patience: float, **names: Any) -> Answer:
    """Return an answer that is a page or a redirect; `patience` is the seconds for connecting.

    Raises FetchError, and httpx.ConnectError or ConnectTimeout.
    """
    timeout = httpx.Timeout(rules.timeout, connect=patience)
    client = httpx.AsyncClient(verify=rules.tls, trust_env=False, headers=HEADERS, timeout=timeout)
    try:
        async with client, client.stream("GET", url, **names) as response:
            if response.has_redirect_location:
                return response, b""
            return response, await read(response, rules.max_bytes)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
        raise FetchError("its server broke off, or does not speak HTTP") from exc


async def read(response: httpx.Response, most: int) -> bytes:
    """Return the whole body of an answer that can be a page. Raises FetchError."""
    headers = response.headers
    if response.status_code != 200:
        raise FetchError(f"its server answered {response.status_code}")
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise FetchError("it came compressed, which we had asked it not to be")
    if kind_of(response) not in TYPES:
        raise FetchError("it is no HTML, plain text, Markdown or JSON")
    body = bytearray()
    if int(headers.get("content-length", 0)) <= most:
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise FetchError(f"it is longer than {most} bytes")


def kind_of(response: httpx.Response) -> str:
    """Return the content type, without parameters."""
    return str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()
