"""Presets as clients see them: models of Ollama, to whose chats agents belong."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

import demo
from tests.support import CHAT, COMPLETIONS, PATHS, House, frames, running, said, turn, write_agent

PRESETS = {
    "helper": {"model": "demo", "agents": "/note:p", "system": "Be brief."},
    "team/Plain": {"model": "Demo:latest"},
}
NOTE = """
class Note(BaseAgent):
    async def on_request(self, payload):
        return add_system(payload, f"note {self.arguments['text']}")
"""


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_with_a_preset_has_its_agents_and_a_generate_its_system_text(
    plugins: Path, path: str, stream: bool
) -> None:
    write_agent(plugins, "note", NOTE, arguments={"text": "nothing"})
    generate = {"model": "helper", "prompt": "hi", "stream": False}

    async with demo.serve(demo.create_app()) as url:
        async with running(url, plugins, presets=PRESETS) as client:
            with anyio.fail_after(5):  # they are made in the background
                while "team/Plain:latest" not in (await client.get("/api/tags")).text:
                    await anyio.lowlevel.checkpoint()
            for name, agent in (("Helper:latest", "/note:p"), ("team/plain", "")):
                answer = await client.post(path, json=turn("hi", stream=stream) | {"model": name})

                system = "[system] note p\n" if agent else ""
                assert said(answer.content).endswith(f"sent:\n{system}[user] hi")
                assert ("x-osp-agents" in answer.headers) == bool(agent)
            generated = await client.post("/api/generate", json=generate)

    assert generated.json()["response"].endswith("sent:\n[system] Be brief.\n[user] hi")


@pytest.mark.parametrize("path", PATHS[:3])
async def test_a_preset_without_agents_is_a_model_like_any_other(house: House, path: str) -> None:
    house.ollama.says(path, "a")
    body = b'{ "model":"team/Plain:latest" , "messages":[{"role":"user","content":"hi"}]}'

    async with house.open(presets=PRESETS) as client:
        answer = await client.post(path, content=body)

    assert (house.ollama.asked[0].body, answer.content) == (body, b"".join(frames(path, "a")))
    assert "x-osp-agents" not in answer.headers
