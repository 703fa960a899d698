"""Presets as clients see them: models of Ollama, to whose chats agents belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

import demo
from tests.support import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    PATHS,
    RESPONSES,
    House,
    chat,
    frames,
    running,
    said,
    turn,
    write_agent,
)

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


@pytest.mark.parametrize("path", PATHS)
async def test_a_preset_without_agents_is_a_model_like_any_other(house: House, path: str) -> None:
    house.ollama.says(path, "a")
    body = b'{ "model":"team/Plain:latest" , "messages":[{"role":"user","content":"hi"}]}'

    async with house.open(presets=PRESETS) as client:
        answer = await client.post(path, content=body)

    assert (house.ollama.asked[0].body, answer.content) == (body, b"".join(frames(path, "a")))
    assert "x-osp-agents" not in answer.headers


@pytest.mark.parametrize(
    ("path", "think", "fields", "filled"),
    [
        (CHAT, None, {}, {"keep_alive": "1h"}),
        (CHAT, True, {"keep_alive": 5, "stream": False}, {"think": True}),
        (CHAT, "low", {"think": None, "options": {}}, {"think": "low", "keep_alive": "1h"}),
        (CHAT, False, {"think": True, "keep_alive": 0}, {}),
        (COMPLETIONS, False, {"seed": 1.0}, {"reasoning": {"effort": "none"}}),
        (COMPLETIONS, True, {}, {}),  # a model that can think does so unasked
        (COMPLETIONS, "high", {"reasoning_effort": "low"}, {}),
        (MESSAGES, False, {"system": "s", "stream": True}, {"thinking": {"type": "disabled"}}),
        (
            MESSAGES,
            "max",
            {"output_config": {"a": 1}},
            {"output_config": {"a": 1, "effort": "max"}},
        ),
        (MESSAGES, "max", {"thinking": {"type": "adaptive"}}, {}),
        (RESPONSES, "low", {"reasoning": {"a": 1}}, {"reasoning": {"a": 1, "effort": "low"}}),
        (RESPONSES, False, {"reasoning": {"effort": "low"}}, {}),
    ],
)
async def test_a_preset_says_how_to_think_and_how_long_to_stay_where_a_chat_does_not(
    house: House, path: str, think: Any, fields: dict[str, Any], filled: dict[str, Any]
) -> None:
    """Nothing else changes, the order of keys included; where nothing is filled in, no byte."""
    preset = {"model": "demo", "think": think, "keep_alive": "1h"}
    preset = {key: value for key, value in preset.items() if value is not None}
    asked = chat(path, "hi \u2028 é", **fields) | {"model": "p"}
    house.ollama.says(path, "a")

    async with house.open(presets={"p": preset}) as client:
        answer = await client.post(path, content=json.dumps(asked, indent=1))

    body = house.ollama.asked[0].body
    assert list(json.loads(body).items()) == list((asked | filled).items())
    assert (body == json.dumps(asked, indent=1).encode()) is not bool(filled)
    assert answer.content == b"".join(frames(path, "a")) and "x-osp-agents" not in answer.headers


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ('{"model": "p"}', '{"model":"p","keep_alive":-1}'),
        ('{"model": "p", "keep_alive": 0}', '{"model": "p", "keep_alive": 0}'),
        ('{"model": "p", "model": "p"}', '{"model": "p", "model": "p"}'),  # which one counts?
    ],
)
async def test_a_model_is_loaded_for_as_long_as_its_preset_says(
    house: House, guarded: bool, asked: str, sent: str
) -> None:
    if guarded:
        house.add("watch", "pass", always=True, on_error="abort")
    preset = {"model": "demo", "keep_alive": -1, "think": True}
    house.ollama.answers(b"{}")

    async with house.open(presets={"p": preset}) as client:
        answer = await client.post(CHAT, content=asked)

    bodies = [each.body.decode().replace(" ", "") for each in house.ollama.asked]
    refused = guarded and asked.count('"model"') > 1
    expected = (403, []) if refused else (200, [sent.replace(" ", "")])
    assert (answer.status_code, bodies) == expected


@pytest.mark.parametrize(
    ("path", "key"),
    [(CHAT, "think"), (COMPLETIONS, "reasoning"), (MESSAGES, "thinking"), (RESPONSES, "reasoning")],
)
async def test_agents_see_what_the_preset_says_and_have_the_last_word(
    house: House, path: str, key: str
) -> None:
    house.add("look", f"set_prompt(payload, '{key} ' + str(payload.pop('{key}')))")
    preset = {"model": "demo", "agents": "/look", "think": False}

    async with house.open(presets={"p": preset}) as client:
        await house.post(client, path, "hi", model="p")

    assert f"{key} " in str(house.sent[0][-1]) and key not in house.ollama.asked[0].json
