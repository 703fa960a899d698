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
from tests.support import PATHS, House, chat, frames, outcomes, said, whole

REFUSES = """
class No(BaseAgent):
    async def on_request(self, payload):
        raise Abort(403, "no")
"""


@pytest.fixture
def agents(house: House) -> House:
    house.link("audit", "time")
    house.write("no", REFUSES)
    return house


def on(**settings: Any) -> dict[str, Any]:
    return {"audit": {"enabled": True, "settings": settings}}


def lines(house: House) -> list[dict[str, Any]]:
    file = house.plugins.parent / "data/audit/audit.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("texts", [True, False])
async def test_who_asked_what_is_noted_as_text_or_digest(
    agents: House, path: str, stream: bool, texts: bool
) -> None:
    agents.ollama.says(path, "Hel", "lo", stream=stream)
    head = {"x-request-id": "r1", "x-api-key": "key"}
    keys = {"me": {"key": "key"}}
    async with agents.open(agents=on(texts=texts), keys=keys) as client:
        body = chat(path, "/time what day?", stream=stream)
        answer = await client.post(path, json=body, headers=head)

    shown = str if texts else digest
    request, response = lines(agents)
    assert said(answer.content) == "Hello"
    assert request.pop("time") <= response.pop("time") and request.pop("user")
    assert request.pop("dialect") in ("ollama", "openai", "anthropic", "responses")
    asked = {"model": "demo", "agents": ["audit", "time"], "prompt": shown("what day?")}
    assert request == {"event": "request", "id": "r1", **asked}
    assert response == {"event": "answer", "id": "r1", "finish": "stop", "answer": shown("Hello")}


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_where_it_is_a_guard_a_chat_with_tools_has_two_lines(
    agents: House, path: str, stream: bool
) -> None:
    agents.write("weather", WEATHER)
    end = b"".join(frames(path, "Rain.")) if stream else whole(path, "Rain.")
    agents.ollama.says_in_turn(path, call(path, "tagcall", stream), end, stream=stream)
    guard = on(texts=True)["audit"] | {"on_error": "abort"}

    async with agents.open(agents={"audit": guard}) as client:
        body = chat(path, "/weather how is it?", stream=stream)
        answer = await client.post(path, json=body)

    request, response = lines(agents)
    assert (request["prompt"], response["finish"]) == ("how is it?", "stop")
    assert response["answer"] == said(answer.content) != ""


async def test_what_is_refused_has_one_line_and_what_is_explained_none(agents: House) -> None:
    agents.ollama.says(PATHS[0], "Hello")
    async with agents.open(agents=on()) as client:
        for text in ("/no hello", "/explain /time hello"):
            await client.post(PATHS[0], json=chat(PATHS[0], text))

    assert [line["event"] for line in lines(agents)] == ["request"]


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="needs a full disk")
async def test_a_full_disk_and_a_deleted_folder_hold_no_chat_up(agents: House) -> None:
    agents.ollama.says(PATHS[0], "Hello", stream=False)
    folder = agents.plugins.parent / "data/audit"
    async with agents.open(agents=on()) as client:
        (folder / "audit.jsonl").symlink_to("/dev/full")
        full = await client.post(PATHS[0], json=chat(PATHS[0], "hello", stream=False))
        (folder / "audit.jsonl").unlink()
        folder.rmdir()
        after = await client.post(PATHS[0], json=chat(PATHS[0], "hello", stream=False))

    assert said(full.content) == said(after.content) == "Hello"
    assert (outcomes(full), outcomes(after)) == ("audit;error", "audit;ok")
    assert len(lines(agents)) == 2
    assert (folder / "audit.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_full_file_makes_room_for_the_next(tmp_path: Path, count: int) -> None:
    file = RotatedFile(tmp_path / "a", 4, count)
    for number in range(8):
        file.write(b"%d\n" % number)

    found = {path.name: path.read_text().replace("\n", "") for path in tmp_path.iterdir()}
    assert found == dict([("a", "67"), ("a.1", "45"), ("a.2", "23")][:count])


@pytest.mark.parametrize("name", ["max_bytes", "files"])
async def test_a_limit_must_be_above_zero(agents: House, name: str) -> None:
    async with agents.open(agents=on(**{name: 0})) as client:
        assert f"settings: {name}: 0 must be above 0" in (await client.get("/plugins")).text
