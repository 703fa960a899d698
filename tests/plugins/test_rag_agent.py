"""The RAG agent, loaded as the proxy loads it, over real files and a real SQLite file.

First comes what a request becomes and what is put under the answer, then the files and the index,
then vectors, from an embedding model that knows some words, and last the agent in the proxy.
`write` gives each file a time of its own, and a question waits until the folder is read, unless
`wait` says otherwise: so no test depends on a clock.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import demo
from kernel.agent import BaseAgent, Clock, Context, Payload
from kernel.client import OllamaClient
from kernel.config import PluginsConfig, parse_upstream
from kernel.plugin import Plugin
from kernel.registry import PluginRegistry
from plugins.rag_agent.index import Index, is_damage, put
from plugins.rag_agent.vectors import Vectors, normalised
from plugins.rag_agent.words import fused
from tests.support import FakeOllama, running, said, write_agent
from tests.support import turn as chat

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"
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
    settings = {"folder": str(tmp_path / "notes"), "wait": 20} | settings
    config = PluginsConfig(dirs=(PLUGINS,), only=("rag",))
    agents = {"rag": {"settings": settings}}
    async with PluginRegistry(config, agents, tmp_path / "data", {}) as registry:
        yield registry.plugins["rag"]


NOBODY = OllamaClient(parse_upstream("127.0.0.1:9"), 1.0)


def an_instance(
    plugin: Plugin, payload: Payload, k: int = 4, client: OllamaClient = NOBODY
) -> BaseAgent:
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
        client=client,
    )
    return plugin.instance(context, {"k": k})


async def turn(
    plugin: Plugin, payload: Payload, k: int = 4, client: OllamaClient = NOBODY
) -> tuple[Payload, str]:
    """Return what becomes of a chat, and what is put under its answer."""
    agent = an_instance(plugin, payload, k, client)
    changed = await plugin.runner.run(agent.on_request, copy.deepcopy(payload), clock=Clock(30))
    return changed, await plugin.runner.run(agent.on_end, clock=Clock(5))


def a_chat(*contents: Any) -> Payload:
    """Return a chat in which the user and the model take turns."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": it} for role, it in zip(roles, contents, strict=False)]
    return {"model": "demo", "messages": messages}


async def ask(
    plugin: Plugin, question: str, *, k: int = 4, client: OllamaClient = NOBODY
) -> tuple[str, str]:
    """Return what the model reads, and what stands under its answer."""
    payload, below = await turn(plugin, a_chat(question), k, client)
    return payload["messages"][-1]["content"], below


def rows(tmp_path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(tmp_path / "data/rag/index.db")) as db:
        return db.execute(query).fetchall()


def left_out(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the files that the log says were left out, and why."""
    found = [record for record in caplog.records if record.message == "file is left out"]
    return [tuple(vars(record)["fields"].values()) for record in found]


def progress(plugin: Plugin) -> str:
    assert plugin.agent
    return plugin.agent.progress


BARREL = "\n\nSources:\n- minutes.md, Minutes > Meeting of 12 May"


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


async def test_a_heading_may_be_underlined_and_what_ends_a_front_matter_is_none(
    notes: Path, tmp_path: Path
) -> None:
    front = "---\ntags: river\n---\n\n"
    write(notes / "animals.md", f"{front}Otters\n======\n\nThey swim.\n\nHabits\n---\nThey eat.\n")
    write(notes / "ruled.md", "# Yaks\n---\nThey graze.\n")
    async with loaded(tmp_path) as rag:
        below = [(await ask(rag, word, k=1))[1] for word in ("river", "swim", "eat", "graze")]

    assert [text.removeprefix("\n\nSources:\n- ") for text in below] == [
        "animals.md",
        "animals.md, Otters",
        "animals.md, Otters > Habits",
        "ruled.md, Yaks",
    ]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("On otters\n\nThey swim.\n", "a.txt, On otters"),
        ("Dear otter,\n\nThey swim.\n", "a.txt"),
        ("An otter and\na yak\n\nThey swim.\n", "a.txt"),
        ("An otter\n", "a.txt"),
    ],
)
async def test_a_first_line_that_stands_alone_is_the_title_of_a_text(
    notes: Path, tmp_path: Path, text: str, source: str
) -> None:
    write(notes / "a.txt", text)
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "otter")

    assert below == f"\n\nSources:\n- {source}"


PAGE = """\
<!DOCTYPE html><html><head><title>Animals</title><style>otter { color: red }</style></head>
<body><nav><a href="/">otter</a></nav><!-- otter --><script>otter("<p>")</script>
<h1 class="a > b">Otters &amp; <em>yaks</em></h1><p>They<br>swim, 5 &lt; 6.</p>
<h2>Food</h2><ul><li>fish</li><li>frogs</ul><table><tr><td>3<td>4</table>
</body></html>
"""


async def test_of_a_page_of_html_what_one_reads_is_found(notes: Path, tmp_path: Path) -> None:
    write(notes / "animals.html", PAGE)
    write(notes / "untitled.HTM", PAGE.replace("h1", "p"))
    async with loaded(tmp_path) as rag:
        swim, food = await ask(rag, "swim", k=9), await ask(rag, "fish", k=1)
        assert progress(rag) == "4 files, 7 passages"

    assert "[1] animals.html, Otters & yaks\nThey\nswim, 5 < 6.\n\n" in swim[0]
    assert "[2] untitled.HTM, Animals\nOtters & yaks\n\nThey\nswim" in swim[0]
    assert "[1] untitled.HTM, Animals > Food\n- fish\n- frogs\n\n3 4\n\n" in food[0]


@pytest.mark.parametrize("start", ["<a ", '<a "', "<!--", "<script>", "<nav><nav ", "</", "<p a='"])
async def test_a_broken_page_costs_no_more_time_than_a_good_one(
    notes: Path, tmp_path: Path, start: str
) -> None:
    write(notes / "broken.html", f"<p>otter</p>{start * 100_000}")
    async with loaded(tmp_path) as rag:
        assert "broken.html" in (await ask(rag, "otter"))[1]


NO_PYPDF = importlib.util.find_spec("pypdf") is None


@pytest.mark.skipif(not NO_PYPDF, reason="pypdf is installed")
async def test_without_pypdf_every_pdf_is_listed_as_left_out(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.pdf", "b.PDF"):
        write(notes / name, "%PDF-1.4")
    async with loaded(tmp_path) as rag:
        assert "12 May" in (await ask(rag, "rain barrel"))[1]
        why = "pypdf is not installed"

        assert left_out(caplog) == [("a.pdf", why), ("b.PDF", why)]
        assert progress(rag) == f"2 files, 3 passages, left out: a.pdf ({why}), b.PDF ({why})"


PYPDF = """
class PdfReader:
    def __init__(self, file):
        data = file.read()
        if not data.startswith(b"%PDF"):
            raise ValueError("no PDF \\ud83d")
        self.pages = [Page(text) for text in data.decode().split("|")[1:]]

class Page:
    def __init__(self, text):
        self.text = text

    def extract_text(self):
        return self.text + "\\ud83d"[len(self.text) < 3:]
"""


@pytest.fixture
def pypdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library of that name that reads pages with | between them."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library/pypdf.py").write_text(PYPDF, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "library")
    yield
    sys.modules.pop("pypdf", None)


@pytest.mark.skipif(not NO_PYPDF, reason="pypdf is installed")
async def test_with_pypdf_a_pdf_is_read_by_pages(
    notes: Path, tmp_path: Path, pypdf: None, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "manual.pdf", "%PDF|Contents|Turn the otter off.")
    write(notes / "broken.pdf", "otter")
    write(notes / "scanned.pdf", "%PDF| |")
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "otter")

    assert "[1] manual.pdf, page 2\nTurn the otter off." in text
    assert below == "\n\nSources:\n- manual.pdf, page 2"
    assert left_out(caplog) == [
        ("broken.pdf", "is broken: ValueError('no PDF \\ud83d')"),
        ("scanned.pdf", "holds no text, or only pictures of it"),
    ]


@pytest.mark.skipif(not NO_PYPDF, reason="pypdf is installed")
async def test_what_was_left_out_is_tried_again_at_the_next_start(
    notes: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write(notes / "manual.pdf", "%PDF|Turn the otter off.")
    async with loaded(tmp_path) as rag:
        assert "manual.pdf" not in (await ask(rag, "otter"))[1]
    request.getfixturevalue("pypdf")
    async with loaded(tmp_path) as rag:
        assert "manual.pdf" in (await ask(rag, "otter"))[1]


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


async def test_a_changed_file_may_keep_its_time_and_its_size(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "spare key")
        before = os.stat(notes / "house/keys.txt")
        write(notes / "house/keys.txt", "The pilot: has a spare key")
        os.utime(notes / "house/keys.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
        text, _ = await ask(rag, "spare key")

    assert os.stat(notes / "house/keys.txt").st_size == before.st_size
    assert "pilot" in text


async def test_a_removed_file_is_forgotten(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        shutil.rmtree(notes / "house")
        _, below = await ask(rag, "spare key")

    assert below == "\n\n(Nothing found in the folder.)"


async def test_what_did_not_change_is_not_read_again(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "otter")
        before = rows(tmp_path, "SELECT path, id FROM files")
    write(notes / "later.txt", "new")
    async with loaded(tmp_path) as rag:
        await ask(rag, "otter")
        after = rows(tmp_path, "SELECT path, id FROM files")

    assert len(after) == 3
    assert set(before) < set(after)


async def test_another_folder_takes_the_place_of_the_first(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "other/zoo.md", "A quokka moved in.")
    async with loaded(tmp_path):
        pass
    async with loaded(tmp_path, folder=str(tmp_path / "other")) as rag:
        assert "zoo.md" in (await ask(rag, "quokka"))[1]
        assert "Nothing" in (await ask(rag, "rain barrel"))[1]


async def test_without_a_question_the_folder_is_followed_too(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        with anyio.fail_after(20):
            while progress(rag) != "2 files, 3 passages":
                await anyio.lowlevel.checkpoint()


@contextmanager
def nobody_writes(tmp_path: Path) -> Iterator[None]:
    """Hold the index up: what writes into it waits until the block ends."""
    with closing(sqlite3.connect(tmp_path / "data/rag/index.db")) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


async def test_while_the_folder_is_read_a_question_uses_what_there_is(
    notes: Path, tmp_path: Path
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "otter")
    write(notes / "late.txt", "otter")
    with ExitStack() as held:
        held.enter_context(nobody_writes(tmp_path))
        async with loaded(tmp_path, wait=0.1) as rag:  # setup does not wait for the folder
            found, missing = await ask(rag, "rain barrel", k=1), await ask(rag, "otter")
            held.close()
            with anyio.fail_after(20):
                while "late.txt" not in (await ask(rag, "otter"))[1]:
                    pass

    note = "(The folder is still being read.)"
    assert found[1] == f"\n\nSources:\n- minutes.md, Minutes > Meeting of 12 May\n{note}"
    assert "still being read, and nothing about the question" in missing[0]
    assert missing[1] == f"\n\n(Nothing found in the folder.)\n{note}"


async def test_a_folder_may_change_while_it_is_read(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "otter")
    for name in ("a", "b", "c"):
        write(notes / f"{name}.txt", f"otter {name}")
    with ExitStack() as held:
        held.enter_context(nobody_writes(tmp_path))
        async with loaded(tmp_path) as rag:
            with anyio.fail_after(20):
                while "3 of 5 files are still to be read" not in progress(rag):
                    await anyio.lowlevel.checkpoint()
            (notes / "b.txt").unlink()
            write(notes / "c.txt", "yak")
            held.close()
            _, below = await ask(rag, "otter")

    assert below == "\n\nSources:\n- a.txt"
    assert left_out(caplog) == []


async def test_a_folder_that_goes_away_is_found_as_it_was_until_it_is_back(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "rain barrel")
        os.rename(notes, tmp_path / "away")
        for _ in range(3):
            assert "12 May" in (await ask(rag, "rain barrel"))[1]
        assert "not followed" in progress(rag)
        os.rename(tmp_path / "away", notes)
        write(notes / "zoo.md", "A quokka moved in.")

        assert "zoo.md" in (await ask(rag, "quokka"))[1]
        assert progress(rag) == "3 files, 4 passages"
    assert caplog.messages.count("folder is not followed") == 1


async def test_the_thread_ends_with_the_agent(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path):
        assert "rag" in [thread.name for thread in threading.enumerate()]

    assert "rag" not in [thread.name for thread in threading.enumerate()]


INDEXING = """
import asyncio, sys
from pathlib import Path
from kernel.config import PluginsConfig
from kernel.registry import PluginRegistry

async def main(plugins, folder):
    config = PluginsConfig(dirs=(Path(plugins),), only=("rag",))
    agents = {"rag": {"settings": {"folder": folder + "/notes"}}}
    async with PluginRegistry(config, agents, Path(folder, "data"), {}):
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_whoever_is_killed_in_the_middle_leaves_an_index_that_heals(
    notes: Path, tmp_path: Path
) -> None:
    for number in range(400):
        write(notes / f"{number:03}.txt", "\n\n".join([f"otter{number} {'swims ' * 120}"] * 9))
    kill_while_indexing(tmp_path)
    (some,) = rows(tmp_path, "SELECT count(*) FROM files")[0]
    partly = rows(tmp_path, "SELECT id FROM files WHERE passages NOT IN (2, 1, 9)")
    whole = rows(tmp_path, "PRAGMA integrity_check")
    async with loaded(tmp_path) as rag:
        found = [(await ask(rag, f"otter{number}", k=1))[1] for number in (0, 200, 399)]

    assert 0 < some < 402
    assert (partly, whole) == ([], [("ok",)])
    assert found == [f"\n\nSources:\n- {number}.txt" for number in ("000", "200", "399")]


def kill_while_indexing(tmp_path: Path) -> None:
    """Index `notes` in another process, and kill that as soon as some files are there."""
    command = [sys.executable, "-c", INDEXING, str(PLUGINS), str(tmp_path)]
    with subprocess.Popen(command, cwd=PLUGINS.parent) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(sqlite3.Error):
                if rows(tmp_path, "SELECT count(*) FROM files")[0][0] > 20:
                    break
        process.kill()


async def test_a_missing_folder_is_named_when_the_agent_is_loaded(tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        assert rag.status == "failed"
        assert f"settings: folder: there is no folder {tmp_path / 'notes'}" in str(rag.error)


@pytest.mark.parametrize("setting", ["max_chars", "max_file", "embed_batch", "wait"])
async def test_some_settings_must_be_above_zero(notes: Path, tmp_path: Path, setting: str) -> None:
    settings: dict[str, Any] = {setting: 0}
    async with loaded(tmp_path, **settings) as rag:
        assert f"settings: {setting}: 0 must be above 0" in str(rag.error)


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


async def test_an_index_that_was_deleted_under_a_writer_is_made_anew(
    notes: Path, tmp_path: Path
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "rain barrel")
        with closing(sqlite3.connect(tmp_path / "data/rag/index.db")) as db:
            db.execute("UPDATE state SET version = 7")
            db.commit()  # into a second file, which stays
            (tmp_path / "data/rag/index.db").unlink()

            assert (await ask(rag, "rain barrel", k=1))[1] == BARREL


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


@pytest.mark.parametrize(
    ("code", "damage"),
    [("CORRUPT_VTAB", True), ("NOTADB", True), ("IOERR_SHORT_READ", True), ("BUSY_SNAPSHOT", False)]
    + [("FULL", False), ("READONLY", False)],
)
def test_only_for_damage_the_index_is_removed(code: str, damage: bool) -> None:
    error = sqlite3.OperationalError()
    error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")

    assert is_damage(error) is damage


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
        assert [(await ask(rag, "barrel"))[1] for rag in (one, two)] == [BARREL, BARREL]
        for number in range(50):
            write(notes / f"{number}.txt", f"otter {number}")
        (tmp_path / "data/rag/index.db").unlink()
        questions = [ask(rag, "otter 42", k=1) for rag in (one, two) * 4]
        answers = await asyncio.gather(*questions)

    assert {below for _, below in answers} == {"\n\nSources:\n- 42.txt"}


async def test_one_request_does_not_see_what_another_found(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        first = an_instance(rag, a_chat("baker"))
        await rag.runner.run(first.on_request, a_chat("baker"), clock=Clock(30))
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
async def test_texts_in_the_usual_encodings_are_read(
    notes: Path, tmp_path: Path, encoding: str
) -> None:
    write(notes / "old.md", "# Otter\r\n\r\nDer Otter sagt äöü.\r\n".encode(encoding))
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "otter")

    assert "old.md, Otter\nDer Otter sagt äöü.\n" in text
    assert below == "\n\nSources:\n- old.md, Otter"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
async def test_a_name_that_is_not_utf_8_is_shown_with_replacements(
    notes: Path, tmp_path: Path
) -> None:
    write(Path(os.fsdecode(os.fsencode(notes) + b"/k\xe4se.txt")), "otter")
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "otter")

    assert below == "\n\nSources:\n- k\ufffdse.txt"


async def test_a_file_of_fifty_megabytes_is_left_out_and_the_log_says_so_once(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (notes / "dump.txt").open("wb") as file:
        file.truncate(50_000_000)
    async with loaded(tmp_path) as rag:
        await ask(rag, "otter")
        _, below = await ask(rag, "dump")

        assert below == "\n\n(Nothing found in the folder.)"
        assert left_out(caplog) == [("dump.txt", "has more than 10000000 bytes")]
        assert "left out: dump.txt (has more than 10000000 bytes)" in progress(rag)


async def test_the_limit_for_files_may_change_with_a_start(notes: Path, tmp_path: Path) -> None:
    for limit, found in ((10, False), (1000, True), (20, False)):
        async with loaded(tmp_path, max_file=limit) as rag:
            _, below = await ask(rag, "baker")

        assert ("keys.txt" in below) is found


async def test_rubbish_with_the_name_of_a_text_is_left_out(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "rubbish.md", bytes(range(256)) * 40)
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "rubbish or baker")

    assert below == "\n\nSources:\n- house/keys.txt"
    assert left_out(caplog) == [("rubbish.md", "is not text")]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are others here")
async def test_what_may_not_be_read_is_named_in_the_log_and_read_when_it_may(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "locked.txt", "otter")
    write(notes / "closed/zoo.txt", "otter")
    (notes / "locked.txt").chmod(0)
    (notes / "closed").chmod(0)
    if os.access(notes / "locked.txt", os.R_OK):
        pytest.skip("root reads everything")
    async with loaded(tmp_path) as rag:
        assert "12 May" in (await ask(rag, "rain barrel"))[1]
        why = "Permission denied"
        assert left_out(caplog) == [("closed", why), ("locked.txt", why)]

        (notes / "locked.txt").chmod(0o600)
        (notes / "closed").chmod(0o700)
        assert (await ask(rag, "otter"))[1].count(".txt") == 2


async def test_nothing_but_its_data_is_written(notes: Path, tmp_path: Path) -> None:
    before = files_of(PLUGINS / "rag_agent"), files_of(tmp_path)
    async with loaded(tmp_path) as rag:
        await ask(rag, "rain barrel")

    assert files_of(PLUGINS / "rag_agent") == before[0]
    assert files_of(tmp_path) == before[1] | {tmp_path / "data/rag/index.db"}


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


class Brain:
    """An Ollama with an embedding model that knows which words mean the same.

    `status`, `embed` and `most` may be changed; `asked` is what was to be embedded.
    """

    MEANINGS = {"physician": 0, "doctor": 0, "barrel": 1, "cask": 1, "key": 2, "baker": 2}

    def __init__(self) -> None:
        self.status = 200
        self.dims = 8
        self.embed: Callable[[str], Any] = self.meaning
        self.most = 1000  # vectors in one answer
        self.asked: list[list[str]] = []

    def meaning(self, text: str) -> list[float]:
        vector = [0.01] * self.dims
        for word in re.findall(r"\w+", text.lower()):
            vector[self.MEANINGS.get(word, self.dims - 1)] += 1 if word in self.MEANINGS else 0.1
        return vector

    async def answer(self, request: Request) -> Response:
        self.asked.append((await request.json())["input"])
        vectors = [self.embed(text) for text in self.asked[-1]][: self.most]
        return Response(json.dumps({"embeddings": vectors}), self.status)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/api/embed", self.answer, methods=["POST"])])


@pytest.fixture
def brain() -> Brain:
    return Brain()


@pytest.fixture
async def client(brain: Brain) -> AsyncIterator[OllamaClient]:
    async with demo.serve(brain.app) as url:
        async with OllamaClient(parse_upstream(url), 5.0) as client:
            yield client


async def all_embedded(plugin: Plugin, client: OllamaClient) -> None:
    """Wait until what has no vector was given one, or could not be."""
    agent: Any = plugin.agent
    await agent.vectors.begin(an_instance(plugin, a_chat("otter"), client=client).context)


async def test_with_an_embedding_model_other_words_of_that_meaning_are_found(
    notes: Path, tmp_path: Path, client: OllamaClient
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        _, below = await ask(rag, "cask", k=1, client=client)

        assert below == BARREL
        assert progress(rag) == "2 files, 3 passages; 3 of 3 passages have vectors"


def test_what_both_rankings_name_comes_first() -> None:
    assert fused([[1, 2, 3], [4, 2]]) == [2, 1, 4, 3]


async def test_vectors_are_kept_as_float32_of_the_length_one(
    notes: Path, tmp_path: Path, client: OllamaClient
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        await ask(rag, "cask", client=client)

    stored = [array("f", data) for (data,) in rows(tmp_path, "SELECT vector FROM vectors")]
    assert [len(vector) for vector in stored] == [8, 8, 8]
    assert [math.hypot(*vector) for vector in stored] == pytest.approx([1, 1, 1])


async def test_a_passage_is_embedded_once_and_with_its_headings(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    for _ in range(2):
        async with loaded(tmp_path, embed_model="brain") as rag:
            await ask(rag, "cask", client=client)

    may = "minutes.md, Minutes > Meeting of 12 May\nWe decided to buy a rain barrel."
    assert may in brain.asked[0] and len(brain.asked[0]) == 3
    assert brain.asked[1:] == [["cask"], ["cask"]]


async def test_only_what_changed_is_embedded_again(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        await ask(rag, "cask", client=client)
        write(notes / "house/keys.txt", "The doctor has a spare key.")
        shutil.copy(notes / "house/keys.txt", notes / "new.txt")
        (notes / "minutes.md").unlink()
        _, below = await ask(rag, "physician", client=client)

    assert [len(texts) for texts in brain.asked] == [3, 1, 2, 1]
    assert sorted(below.split("\n- ")[1:]) == ["house/keys.txt", "new.txt"]
    assert rows(tmp_path, "SELECT count(*) FROM vectors") == [(2,)]


async def test_until_most_passages_have_vectors_words_alone_decide(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    async with loaded(tmp_path, embed_model="brain", embed_batch=2) as rag:
        _, first = await ask(rag, "cask", client=client)  # three are missing: not waited for
        await all_embedded(rag, client)
        _, then = await ask(rag, "cask", k=1, client=client)

    assert first == "\n\n(Nothing found in the folder.)"
    assert then == BARREL
    assert [len(texts) for texts in brain.asked] == [2, 1, 1]


@pytest.mark.parametrize("status", [404, 500])
async def test_without_the_embedding_model_words_are_enough_and_the_log_says_so(
    notes: Path,
    tmp_path: Path,
    brain: Brain,
    client: OllamaClient,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        brain.status = status
        _, below = await ask(rag, "barrel", client=client)

        assert below == BARREL
        assert "passages have no vectors" in caplog.messages
        assert progress(rag).endswith("; passages get no vectors, the log says why")

        brain.status = 200
        assert (await ask(rag, "cask", k=1, client=client))[1] == BARREL


async def test_a_model_that_fails_later_costs_nothing_but_meaning(
    notes: Path,
    tmp_path: Path,
    brain: Brain,
    client: OllamaClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        await ask(rag, "cask", client=client)
        brain.status = 500
        _, below = await ask(rag, "barrel", client=client)

    assert below == BARREL
    assert any(text.startswith("question has no vector: ") for text in caplog.messages)


@pytest.mark.parametrize("nonsense", [[], [math.nan] * 8, [None] * 8, ["a"], None, 7, {}])
async def test_nonsense_in_the_place_of_a_vector_is_no_vector(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient, nonsense: Any
) -> None:
    brain.embed = lambda text: nonsense
    async with loaded(tmp_path, embed_model="brain") as rag:
        assert (await ask(rag, "barrel", client=client))[1] == BARREL
        brain.embed = brain.meaning
        assert (await ask(rag, "cask", k=1, client=client))[1] == BARREL


async def test_vectors_of_several_lengths_or_too_few_are_none(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        brain.embed = lambda text: [1.0] * len(text)
        several = await ask(rag, "barrel", client=client)
        brain.embed, brain.most = brain.meaning, 2
        few = await ask(rag, "barrel", client=client)

    assert (several[1], few[1]) == (BARREL, BARREL)
    assert rows(tmp_path, "SELECT count(*) FROM vectors") == [(0,)]


async def test_with_few_vectors_the_model_is_not_asked_about_the_question(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    brain.embed = lambda text: brain.meaning(text) if "baker" in text else [math.nan]
    async with loaded(tmp_path, embed_model="brain", embed_batch=1) as rag:
        await ask(rag, "cask", client=client)
        await all_embedded(rag, client)
        _, below = await ask(rag, "cask", client=client)

    assert rows(tmp_path, "SELECT count(*) FROM vectors") == [(1,)]
    assert ["cask"] not in brain.asked
    assert below == "\n\n(Nothing found in the folder.)"


def test_a_vector_that_comes_too_late_belongs_to_nobody(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    vectors = Vectors(index, "brain", 1, lambda text: None)
    with index.open() as db:
        put(db, "a", "", "", [("a", "", "otter")])
        ((late,),) = db.execute("SELECT rowid FROM chunks").fetchall()
        put(db, "a", "", "", [("a", "", "yak")])
    vectors.store([late], [normalised([1.0, 2.0])])

    assert vectors.load().missing == 1
    with index.open() as db:
        assert db.execute("SELECT count(*) FROM vectors").fetchall() == [(0,)]


async def test_one_passage_that_the_model_cannot_read_does_not_stop_the_others(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    for number in range(20):
        write(notes / f"{number}.txt", f"{'doctor ' * 9} {number}")
    brain.embed = lambda text: [math.nan] if "baker" in text else brain.meaning(text)
    async with loaded(tmp_path, embed_model="brain", embed_batch=1) as rag:
        await ask(rag, "cask", client=client)
        await all_embedded(rag, client)

        assert progress(rag).endswith("22 of 23 passages have vectors")
        assert (await ask(rag, "cask", k=1, client=client))[1] == BARREL


async def test_a_model_that_answers_with_other_numbers_takes_the_place_of_the_first(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    async with loaded(tmp_path, embed_model="brain") as rag:
        await ask(rag, "cask", client=client)
        brain.dims = 16
        _, first = await ask(rag, "cask", k=1, client=client)
        await all_embedded(rag, client)
        _, then = await ask(rag, "cask", k=1, client=client)

    assert (first, then) == ("\n\n(Nothing found in the folder.)", BARREL)
    assert rows(tmp_path, "SELECT DISTINCT dims FROM vectors") == [(16,)]


async def test_another_embedding_model_takes_the_place_of_the_first(
    notes: Path, tmp_path: Path, brain: Brain, client: OllamaClient
) -> None:
    for model in ("one", "", "two"):
        async with loaded(tmp_path, embed_model=model) as rag:
            await ask(rag, "cask", client=client)

    assert [len(texts) for texts in brain.asked] == [3, 1, 3, 1]
    assert rows(tmp_path, "SELECT DISTINCT model FROM vectors") == [("two",)]


async def test_the_end_of_the_proxy_does_not_wait_for_vectors(
    notes: Path, tmp_path: Path, ollama: FakeOllama, ollama_url: str
) -> None:
    ollama.answers(ollama.pause)
    async with OllamaClient(parse_upstream(ollama_url), 5.0) as client:
        with anyio.fail_after(5):
            async with loaded(tmp_path, embed_model="brain", embed_batch=1) as rag:
                await ask(rag, "cask", client=client)
                await ollama.arrived.wait()
            await ollama.disconnected.wait()


async def test_of_many_vectors_the_nearest_are_found(tmp_path: Path) -> None:
    """The codes leave out most vectors: the nearest must not be among those."""
    rng = random.Random(7)
    index = Index(tmp_path / "index.db")
    vectors = Vectors(index, "random", 1, lambda text: None)
    middle = [[rng.gauss(0, 1) for _ in range(96)] for _ in range(30)]
    many = [normalised([x + rng.gauss(0, 1) for x in rng.choice(middle)]) for _ in range(2000)]
    with index.open() as db:
        put(db, "a", "", "", [("a", "", "otter")] * len(many))
        ids = [row for (row,) in db.execute("SELECT rowid FROM chunks")]
    vectors.store(ids, many)
    vectors.load()
    hits = 0
    with index.open() as db:
        for _ in range(20):
            asked = normalised([x + rng.gauss(0, 1) for x in rng.choice(middle)])
            near = [sum(map(operator.mul, asked, other)) for other in many]
            best = sorted(range(len(many)), key=near.__getitem__, reverse=True)[:5]
            hits += len({ids[place] for place in best} & set(vectors.near(db, asked, 5)))

    assert hits >= 90  # of 100


@pytest.mark.parametrize("model", ["", "brain"])
async def test_the_right_passage_is_among_five_for_nine_of_ten_questions(
    tmp_path: Path, brain: Brain, client: OllamaClient, model: str
) -> None:
    """The questions of its bench that share words with the passage they are about.

    An embedding model that knows nothing at all must not spoil that.
    """
    rng = random.Random(7)
    brain.embed = lambda text: [rng.gauss(0, 1) for _ in range(8)]
    bench = ROOT / "plugins/rag_agent/bench/rag.toml"
    articles = tomllib.loads(bench.read_text(encoding="utf-8"))["articles"]
    for article in articles:
        write(tmp_path / "notes" / article["name"], article["text"])
    hits = []
    async with loaded(tmp_path, embed_model=model, embed_batch=1000) as rag:
        for article in articles:
            for question, answer, kind in article["questions"]:
                text, _ = await ask(rag, question, k=5, client=client)
                hits += [" ".join(answer.split()) in " ".join(text.split())] * (kind == "words")

    assert len(hits) >= 40 and len(brain.asked) >= (len(hits) if model else 0)
    assert sum(hits) >= 0.9 * len(hits)


NOTE = """
class Note(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, "Remember: the baker has a spare key.")
"""
PATHS = ["/api/chat", "/v1/chat/completions"]


@pytest.fixture
async def proxy(notes: Path, plugins: Path, demo_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A proxy with the agents rag, translate and note, before a model that repeats all it reads."""
    for name in ("rag_agent", "translate_agent"):
        shutil.copytree(PLUGINS / name, plugins / name)
    write_agent(plugins, "note", NOTE)
    rag = {"settings": {"folder": str(notes), "wait": 20, "embed_model": "demo-embed"}}
    async with running(demo_url, plugins, agents={"rag": rag}) as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_it_works_in_both_dialects_streamed_and_not(
    proxy: httpx.AsyncClient, path: str, stream: bool
) -> None:
    answer = await proxy.post(path, json=chat("/rag:k=1 rain barrel", stream=stream))

    text = said(answer.content)
    assert answer.headers["x-osp-agents"].startswith("rag;ok;")
    assert "[1] minutes.md, Minutes > Meeting of 12 May\nWe decided to buy" in text
    assert text.endswith("\n\nrain barrel" + BARREL)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_in_a_chain_the_sources_stay_under_the_translated_answer(
    proxy: httpx.AsyncClient, path: str, stream: bool
) -> None:
    asked = chat("/rag:k=1 /translate:de rain barrel", stream=stream)

    text = said((await proxy.post(path, json=asked)).content)

    assert "You are a translator." in text and "We decided to buy a rain barrel." in text
    assert text.endswith(BARREL) and text.count("Sources:") == 1


@pytest.mark.parametrize("commands", ["/note /rag:k=1", "/rag:k=1&/note", "/note&/rag:k=1"])
async def test_what_other_agents_add_is_kept_and_not_searched_for(
    proxy: httpx.AsyncClient, commands: str
) -> None:
    asked = chat(f"{commands} rain barrel", stream=False)

    text = said((await proxy.post("/api/chat", json=asked)).content)

    assert "Remember: the baker has a spare key." in text
    assert text.endswith("\n\nrain barrel" + BARREL)


async def test_the_list_of_plugins_says_how_far_it_is(proxy: httpx.AsyncClient) -> None:
    await proxy.post("/api/chat", json=chat("/rag rain barrel", stream=False))
    listed = (await proxy.get("/plugins")).json()["plugins"]

    (said_of_rag,) = [plugin["progress"] for plugin in listed if plugin["name"] == "rag"]
    assert said_of_rag == "2 files, 3 passages; 3 of 3 passages have vectors"


async def test_a_tools_result_is_not_searched_for(proxy: httpx.AsyncClient) -> None:
    asked = chat("/rag rain barrel", stream=False)
    asked["messages"].append({"role": "tool", "content": "42"})

    answer = await proxy.post("/api/chat", json=asked)

    assert "rag;ok" in answer.headers["x-osp-agents"]
    assert "Sources" not in said(answer.content) and "We decided" not in said(answer.content)


async def test_a_prompt_cannot_choose_the_folder(proxy: httpx.AsyncClient) -> None:
    answer = await proxy.post("/api/chat", json=chat("/rag:folder=/etc passwd", stream=False))

    assert "Sources" not in said(answer.content)
    assert "folder" in answer.text and "k" in answer.text
