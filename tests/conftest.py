"""What every test shares: asyncio is the loop that the proxy runs on, and the upstreams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest

import demo
from kernel.agent import Schema, Store
from kernel.postgres import Postgres
from kernel.sqlite import SQLite
from tests.postgres import INITDB, Cluster, cluster
from tests.support import FakeOllama, House, OpenStore

pytest.register_assert_rewrite("tests.scenarios")
collect_ignore = ["exercises"]  # they fail until you have done them, docs/add-a-slice.md


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def demo_url() -> AsyncIterator[str]:
    """The built-in stand-in for Ollama."""
    async with demo.serve(demo.create_app()) as url:
        yield url


@pytest.fixture
def ollama() -> FakeOllama:
    """A scripted upstream; `ollama_url` is where it listens."""
    return FakeOllama()


@pytest.fixture
async def ollama_url(ollama: FakeOllama) -> AsyncIterator[str]:
    async with demo.serve(ollama) as url:
        yield url


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """An empty folder of plugins."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    return folder


@pytest.fixture
def house(ollama: FakeOllama, ollama_url: str, plugins: Path) -> House:
    """A proxy that is open while it is asked, with the agents in `plugins`, before `ollama`."""
    return House(ollama, ollama_url, plugins)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL of its own; tests that need one are skipped where there is none."""
    if not INITDB:
        pytest.skip("there is no PostgreSQL here: initdb is missing")
    with cluster() as made:
        yield made


NUMBERS = count(1)


@pytest.fixture
def database(postgres: Cluster) -> str:
    """The address of a new database there."""
    name = f"test{next(NUMBERS)}"
    postgres.execute(f"CREATE DATABASE {name}")
    return postgres.url(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a new database, or the folder of SQLite's file."""
    server = request.param == "postgresql"
    return str(request.getfixturevalue("database") if server else tmp_path / "data")


@pytest.fixture
async def open_store(where: str) -> AsyncIterator[OpenStore]:
    """Open an agent's store as a proxy of its own; those of one test share what is in it."""
    servers: list[Postgres] = []

    def open_it(agent: str, schema: Schema) -> Store:
        if not where.startswith("postgresql:"):
            return SQLite(agent, Path(where), schema)
        servers.append(Postgres(where))
        return servers[-1].store(agent, schema)

    yield open_it
    for server in servers:
        await server.close()
