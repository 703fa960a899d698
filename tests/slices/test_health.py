"""GET /health: is Ollama there, and who else is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

import demo
import osp
from kernel.config import Config, PluginsConfig, ServerConfig, UpstreamConfig
from tests.support import running, write_agent

AGENT = "class A(BaseAgent): ..."


@asynccontextmanager
async def before(answer: bytes, plugins: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run a proxy before a server that sends this, whatever it is asked, and waits."""

    async def sends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(sends, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        config = Config(
            server=ServerConfig(data=plugins.parent / "data"),
            upstream=UpstreamConfig(url=f"{host}:{port}", connect_timeout=0.2),
            plugins=PluginsConfig(dirs=(plugins,)),
        )
        async with (
            demo.serve(osp.create_app(config)) as url,
            httpx.AsyncClient(base_url=url, timeout=10) as client,
        ):
            yield client


async def test_with_ollama_the_answer_is_200_and_the_facts(demo_url: str, plugins: Path) -> None:
    write_agent(plugins, "good", AGENT)
    write_agent(plugins, "off", AGENT, enabled=False)
    write_agent(plugins, "bad", "1 / 0")

    async with running(demo_url, plugins) as client:
        answer = await client.get("/health")

    facts = answer.json()
    assert answer.status_code == 200
    assert facts["upstream"].pop("latency_ms") > 0
    assert 0 <= facts.pop("uptime") < 60
    upstream = {"url": demo_url, "version": "0.33.0-demo"}
    assert facts == {"status": "ok", "upstream": upstream, "agents": ["good"]}


async def test_without_ollama_the_answer_is_503_and_says_why(plugins: Path) -> None:
    async with running("127.0.0.1:1", plugins) as client:
        answer = await client.get("/health")

    facts = answer.json()
    assert (answer.status_code, facts["status"]) == (503, "error")
    assert list(facts["upstream"]) == ["url", "error"]
    assert facts["upstream"]["error"].startswith("nothing answers at http://127.0.0.1:1: is Ollama")


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", "no answer from Ollama at http://"),
        (b"HTTP/1.1 200 OK\r\n", "no answer from Ollama at http://"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"ver', "no answer from Ollama at http://"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "what answers at http://"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "what answers at http://"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "/api/version answered something"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno", "/api/version answered 404: no"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "Ollama at http://"),
    ],
)
async def test_what_is_silent_or_no_ollama_is_a_503_in_time(
    plugins: Path, sent: bytes, error: str
) -> None:
    async with before(sent, plugins) as client:
        with anyio.fail_after(2):
            answer = await client.get("/health")

    assert answer.status_code == 503
    assert answer.json()["upstream"]["error"].startswith(error)


async def test_a_probe_may_ask_for_the_head_alone(demo_url: str, plugins: Path) -> None:
    async with running(demo_url, plugins) as client:
        answer = await client.head("/health")

    assert (answer.status_code, answer.content) == (200, b"")


async def test_the_proxy_is_alive_without_ollama(plugins: Path) -> None:
    async with running("127.0.0.1:1", plugins) as client:
        answer = await client.get("/health?live")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
