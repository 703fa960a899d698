"""The RAG agent, loaded as the proxy loads it, over real files and a real SQLite file.

Nothing asks a model here: what a request becomes, and what is put under the answer, is all there
is to see. `write` gives each file a time of its own, so that no test waits for a clock.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import os
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from kernel.agent import BaseAgent, Clock, Context, Payload
from kernel.client import OllamaClient
from kernel.config import PluginsConfig, parse_upstream
from kernel.registry import Plugin, PluginRegistry

PLUGINS = Path(__file__).parents[2] / "plugins"
TIMES = itertools.count(1_700_000_000)
MINUTES = """\
# Minutes

## Meeting of 14 April

We decided to repair the greenhouse.

## Meeting of 12 May

We decided to buy a rain barrel.
"""


def write(file: Path, text: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    now = next(TIMES)
    os.utime(file, (now, now))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    write(tmp_path / "notes/minutes.md", MINUTES)
    write(tmp_path / "notes/house/keys.txt", "The baker has a spare key.")
    return tmp_path / "notes"


@asynccontextmanager
async def loaded(tmp_path: Path, **settings: Any) -> AsyncIterator[Plugin]:
    """Load the agent as `osp.py` does; its data is in `tmp_path / "data/rag"`."""
    settings = {"folder": str(tmp_path / "notes")} | settings
    config = PluginsConfig(dirs=(PLUGINS,), only=("rag",))
    agents = {"rag": {"settings": settings}}
    async with PluginRegistry(config, agents, tmp_path / "data", {}) as registry:
        yield registry.plugins["rag"]


def an_instance(plugin: Plugin, payload: Payload, k: int = 4) -> BaseAgent:
    """Return the agent as one request has it."""
    assert plugin.error is None
    context = Context(
        request_id="1",
        dialect="ollama",
        stream=True,
        asked=True,
        user="",
        state={},
        log=logging.LoggerAdapter(logging.getLogger("test")),
        payload=copy.deepcopy(payload),
        client=OllamaClient(parse_upstream("127.0.0.1:9"), 1.0),
    )
    return plugin.instance(context, {"k": k})


async def turn(plugin: Plugin, payload: Payload, k: int = 4) -> tuple[Payload, str]:
    """Return what becomes of a chat, and what is put under its answer."""
    agent = an_instance(plugin, payload, k)
    changed = await plugin.runner.run(agent.on_request, copy.deepcopy(payload), clock=Clock(5))
    return changed, await plugin.runner.run(agent.on_end, clock=Clock(5))


def a_chat(*contents: Any) -> Payload:
    """Return a chat in which the user and the model take turns."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": it} for role, it in zip(roles, contents, strict=False)]
    return {"model": "demo", "messages": messages}


async def ask(plugin: Plugin, question: str, *, k: int = 4) -> tuple[str, str]:
    """Return what the model reads, and what stands under its answer."""
    payload, below = await turn(plugin, a_chat(question), k)
    return payload["messages"][-1]["content"], below


async def test_what_fits_the_question_stands_before_it(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        text, _ = await ask(rag, "What about a rain barrel?")

    assert "[1] minutes.md, Minutes > Meeting of 12 May\nWe decided to buy a rain barrel." in text
    assert text.endswith("\n\nWhat about a rain barrel?")


async def test_sources_stand_under_the_answer_the_best_first(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "What did we decide in May?")

    assert below == (
        "\n\nSources:"
        "\n- minutes.md, Minutes > Meeting of 12 May"
        "\n- minutes.md, Minutes > Meeting of 14 April"
    )


async def test_a_source_of_two_passages_is_named_once(notes: Path, tmp_path: Path) -> None:
    write(notes / "long.md", "\n\n".join(f"{n} otters. " + "They swim. " * 60 for n in range(3)))
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "otters")

    assert text.count("long.md\n") == 3
    assert below == "\n\nSources:\n- long.md"


@pytest.mark.parametrize("question", ["house", "April", "GREENHOUSES", "repairing"])
async def test_names_headings_and_other_forms_of_a_word_are_found(
    notes: Path, tmp_path: Path, question: str
) -> None:
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, question)

    assert ("keys.txt" if question == "house" else "April") in below


async def test_accents_do_not_matter(notes: Path, tmp_path: Path) -> None:
    write(notes / "cafe.txt", "Das Café öffnet um neun.")
    async with loaded(tmp_path) as rag:
        for question in ("cafe", "CAFÉ", "cafe\u0301", "Wann ist es offnet?", "o\u0308ffnet"):
            assert "cafe.txt" in (await ask(rag, question))[1]


async def test_a_heading_in_a_code_block_or_a_text_file_is_text(
    notes: Path, tmp_path: Path
) -> None:
    write(notes / "build.md", "# Build\n\n```sh\n# quokka\nmake\n```\n")
    write(notes / "plain.txt", "# quokka\n")
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "quokka")

    assert sorted(below.split("\n- ")[1:]) == ["build.md, Build", "plain.txt"]


async def test_a_heading_with_nothing_below_is_a_text_itself(notes: Path, tmp_path: Path) -> None:
    write(notes / "short.md", "# Decided\n## We keep the quokka ##\n## We sell the yak\n")
    async with loaded(tmp_path) as rag:
        quokka, yak = await ask(rag, "quokka"), await ask(rag, "yak")

    assert quokka[1] == "\n\nSources:\n- short.md, Decided > We keep the quokka"
    assert yak[1] == "\n\nSources:\n- short.md, Decided > We sell the yak"


async def test_a_long_text_is_cut_between_sentences(notes: Path, tmp_path: Path) -> None:
    write(notes / "long.txt", " ".join(f"Otter {n} swims in the river." for n in range(200)))
    async with loaded(tmp_path, max_chars=100_000) as rag:
        text, _ = await ask(rag, "otter", k=20)

    passages = text.split("\n\n")[1:-1]
    assert len(passages) > 5
    assert all(passage.endswith("river.") and len(passage) < 1000 for passage in passages)


async def test_a_text_without_spaces_is_cut_anywhere(notes: Path, tmp_path: Path) -> None:
    write(notes / "blob.txt", "otter " + "x" * 5000)
    async with loaded(tmp_path, max_chars=100_000) as rag:
        text, _ = await ask(rag, "blob", k=20)

    passages = text.split("\n\n")[1:-1]
    assert max(map(len, passages)) < 1000
    assert sum(passage.count("x") for passage in passages) == 5000 + text.count(".txt\n")


async def test_a_long_heading_is_shortened(notes: Path, tmp_path: Path) -> None:
    write(notes / "long.md", f"# Quokkas {'x' * 1000}\n\nThey hop.")
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "quokkas")

    assert 100 < len(below) < 200


async def test_a_new_file_is_found_without_a_restart(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        before = await ask(rag, "quokka")
        write(notes / "later/zoo.markdown", "A quokka moved in.")
        after = await ask(rag, "quokka")

    assert before[1] == "\n\n(Nothing found in the folder.)"
    assert after[1] == "\n\nSources:\n- later/zoo.markdown"


async def test_a_changed_file_is_read_again(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        write(notes / "house/keys.txt", "The cooper has a spare key")  # of the same size
        text, _ = await ask(rag, "spare key")

    assert "cooper" in text
    assert "baker" not in text


async def test_a_removed_file_is_forgotten(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        shutil.rmtree(notes / "house")
        _, below = await ask(rag, "spare key")

    assert below == "\n\n(Nothing found in the folder.)"


async def test_what_did_not_change_is_not_read_again(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path):
        (notes / "minutes.md").touch()
    with closing(sqlite3.connect(tmp_path / "data/rag/index.db")) as db:
        before = dict(db.execute("SELECT path, id FROM files").fetchall())
        write(notes / "later.txt", "new")
        async with loaded(tmp_path):
            after = dict(db.execute("SELECT path, id FROM files").fetchall())

    keys = os.fsencode(notes / "house/keys.txt")
    assert len(after) == 3
    assert before[keys] == after[keys]


async def test_another_folder_takes_the_place_of_the_first(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "other/zoo.md", "A quokka moved in.")
    async with loaded(tmp_path):
        pass
    async with loaded(tmp_path, folder=str(tmp_path / "other")) as rag:
        assert "zoo.md" in (await ask(rag, "quokka"))[1]
        assert "Nothing" in (await ask(rag, "rain barrel"))[1]


async def test_a_missing_folder_is_named_when_the_agent_is_loaded(tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        assert rag.status == "failed"
        assert f"settings: folder: there is no folder {tmp_path / 'notes'}" in str(rag.error)


async def test_max_chars_must_be_above_zero(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path, max_chars=0) as rag:
        assert "max_chars" in str(rag.error)


async def test_the_folder_of_the_settings_starts_at_home_or_beside_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine/zoo.md", "A quokka moved in.")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))

    async with loaded(tmp_path, folder="~/mine") as rag:
        assert "zoo.md" in (await ask(rag, "quokka"))[1]
    async with loaded(tmp_path, folder="sample") as rag:
        _, below = await ask(rag, "What did we decide in May?")
        assert below.startswith("\n\nSources:\n- decisions.md, Decisions > Meeting of 12 May")


@pytest.mark.parametrize(
    "question",
    [
        '"',
        '" OR text : "',
        "NEAR(baker key, 5)",
        "baker AND NOT (key OR",
        "baker* ^key {file}: -text + 'x'",
        "; DROP TABLE files; --",
        "🦦 \0 \ud83d _ __ \u0301",
        "?!",
        " ".join(map(str, range(50_000))),
    ],
)
async def test_no_question_is_a_syntax_error(notes: Path, tmp_path: Path, question: str) -> None:
    async with loaded(tmp_path) as rag:
        text, _ = await ask(rag, question)
        _, below = await ask(rag, "baker")

    assert text.endswith(question)
    assert below == "\n\nSources:\n- house/keys.txt"


async def test_words_that_say_little_count_where_there_are_no_others(
    notes: Path, tmp_path: Path
) -> None:
    async with loaded(tmp_path) as rag:
        _, with_others = await ask(rag, "the has a barrel")
        _, alone = await ask(rag, "the has")

    assert "keys.txt" not in with_others
    assert "keys.txt" in alone


async def test_where_nothing_is_found_both_sides_are_told(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "quokka?")

    assert "hold nothing about it" in text
    assert text.endswith("\n\nquokka?")
    assert below == "\n\n(Nothing found in the folder.)"


@pytest.mark.parametrize("question", ["", " \n"])
async def test_an_empty_prompt_is_left_alone(notes: Path, tmp_path: Path, question: str) -> None:
    async with loaded(tmp_path) as rag:
        assert await ask(rag, question) == (question, "")


async def test_a_continuation_is_left_alone(notes: Path, tmp_path: Path) -> None:
    payload = a_chat("barrel")
    payload["messages"].append({"role": "tool", "content": "42"})
    async with loaded(tmp_path) as rag:
        assert await turn(rag, payload) == (payload, "")


async def test_only_the_last_question_counts(notes: Path, tmp_path: Path) -> None:
    payload = a_chat("rain barrel", "Which one?", "spare key")
    async with loaded(tmp_path) as rag:
        changed, below = await turn(rag, payload)

    assert changed["messages"][:2] == payload["messages"][:2]
    assert below == "\n\nSources:\n- house/keys.txt"


async def test_of_the_parts_of_an_openai_message_only_the_text_is_changed(
    notes: Path, tmp_path: Path
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    payload = a_chat([image, {"type": "text", "text": "rain barrel"}])
    async with loaded(tmp_path) as rag:
        changed, below = await turn(rag, payload)

    first, text = changed["messages"][0]["content"]
    assert first == image
    assert text["text"].endswith("We decided to buy a rain barrel.\n\nrain barrel")
    assert below == "\n\nSources:\n- minutes.md, Minutes > Meeting of 12 May"


@pytest.mark.parametrize(("k", "passages"), [(-5, 1), (0, 1), (3, 3), (20, 20), (10**9, 20)])
async def test_k_is_clamped(notes: Path, tmp_path: Path, k: int, passages: int) -> None:
    for number in range(30):
        write(notes / f"{number}.txt", "otter")
    async with loaded(tmp_path) as rag:
        text, _ = await ask(rag, "otter", k=k)

    assert text.count(".txt\notter") == passages


async def test_passages_that_do_not_fit_are_left_out_and_are_no_sources(
    notes: Path, tmp_path: Path
) -> None:
    for number in range(3):
        write(notes / f"{number}.txt", "otter " + "x" * 80)
    async with loaded(tmp_path, max_chars=250) as rag:
        text, below = await ask(rag, "otter")

    assert text.count("otter x") == 2
    assert below == "\n\nSources:\n- 0.txt\n- 1.txt"


async def test_a_single_passage_that_does_not_fit_is_cut(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path, max_chars=20) as rag:
        text, _ = await ask(rag, "baker")

    assert text.split("\n\n")[1] == "[1] house/keys.txt\nT"


async def test_a_damaged_index_is_made_anew(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        for rubbish in (b"no database at all" * 100, b""):
            (tmp_path / "data/rag/index.db").write_bytes(rubbish)
            assert "12 May" in (await ask(rag, "rain barrel"))[1]
    (tmp_path / "data/rag/index.db").write_bytes(b"no database at all" * 100)
    async with loaded(tmp_path) as rag:
        assert "12 May" in (await ask(rag, "rain barrel"))[1]


async def test_an_index_that_is_damaged_inside_is_made_anew(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        file = tmp_path / "data/rag/index.db"
        whole = file.read_bytes()
        file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))

        assert "12 May" in (await ask(rag, "rain barrel"))[1]


async def test_an_index_with_a_damaged_text_is_made_anew(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        with closing(sqlite3.connect(tmp_path / "data/rag/index.db")) as db, db:
            db.execute("UPDATE chunks_content SET c2 = CAST(x'ff' AS TEXT)")

        assert "a rain barrel." in (await ask(rag, "rain barrel"))[0]


async def test_an_index_of_another_version_is_made_anew(notes: Path, tmp_path: Path) -> None:
    file = tmp_path / "data/rag/index.db"
    file.parent.mkdir(parents=True)
    with closing(sqlite3.connect(file)) as db:
        db.executescript("CREATE TABLE files (path TEXT); PRAGMA user_version = 99")

    async with loaded(tmp_path) as rag:
        assert "12 May" in (await ask(rag, "rain barrel"))[1]


async def test_other_errors_of_the_database_are_not_taken_for_damage(
    notes: Path, tmp_path: Path
) -> None:
    (tmp_path / "data/rag/index.db").mkdir(parents=True)

    async with loaded(tmp_path) as rag:
        assert "unable to open" in str(rag.error)


async def test_what_dies_halfway_leaves_the_index_as_it_was(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        with closing(sqlite3.connect(tmp_path / "data/rag/index.db")) as db:
            db.execute("DELETE FROM files")  # and no commit

        assert "12 May" in (await ask(rag, "rain barrel"))[1]


async def test_requests_at_once_find_the_same(notes: Path, tmp_path: Path) -> None:
    """Two registries stand for two processes: they share nothing but the files."""
    async with loaded(tmp_path) as one, loaded(tmp_path) as two:
        for number in range(50):
            write(notes / f"{number}.txt", f"otter {number}")
        (tmp_path / "data/rag/index.db").unlink()
        questions = [ask(rag, "otter 42", k=1) for rag in (one, two) * 4]
        answers = await asyncio.gather(*questions)

    assert {below for _, below in answers} == {"\n\nSources:\n- 42.txt"}


async def test_one_request_does_not_see_what_another_found(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        first = an_instance(rag, a_chat("baker"))
        await rag.runner.run(first.on_request, a_chat("baker"), clock=Clock(5))
        await ask(rag, "rain barrel")

        assert await first.on_end() == "\n\nSources:\n- house/keys.txt"


async def test_only_visible_texts_of_the_folder_are_read(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret/plan.md", "otter")
    for name in (".hidden.md", ".git/notes.md", "otter.py", "otter.md.bak"):
        write(notes / name, "otter")
    (notes / "link.md").symlink_to(tmp_path / "secret/plan.md")
    (notes / "linked").symlink_to(tmp_path / "secret")
    (notes / "loop.md").symlink_to(notes / "loop.md")
    (notes / "folder.md").mkdir()
    os.mkfifo(notes / "pipe.md")  # to open it would wait for a writer
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "otter")

    assert below == "\n\n(Nothing found in the folder.)"


async def test_a_link_inside_of_the_folder_is_followed(notes: Path, tmp_path: Path) -> None:
    (notes / "link.md").symlink_to(notes / "house/keys.txt")
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "link")

    assert below == "\n\nSources:\n- link.md"


async def test_bytes_that_are_not_utf_8_are_replaced(notes: Path, tmp_path: Path) -> None:
    write(notes / "old.txt", b"The otter says \xe4\xf6\xfc.\0")
    write(notes / "bom.md", b"\xef\xbb\xbf# Otters\n\nThey swim.")
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "otter")

    assert "The otter says \ufffd" in text
    assert "- bom.md, Otters" in below


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
async def test_a_name_that_is_not_utf_8_is_shown_with_replacements(
    notes: Path, tmp_path: Path
) -> None:
    write(Path(os.fsdecode(os.fsencode(notes) + b"/k\xe4se.txt")), "otter")
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "otter")

    assert below == "\n\nSources:\n- k\ufffdse.txt"


async def test_a_file_that_is_too_large_is_named_in_the_log_once(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "dump.txt", "otter " * 400_000)
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "otter")

    assert below == "\n\n(Nothing found in the folder.)"
    assert [record.message for record in caplog.records] == ["file is too large"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are others here")
async def test_a_file_that_cannot_be_read_is_named_in_the_log(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "locked.txt", "otter")
    (notes / "locked.txt").chmod(0)
    if os.access(notes / "locked.txt", os.R_OK):
        pytest.skip("root reads everything")
    async with loaded(tmp_path) as rag:
        assert "12 May" in (await ask(rag, "rain barrel"))[1]
        assert "file cannot be read" in caplog.messages

        (notes / "locked.txt").chmod(0o600)
        assert "locked.txt" in (await ask(rag, "otter"))[1]


async def test_nothing_but_its_data_is_written(notes: Path, tmp_path: Path) -> None:
    before = files_of(PLUGINS / "rag_agent"), files_of(tmp_path)
    async with loaded(tmp_path) as rag:
        await ask(rag, "rain barrel")

    assert files_of(PLUGINS / "rag_agent") == before[0]
    assert files_of(tmp_path) == before[1] | {tmp_path / "data/rag/index.db"}


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}
