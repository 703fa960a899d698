"""What every test shares: asyncio is the loop that the proxy runs on, and the upstreams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import demo
from tests.support import FakeOllama, House

pytest.register_assert_rewrite("tests.scenarios")


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
