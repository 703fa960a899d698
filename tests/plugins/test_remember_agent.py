"""The agent remember: notes are kept, listed, forgotten, and given to the model where they fit."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kernel.agent import Payload, Reply, Store, StoreError
from kernel.sqlite import SQLite
from plugins.remember_agent import agent as texts
from plugins.remember_agent.agent import INSTRUCTION, NOT_NOTED, NOTHING, Remember
from tests.plugins.context import a_context, no_model
from tests.support import OpenStore

FOLDER = Path(__file__).parents[2] / "plugins/remember_agent"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
RED = "- my bike is red"
QUESTION = "what colour is my bike?"


Load = Callable[..., Awaitable[Remember]]


async def loaded(store: Store, **settings: Any) -> Remember:
    agent = Remember()
    agent.settings = CONFIG["settings"] | settings
    agent._store = lambda: store
    await agent.setup()
    return agent


async def in_file(folder: Path, **settings: Any) -> Remember:
    return await loaded(SQLite("remember", folder, Remember.schema), **settings)


@pytest.fixture
def load(open_store: OpenStore) -> Load:
    """Load the agent, as in a proxy of its own; those of one test share what is kept."""
    return lambda **settings: loaded(open_store("remember", Remember.schema), **settings)


@pytest.fixture
async def remember(load: Load) -> Remember:
    return await load()


def an_instance(remember: Remember, prompt: str, model: Any = no_model, **values: Any) -> Remember:
    """Return the agent as one request has it; `values` are its arguments and of its context."""
    agent = copy.copy(remember)
    agent.pieces = []
    agent.arguments = {"do": values.pop("do", ""), "forget": values.pop("forget", 0)}
    agent.context = a_context(prompt, model, **values)
    return agent


async def ask(remember: Remember, prompt: str, **values: Any) -> str:
    """Return what is answered without the model, or else what the model reads."""
    agent = an_instance(remember, prompt, **values)
    payload = {"messages": [{"role": "user", "content": prompt}]}
    try:
        changed = await agent.on_request(payload)
    except Reply as reply:
        return str(reply.text)
    return str(changed["messages"][0]["content"])


async def note(remember: Remember, *texts: str) -> None:
    for text in texts:
        assert (await ask(remember, f"that {text}")).startswith("Noted as ")


async def listed(remember: Remember, **values: Any) -> str:
    return await ask(remember, "and more", do="list", **values)


@pytest.mark.parametrize(
    ("typed", "noted"),
    [
        ("that my bike is red", "my bike is red"),
        ("THAT my bike\n\tis  red ", "my bike is red"),
        ("that that is that", "that is that"),
        ("that ein Fahrrad – 赤い – rot ist 🚲", "ein Fahrrad – 赤い – rot ist 🚲"),
        ("that \ud83d half", "? half"),
        ("that '; DROP TABLE kept \0", "'; DROP TABLE kept"),
    ],
)
async def test_what_begins_with_that_is_a_note(remember: Remember, typed: str, noted: str) -> None:
    assert await ask(remember, typed) == f"Noted as 1: {noted}"
    assert await listed(remember) == f"- 1: {noted}"
    assert await ask(remember, "", forget=1) == f"Forgotten: {noted}"


@pytest.mark.parametrize("typed", ["my bike is green", "that's my bike", "bikes?"])
async def test_anything_else_goes_to_the_model_which_is_told_that_it_was_not_noted(
    remember: Remember, typed: str
) -> None:
    assert await ask(remember, typed) == f"{NOTHING}\n{NOT_NOTED}\n\n{typed}"
    await note(remember, "my bike is red")

    assert await ask(remember, typed) == f"{INSTRUCTION}\n{RED}\n{NOT_NOTED}\n\n{typed}"
    assert await listed(remember) == "- 1: my bike is red"


@pytest.mark.parametrize(
    ("typed", "under"), [("my bike is red", f"\n\n{texts.UNDER}"), (QUESTION, "")]
)
async def test_under_the_answer_to_what_is_no_question_stands_that_nothing_was_noted(
    remember: Remember, typed: str, under: str
) -> None:
    for values, expected in (({}, under), ({"asked": False}, ""), ({"continuation": True}, "")):
        agent = an_instance(remember, typed, **values)
        await agent.on_request({"messages": []})
        text = await agent.on_chunk("ok")
        agent.context.continuation = True  # other agents' tools ran
        await agent.on_request({"messages": []})

        assert text + await agent.on_end() == f"ok{expected}"


@pytest.mark.parametrize(
    ("typed", "arguments"),
    [("that", {}), ("that \n", {}), ("x", {"do": "nonsense"}), ("x", {"do": "3", "forget": 1})],
)
async def test_what_makes_no_sense_gets_the_usage(
    remember: Remember, typed: str, arguments: dict[str, Any]
) -> None:
    await note(remember, "my bike is red")

    assert await ask(remember, typed, **arguments) == texts.USAGE
    assert await listed(remember, forget=1) == "- 1: my bike is red"  # a list forgets nothing


async def test_a_number_is_never_used_again(remember: Remember, load: Load) -> None:
    await note(remember, "one bike", "two bikes", "three bikes")

    for number, text in ((3, "three bikes"), (2, "two bikes")):
        assert await ask(remember, "", forget=number) == f"Forgotten: {text}"
        assert await ask(remember, "", forget=number) == f"There is no note {number}."
    again = await load()
    assert await ask(again, "that four bikes") == "Noted as 4: four bikes"
    assert await listed(again) == "- 1: one bike\n- 4: four bikes"
    assert "- two" not in await ask(again, "which two bikes?")
    for number in (7, -1, 10**40):
        assert await ask(again, "", forget=number) == f"There is no note {number}."


async def test_what_is_forgotten_is_not_in_the_file_any_more(tmp_path: Path) -> None:
    remember = await in_file(tmp_path / "data")
    await note(remember, "the quokka hops", "the walrus sings", "the otter swims")
    assert b"walrus" in (tmp_path / "data/notes.db").read_bytes()

    await ask(remember, "", forget=2)

    files = b"".join(file.read_bytes() for file in (tmp_path / "data").iterdir())
    assert b"walru" not in files and b"sing" not in files and b"quokka" in files


async def test_explaining_notes_and_forgets_nothing(remember: Remember) -> None:
    await note(remember, "my bike is red")

    assert await ask(remember, "that x", explaining=True) == texts.NO_EFFECT
    assert await ask(remember, "", forget=1, explaining=True) == texts.NO_EFFECT
    assert await listed(remember, explaining=True) == "- 1: my bike is red"


@pytest.mark.parametrize(
    ("text", "questions"),
    [
        (
            "the bike and both Räder stand behind the Café of Ms Müller",
            ["Where are the BIKES?", "CAFE\u0301", "biking at the café", "rader", "Frau Mueller"],
        ),
        ("我的自行车是红色的", ["自行车是什么颜色？", "什么是红色？"]),
        ("私の自転車は赤いです", ["自転車の色は？"]),
        ("내 자전거는 빨간색이다", ["자전거가 무슨 색이야?"]),
        ("จักรยานของฉันสีแดง", ["จักรยานสีอะไร"]),
        ("мой велосипед красный", ["какого цвета велосипеды?"]),
        ("Das Fahrrad steht im Keller", ["Wo sind die Fahrräder?"]),
    ],
)
async def test_other_forms_and_spellings_of_a_word_find_it(
    remember: Remember, text: str, questions: list[str]
) -> None:
    await note(remember, text)

    for question in questions:
        assert f"- {text}\n" in await ask(remember, question)
    for question in ("hi", "谢谢", "what is in the city?"):
        assert (await ask(remember, question)).startswith(NOTHING)


@pytest.mark.parametrize(
    "question",
    [
        *('" OR text : "', "NEAR(key, 5) AND NOT (key OR", "; DROP TABLE kept; --", "?!"),
        *("baker* ^key {user}: -text + 'x'", "\U0001f9a6 \0 \ud83d _ __ \u0301"),
        " ".join(map(str, range(50_000))),
    ],
)
async def test_no_question_is_a_syntax_error(remember: Remember, question: str) -> None:
    await note(remember, "my bike is red")

    assert (await ask(remember, question)).endswith(question)


async def test_the_best_notes_that_have_room_are_given_the_newest_last(load: Load) -> None:
    remember = await load(max_matches=2)
    await note(remember, "the red bike is fast", "a bike", "no match", "a red bike", "red wine")
    given = await ask(remember, "which red bike?", asked=False)
    small = await load(max_context=100, max_chars=100)
    for letter in "xyz":
        await ask(small, f"that bike {letter * 45}", user="other")

    assert given == f"{INSTRUCTION}\n- the red bike is fast\n- a red bike\n\nwhich red bike?"
    bikes = "".join(f"- bike {letter * 45}\n" for letter in "yz")
    told = f"{INSTRUCTION}\n{bikes}{NOT_NOTED}\n\nmy bike"
    assert await ask(small, "my bike", user="other") == told


async def test_what_is_too_long_or_too_much_is_refused_and_twice_is_once(load: Load) -> None:
    remember = await load(max_chars=10, max_notes=2)
    typed = ("x" * 11, "x" * 10, "b", "c", "x" * 10)

    answers = [await ask(remember, f"that {text}") for text in typed]
    await ask(remember, "", forget=1)
    answers.append(await ask(remember, "that c"))

    assert answers[0] == "Not noted: a note has at most 10 characters, this one has 11."
    assert answers[3].startswith("Not noted: there is no room for more notes.")
    assert answers[4:] == [f"Noted as 1: {'x' * 10}", "Noted as 3: c"]


async def test_each_user_has_notes_of_their_own(remember: Remember) -> None:
    for user, text in (("one", "my bike is red"), ("two", "my bike is blue")):
        assert await listed(remember, user=user) == "There are no notes."
        assert await ask(remember, f"that {text}", user=user) == f"Noted as 1: {text}"

    assert RED in await ask(remember, QUESTION, user="one")
    assert RED not in await ask(remember, QUESTION, user="two")
    assert await ask(remember, QUESTION, user="three") == f"{NOTHING}\n{NOT_NOTED}\n\n{QUESTION}"


async def test_always_on_it_adds_notes_and_keeps_only_what_it_is_told_to(
    remember: Remember,
) -> None:
    await note(remember, "my bike is red")

    assert await ask(remember, QUESTION, asked=False) == f"{INSTRUCTION}\n{RED}\n\n{QUESTION}"
    for text in ("that my house is green", "hello", ""):
        assert await ask(remember, text, asked=False) == text
    assert await ask(remember, "that x", continuation=True) == "that x"
    assert await listed(remember) == "- 1: my bike is red"


async def automatic(
    remember: Remember, content: Any, prompt: str = "My bike is red.", **values: Any
) -> tuple[str, list[Payload]]:
    """Return what stands under the answer, and what the model was asked after it."""
    bodies: list[Payload] = []

    async def model(path: str, body: Payload) -> Payload:
        bodies.append(body)
        if isinstance(content, Exception):
            raise content
        return {"message": {"content": content}, "done_reason": "stop"}

    agent = an_instance(remember, prompt, model, **({"finish": "stop", "asked": False} | values))
    await agent.on_request({"messages": [{"role": "user", "content": prompt}]})
    return (await agent.on_chunk("ok") + await agent.on_end()).removeprefix("ok"), bodies


async def test_where_it_may_the_model_is_asked_once_for_facts_and_each_new_one_is_shown(
    load: Load,
) -> None:
    remember = await load(auto=True)
    facts = json.dumps({"facts": ["The user's bike is red.", " ", "The user lives in Łódź."]})

    first, bodies = await automatic(remember, facts)
    again, _ = await automatic(remember, facts, prompt="It is red.")

    assert first == (
        "\n\n(Noted as 1: The user's bike is red.)\n\n(Noted as 2: The user lives in Łódź.)"
    )
    assert again == "" and len(bodies) == 1
    assert bodies[0]["format"]["properties"]["facts"] and bodies[0]["options"]["temperature"] == 0
    assert "My bike is red." in bodies[0]["messages"][-1]["content"]


@pytest.mark.parametrize(
    "values",
    [{"finish": "length"}, {"finish": "tool_calls"}, {"finish": ""}, {"explaining": True}]
    + [{"prompt": ""}, {"auto": False}],
)
async def test_otherwise_the_model_is_not_asked(load: Load, values: dict[str, Any]) -> None:
    remember = await load(auto=values.get("auto", True))
    values = {key: value for key, value in values.items() if key != "auto"}

    assert await automatic(remember, '{"facts": ["x"]}', **values) == ("", [])
    assert await listed(remember) == "There are no notes."


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", '{"facts": 7}', "{}", OSError("down")])
async def test_nonsense_of_the_model_is_no_note(load: Load, content: Any) -> None:
    remember = await load(auto=True)

    assert (await automatic(remember, content))[0] == ""


async def test_a_folder_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    remember = await in_file(tmp_path / "data")
    await note(remember, "my bike is red")
    shutil.rmtree(tmp_path / "data")

    assert await ask(remember, QUESTION) == f"{NOTHING}\n{NOT_NOTED}\n\n{QUESTION}"
    assert await ask(remember, "that my bike is blue") == "Noted as 1: my bike is blue"


async def test_a_damaged_file_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/notes.db"
    file.write_bytes(b"no database at all" * 100)

    with pytest.raises(StoreError, match="notes.db: DatabaseError: file is not a database"):
        await in_file(tmp_path / "data")
    assert file.read_bytes() == b"no database at all" * 100


@pytest.mark.parametrize(
    "settings", [{"max_notes": 0}, {"max_chars": 0}, {"max_matches": 0}, {"max_context": 499}]
)
async def test_settings_that_cannot_work_are_an_error_at_the_start(
    tmp_path: Path, settings: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        await in_file(tmp_path, **settings)


@pytest.mark.skipif(os.name == "nt", reason="permissions are others here")
async def test_its_files_are_the_owners_alone(tmp_path: Path) -> None:
    remember = await in_file(tmp_path / "data")
    await note(remember, "my bike is red")

    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "data").iterdir()}
    assert modes == {"notes.db": 0o600}


async def test_two_proxies_share_the_notes(remember: Remember, load: Load) -> None:
    other = await load()
    jobs = [ask(agent, f"that {n}") for n in range(10) for agent in (remember, other)]

    noted = await asyncio.gather(*jobs)

    assert sorted(noted[0::2]) == sorted(noted[1::2])
    lines = (await listed(remember)).splitlines()
    assert sorted(lines) == sorted({f"- {text[9:]}" for text in noted})
    assert len(lines) == 10


BEFORE = """
CREATE VIRTUAL TABLE kept USING fts5 (words, text UNINDEXED, user UNINDEXED, number UNINDEXED,
  tokenize = 'porter ascii');
INSERT INTO kept VALUES ('my bike is red', 'my bike is red', '', 1), ('', '', '', 2);
"""


async def test_a_file_from_before_there_were_stores_goes_on_to_work(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "notes.db")) as db:
        db.executescript(BEFORE)
    remember = await in_file(tmp_path)

    assert RED in await ask(remember, QUESTION)
    assert await ask(remember, "that it is fast") == "Noted as 3: it is fast"
    with closing(sqlite3.connect(tmp_path / "notes.db")) as db:  # an older proxy finds it, too
        found = db.execute("SELECT number FROM kept WHERE kept MATCH 'fast' ORDER BY bm25(kept)")
        assert found.fetchall() == [(3,)]
