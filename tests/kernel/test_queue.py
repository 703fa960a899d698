"""Fair waiting: who asks a model next, where only so many requests may ask at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from kernel.log import RequestInfo
from kernel.metrics import Metrics
from kernel.queue import FairQueue
from tests.support import CHAT, PATHS, House, chat, done, line, prompts, running, said, whole

ONE: dict[str, Any] = {"upstream": {"parallel": 1}}
KEYS: dict[str, dict[str, Any]] = {
    "ann": {"key": "secret-a"},
    "bob": {"key": "secret-b"},
    "boss": {"key": "secret-c", "priority": -1},
    "cron": {"key": "secret-d", "priority": 10},
}
ASKS = """
class It(BaseAgent):
    async def ask(self, text):
        return await self.context.chat([{"role": "user", "content": text}])
    async def on_request(self, payload):
        await self.ask("first")
        return payload
    async def on_response(self, response):
        pieces = [p async for p in self.context.stream([{"role": "user", "content": "last"}])]
        return response + " " + "".join(pieces)
"""

ON_CHUNK = """
class It(BaseAgent):
    async def on_chunk(self, text):
        return text + await self.context.chat([{"role": "user", "content": text}])
"""


@dataclass
class Crowd:
    """Requests to a proxy whose upstream answers one of them for each `release` of the gate."""

    house: House
    client: httpx.AsyncClient
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    tasks: list[asyncio.Task[httpx.Response]] = field(default_factory=list)

    async def asks(self, text: str, user: str = "", path: str = CHAT) -> asyncio.Task[Any]:
        """Send a request, and return when it waits for its turn or has it."""
        headers = {"x-api-key": KEYS[user]["key"]} if user else {}
        request = self.client.post(path, json=chat(path, text, stream=False), headers=headers)
        self.tasks.append(asyncio.create_task(request))
        await self.until(len(self.tasks))
        return self.tasks[-1]

    async def until(self, count: int, phase: str = "waiting for ") -> None:
        """Return when so many requests are in a phase."""
        async with asyncio.timeout(5):
            while len([p for p in await self.phases() if p.startswith(phase)]) != count:
                pass

    async def phases(self) -> list[str]:
        headers = {"x-api-key": KEYS["ann"]["key"]}
        running = (await self.client.get("/traces", headers=headers)).json()["running"]
        return [trace["phase"] for trace in running]

    @property
    def sent(self) -> list[Any]:
        """The prompts that the upstream got, in their order."""
        return [text for asked in self.house.ollama.asked for text in prompts(asked)]


@asynccontextmanager
async def crowd(house: House, **sections: Any) -> AsyncIterator[Crowd]:
    async with house.open(**{**ONE, **sections}) as client:
        made = Crowd(house, client)
        house.ollama.memory = {"models": [{"model": "demo", "name": "demo"}]}
        house.ollama.answers(whole(CHAT, "ok"), before=made.gate.acquire)
        yield made
        made.gate.release()
        for _ in made.tasks:
            made.gate.release()
        await asyncio.gather(*made.tasks, return_exceptions=True)


async def test_the_lowest_priority_goes_first_and_among_equals_each_key_in_turn(
    house: House,
) -> None:
    arrivals = "ann0 ann1 ann2 ann3 cron0 bob0 bob1 boss0".split()

    async with crowd(house, keys=KEYS) as crowded:
        for text in arrivals:
            await crowded.asks(text, text[:-1])
        phases = await crowded.phases()
        for _ in arrivals:
            crowded.gate.release()
        answers = await asyncio.gather(*crowded.tasks)

    assert sorted(phases) == ["waiting for its turn"] * 7 + ["waiting for the model"]
    assert crowded.sent == "ann0 boss0 bob0 ann1 bob1 ann2 ann3 cron0".split()
    assert all(said(answer.content) == "ok" for answer in answers)


async def test_so_many_ask_at_once_and_without_a_number_all(house: House) -> None:
    for parallel, waiting in ((2, 1), (0, 0)):
        async with crowd(house, upstream={"parallel": parallel}) as crowded:
            for text in "abc":
                await crowded.asks(text)

            await crowded.until(waiting, "waiting for its turn")
            assert len(crowded.sent) == 3 - waiting
        house.ollama.asked.clear()


async def test_a_client_that_leaves_gives_its_place_up_at_once(house: House) -> None:
    async with crowd(house) as crowded:
        has, waits, last = [await crowded.asks(text) for text in ("has", "waits", "last")]
        waits.cancel()
        await crowded.until(2)
        has.cancel()
        await crowded.until(1)
        await crowded.until(1, "waiting for the model")
        crowded.gate.release()

        assert said((await last).content) == "ok"
        assert crowded.sent == ["has", "last"]


async def test_a_request_that_fails_gives_its_place_up(house: House) -> None:
    house.ollama.answers(house.ollama.breaks)
    async with house.open(**ONE) as client:
        for _ in range(3):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(CHAT, json=chat(CHAT, "x"))
        house.ollama.answers(line("a"), done())
        assert (await client.post(CHAT, json=chat(CHAT, "x"))).status_code == 200
    async with running("127.0.0.1:1", house.plugins, **ONE) as client:
        for _ in range(3):
            assert (await client.post(CHAT, json=chat(CHAT, "x"))).status_code == 502


async def test_only_what_asks_a_model_waits(house: House) -> None:
    async with crowd(house) as crowded:
        await crowded.asks("x")
        waiting = []
        paths = [*PATHS, "/api/generate", "/api/embed", "/v1/embeddings", "/api/%65mbed?x=1"]
        for path in paths:
            waiting.append(asyncio.create_task(crowded.client.post(path, json={"model": "m"})))
        await crowded.until(len(paths), "waiting for its turn")
        house.ollama.before = None  # what gets through is answered at once
        for path in ("/api/show", "/api/pull", "/api/generatr"):
            assert (await crowded.client.post(path, json={"model": "m"})).status_code == 200
        assert (await crowded.client.get("/health")).status_code == 200
        crowded.tasks += waiting


@pytest.mark.parametrize("typed", ["/asks x", "/asks&/also x"])
async def test_what_an_agent_asks_never_waits_for_its_own_request(house: House, typed: str) -> None:
    house.write("asks", ASKS)
    house.write("also", ASKS.partition("    async def on_resp")[0])
    house.ollama.answers(whole(CHAT, "ok"), kind="application/json")

    async with house.open(**ONE) as client, asyncio.timeout(5):
        answers = [await client.post(CHAT, json=chat(CHAT, typed, stream=False)) for _ in range(2)]

    assert [said(answer.content) for answer in answers] == ["ok ok"] * 2


async def test_an_agent_may_ask_while_the_answer_itself_comes(house: House) -> None:
    house.write("asks", ON_CHUNK)
    house.ollama.answers(done())

    async def arrived() -> None:
        house.ollama.go.set()

    house.ollama.script = [(line("a"), house.ollama.pause, done()), (arrived, whole(CHAT, "ok"))]
    async with house.open(**ONE) as client, asyncio.timeout(5):
        answer = await client.post(CHAT, json=chat(CHAT, "/asks x"))

    assert said(answer.content) == "aok"


async def test_a_turn_that_comes_while_its_client_leaves_goes_to_the_next() -> None:
    queue = FairQueue(1, Metrics())
    first, leaves, last = (RequestInfo(name) for name in "abc")
    leave = await queue.enter(first)
    waiting = asyncio.create_task(queue.enter(leaves))
    await asyncio.sleep(0)

    leave()
    waiting.cancel()
    await asyncio.wait({waiting})

    async with asyncio.timeout(5):
        await queue.enter(last)
    assert waiting.cancelled()


async def test_waiting_is_measured(house: House) -> None:
    async with crowd(house, keys=KEYS) as crowded:
        await crowded.asks("x", "ann")
        await crowded.asks("y", "cron")
        headers = {"x-api-key": KEYS["ann"]["key"]}
        during = (await crowded.client.get("/metrics", headers=headers)).text
        crowded.gate.release()
        crowded.gate.release()
        await asyncio.gather(*crowded.tasks)
        after = (await crowded.client.get("/metrics", headers=headers)).text
        latest = (await crowded.client.get("/traces?user=cron", headers=headers)).json()["finished"]

    assert 'osp_waiting_requests{user="cron"} 1' in during
    assert 'osp_waiting_requests{user="cron"} 0' in after
    assert 'osp_waiting_seconds_count{user="cron"} 1' in after
    names = [phase["name"] for phase in latest[0]["phases"]]
    assert names == ["reading", "waiting for its turn", "waiting for the model", "streaming"]
