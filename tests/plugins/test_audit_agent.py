"""The agent audit: each chat is noted, and nothing of it holds a chat up."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from plugins.audit_agent.agent import RotatedFile
from tests.slices.test_tools import WAYS, WEATHER, call
from tests.support import (
    PATHS,
    FakeOllama,
    chat,
    frames,
    outcomes,
    running,
    said,
    whole,
    write_agent,
)

PLUGINS = Path(__file__).parents[2] / "plugins"
REFUSES = """
class No(BaseAgent):
    async def on_request(self, payload):
        raise Abort(403, "no")
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    for name in ("audit", "time"):
        (plugins / f"{name}_agent").symlink_to(PLUGINS / f"{name}_agent")
    write_agent(plugins, "no", REFUSES)
    return plugins


def on(**settings: Any) -> dict[str, Any]:
    return {"audit": {"enabled": True, "settings": settings}}


def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "audit/audit.jsonl").read_text().splitlines()]


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("texts", [True, False])
async def test_who_asked_what_is_noted_as_text_or_digest(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool, texts: bool
) -> None:
    ollama.says(path, "Hel", "lo", stream=stream)
    head = {"x-request-id": "r1", "x-api-key": "key"}
    keys = {"me": {"key": "key"}}
    async with running(ollama_url, agents, agents=on(texts=texts), keys=keys) as client:
        body = chat(path, "/time what day?", stream=stream)
        answer = await client.post(path, json=body, headers=head)

    shown = str if texts else digest
    request, response = lines(agents.parent / "data")
    assert said(answer.content) == "Hello"
    assert request.pop("time") <= response.pop("time") and request.pop("user")
    assert request.pop("dialect") in ("ollama", "openai", "anthropic", "responses")
    asked = {"model": "demo", "agents": ["audit", "time"], "prompt": shown("what day?")}
    assert request == {"event": "request", "id": "r1", **asked}
    assert response == {"event": "answer", "id": "r1", "finish": "stop", "answer": shown("Hello")}


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_where_it_is_a_guard_a_chat_with_tools_has_two_lines(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    write_agent(agents, "weather", WEATHER)
    end = b"".join(frames(path, "Rain.")) if stream else whole(path, "Rain.")
    ollama.says_in_turn(path, call(path, "tagcall", stream), end, stream=stream)
    guard = on(texts=True)["audit"] | {"on_error": "abort"}

    async with running(ollama_url, agents, agents={"audit": guard}) as client:
        body = chat(path, "/weather how is it?", stream=stream)
        answer = await client.post(path, json=body)

    request, response = lines(agents.parent / "data")
    assert (request["prompt"], response["finish"]) == ("how is it?", "stop")
    assert response["answer"] == said(answer.content) != ""


async def test_what_is_refused_has_one_line_and_what_is_explained_none(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.says(PATHS[0], "Hello")
    async with running(ollama_url, agents, agents=on()) as client:
        for text in ("/no hello", "/explain /time hello"):
            await client.post(PATHS[0], json=chat(PATHS[0], text))

    assert [line["event"] for line in lines(agents.parent / "data")] == ["request"]


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="needs a full disk")
async def test_a_full_disk_and_a_deleted_folder_hold_no_chat_up(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.says(PATHS[0], "Hello", stream=False)
    folder = agents.parent / "data/audit"
    async with running(ollama_url, agents, agents=on()) as client:
        (folder / "audit.jsonl").symlink_to("/dev/full")
        full = await client.post(PATHS[0], json=chat(PATHS[0], "hello", stream=False))
        (folder / "audit.jsonl").unlink()
        folder.rmdir()
        after = await client.post(PATHS[0], json=chat(PATHS[0], "hello", stream=False))

    assert said(full.content) == said(after.content) == "Hello"
    assert (outcomes(full), outcomes(after)) == ("audit;error", "audit;ok")
    assert len(lines(agents.parent / "data")) == 2
    assert (folder / "audit.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_full_file_makes_room_for_the_next(tmp_path: Path, count: int) -> None:
    file = RotatedFile(tmp_path / "a", 4, count)
    for number in range(8):
        file.write(b"%d\n" % number)

    found = {path.name: path.read_text().replace("\n", "") for path in tmp_path.iterdir()}
    assert found == dict([("a", "67"), ("a.1", "45"), ("a.2", "23")][:count])


@pytest.mark.parametrize("name", ["max_bytes", "files"])
async def test_a_limit_must_be_above_zero(ollama_url: str, agents: Path, name: str) -> None:
    async with running(ollama_url, agents, agents=on(**{name: 0})) as client:
        assert f"settings: {name}: 0 must be above 0" in (await client.get("/plugins")).text
