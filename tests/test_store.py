"""Proxies before one PostgreSQL, as real processes, while it comes and goes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from psycopg import Connection

from kernel.config import HOME
from tests.postgres import Cluster
from tests.support import CHAT, NOTICE, FakeOllama, chat, outcomes, running, said
from tests.test_osp import Proxy, starting
from tests.test_testkit import command

QUESTION = "/remember what colour is my bike?"
NOTED = "- my bike is red"


@pytest.fixture
def plugins(plugins: Path) -> Path:
    for name in ("cache", "remember"):
        (plugins / f"{name}_agent").symlink_to(HOME / "plugins" / f"{name}_agent")
    return plugins


@asynccontextmanager
async def proxy(
    upstream: str, plugins: Path, database: str
) -> AsyncIterator[tuple[Proxy, httpx.AsyncClient]]:
    """Start a process with its own data, and agents that keep what they keep in the database."""
    env = {"OSP_PLUGINS": "", "OSP_PLUGINS_DIRS": str(plugins), "OSP_STORE": database}
    env |= {"OSP_SERVER_STORE": "$OSP_STORE", "OSP_UPSTREAM_URL": upstream}
    env |= {"OSP_SERVER_DATA": str(plugins / "no data"), "OSP_LOG_LEVEL": "debug"}
    async with starting(env=env) as process, process.client() as client:
        yield process, client


async def ask(client: httpx.AsyncClient, text: str) -> str:
    """Return the text of an answer, which is never an error."""
    answer = await client.post(CHAT, json=chat(CHAT, text))
    assert answer.status_code == 200, answer.content
    return said(answer.content)


@pytest.fixture
def stopped(postgres: Cluster) -> Iterator[Cluster]:
    """The server, which is away when the test begins, and back when it ends."""
    postgres.stop()
    yield postgres
    if not postgres.runs:
        postgres.start()


async def test_a_database_that_comes_and_goes_holds_no_chat(
    demo_url: str, plugins: Path, database: str, stopped: Cluster
) -> None:
    async with proxy(demo_url, plugins, database) as (process, client):
        assert "Connection refused" in await process.says("store does not answer yet")
        for typed in ("/remember that", "/cache"):
            name = typed.split()[0][1:]
            assert (await ask(client, f"{typed} hello")).endswith(NOTICE.format(name))
        stopped.start()
        assert await ask(client, "/remember that my bike is red") == "Noted as 1: my bike is red"
        stopped.stop()
        assert (await ask(client, QUESTION)).endswith(NOTICE.format("remember"))
        failed = await process.says('"hook": "on_request"')
        stopped.start()
        assert NOTED in await ask(client, QUESTION)
        await process.stop()

    assert "StoreError: PostgreSQL: OperationalError: " in failed
    assert stopped.password not in "".join(process.lines)
    assert not (plugins / "no data").exists()


async def test_what_one_proxy_keeps_the_others_know(
    ollama: FakeOllama, ollama_url: str, plugins: Path, database: str
) -> None:
    start = partial(proxy, ollama_url, plugins, database)
    ollama.says(CHAT, "the answer")

    async with start() as (first, one), start() as (_, two):
        tasks = [
            ask(client, f"/remember that {n} {client.base_url}")
            for n in range(20)
            for client in (one, two)
        ]
        noted = [re.match(r"Noted as (\d+):", text) for text in await asyncio.gather(*tasks)]
        numbers = sorted(int(found[1]) for found in noted if found)
        assert numbers == [*range(1, 41)]
        assert await ask(one, "/cache why?") == "the answer"
        first.process.kill()

        assert await ask(two, "/cache why?") == "the answer" and len(ollama.asked) == 1
        assert len((await ask(two, "/remember:list x")).splitlines()) == 40


async def test_a_database_that_is_slow_costs_a_chat_no_more_than_the_hooks_time(
    demo_url: str, plugins: Path, database: str
) -> None:
    settings: dict[str, Any] = {"server": {"store": database}}
    settings["agents"] = {"cache": {"timeout": 0.3}}

    async with running(demo_url, plugins, **settings) as client:
        await ask(client, "/cache hello")
        with Connection.connect(database) as other:  # until its transaction ends, nobody reads
            other.execute("LOCK TABLE osp_cache.answers")
            slow = [client.post(CHAT, json=chat(CHAT, "/cache hello")) for _ in range(10)]
            answers = await asyncio.gather(*slow)
        again = await client.post(CHAT, json=chat(CHAT, "/cache hello"))

    assert {outcomes(answer) for answer in answers} == {"cache;timeout"}
    assert outcomes(again) == "cache;reply"


def test_looking_agents_over_touches_no_store_of_the_proxies(
    plugins: Path, database: str, postgres: Cluster
) -> None:
    done = command("check", OSP_PLUGINS_DIRS=str(plugins), OSP_SERVER_STORE=database)

    assert done.stdout == "ok       cache\nok       remember\n"
    made = postgres.execute("SELECT nspname FROM pg_namespace", database.rpartition("/")[2])
    assert not [name for (name,) in made if name.startswith("osp_")]
