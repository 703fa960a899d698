"""The agent cache: the same conversation gets the same answer, and the model is not asked again.

The scripted model numbers its answers, so that each test sees which one came.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import (
    CHAT,
    COMPLETIONS,
    PATHS,
    FakeOllama,
    House,
    chat,
    done,
    dumped,
    frames,
    line,
    outcomes,
    said,
    whole,
)

FILES = """
class Files(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, "From a file: 42.")

    async def on_end(self):
        return " (from a file)"
"""


LOOKUP = """
class Lookup(BaseAgent):
    tools = [{"name": "f"}]

    async def on_tool(self, name, arguments):
        return "42"
"""


@pytest.fixture
def agents(house: House) -> House:
    house.link("cache", "translate")
    house.write("files", FILES)
    numbered(house)
    return house


def numbered(house: House, text: str = "answer {}") -> None:
    """Answer each request with its number, in its dialect and as it wants it."""
    ollama = house.ollama

    async def prepare() -> None:
        asked = ollama.asked[-1]
        streams = asked.json.get("stream", asked.target == CHAT)
        ollama.says(asked.target, text.format(len(ollama.asked)), stream=streams)
        ollama.before = prepare

    ollama.answers(before=prepare)


async def ask(
    client: httpx.AsyncClient, text: Any = "/cache hello", path: str = CHAT, **fields: Any
) -> str:
    """Return the text of an answer; `headers` may be among the fields."""
    headers = fields.pop("headers", {})
    messages = fields.pop("messages", [text])
    content = dumped(chat(path, *messages, **fields))
    response = await client.post(path, content=content, headers=headers)
    assert response.status_code == 200, response.content
    return said(response.content)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
async def test_what_was_asked_before_is_answered_without_the_model(
    agents: House, path: str, first: bool, second: bool
) -> None:
    agents.ollama.says(path, "ans", "wer", stream=first)
    frames_sent = frames(path, "ans", "wer") if first else [whole(path, "answer")]

    async with agents.open() as client:
        answer = await client.post(path, json=chat(path, "/cache hello", stream=first))
        again = await client.post(path, json=chat(path, "/cache hello", stream=second))

    assert answer.content == b"".join(frames_sent)  # the model's own, byte for byte
    assert (said(again.content), outcomes(again)) == ("answer", "cache;reply")
    assert len(agents.ollama.asked) == 1


async def test_the_text_flows_while_it_is_kept(agents: House) -> None:
    agents.ollama.answers(line("Hel"), agents.ollama.pause, line("lo"), done())

    async with agents.open() as client:
        async with client.stream("POST", CHAT, json=chat(CHAT, "/cache greet")) as response:
            chunks = response.aiter_raw()
            assert said(await anext(chunks)) == "Hel"
            agents.ollama.go.set()
            assert [said(chunk) async for chunk in chunks][0] == "lo"
        assert await ask(client, "/cache greet") == "Hello"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TEXT = {"type": "text", "text": "/cache hello"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "42"}
OPTIONS = [{"options": {"seed": 1, "top_k": 2}}, {"options": {"top_k": 2, "seed": 1}}]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", ["/cache /lookup hello", "/lookup /cache hello"])
async def test_an_answer_for_which_a_tool_could_be_called_is_not_kept(
    agents: House, path: str, text: str
) -> None:
    agents.write("lookup", LOOKUP)

    async with agents.open() as client:
        said = [await ask(client, text, path=path) for _ in range(2)]

    assert said == ["answer 1", "answer 2"]


@pytest.mark.parametrize(
    ("path", "one", "other", "second"),
    [
        *((CHAT, {}, {key: value}, 2) for key, value in [("model", "m"), ("think", True)]),
        (CHAT, {}, OPTIONS[0], 2),
        (CHAT, OPTIONS[0], OPTIONS[1], 1),
        (CHAT, {"keep_alive": 5, "stream": True}, {"stream": False}, 1),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}}, {}, 1),
        (CHAT, {}, {"messages": [SYSTEM, "/cache hello"]}, 2),
        (CHAT, {}, {"messages": [{"role": "user", "content": "/cache hello", "images": [""]}]}, 2),
        (COMPLETIONS, {}, {"text": [IMAGE, TEXT]}, 2),
        (CHAT, {"tools": []}, {"tools": []}, 1),
        (CHAT, {"text": "/cache:true hello"}, {}, 1),
        (CHAT, {}, {"text": "/cache:fresh=true hello"}, 2),
        (CHAT, {"text": "hello"}, {}, 2),
        # These always go to the model.
        *((path, {"tools": TOOLS}, {"tools": TOOLS}, 2) for path in PATHS),
        (COMPLETIONS, {"functions": TOOLS}, {"functions": TOOLS}, 2),
        (CHAT, {"format": "json"}, {"format": "json"}, 2),
        (CHAT, {"logprobs": True}, {"logprobs": True}, 2),
        (CHAT, *[{"messages": ["/cache hello", CALL, RESULT]}] * 2, 2),
    ],
)
async def test_only_the_same_request_gets_the_same_answer(
    agents: House, path: str, one: dict[str, Any], other: dict[str, Any], second: int
) -> None:
    async with agents.open() as client:
        said = [await ask(client, path=path, **fields) for fields in (one, other)]

    assert said == ["answer 1", f"answer {second}"]


async def test_each_key_has_answers_of_its_own(agents: House) -> None:
    keys = ["one", "two", "one", "two"]

    named = {name: {"key": name} for name in ("one", "two")}
    async with agents.open(keys=named) as client:
        said = [await ask(client, headers={"x-api-key": key}) for key in keys]

    assert said == ["answer 1", "answer 2", "answer 1", "answer 2"]


def cut_off(path: str) -> bytes:
    """Return a whole answer that the model's context or a limit cut off."""
    swaps = [(b'"stop"', b'"length"'), (b'"end_turn"', b'"max_tokens"')]
    body = whole(path, "half")
    for swap in swaps:
        body = body.replace(*swap)
    return body


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        (CHAT, lambda ollama: [line("half"), ollama.breaks]),
        (CHAT, lambda ollama: [line("half"), dumped({"error": "out of memory"})]),
        (CHAT, lambda ollama: [line("half")]),
        (CHAT, lambda ollama: [done("half", done_reason="length")]),
        *((path, lambda ollama, path=path: [cut_off(path)]) for path in PATHS[1:3]),
    ],
)
async def test_an_answer_that_is_not_whole_is_not_kept(
    agents: House, path: str, steps: Callable[[FakeOllama], list[Any]]
) -> None:
    kind = "application/x-ndjson" if path == CHAT else "application/json"
    agents.ollama.answers(*steps(agents.ollama), kind=kind)
    body = chat(path, "/cache hello", stream=path == CHAT)
    async with agents.open() as client:
        with suppress(httpx.RemoteProtocolError):
            assert "half" in (await client.post(path, json=body)).text
        numbered(agents)

        said = [await ask(client, path=path, stream=path == CHAT) for _ in range(2)]

    assert said == ["answer 2", "answer 2"]


async def test_an_answer_that_the_client_left_or_that_is_an_error_is_not_kept(
    agents: House,
) -> None:
    async with agents.open() as client:
        agents.ollama.answers(dumped({"error": "no"}), kind="application/json", status=404)
        assert (await client.post(CHAT, json=chat(CHAT, "/cache hello"))).status_code == 404
        agents.ollama.answers(line("half"), agents.ollama.pause, done())
        async with client.stream("POST", CHAT, json=chat(CHAT, "/cache hello")) as response:
            await anext(response.aiter_raw())
        async with asyncio.timeout(5):
            await agents.ollama.disconnected.wait()
        numbered(agents)

        assert [await ask(client) for _ in range(2)] == ["answer 3", "answer 3"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_with_a_translation_the_models_own_answer_is_kept(
    agents: House, path: str, stream: bool
) -> None:
    async with agents.open() as client:
        for typed in ("/cache /translate:de", "/translate:de /cache"):
            text = await ask(client, f"{typed} hello", path, stream=stream)
            assert text == f"answer {len(agents.ollama.asked)}"
        assert await ask(client, "/cache hello", path, stream=stream) == "answer 1"

    assert len(agents.ollama.asked) == 3


@pytest.mark.parametrize("typed", ["/files /cache", "/cache /files", "/files&/cache", "/files"])
async def test_what_other_agents_added_is_part_of_the_question(agents: House, typed: str) -> None:
    always = {"cache": {"always": "cache" not in typed}}

    async with agents.open(agents=always) as client:
        said = [await ask(client, f"{command} hello") for command in (typed, "/cache") * 2]

    assert said == ["answer 1 (from a file)", "answer 2"] * 2


async def test_what_is_explained_is_not_kept(agents: House) -> None:
    async with agents.open() as client:
        explained = await ask(client, "/explain /cache hello")
        said = [await ask(client), await ask(client)]

    assert "changed nothing" in explained and said == ["answer 1", "answer 1"]


# The store


@dataclass
class Kept:
    """Where answers are: `server` is a section of the settings, `execute` runs SQL there."""

    server: dict[str, str]
    execute: Callable[[str], list[Any]]


@pytest.fixture
def kept(request: pytest.FixtureRequest, where: str) -> Kept:
    if where.startswith("postgresql:"):
        cluster, name = request.getfixturevalue("postgres"), where.rpartition("/")[2]
        return Kept({"store": where}, lambda sql: cluster.execute(sql.format("osp_cache."), name))

    def execute(sql: str) -> list[Any]:
        with closing(sqlite3.connect(f"{where}/cache/store.db")) as db, db:
            return db.execute(sql.format("")).fetchall()

    return Kept({}, execute)


async def test_an_old_answer_and_one_from_the_future_are_not_given(
    agents: House, kept: Kept
) -> None:
    settings = {"cache": {"settings": {"max_age": 60}}}

    async with agents.open(agents=settings, server=kept.server) as client:
        said = [await ask(client)]
        for later in (-30, -31, 3600):
            kept.execute(f"UPDATE {{}}answers SET made = made + {later}")
            said.append(await ask(client))
        kept.execute("UPDATE {}answers SET made = made - 61")
        await ask(client, "/cache other")

    assert said == ["answer 1", "answer 1", "answer 2", "answer 3"]
    assert kept.execute("SELECT count(*) FROM {}answers") == [(1,)]


@pytest.mark.parametrize("limit", [{"max_entries": 2}, {"max_bytes": 2 * len("answer 1")}])
async def test_when_there_is_no_room_the_oldest_answer_goes(
    agents: House, kept: Kept, limit: dict[str, int]
) -> None:
    settings = {"cache": {"settings": limit}}

    async with agents.open(agents=settings, server=kept.server) as client:
        for text in ("/cache a", "/cache b", "/cache:fresh=true a", "/cache c"):
            await ask(client, text)
        said = [await ask(client, f"/cache {text}") for text in "acb"]

    assert said == ["answer 3", "answer 4", "answer 5"]


async def test_an_answer_that_is_too_large_is_not_kept_and_drives_no_other_out(
    agents: House, kept: Kept
) -> None:
    # It has one byte more than there may be
    settings = {"cache": {"settings": {"max_bytes": len("answer 2 is large ä")}}}

    async with agents.open(agents=settings, server=kept.server) as client:
        await ask(client, "/cache small")
        numbered(agents, "answer {} is large ä")
        said = [await ask(client, f"/cache {text}") for text in ("large", "large", "small")]

    assert said == ["answer 2 is large ä", "answer 3 is large ä", "answer 1"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: shutil.rmtree(file.parent)])
async def test_a_file_that_is_gone_is_made_anew(
    agents: House, damage: Callable[[Path], Any]
) -> None:
    async with agents.open() as client:
        said = [await ask(client)]
        damage(agents.plugins.parent / "data/cache/store.db")
        said += [await ask(client) for _ in range(2)]

    assert said == ["answer 1", "answer 2", "answer 2"]


@pytest.mark.parametrize("setting", ["max_age", "max_entries", "max_bytes"])
async def test_a_limit_must_be_above_zero(agents: House, setting: str) -> None:
    settings = {"settings": {setting: 0}}

    async with agents.open(agents={"cache": settings}) as client:
        assert f"settings: {setting}: 0 must be above 0" in (await client.get("/plugins")).text


async def test_two_proxies_share_what_they_keep(agents: House, kept: Kept) -> None:
    """They begin at once, fill the same entries at once, and share nothing else."""
    proxy = partial(agents.open, server=kept.server)

    async with proxy() as one, proxy() as two:
        both = [(client, f"/cache {n}") for n in range(10) for client in (one, two)]
        bodies = [(client, chat(CHAT, text)) for client, text in both]
        first = await asyncio.gather(*(c.post(CHAT, json=body) for c, body in bodies))
        asked = len(agents.ollama.asked)
        said = [await asyncio.gather(ask(one, text), ask(two, text)) for _, text in both]

    assert {outcomes(answer) for answer in first} <= {"cache;ok", "cache;reply"}
    assert len(agents.ollama.asked) == asked and all(first == second for first, second in said)
    assert kept.execute("SELECT count(*) FROM {}answers") == [(10,)]


@pytest.mark.skipif(os.name == "nt", reason="permissions are others here")
async def test_its_files_are_the_owners_alone(agents: House) -> None:
    async with agents.open() as client:
        await ask(client)

    files = [*(agents.plugins.parent / "data/cache").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


async def test_half_a_character_is_kept_as_it_came(agents: House, kept: Kept) -> None:
    half = b'{"message":{"role":"assistant","content":"<\\ud83d>"},"done":false}\n'
    agents.ollama.answers(half, done())

    async with agents.open(server=kept.server) as client:
        said = [await ask(client), await ask(client)]

    assert said == ["<\ud83d>", "<\ud83d>"] and len(agents.ollama.asked) == 1
