"""The agent time: the model is told the date and the time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support import FakeOllama, done, event, running, said, turn

PLUGINS = Path(__file__).parents[2] / "plugins"
PATHS = ["/api/chat", "/v1/chat/completions"]
TOLD = re.compile(r"It is (\w+), (\d\d \w+ \d{4}, \d\d:\d\d) (\S+) \(UTC([+-]\d{4})\)\.\n\n(.*)")


@pytest.fixture
def agents(plugins: Path) -> Path:
    for name in ("time", "translate"):
        (plugins / f"{name}_agent").symlink_to(PLUGINS / f"{name}_agent")
    return plugins


@pytest.fixture
def in_india(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def told(text: str) -> re.Match[str]:
    """Return weekday, date, zone, offset and prompt of what the model was sent."""
    found = TOLD.fullmatch(text)
    assert found, text
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_the_model_is_told_the_time_before_the_question(
    demo_url: str, agents: Path, path: str, stream: bool
) -> None:
    """The demo model repeats what it was sent."""
    async with running(demo_url, agents) as client:
        answer = await client.post(path, json=turn("/time what is today?", stream=stream))

    _, _, sent = said(answer.content).partition("[user] ")
    weekday, date, _, offset, prompt = told(sent).groups()
    then = datetime.strptime(f"{date} {offset}", "%d %B %Y, %H:%M %z")
    assert timedelta(0) <= datetime.now().astimezone() - then < timedelta(minutes=2)
    assert weekday == then.strftime("%A")
    assert prompt == "what is today?"


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone cannot be changed here")
async def test_the_zone_is_that_of_the_machine(
    in_india: None, ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents) as client:
        await client.post("/api/chat", json=turn("/time x"))

    sent = told(ollama.asked[0].json["messages"][0]["content"])
    assert sent.group(3, 4) == ("IST", "+0530")


async def test_only_the_last_question_is_changed(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    past = [{"role": "user", "content": "/time hi"}, {"role": "assistant", "content": "hello"}]
    messages = [*past, {"role": "user", "content": "/time and now?"}]

    async with running(ollama_url, agents) as client:
        await client.post("/api/chat", json={"model": "demo", "messages": messages})

    sent = [message["content"] for message in ollama.asked[0].json["messages"]]
    assert sent[:2] == ["hi", "hello"]
    assert told(sent[2]).group(5) == "and now?"


async def test_an_image_stays_beside_the_text(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(event("ok"), kind="text/event-stream")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    parts: Any = [image, {"type": "text", "text": "/time what is it?"}]

    async with running(ollama_url, agents) as client:
        await client.post("/v1/chat/completions", json=turn(parts))

    first, text = ollama.asked[0].json["messages"][0]["content"]
    assert first == image
    assert told(text["text"]).group(5) == "what is it?"


async def test_in_a_chain_the_others_do_their_part(demo_url: str, agents: Path) -> None:
    async with running(demo_url, agents) as client:
        answer = await client.post("/api/chat", json=turn("/time /translate:de what is today?"))

    text = said(answer.content)
    assert "into German" in text and "\n[user] It is " in text


async def test_always_on_it_is_in_every_conversation(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, agents={"time": {"always": True}}) as client:
        await client.post("/api/chat", json=turn("hello"))

    assert told(ollama.asked[0].json["messages"][0]["content"]).group(5) == "hello"
