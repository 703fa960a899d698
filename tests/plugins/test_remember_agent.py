"""The agent remember: notes are kept, listed, forgotten, and given to the model where they fit.

The scripted model says "ok"; what it was asked is what there is to see.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import FakeOllama, done, event, line, running, said, turn, write_agent

PLUGINS = Path(__file__).parents[2] / "plugins"
PATHS = ["/api/chat", "/v1/chat/completions"]
ALWAYS = {"remember": {"always": True}}
FILE = "data/remember/notes.db"
FILES = """
class Files(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, "From a file: 42.")
"""
NOTES = "These are notes of mine, the newest last. Use those that help with what follows.\n"
NOTHING = "None of my notes fits what follows, and nothing new was noted.\n\n"


@pytest.fixture
def agents(plugins: Path) -> Path:
    for name in ("remember", "translate"):
        (plugins / f"{name}_agent").symlink_to(PLUGINS / f"{name}_agent")
    return plugins


@pytest.fixture
async def client(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a proxy whose agents are as they come."""
    ollama.answers(line("ok"), done())
    async with running(ollama_url, agents) as client:
        yield client


async def ask(client: httpx.AsyncClient, text: Any, **fields: Any) -> str:
    """Return the text of an answer; `path` and `headers` may be among the fields."""
    path, headers = fields.pop("path", "/api/chat"), fields.pop("headers", {})
    body = json.dumps(turn(text, **fields))  # unlike httpx it can say half a character
    response = await client.post(path, content=body, headers=headers)
    assert response.status_code == 200, response.content
    return said(response.content)


def asked(ollama: FakeOllama) -> str:
    """Return the last message of what the model was last asked."""
    return str(ollama.asked[-1].json["messages"][-1]["content"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_note_is_kept_without_the_model_and_given_where_it_fits(
    demo_url: str, agents: Path, path: str, stream: bool
) -> None:
    """The demo model repeats what it was sent."""
    how = {"path": path, "stream": stream}
    async with running(demo_url, agents) as client:
        noted = await ask(client, "/remember that my bike is red", **how)
        text = await ask(client, "/remember what colour is my bike?", **how)

    assert noted == "Noted as 1: my bike is red"
    assert text.endswith(f"[user] {NOTES}- my bike is red\n\nwhat colour is my bike?")


@pytest.mark.parametrize(
    ("typed", "noted"),
    [
        ("that my bike is red", "my bike is red"),
        ("THAT my bike\n\tis  red ", "my bike is red"),
        ("that that is that", "that is that"),
        ("that ein Fahrrad – 赤い – rot ist \U0001f6b2", "ein Fahrrad – 赤い – rot ist \U0001f6b2"),
    ],
)
async def test_what_begins_with_that_is_a_note(
    client: httpx.AsyncClient, ollama: FakeOllama, typed: str, noted: str
) -> None:
    assert await ask(client, f"/remember {typed}") == f"Noted as 1: {noted}"
    assert await ask(client, "/remember:list") == f"- 1: {noted}"
    assert ollama.asked == []


@pytest.mark.parametrize("typed", ["my bike is red", "that's it", "thatch my roof", "where?"])
async def test_anything_else_goes_to_the_model_and_is_not_noted(
    client: httpx.AsyncClient, ollama: FakeOllama, typed: str
) -> None:
    assert await ask(client, f"/remember {typed}") == "ok"
    assert asked(ollama) == NOTHING + typed
    assert await ask(client, "/remember:list") == "There are no notes."


@pytest.mark.parametrize("typed", ["/remember that", "/remember that \n", "/remember:nonsense x"])
async def test_what_makes_no_sense_gets_the_usage(
    client: httpx.AsyncClient, ollama: FakeOllama, typed: str
) -> None:
    answer = await ask(client, typed)

    assert "/remember:list: lists your notes" in answer and "/remember:forget=3" in answer
    assert ollama.asked == []


async def test_alone_it_gets_the_help_of_the_proxy(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    assert (await ask(client, "/remember")).startswith("/remember: Keeps short notes")
    assert ollama.asked == []


async def test_notes_are_listed_with_their_numbers(client: httpx.AsyncClient) -> None:
    for text in ("my bike is red", "the key is under the stone"):
        await ask(client, f"/remember that {text}")

    for typed in ("/remember:list", "/remember:LIST", "/remember:do=list and more"):
        assert await ask(client, typed) == "- 1: my bike is red\n- 2: the key is under the stone"


async def test_a_note_is_forgotten_by_its_number(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    for text in ("one bike", "two bikes", "three bikes"):
        await ask(client, f"/remember that {text}")

    assert await ask(client, "/remember:forget=2") == "Forgotten: two bikes"
    assert await ask(client, "/remember:forget=2") == "There is no note 2."
    assert await ask(client, "/remember:list") == "- 1: one bike\n- 3: three bikes"
    await ask(client, "/remember which bikes?")
    assert "two" not in asked(ollama)
    assert await ask(client, "/remember that four bikes") == "Noted as 4: four bikes"


@pytest.mark.parametrize("number", ["7", "-1", "9" * 40])
async def test_there_is_no_such_note(client: httpx.AsyncClient, number: str) -> None:
    await ask(client, "/remember that my bike is red")

    assert await ask(client, f"/remember:forget={number}") == f"There is no note {number}."
    assert await ask(client, "/remember:list") == "- 1: my bike is red"


async def test_what_is_forgotten_is_not_in_the_file_any_more(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    for text in ("the quokka hops", "the walrus sings", "the otter swims"):
        await ask(client, f"/remember that {text}")
    assert b"walrus" in (tmp_path / FILE).read_bytes()

    await ask(client, "/remember:forget=2")

    files = b"".join(file.read_bytes() for file in (tmp_path / FILE).parent.iterdir())
    assert b"walru" not in files and b"sing" not in files and b"quokka" in files


async def test_what_is_noted_twice_is_one_note(client: httpx.AsyncClient) -> None:
    for text in ("my bike is red", "the sky is blue", "my  bike is red"):
        noted = await ask(client, f"/remember that {text}")

    assert noted == "Noted as 1: my bike is red"
    assert (await ask(client, "/remember:list")).count("bike") == 1


@pytest.mark.parametrize(
    "question",
    ["Where are the BIKES?", "cafe", "CAFE\u0301", "biking at the café", "Ra\u0308der", "rader"],
)
async def test_other_forms_of_a_word_find_it(
    client: httpx.AsyncClient, ollama: FakeOllama, question: str
) -> None:
    await ask(client, "/remember that the bike and both Räder stand behind the Café")

    await ask(client, f"/remember {question}")

    assert "- the bike and both" in asked(ollama)


async def test_of_a_pasted_text_only_the_first_words_are_looked_for(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    await ask(client, "/remember that my bike is red")
    pasted = " ".join(map(str, range(1000)))

    await ask(client, f"/remember bike {pasted}")
    assert asked(ollama).startswith(NOTES)
    await ask(client, f"/remember {pasted} bike")
    assert asked(ollama).startswith(NOTHING)


async def test_words_that_say_little_find_nothing(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    await ask(client, "/remember that the bike is in my garage")

    await ask(client, "/remember what is the colour of my house in the city?")

    assert asked(ollama).startswith(NOTHING)


@pytest.mark.parametrize(
    "question",
    [
        '"',
        '" OR text : "',
        "NEAR(key, 5) AND NOT (key OR",
        "baker* ^key {user}: -text + 'x'",
        "; DROP TABLE notes; --",
        "\U0001f9a6 \0 \ud83d _ __ \u0301",
        "?!",
        " ".join(map(str, range(50_000))),
    ],
)
async def test_no_question_is_a_syntax_error(
    client: httpx.AsyncClient, ollama: FakeOllama, question: str
) -> None:
    await ask(client, "/remember that my bike is red")

    assert await ask(client, f"/remember {question}") == "ok"
    assert asked(ollama).endswith(question)


@pytest.mark.parametrize("text", ["\ud83d half", 'a "quote" \0 and NUL', "'; DROP TABLE notes"])
async def test_any_text_can_be_noted(client: httpx.AsyncClient, text: str) -> None:
    await ask(client, f"/remember that {text}")

    noted = text.replace("\ud83d", "?")
    assert await ask(client, "/remember:list") == f"- 1: {noted}"
    assert await ask(client, "/remember:forget=1") == f"Forgotten: {noted}"


async def test_the_best_notes_are_given_the_newest_last(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    settings = {"settings": {"max_matches": 2}}

    async with running(ollama_url, agents, agents={"remember": settings}) as client:
        for text in ("the red bike is fast", "a bike", "no match", "a red bike", "red wine"):
            await ask(client, f"/remember that {text}")
        await ask(client, "/remember which red bike?")

    assert asked(ollama) == f"{NOTES}- the red bike is fast\n- a red bike\n\nwhich red bike?"


async def test_no_more_characters_are_given_than_the_settings_say(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    settings = {"settings": {"max_context": 100, "max_chars": 100}}

    async with running(ollama_url, agents, agents={"remember": settings}) as client:
        for letter in "xyz":
            await ask(client, f"/remember that bike {letter * 45}")
        await ask(client, "/remember my bike")

    assert asked(ollama) == f"{NOTES}- bike {'y' * 45}\n- bike {'z' * 45}\n\nmy bike"


async def test_a_note_that_is_too_long_is_refused(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    settings = {"settings": {"max_chars": 10}}

    async with running(ollama_url, agents, agents={"remember": settings}) as client:
        refused = await ask(client, f"/remember that {'x' * 11}")
        await ask(client, f"/remember that {'x' * 10}")
        listed = await ask(client, "/remember:list")

    assert refused == "Not noted: a note has at most 10 characters, this one has 11."
    assert listed == f"- 1: {'x' * 10}"


async def test_where_there_are_too_many_notes_the_next_is_refused(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    settings = {"settings": {"max_notes": 2}}

    async with running(ollama_url, agents, agents={"remember": settings}) as client:
        said = [await ask(client, f"/remember that {text}") for text in "abca"]
        await ask(client, "/remember:forget=1")
        said.append(await ask(client, "/remember that c"))

    assert said[2].startswith("Not noted: there is no room for more notes.")
    assert said[3:] == ["Noted as 1: a", "Noted as 3: c"]


async def test_each_key_has_notes_of_its_own(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    one, two = ({"headers": {"x-api-key": key}} for key in ("one", "two"))
    settings = {"remember": {"settings": {"max_notes": 1}}}

    async with running(
        ollama_url, agents, agents=settings, access={"keys": ["one", "two"]}
    ) as client:
        assert await ask(client, "/remember that my bike is red", **one) == (
            "Noted as 1: my bike is red"
        )
        assert await ask(client, "/remember:list", **two) == "There are no notes."
        assert await ask(client, "/remember:forget=1", **two) == "There is no note 1."
        await ask(client, "/remember my bike?", **two)
        assert asked(ollama) == f"{NOTHING}my bike?"
        assert await ask(client, "/remember that my bike is blue", **two) == (
            "Noted as 1: my bike is blue"
        )
        assert await ask(client, "/remember:forget=1", **two) == "Forgotten: my bike is blue"
        await ask(client, "/remember my bike?", **one)
        assert asked(ollama) == f"{NOTES}- my bike is red\n\nmy bike?"


async def test_always_on_it_adds_notes_and_keeps_only_what_it_is_told_to(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, agents=ALWAYS) as client:
        await ask(client, "/remember that my bike is red")
        await ask(client, "what colour is my bike?")
        assert asked(ollama) == f"{NOTES}- my bike is red\n\nwhat colour is my bike?"

        for text in ("that my house is green", "hello"):
            await ask(client, text)
            assert asked(ollama) == text
        assert await ask(client, "/remember:list") == "- 1: my bike is red"


async def test_without_being_asked_for_it_does_nothing(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    await ask(client, "/remember that my bike is red")

    await ask(client, "what colour is my bike?")

    assert asked(ollama) == "what colour is my bike?"


async def test_while_a_tool_is_at_work_nothing_is_added_or_noted(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    texts = ["/remember what about my bike?", "/remember that my house is green"]
    result = {"role": "tool", "content": "42"}

    async with running(ollama_url, agents, agents=ALWAYS) as client:
        await ask(client, "/remember that my bike is red")
        for text in texts:
            await ask(client, "", messages=[{"role": "user", "content": text}, result])
            sent = ollama.asked[-1].json["messages"][0]["content"]
            assert sent == text.removeprefix("/remember ")
        assert await ask(client, "/remember:list") == "- 1: my bike is red"


async def test_an_image_without_text_is_left_alone(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    message = {"role": "user", "content": "/remember", "images": ["AA=="]}

    await ask(client, "", messages=[message])

    assert ollama.asked[0].json["messages"] == [message | {"content": ""}]


async def test_of_the_parts_of_an_openai_message_only_the_text_is_changed(
    client: httpx.AsyncClient, ollama: FakeOllama
) -> None:
    ollama.answers(event("ok"), kind="text/event-stream")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    await ask(client, "/remember that my bike is red")

    parts = [image, {"type": "text", "text": "/remember is this my bike?"}]
    await ask(client, parts, path=PATHS[1])

    first, text = ollama.asked[-1].json["messages"][0]["content"]
    assert first == image
    assert text["text"] == f"{NOTES}- my bike is red\n\nis this my bike?"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_before_a_translation_the_notes_reach_the_model(
    demo_url: str, agents: Path, path: str, stream: bool
) -> None:
    how = {"path": path, "stream": stream}
    async with running(demo_url, agents) as client:
        await ask(client, "/remember that my bike is red", **how)
        text = await ask(client, "/remember /translate:de what colour is my bike?", **how)

    assert "Translate what the user sends into German." in text
    assert text.endswith(f"[user] {NOTES}- my bike is red\n\nwhat colour is my bike?")


@pytest.mark.parametrize(
    ("typed", "context"),
    [
        ("/files /remember", f"{NOTES}- my bike is red\n\nFrom a file: 42.\n\n"),
        ("/remember /files", f"From a file: 42.\n\n{NOTES}- my bike is red\n\n"),
        ("/remember&/files", f"{NOTES}- my bike is red\n\nFrom a file: 42.\n\n"),
    ],
)
async def test_beside_another_agent_both_put_their_part_before_the_question(
    ollama: FakeOllama, ollama_url: str, agents: Path, typed: str, context: str
) -> None:
    write_agent(agents, "files", FILES)
    ollama.answers(done("ok"))

    async with running(ollama_url, agents) as client:
        await ask(client, "/remember that my bike is red")
        assert await ask(client, f"{typed} which bike?") == "ok"

    assert asked(ollama) == f"{context}which bike?"


async def test_after_a_restart_the_notes_are_still_there(ollama_url: str, agents: Path) -> None:
    async with running(ollama_url, agents) as client:
        await ask(client, "/remember that my bike is red")

    async with running(ollama_url, agents) as client:
        assert await ask(client, "/remember:list") == "- 1: my bike is red"


async def test_a_damaged_file_is_an_error_and_stays_as_it_is(
    ollama_url: str, agents: Path, tmp_path: Path
) -> None:
    file = tmp_path / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no database at all" * 100)

    async with running(ollama_url, agents) as client:
        listed = (await client.get("/plugins")).json()["plugins"]

    assert [p["status"] for p in listed if p["name"] == "remember"] == ["failed"]
    assert file.read_bytes() == b"no database at all" * 100


@pytest.mark.parametrize(
    "settings",
    [
        {"max_notes": 0},
        {"max_chars": 0},
        {"max_matches": 0},
        {"max_context": 0},
        {"max_context": 499, "max_chars": 500},
    ],
)
async def test_settings_that_cannot_work_are_an_error_at_the_start(
    ollama_url: str, agents: Path, settings: dict[str, int]
) -> None:
    table = {"remember": {"settings": settings}}

    async with running(ollama_url, agents, agents=table) as client:
        listed = (await client.get("/plugins")).json()["plugins"]

    assert [p["status"] for p in listed if p["name"] == "remember"] == ["failed"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are others here")
async def test_its_files_are_the_owners_alone(client: httpx.AsyncClient, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as reader:
        reader.execute("SELECT * FROM notes").fetchall()  # so the other files stay
        await ask(client, "/remember that my bike is red")
        files = (tmp_path / FILE).parent.iterdir()
        modes = {file.name: file.stat().st_mode & 0o777 for file in files}

    assert modes == dict.fromkeys(["notes.db", "notes.db-wal", "notes.db-shm"], 0o600)


async def test_two_proxies_share_one_file(ollama_url: str, agents: Path, tmp_path: Path) -> None:
    """They share nothing but the file, as two processes do."""
    data = tmp_path / "shared"

    async with (
        running(ollama_url, agents, data=data) as one,
        running(ollama_url, agents, data=data) as two,
    ):
        both = [ask(client, f"/remember that {n}") for n in range(10) for client in (one, two)]
        noted = await asyncio.gather(*both)
        listed = await ask(one, "/remember:list")

    assert sorted(noted[0::2]) == sorted(noted[1::2])
    assert sorted(listed.splitlines()) == sorted({f"- {text[9:]}" for text in noted})
    assert sorted(int(text.split()[2][:-1]) for text in set(noted)) == list(range(1, 11))
