"""Under systemd: sockets that are inherited, restarts that drop nobody, what the log looks like.

A small program stands for systemd: it passes sockets as sd_listen_fds(3) has it, says that it reads
stderr for the journal, and becomes osp.py. tests/examples/test_systemd.py has the units.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from kernel.config import HOME
from kernel.downstream import GRACE
from tests.support import said, turn, write_agent
from tests.test_osp import LIMIT, Proxy, free_port, starting, with_agents

SYSTEMD = """
import fcntl, os, sys
count = int(sys.argv[1])
for number, given in enumerate(sys.argv[2 : 2 + count], 3):
    os.dup2(fcntl.fcntl(int(given), fcntl.F_DUPFD, 100), number)
os.environ.setdefault("LISTEN_PID", str(os.getpid()))
os.environ.setdefault("LISTEN_FDS", str(count))
os.environ["JOURNAL_STREAM"] = f"{os.fstat(2).st_dev}:{os.fstat(2).st_ino}"
os.execv(sys.executable, [sys.executable, *sys.argv[2 + count :]])
"""
TELLS = """
import os
class Tells(BaseAgent):
    def setup(self):
        self.progress = "sees " + " ".join(name for name in os.environ if name[:4] == "LIST")
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Path:
    script = tmp_path / "systemd.py"
    script.write_text(SYSTEMD, encoding="utf-8")
    return script


def activated(
    systemd: Path, sockets: Sequence[Any], *flags: str, **env: str
) -> AbstractAsyncContextManager[Proxy]:
    """Start osp.py with sockets that were opened for it."""
    numbers = [each.fileno() for each in sockets]
    passed = [str(len(numbers)), *map(str, numbers), str(HOME / "osp.py"), "--demo", "0.1"]
    return starting(*passed, *flags, script=systemd, env=env, pass_fds=numbers)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
async def test_inherited_sockets_are_served_and_children_hear_nothing_of_them(
    systemd: Path, plugins: Path
) -> None:
    write_agent(plugins, "tells", TELLS)
    env = {**with_agents(plugins), "OSP_SERVER_PORT": str(free_port())}
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as second,
        httpx.Client(timeout=LIMIT) as client,
    ):
        live = f"{url_of(first)}/health?live"
        waits = asyncio.create_task(asyncio.to_thread(client.get, live))  # nobody serves it yet
        async with activated(systemd, [first, second], **env) as proxy:
            assert url_of(first) in await proxy.says(url_of(first))
            assert url_of(second) in await proxy.says(url_of(second))
            assert 'sees "' in await proxy.says('"name": "tells"')
            assert (await waits).status_code == 200
            # Only this machine can connect to either, so foreign names are refused.
            for host, status in ("::1", 200), ("a.de", 403):
                answer = await asyncio.to_thread(client.get, url_of(second), headers={"Host": host})
                assert answer.status_code == status
            assert await proxy.stop() == 0
        assert first.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert second.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_with_reload_the_inherited_socket_stays_open(systemd: Path, plugins: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with activated(systemd, [listener], "--reload", **with_agents(plugins)) as proxy:
            await proxy.says("ready: type ")
            write_agent(plugins, "tells", TELLS)
            await proxy.says('"name": "tells"')
            async with httpx.AsyncClient(timeout=LIMIT) as client:
                assert '["tells"]' in (await client.get(f"{url_of(listener)}/health")).text


@pytest.mark.parametrize("variable", [{"LISTEN_PID": "1"}, {"LISTEN_FDS": "one"}])
async def test_sockets_that_are_not_passed_to_it_are_not_touched(
    systemd: Path, variable: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with activated(systemd, [listener], **variable) as proxy:
            assert url_of(listener) not in await proxy.says('"event": "listening"')


@pytest.mark.parametrize(
    "make",
    [
        lambda: socket.create_server("\0osp-test", family=socket.AF_UNIX),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        lambda: socket.socket(socket.AF_INET),
        lambda: Path(__file__).open(),
    ],
    ids=["a Unix socket", "no stream", "not listening", "a file"],
)
async def test_an_unsuitable_socket_ends_the_start_with_one_line(systemd: Path, make: Any) -> None:
    with make() as given:
        async with activated(systemd, [given]) as proxy:
            status = await proxy.ended()

    (line,) = proxy.lines
    assert status == 2 and line.startswith("osp.py: LISTEN_FDS: file descriptor 3: ")
    assert "must be a listening TCP socket: ListenStream=127.0.0.1:11435 with Accept=no" in line


@pytest.mark.parametrize("given", ["{}", "@{}"])
async def test_systemd_is_told_when_it_serves_and_when_it_stops(tmp_path: Path, given: str) -> None:
    address = given.format(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(LIMIT)
        async with starting("--demo", "0", env={"NOTIFY_SOCKET": address}) as proxy:
            assert await asyncio.to_thread(systemd.recv, 99) == b"READY=1"
            async with proxy.client() as client:
                assert (await client.get("/health?live")).status_code == 200
            await proxy.stop()
            assert systemd.recv(99) == b"STOPPING=1"


async def test_in_the_journal_each_line_has_its_priority_and_no_time(
    systemd: Path, plugins: Path
) -> None:
    """tests/kernel/test_log.py has the other form, and other levels."""
    write_agent(plugins, "wrong", "raise RuntimeError")
    async with activated(systemd, [], **with_agents(plugins)) as proxy:
        await proxy.says('<4>{"level": "warning", "event": "agent failed to load", ')
        await proxy.says('<6>{"level": "info", "event": "ready: ')

    assert all(line.startswith(("<4>{", "<6>{")) for line in proxy.lines)


async def load(
    client: httpx.AsyncClient, answers: asyncio.Queue[float], stop: asyncio.Event
) -> list[tuple[float, Exception]]:
    """Ask again and again; return what failed, and after how many seconds of silence."""
    failed: list[tuple[float, Exception]] = []
    last = time.monotonic()
    while not stop.is_set():
        try:
            answer = await client.post("/api/show", json={"model": "demo"})
            assert answer.status_code == 200
        except (httpx.TransportError, AssertionError) as exc:
            failed.append((time.monotonic() - last, exc))
        last = time.monotonic()
        answers.put_nowait(last)
    return failed


async def test_restarts_drop_no_request_and_end_streams_whole(systemd: Path) -> None:
    """A kept connection that is silent for GRACE may be closed just as its next request comes."""
    answers: asyncio.Queue[float] = asyncio.Queue()
    stop, once = asyncio.Event(), httpx.Limits(max_keepalive_connections=0)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = url_of(listener)
        async with (
            httpx.AsyncClient(base_url=url, timeout=LIMIT, limits=once) as fresh,
            httpx.AsyncClient(base_url=url, timeout=LIMIT) as kept,
        ):
            clients = [fresh] * 4 + [kept] * 4
            loads = [asyncio.create_task(load(client, answers, stop)) for client in clients]
            for last in False, False, False, True:
                async with activated(systemd, [listener], OSP_LOG_LEVEL="warning") as proxy:
                    await served(answers, 200)
                    async with fresh.stream("POST", "/api/chat", json=turn("hello")) as answer:
                        chunks = answer.aiter_bytes()
                        body = await anext(chunks)
                        if last:
                            stop.set()
                            failures = await asyncio.gather(*loads)
                        proxy.process.terminate()
                        body += b"".join([chunk async for chunk in chunks])
                    assert said(body).endswith("[user] hello") and b'"done":true' in body
                    assert await proxy.ended() == 0

    assert not any(failures[:4])
    assert not [exc for failed in failures[4:] for silent, exc in failed if silent < GRACE]


async def served(answers: asyncio.Queue[float], count: int) -> None:
    """Wait until so many requests were answered from now on."""
    while not answers.empty():
        answers.get_nowait()
    with anyio.fail_after(LIMIT):
        for _ in range(count):
            await answers.get()
