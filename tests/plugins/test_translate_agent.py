"""The agent translate: the answer arrives in the language that was named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import FakeOllama, done, event, line, running, said, turn

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("typed", "language"),
    [
        ("/translate:de", "German"),
        ("/translate:DE", "German"),
        ("/translate:to=fr", "French"),
        ("/translate:Klingon", "Klingon"),
        ('/translate:"Swiss German"', "Swiss German"),
        ("/translate", "English"),
    ],
)
async def test_the_answer_is_translated_with_a_second_question(
    demo_url: str, tmp_path: Path, path: str, stream: bool, typed: str, language: str
) -> None:
    """The demo model repeats what it was sent: so its answer shows what the translator is told."""
    async with running(demo_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post(path, json=turn(f"{typed} why is it blue?", stream=stream))

    text = said(answer.content)
    assert f"[system] You are a translator. Translate what the user sends into {language}." in text
    assert text.endswith("[user] I am the demo model. I was sent:\n[user] why is it blue?")


async def test_the_translator_is_asked_coolly_and_once(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    async def second() -> None:
        if len(ollama.asked) == 1:
            ollama.answers(done(" Hallo \n"), kind="application/json", before=second)

    ollama.answers(line("Hel"), line("lo"), second, done())

    async with running(ollama_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de greet", stream=True))

    assert said(answer.content) == "Hallo"
    (asked,) = ollama.asked[1:]
    assert asked.json["options"] == {"temperature": 0}
    assert asked.json["messages"][1] == {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("reply", [done(""), done("  \n"), b"no json", b'{"error":"gone"}'])
async def test_an_answer_is_never_lost_to_its_translation(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path, reply: bytes
) -> None:
    async def second() -> None:
        ollama.answers(reply, kind="application/json")

    ollama.answers(line("Hello"), second, done())

    async with running(ollama_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de greet", stream=True))

    assert said(answer.content).startswith("Hello")


async def test_tool_calls_are_not_translated(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    calls: dict[str, Any] = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    ollama.answers(done("", message=calls))

    async with running(ollama_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de x", tools=[{}]))

    assert json.loads(answer.content)["message"]["tool_calls"] == calls["tool_calls"]
    assert len(ollama.asked) == 1


async def test_translate_shows_in_the_openai_dialect_frame_by_frame(
    demo_url: str, tmp_path: Path
) -> None:
    async with running(demo_url, PLUGINS, data=tmp_path) as client:
        body = turn("/translate:de x", stream=True)
        answer = await client.post("/v1/chat/completions", json=body)

    events = answer.content.split(b"\n\n")
    assert events[-2] == b"data: [DONE]" and len(events) > 5
    assert event("")[:6] == b"data: "
