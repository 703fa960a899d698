"""GET /health: is Ollama there, and which agents are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio
import pytest

from tests.support import running, write_agent

AGENT = "class A(BaseAgent): ..."


async def test_with_ollama_the_answer_is_200_and_the_facts(demo_url: str, plugins: Path) -> None:
    write_agent(plugins, "good", AGENT)
    write_agent(plugins, "off", AGENT, enabled=False)
    write_agent(plugins, "bad", "1 / 0")

    async with running(demo_url, plugins) as client:
        answer = await client.get("/health")
        head = await client.head("/health")

    upstream = {"url": demo_url, "version": "0.33.0-demo"}
    assert answer.json() == {"status": "ok", "upstream": upstream, "agents": ["good"]}
    assert (answer.status_code, head.status_code, head.content) == (200, 200, b"")


async def test_without_ollama_the_answer_is_503_and_says_why(plugins: Path) -> None:
    async with running("127.0.0.1:1", plugins) as client:
        answer = await client.get("/health")
        live = await client.get("/health?live")

    facts = answer.json()
    assert (answer.status_code, facts["status"]) == (503, "error")
    assert list(facts["upstream"]) == ["url", "error"]
    assert facts["upstream"]["error"].startswith("nothing answers at http://127.0.0.1:1: is Ollama")
    assert (live.status_code, live.json()) == (200, {"status": "ok"})


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", "no answer from Ollama at http://"),
        (OK, "no answer from Ollama at http://"),
        (OK + b'Content-Length: 9\r\n\r\n{"ver', "no answer from Ollama at http://"),
        (OK + b"Content-Length: 2\r\n\r\n{}", "what answers at http://"),
        (OK + b"Content-Length: 2\r\n\r\n[]", "what answers at http://"),
        (OK + b"Content-Length: 2\r\n\r\nhi", "/api/version answered something"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno", "/api/version answered 404: no"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "Ollama at http://"),
    ],
)
async def test_what_is_silent_or_no_ollama_is_a_503_in_time(
    plugins: Path, sent: bytes, error: str
) -> None:
    async def sends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(sent)
        writer.close()

    async with await asyncio.start_server(sends, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        soon = {"connect_timeout": 0.2}
        async with running(f"{host}:{port}", plugins, upstream=soon) as client:
            with anyio.fail_after(2):
                answer = await client.get("/health")

    assert answer.status_code == 503
    assert answer.json()["upstream"]["error"].startswith(error)


async def test_where_a_key_is_needed_the_status_alone_is_told_without_one(
    demo_url: str, plugins: Path
) -> None:
    keys = {"me": {"key": "sesame"}}
    async with running(demo_url, plugins, keys=keys) as client:
        whole = await client.get("/health", headers={"x-api-key": "sesame"})
        for path in ("/health", "/health?live"):
            assert (await client.get(path)).json() == {"status": "ok"}
    async with running("127.0.0.1:1", plugins, keys=keys) as client:
        answer = await client.get("/health")

    assert list(whole.json()) == ["status", "upstream", "agents"]
    assert (answer.status_code, answer.json()) == (503, {"status": "error"})
