"""The client's connections on both event loops: addresses, what failed, how long they are kept."""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    ExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest

from kernel.client import OllamaClient
from kernel.config import Upstream, parse_upstream
from kernel.connection import Connection
from kernel.errors import UpstreamConnectionError, UpstreamError, UpstreamTimeout

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Serve: TypeAlias = Callable[[Reader, Writer], Awaitable[None]]
Port: TypeAlias = AsyncIterator[int]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LOOPS = ["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif("sys.platform == 'win32'"))]


@pytest.fixture(scope="module", params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@asynccontextmanager
async def upstream(serve: Serve, host: str = "127.0.0.1", port: int = 0, **tls: Any) -> Port:
    """Serve each connection to its end, and yield the port."""
    connections: set[asyncio.Task[None] | None] = set()

    async def connected(reader: Reader, writer: Writer) -> None:
        connections.add(asyncio.current_task())
        with suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(connected, host, port, **tls)
    async with server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*filter(None, connections))


@asynccontextmanager
async def before(serve: Serve, keep: float = 60.0) -> AsyncIterator[OllamaClient]:
    async with upstream(serve) as port:
        async with OllamaClient(Upstream("http", "127.0.0.1", port), 1.0, keep) as client:
            yield client


async def answers(reader: Reader, writer: Writer) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(OK)


async def garbles(reader: Reader, writer: Writer) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@contextmanager
def dead(host: str) -> Iterator[int]:
    """Listen at an address that lets nobody in: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("first", ["dead", "refused", "alive"])
async def test_a_name_with_several_addresses_is_reached_at_the_first_that_answers(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    with dead("127.0.0.2") as port:
        hosts = {"dead": "127.0.0.2", "refused": "127.0.0.3", "alive": "127.0.0.1"}

        async def two_addresses(*_: object, **__: object) -> list[tuple[Any, ...]]:
            return [(2, 1, 6, "", (host, port)) for host in (hosts[first], "127.0.0.1")]

        # No name that every machine knows has two addresses.
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two_addresses)
        async with upstream(answers, port=port):
            async with OllamaClient(Upstream("http", "two", port), 5.0) as client:
                with anyio.fail_after(2):
                    answer = await client.forward("GET", b"/", [])
                    assert await answer.read() == b"ok"


async def test_who_leaves_in_the_moment_of_connecting_leaves_no_connection() -> None:
    came: list[Reader] = []
    ended: list[Reader] = []

    async def serve(reader: Reader, writer: Writer) -> None:
        came.append(reader)
        await asyncio.wait_for(reader.read(), 2)
        ended.append(reader)

    async with before(serve) as client:
        for steps in range(1000):  # a busy machine takes longer to find the address
            asking = asyncio.create_task(client.forward("GET", b"/", []))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait({asking})
            if len(came) > 9:
                break

    assert came and ended == came


@pytest.mark.parametrize("alive", [True, False])
async def test_connecting_leaves_nothing_to_the_garbage_collector(alive: bool) -> None:
    async with before(answers) as client:
        if not alive:
            client.upstream = Upstream("http", "127.0.0.1", 1)
        gc.collect()
        with nullcontext() if alive else pytest.raises(UpstreamConnectionError):
            (await client.forward("GET", b"/", [])).close()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            left = [thing for thing in gc.garbage if isinstance(thing, Exception | asyncio.Task)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    assert left == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate, with its key, that nobody trusts."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -keyout".split()
    subprocess.run(["openssl", *made, file, "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@pytest.mark.parametrize(
    ("url", "error", "text"),
    [
        ("http://unknown:{port}", UpstreamConnectionError, "no such name"),
        ("http://a..b:{port}", UpstreamConnectionError, "no such name"),
        ("http://127.0.0.1:1", UpstreamConnectionError, "is Ollama running there?"),
        ("https://127.0.0.1:{tls}", UpstreamConnectionError, r"not trusted \(.*self.signed"),
        ("https://127.0.0.1:{port}", UpstreamConnectionError, "does not speak TLS"),
        ("http://127.0.0.2:{dead}", UpstreamTimeout, "in time"),
        ("http://255.255.255.255:1", UpstreamConnectionError, "cannot connect to http://255"),
    ],
)
async def test_why_there_is_no_connection_is_said(
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    error: type[UpstreamError],
    text: str,
) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if "unknown" in url:  # to ask the network would take its time
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the failed handshake
    with dead("127.0.0.2") as full:
        async with upstream(garbles) as port, upstream(answers, ssl=tls) as tls_port:
            url = url.format(port=port, tls=tls_port, dead=full)
            async with OllamaClient(parse_upstream(url), 1.0) as client:
                with anyio.fail_after(3), pytest.raises(error, match=text) as caught:
                    await client.forward("GET", b"/", [])

    assert url in str(caught.value)


async def test_a_connection_that_was_idle_for_its_time_is_closed() -> None:
    closed = asyncio.Event()

    async def serve(reader: Reader, writer: Writer) -> None:
        try:
            await answers(reader, writer)
        finally:
            closed.set()

    async with before(serve, keep=0.1) as client:
        for _ in range(2):
            await (await client.forward("GET", b"/", [])).read()
        assert not closed.is_set()
        with anyio.fail_after(1):
            await closed.wait()


async def test_the_other_side_of_a_silent_connection_is_probed() -> None:
    loop, made = asyncio.get_running_loop(), partial(Connection, "http://x", print)
    async with upstream(answers) as port:
        transport, _ = await loop.create_connection(made, "127.0.0.1", port)
        sock = transport.get_extra_info("socket")
        idle = sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 0x10))
        transport.close()

        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle == 15


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9\r\n"])
async def test_a_server_that_does_not_wait_for_a_request_is_an_error(banner: bytes) -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        writer.write(banner)

    async with before(serve) as client:
        for _ in range(20):
            with anyio.fail_after(1), pytest.raises(UpstreamError, match="broke off|not HTTP"):
                await client.forward("GET", b"/", [])


@pytest.mark.parametrize("phase", ["waiting", "reading", "uploading"])
async def test_cancelling_a_request_closes_its_connection(phase: str) -> None:
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK[:-1] if phase == "reading" else b"")
        arrived.set()
        await reader.read()
        closed.set()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def ask(client: OllamaClient) -> None:
        sent = body() if phase == "uploading" else b"x"
        async with aclosing(await client.forward("POST", b"/", [], sent)) as answer:
            assert [chunk async for chunk in answer] == []

    async with before(serve) as client:
        asking = asyncio.create_task(ask(client))
        await arrived.wait()
        asking.cancel()
        with anyio.fail_after(1):
            await closed.wait()

    assert asking.cancelled()
