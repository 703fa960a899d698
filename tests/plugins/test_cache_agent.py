"""The agent cache: the same conversation gets the same answer, and the model is not asked again.

The scripted model numbers its answers, so that each test sees which one came.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import (
    DONE,
    FakeOllama,
    done,
    dumped,
    event,
    line,
    running,
    said,
    turn,
    write_agent,
)

PLUGINS = Path(__file__).parents[2] / "plugins"
PATHS = ["/api/chat", "/v1/chat/completions"]
FILE = "data/cache/answers.db"
FIRST = {"role": "user", "content": "a"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "42"}
OPTIONS = [("seed", 1), ("top_k", 2)]
FILES = """
class Files(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, "From a file: 42.")

    async def on_end(self):
        return " (from a file)"
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    for name in ("cache", "translate"):
        (plugins / f"{name}_agent").symlink_to(PLUGINS / f"{name}_agent")
    return plugins


def numbered(ollama: FakeOllama, text: str = "answer {}") -> None:
    """Answer each request with its number, in its dialect and as it wants it."""

    async def prepare() -> None:
        asked = ollama.asked[-1]
        said = text.format(len(ollama.asked))
        openai = asked.target.startswith("/v1/")
        kind, frames = answer(openai, bool(asked.json.get("stream", not openai)), said)
        ollama.answers(*frames, kind=kind, before=prepare)

    ollama.answers(before=prepare)


def answer(openai: bool, stream: bool, text: str) -> tuple[str, list[bytes]]:
    """Return content type and frames of an answer; a stream has the text in two."""
    half = len(text) // 2
    if openai and stream:
        frames = [event(text[:half]), event(text[half:]), event(None, "stop"), DONE]
        return "text/event-stream", frames
    if openai:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return "application/json", [dumped({"id": "c", "model": "m", "choices": [choice]})]
    if stream:
        return "application/x-ndjson", [line(text[:half]), line(text[half:]), done()]
    return "application/json", [done(text)]


async def ask(client: httpx.AsyncClient, text: Any = "/cache hello", **fields: Any) -> str:
    """Return the text of an answer; `path` and `headers` may be among the fields."""
    path, headers = fields.pop("path", "/api/chat"), fields.pop("headers", {})
    body = json.dumps(turn(text, **fields))  # unlike httpx it can say half a character
    response = await client.post(path, content=body, headers=headers)
    assert response.status_code == 200, response.content
    return said(response.content)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
async def test_what_was_asked_before_is_answered_without_the_model(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, first: bool, second: bool
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        await client.post(path, json=turn("/cache hello", stream=first))
        again = await client.post(path, json=turn("/cache hello", stream=second))

    assert said(again.content) == "answer 1"
    assert again.headers["x-osp-agents"].startswith("cache;reply;")
    assert len(ollama.asked) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_the_first_answer_is_the_models_own_byte_for_byte(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    kind, frames = answer(path.startswith("/v1/"), stream, "hello")
    ollama.answers(*frames, kind=kind)

    async with running(ollama_url, agents) as client:
        response = await client.post(path, json=turn("/cache hello", stream=stream))

    assert response.content == b"".join(frames)


async def test_the_text_flows_while_it_is_kept(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("Hel"), ollama.pause, line("lo"), done())

    async with running(ollama_url, agents) as client:
        async with client.stream("POST", "/api/chat", json=turn("/cache greet")) as response:
            frames = response.aiter_raw()
            assert said(await anext(frames)) == "Hel"
            ollama.go.set()
            assert [said(frame) async for frame in frames][0] == "lo"
        assert await ask(client, "/cache greet") == "Hello"


@pytest.mark.parametrize(
    "other",
    [
        {"model": "other"},
        {"options": {"temperature": 1}},
        {"messages": [{"role": "user", "content": "/cache b"}]},
        {"messages": [{"role": "user", "content": "/cache a", "images": ["AA=="]}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "/cache a"}]},
        {"think": True},
    ],
)
async def test_another_request_is_another_question(
    ollama: FakeOllama, ollama_url: str, agents: Path, other: dict[str, Any]
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        await ask(client, "/cache a")
        for _ in range(2):
            assert await ask(client, "/cache a", **other) == "answer 2"
        assert await ask(client, "/cache a") == "answer 1"


async def test_an_image_of_the_openai_dialect_is_part_of_the_question(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    def showing(data: str) -> list[Any]:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        return [image, {"type": "text", "text": "/cache what is it?"}]

    numbered(ollama)
    async with running(ollama_url, agents) as client:
        said = [await ask(client, showing(data), path=PATHS[1]) for data in ("AA", "BB", "AA")]

    assert said == ["answer 1", "answer 2", "answer 1"]


async def test_how_the_answer_is_sent_and_the_order_of_keys_do_not_matter_in_a_dialect(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)
    one, other = ({"options": dict(order)} for order in (OPTIONS, OPTIONS[::-1]))
    usage = {"include_usage": True}

    async with running(ollama_url, agents) as client:
        await ask(client, **one)
        await ask(client, **other, keep_alive=5)
        await ask(client, path=PATHS[1], **one, stream=True, stream_options=usage)
        await ask(client, path=PATHS[1], **other, stream=False)

    assert [asked.target for asked in ollama.asked] == PATHS


async def test_each_key_has_answers_of_its_own(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)
    keys = ["one", "two", "one", "two"]

    async with running(ollama_url, agents, access={"keys": ["one", "two"]}) as client:
        said = [await ask(client, headers={"x-api-key": key}) for key in keys]

    assert said == ["answer 1", "answer 2", "answer 1", "answer 2"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"functions": [{"name": "f"}]},
        {"format": "json"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"messages": [{"role": "user", "content": "/cache a"}, CALL, RESULT]},
        {"messages": [{"role": "user", "content": "/cache a"}, RESULT | {"role": "TOOL"}]},
        {"messages": [FIRST, CALL, {"role": "user", "content": "/cache a"}]},
    ],
)
async def test_tools_structured_output_and_logprobs_always_go_to_the_model(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, fields: dict[str, Any]
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        said = [await ask(client, path=path, **fields) for _ in range(2)]

    assert said == ["answer 1", "answer 2"]


async def test_what_is_no_text_format_is_kept(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)
    nothing: dict[str, Any] = {"tools": [], "format": "", "logprobs": False}

    async with running(ollama_url, agents) as client:
        said = [await ask(client, **nothing) for _ in range(2)]

    assert said == ["answer 1", "answer 1"]


@pytest.mark.parametrize(
    "steps",
    [
        lambda ollama: [line("half"), ollama.breaks],
        lambda ollama: [line("half"), dumped({"error": "out of memory"})],
        lambda ollama: [done("")],
    ],
)
async def test_an_answer_that_broke_off_or_is_empty_is_not_kept(
    ollama: FakeOllama, ollama_url: str, agents: Path, steps: Callable[[FakeOllama], list[Any]]
) -> None:
    ollama.answers(*steps(ollama))
    async with running(ollama_url, agents) as client:
        try:
            await client.post("/api/chat", json=turn("/cache hello"))
        except httpx.RemoteProtocolError:
            pass
        numbered(ollama)

        assert await ask(client) == "answer 2"
        assert await ask(client) == "answer 2"


async def test_an_error_of_the_model_is_not_kept(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(dumped({"error": "no"}), kind="application/json", status=404)
    async with running(ollama_url, agents) as client:
        assert (await client.post("/api/chat", json=turn("/cache hello"))).status_code == 404
        numbered(ollama)

        assert await ask(client) == "answer 2"


async def test_an_answer_that_nobody_waited_for_is_not_kept(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("half"), ollama.pause, done())
    async with running(ollama_url, agents) as client:
        async with client.stream("POST", "/api/chat", json=turn("/cache hello")) as response:
            await anext(response.aiter_raw())
        async with asyncio.timeout(5):
            await ollama.disconnected.wait()
        numbered(ollama)

        assert await ask(client) == "answer 2"


async def test_fresh_asks_anew_and_keeps_that_answer(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        typed = ["/cache", "/cache:fresh=true", "/cache:true", "/cache"]
        said = [await ask(client, f"{command} hello") for command in typed]

    assert said == ["answer 1", "answer 2", "answer 3", "answer 3"]


async def test_always_on_it_needs_no_command(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents, agents={"cache": {"always": True}}) as client:
        said = [await ask(client, text) for text in ("hello", "hello", "/cache:fresh=yes hello")]

    assert said == ["answer 1", "answer 1", "answer 2"]


async def test_without_being_asked_for_it_keeps_nothing(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        said = [await ask(client, text) for text in ("hello", "/cache hello", "hello")]

    assert said == ["answer 1", "answer 2", "answer 3"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_with_a_translation_the_models_own_answer_is_kept(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        for typed in ("/cache /translate:de", "/translate:de /cache"):
            text = await ask(client, f"{typed} hello", path=path, stream=stream)
            assert text == f"answer {len(ollama.asked)}"
        assert await ask(client, "/cache hello", path=path, stream=stream) == "answer 1"

    asked = [request.json["messages"][-1]["content"] for request in ollama.asked]
    assert asked == ["hello", "answer 1", "answer 1"]


@pytest.mark.parametrize("typed", ["/files /cache", "/cache /files", "/files&/cache", "/files"])
async def test_what_other_agents_added_is_part_of_the_question(
    ollama: FakeOllama, ollama_url: str, agents: Path, typed: str
) -> None:
    write_agent(agents, "files", FILES)
    numbered(ollama)
    always = {"cache": {"always": "cache" not in typed}}

    async with running(ollama_url, agents, agents=always) as client:
        said = [await ask(client, f"{command} hello") for command in (typed, "/cache") * 2]

    assert said == ["answer 1 (from a file)", "answer 2"] * 2


async def test_after_a_restart_the_answers_are_still_there(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    numbered(ollama)

    for _ in range(2):
        async with running(ollama_url, agents) as client:
            assert await ask(client) == "answer 1"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The agent's file, as somebody else has it open."""
    (tmp_path / FILE).parent.mkdir(parents=True)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as db:
        yield db


async def test_an_old_answer_is_not_given_any_more_and_goes(
    ollama: FakeOllama, ollama_url: str, agents: Path, database: sqlite3.Connection
) -> None:
    numbered(ollama)
    settings = {"settings": {"max_age": 60}}

    async with running(ollama_url, agents, agents={"cache": settings}) as client:
        await ask(client)
        database.execute("UPDATE answers SET stored = stored - 50")
        assert await ask(client) == "answer 1"
        database.execute("UPDATE answers SET stored = stored - 11")
        assert await ask(client) == "answer 2"
        database.execute("UPDATE answers SET stored = stored - 61")
        await ask(client, "/cache other")

        assert database.execute("SELECT count(*) FROM answers").fetchone() == (1,)


async def test_an_answer_from_the_future_is_not_given(
    ollama: FakeOllama, ollama_url: str, agents: Path, database: sqlite3.Connection
) -> None:
    """The clock was wrong then, or is now: nobody knows how old it is."""
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        await ask(client)
        database.execute("UPDATE answers SET stored = stored + 3600")
        assert await ask(client) == "answer 2"


@pytest.mark.parametrize("limit", [{"max_entries": 2}, {"max_bytes": 2 * len("answer 1")}])
async def test_when_there_is_no_room_the_oldest_answer_goes(
    ollama: FakeOllama, ollama_url: str, agents: Path, limit: dict[str, int]
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents, agents={"cache": {"settings": limit}}) as client:
        for text in ("/cache a", "/cache b", "/cache:fresh=true a", "/cache c"):
            await ask(client, text)
        said = [await ask(client, f"/cache {text}") for text in "acb"]

    assert said == ["answer 3", "answer 4", "answer 5"]


async def test_an_answer_that_is_too_large_is_not_kept_and_drives_no_other_out(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    settings = {"settings": {"max_bytes": len("answer 2 is large ä")}}  # it has one byte more
    async with running(ollama_url, agents, agents={"cache": settings}) as client:
        numbered(ollama)
        await ask(client, "/cache small")
        numbered(ollama, "answer {} is large ä")
        said = [await ask(client, f"/cache {text}") for text in ("large", "large", "small")]

    assert said == ["answer 2 is large ä", "answer 3 is large ä", "answer 1"]


@pytest.mark.parametrize("rubbish", [b"no database at all" * 100, b""])
async def test_a_damaged_file_is_made_anew(
    ollama: FakeOllama, ollama_url: str, agents: Path, tmp_path: Path, rubbish: bytes
) -> None:
    numbered(ollama)
    file = tmp_path / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(rubbish)

    async with running(ollama_url, agents) as client:
        said = [await ask(client) for _ in range(2)]
        file.write_bytes(rubbish)
        said += [await ask(client) for _ in range(2)]

    assert said == ["answer 1", "answer 1", "answer 2", "answer 2"]


async def test_a_file_that_is_damaged_inside_is_made_anew(
    ollama: FakeOllama, ollama_url: str, agents: Path, tmp_path: Path
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        await ask(client)
        whole = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        said = [await ask(client) for _ in range(2)]

    assert said == ["answer 2", "answer 2"]


async def test_a_file_that_is_gone_is_made_anew(
    ollama: FakeOllama, ollama_url: str, agents: Path, tmp_path: Path
) -> None:
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        await ask(client)
        (tmp_path / FILE).unlink()
        said = [await ask(client) for _ in range(2)]

    assert said == ["answer 2", "answer 2"]


async def test_other_errors_of_the_file_are_not_taken_for_damage(
    ollama: FakeOllama, ollama_url: str, agents: Path, database: sqlite3.Connection
) -> None:
    database.execute("CREATE TABLE answers (somebody_elses TEXT)")
    database.execute("INSERT INTO answers VALUES ('x')")
    numbered(ollama)

    async with running(ollama_url, agents) as client:
        assert (await ask(client)).startswith("answer 1\n\n")  # and the notice

    assert database.execute("SELECT * FROM answers").fetchall() == [("x",)]


@pytest.mark.parametrize("setting", ["max_age", "max_entries", "max_bytes"])
async def test_a_limit_must_be_above_zero(ollama_url: str, agents: Path, setting: str) -> None:
    settings = {"settings": {setting: 0}}

    async with running(ollama_url, agents, agents={"cache": settings}) as client:
        listed = (await client.get("/plugins")).json()["plugins"]

    assert [p["status"] for p in listed if p["name"] == "cache"] == ["failed"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are others here")
async def test_its_files_are_the_owners_alone(
    ollama: FakeOllama, ollama_url: str, agents: Path, tmp_path: Path
) -> None:
    numbered(ollama)
    folder = (tmp_path / FILE).parent

    async with running(ollama_url, agents) as client:
        with closing(sqlite3.connect(tmp_path / FILE)) as reader:
            reader.execute("SELECT * FROM answers").fetchall()  # so the other files stay
            await ask(client)
            modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}

    assert modes == dict.fromkeys(["answers.db", "answers.db-wal", "answers.db-shm"], 0o600)


async def test_half_a_character_is_kept_as_it_came(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    half = b'{"message":{"role":"assistant","content":"<\\ud83d>"},"done":false}\n'
    ollama.answers(half, done())

    async with running(ollama_url, agents) as client:
        said = [await ask(client, "/cache half \ud83e") for _ in range(2)]

    assert said == ["<\ud83d>", "<\ud83d>"]
    assert len(ollama.asked) == 1


async def test_two_proxies_share_one_file(
    ollama: FakeOllama, ollama_url: str, agents: Path, tmp_path: Path
) -> None:
    """They share nothing but the file, as two processes do."""
    numbered(ollama)
    data = tmp_path / "shared"

    async with (
        running(ollama_url, agents, data=data) as one,
        running(ollama_url, agents, data=data) as two,
    ):
        both = [(client, f"/cache {n}") for n in range(10) for client in (one, two)]
        await asyncio.gather(*(ask(client, text) for client, text in both))
        asked = len(ollama.asked)
        said = [await asyncio.gather(ask(one, text), ask(two, text)) for _, text in both]

    assert len(ollama.asked) == asked
    assert all(first == second for first, second in said)
