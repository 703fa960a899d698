"""Presets as clients see them: models of Ollama, to whose chats agents belong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import httpx
import pytest

import demo
from kernel.config import load
from kernel.errors import ConfigError
from tests.support import DONE, FakeOllama, done, event, line, running, said, turn, write_agent

CHATS = ["/api/chat", "/v1/chat/completions"]
PRESETS = {
    "helper": {"model": "demo", "agents": "/note:p", "system": "Be brief."},
    "team/Plain": {"model": "Demo:latest"},
}
NOTE = """
class Note(BaseAgent):
    async def on_request(self, payload):
        return add_system(payload, f"note {self.arguments['text']}")
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    write_agent(plugins, "note", NOTE, arguments={"text": "nothing", "n": 1})
    return plugins


@pytest.fixture
async def own_demo() -> AsyncIterator[str]:
    """A stand-in for Ollama of this test's own: it keeps the models that are made in it."""
    async with demo.serve(demo.create_app()) as url:
        yield url


async def names(client: httpx.AsyncClient) -> list[str]:
    return [model["name"] for model in (await client.get("/api/tags")).json()["models"]]


async def made(client: httpx.AsyncClient) -> None:
    """Wait until the presets, which are made in the background, stand in the list."""
    with anyio.fail_after(5):
        while not {"helper:latest", "team/Plain:latest"} <= {*await names(client)}:
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_with_a_preset_has_its_agents_and_its_system_text(
    own_demo: str, agents: Path, path: str, stream: bool
) -> None:
    async with running(own_demo, agents, presets=PRESETS) as client:
        await made(client)
        for name, agent in (("Helper:latest", "/note:p"), ("team/plain", "")):
            answer = await client.post(path, json=turn("hi", stream=stream) | {"model": name})

            system = "[system] note p\n" if agent else ""
            assert said(answer.content).endswith(f"sent:\n{system}[user] hi")
            assert ("x-osp-agents" in answer.headers) == bool(agent)
        generated = await client.post(
            "/api/generate", json={"model": "helper", "prompt": "hi", "stream": False}
        )

    assert generated.json()["response"].endswith("sent:\n[system] Be brief.\n[user] hi")


async def test_lists_and_what_asks_about_a_model_are_ollamas_own_bytes(
    own_demo: str, agents: Path
) -> None:
    requests = [("GET", path, None) for path in ("/api/tags", "/v1/models", "/v1/models/helper")]
    show = ("POST", "/api/show", {"model": "helper"})

    async with running(own_demo, agents, presets=PRESETS) as client:
        await made(client)
        async with httpx.AsyncClient(base_url=own_demo) as direct:
            for method, path, body in [*requests, show]:
                answer = await client.request(method, path, json=body)
                expected = await direct.request(method, path, json=body)
                assert (answer.status_code, answer.content) == (200, expected.content)


@pytest.mark.parametrize("path", CHATS)
async def test_a_preset_without_agents_is_a_model_like_any_other(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    frames = [line("a"), done()] if path == CHATS[0] else [event("a"), event(None, "stop"), DONE]
    ollama.answers(*frames, kind="text/odd")
    body = b'{ "model":"team/Plain:latest" , "messages":[{"role":"user","content":"hi"}]}'

    async with running(ollama_url, agents, presets=PRESETS) as client:
        answer = await client.post(path, content=body)

    assert (ollama.asked[0].body, answer.content) == (body, b"".join(frames))
    assert "x-osp-agents" not in answer.headers


async def test_what_loads_or_changes_a_preset_is_sent_as_it_is(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(b"{}", kind="application/json")
    requests = [
        ("POST", "/api/chat", b'{"model": "helper", "keep_alive": 0}'),
        ("POST", "/api/chat", b'{"model": "helper", "messages": []}'),
        ("POST", "/api/generate", b'{"model": "helper", "prompt": "/note x"}'),
        ("DELETE", "/api/delete", b'{"model": "helper"}'),
        ("POST", "/api/create", b'{"model": "helper", "from": "helper"}'),
    ]

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for method, path, body in requests:
            assert (await client.request(method, path, content=body)).content == b"{}"

    assert [(asked.method, asked.target, asked.body) for asked in ollama.asked] == requests


@pytest.mark.parametrize(
    ("preset", "complaint"),
    [
        ('[presets.fast]\nagents = "/rag"', "presets.fast: it must name a `model`"),
        ('[presets.fast]\nmodels = "demo"', "presets.fast: unknown key 'models'; known are model,"),
        ("[presets.fast]\nmodel = 7", "presets.fast: model: 7 is wrong here"),
        ('[presets.fast]\nmodel = "m"\nagents = ["/rag"]', "presets.fast: agents: "),
        ('[presets.fast]\nmodel = "m"\noptions = 7', "presets.fast: options: 7 is wrong here"),
        ('[presets]\nfast = "demo"', "presets.fast: 'demo' is wrong here, it must be a table"),
    ],
)
def test_a_wrong_preset_stops_the_start_and_is_named(
    tmp_path: Path, preset: str, complaint: str
) -> None:
    (tmp_path / "osp.toml").write_text(preset, encoding="utf-8")

    with pytest.raises(ConfigError, match=complaint):
        load(tmp_path / "osp.toml", {}, {})
