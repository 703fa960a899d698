"""kill -9 in the middle of writing, and files that a power cut left damaged.

What a client was told is kept is there after the next start, which needs no help.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import pytest

import demo
from kernel.config import HOME
from tests.support import CHAT, chat, message, outcomes, said, write_agent
from tests.test_osp import Proxy, starting

ROUNDS = 4
ASKING = """
class Asking(BaseAgent):
    tools = [{"name": "look", "description": "Looks.", "consent": True}]
    async def on_tool(self, name, arguments):
        return "seen"
"""
SETTINGS = """
presets.preset = {{ model = "demo", options.num_ctx = {number} }}
agents.rag.settings.folder = "{folder}/texts"
agents.remember.settings.max_notes = 9999
plugins.dirs = ["{home}/plugins", "{folder}/plugins"]
plugins.only = ["asking", "cache", "rag", "remember"]
server = {{ data = "{folder}/data", port = 0 }}
"""


@dataclass
class House:
    """A proxy that is killed and started again, and what it has said is kept."""

    folder: Path
    upstream: str
    notes: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)  # questions
    question: str = ""  # that asks for consent
    left: int = 0  # what is still acknowledged until the proxy is killed

    @asynccontextmanager
    async def open(self, number: int) -> AsyncIterator[tuple[Proxy, httpx.AsyncClient]]:
        file, known = self.folder / "osp.toml", {"folder": self.folder, "home": HOME}
        file.write_text(SETTINGS.format(number=number, **known), encoding="utf-8")
        flags = ("--config", str(file), "--upstream", self.upstream)
        env = {"OSP_PLUGINS": "asking,cache,rag,remember"}
        async with starting(*flags, env=env) as proxy, proxy.client() as client:
            yield proxy, client

    def files(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "data").glob(pattern))

    async def write(self, proxy: Proxy, client: httpx.AsyncClient, name: str) -> None:
        """Have something new written again and again, until the proxy is killed."""

        def acknowledged(kept: list[str]) -> None:
            kept.append(text)
            self.left -= 1
            if not self.left:
                proxy.process.kill()

        for n in range(1000):
            text = f"{name}x{n}"
            (self.folder / f"texts/{name}.md").write_text(f"{text} is here.\n" * 200)
            assert "Noted as" in said((await ask(client, f"/remember that {text}")).content)
            acknowledged(self.notes)
            assert "I am the" in said((await ask(client, f"/cache what is {text}?")).content)
            acknowledged(self.cached)
            assert text in said((await ask(client, f"/rag what is {text}?")).content)
            self.question = said((await ask(client, "/asking use the tool")).content)

    async def check(self, proxy: Proxy, client: httpx.AsyncClient) -> None:
        """Assert that all that was said to be kept is there, and nothing is damaged."""
        await proxy.says('"agents": "cache rag remember asking"')
        listed = said((await ask(client, "/remember:list")).content).splitlines()
        notes = [line.rpartition(" ")[2] for line in listed]
        assert set(self.notes) <= set(notes) and len(notes) == len(set(notes))
        for text in self.cached:
            answer = await ask(client, f"/cache what is {text}?")
            assert outcomes(answer) == "cache;reply" and said(answer.content).endswith(f"{text}?")
        if self.question:
            answer = await ask(client, "/asking use the tool", self.question, "/yes")
            assert said(answer.content).endswith("seen")
        for file in self.files("*/*.db"):
            with closing(sqlite3.connect(file)) as db:
                assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert not [line for line in proxy.lines if '"level": "info"' not in line]


async def ask(client: httpx.AsyncClient, *texts: str) -> httpx.Response:
    """Send a conversation that the user begins."""
    messages = [
        message(role, text)
        for role, text in zip(("user", "assistant", "user"), texts, strict=False)
    ]
    return await client.post(CHAT, json=chat(CHAT, *messages, stream=False))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    write_agent(tmp_path / "plugins", "asking", ASKING)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.md").write_text("The barrel is red.\n" * 2000)
    async with demo.serve(demo.create_app()) as upstream:  # which has no preset yet
        yield House(tmp_path, upstream)


async def test_kill_9_loses_nothing_that_was_acknowledged_and_the_next_start_works(
    house: House,
) -> None:
    rng = Random(15)
    for number in range(ROUNDS):
        async with house.open(1024 + number) as (proxy, client):
            await house.check(proxy, client)
            house.left = rng.randrange(1, 20)
            names = [f"w{number}{n}" for n in range(4)]
            writing = [house.write(proxy, client, name) for name in names]
            done = await asyncio.gather(*writing, return_exceptions=True)
            assert await proxy.ended() == -9
        assert all(isinstance(each, httpx.TransportError) for each in done)

    async with house.open(1024) as (proxy, client):
        await house.check(proxy, client)
        await proxy.event("preset made")
    assert house.notes and house.cached and house.question


@pytest.mark.parametrize("left", [0, 0.5])
async def test_a_file_that_a_power_cut_left_damaged_does_not_keep_the_proxy_from_starting(
    house: House, left: float
) -> None:
    async with house.open(1024) as (proxy, client):
        await proxy.event("preset made")
        for text in ("/remember that it is red", "/cache what is red?", "/rag red barrel?"):
            await ask(client, text)
        asked = said((await ask(client, "/asking use the tool")).content)
        proxy.process.kill()
        await proxy.ended()
    kept = ("presets.json", "consent.key", "remember/notes.db", "rag/index.db", "cache/*")
    for (file,) in map(house.files, kept):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * left)])

    async with house.open(1024) as (proxy, client):
        agents = (await proxy.event("agents loaded"))["agents"].split()
        cached = [outcomes(await ask(client, "/cache what is red?")) for _ in range(2)]
        found = said((await ask(client, "/rag red barrel?")).content)
        old = said((await ask(client, "/asking use the tool", asked, "/yes")).content)
        asked = said((await ask(client, "/asking use the tool")).content)
        new = said((await ask(client, "/asking use the tool", asked, "/yes")).content)
        await proxy.says("presets.json cannot be read (")
        if left:
            await proxy.says("database disk image is malformed; put a copy in its place")

    assert house.files("consent.key")[0].stat().st_size == 32
    assert agents == ["cache", "rag", *["remember"] * (not left), "asking"]
    assert cached == (["cache;error", "cache;ok"] if left else ["cache;ok", "cache;reply"])
    assert "The barrel is red." in found and "nothing was done" in old and new.endswith("seen")
