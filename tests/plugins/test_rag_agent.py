"""The RAG agent over real files, with its index in a SQLite file and in a PostgreSQL.

First comes how files are read and cut, then what a request becomes and what is put under the
answer, then how the folders are followed and the index heals, and last vectors, from an embedding
model that knows some words. `write` gives each file a time of its own, and a question waits until
the folder is read, unless `wait` says otherwise: so no test depends on a clock.
"""

from __future__ import annotations

import asyncio
import copy
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import sys
import threading
import time
import tomllib
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, NameObject, read_object

from kernel.agent import Payload, Reply, Store, StoreError, telling_words
from kernel.sqlite import SQLite
from plugins.rag_agent.agent import INSTRUCTION, NOTHING, Rag
from plugins.rag_agent.index import SCHEMA, Index
from plugins.rag_agent.passages import CHUNK, passages
from plugins.rag_agent.reader import Unreadable, decoded, read
from plugins.rag_agent.vectors import HAS_INDEX, Vectors, normalised
from plugins.rag_agent.words import by_words
from tests.plugins.context import a_context, no_model
from tests.postgres import Cluster
from tests.support import OpenStore

FOLDER = Path(__file__).parents[2] / "plugins/rag_agent"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
TIMES = itertools.count(1_700_000_000)
NOT_FOUND = "\n\n(Nothing found in the folder.)"
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


def cut(text: str | bytes, suffix: str = ".md") -> list[tuple[str, str]]:
    """Return (headings, text) of the passages of a file."""
    blocks, _ = read(text.encode() if isinstance(text, str) else text, suffix)
    return list(passages(blocks))


@pytest.mark.parametrize(
    ("text", "headings"),
    [
        ("# A\n\nx\n\n## B ##\n\ny\n\n# C\n", ["A", "A > B", "C"]),
        (
            "# Decided\n## We keep it\n## We sell it\n",
            ["Decided > We keep it", "Decided > We sell it"],
        ),
        ("A\n=\n\nx\n\nB\n---\ny\n", ["A", "A > B"]),
        ("# A\n---\nx\n", ["A"]),
        ("````md\n```\n# no\n```\n````\n", [""]),
        ("~~~ sh\n# no\n~~~~\n# A\n", ["", "A"]),
        ("``` sh\n# never closed\n", [""]),
        ("    # code\n", [""]),
        ("<!-- x\n# no\n\n# no\n-->\n# A <!-- no -->\n", ["A"]),
        ("---\ntitle: x\n# no\ntags: [a]\n---\n# A\n", ["", "A"]),
        ("---\n# no\ntitle: x\n...\nText\n", [""]),
        ("+++\ntitle = 'x'\n# no\n+++\n# A\n", ["", "A"]),
        ("---\n\n# A\n\n---\n\n# B\n", ["A", "B"]),
        ("> # quoted\n\n- item\n  # item\n", [""]),
        ('<h2 align="center">A</h2>\n\n# B\n', ["A", "B"]),
        (f"# {'x' * 500}\n", ["x" * 120]),
    ],
)
def test_headings_are_those_of_markdown(text: str, headings: list[str]) -> None:
    assert list(dict.fromkeys(heading for heading, _ in cut(text))) == headings


WRITTEN = """\
Intro **bold** <b>x</b> &amp; `<div>` [link](http://a.b)
second line

1. one

   more
2. two
   * nested

```sh
ls  -l # no
```
"""


def test_what_stands_in_a_line_of_markdown_is_left_as_it_was_written() -> None:
    begin = WRITTEN.partition("\n\n")[0]
    ((_, text),) = cut(WRITTEN)

    assert text == f"{begin}\n\n1. one\n\nmore\n\n2. two\n\n- nested\n\nls  -l # no"


PAGE = """\
<!DOCTYPE html><html><head><title>Animals</title><style>otter { color: red }</style></head>
<body><nav><a href="/">otter</a></nav><!-- otter --><script>otter("<p>")</script>
<h1 class="a > b">Otters &amp; <em>yaks</em></h1><p>They<br>swim, 5 &lt; 6.</p>
<h2>Food</h2><ul><li>fish</li><li>frogs</ul><table><tr><th>a<th>b<tr><td>3<td>4</table>
<pre>def x():
    pass</pre></body></html>
"""


def test_of_a_page_of_html_what_one_reads_is_kept() -> None:
    assert cut(PAGE, ".html") == [
        ("Otters & yaks", "They\nswim, 5 < 6."),
        ("Otters & yaks > Food", "- fish\n- frogs\n\na | b\n3 | 4\n\ndef x():\n    pass"),
    ]
    assert cut(PAGE.replace("h1", "p"), ".HTM".lower())[0] == (
        "Animals",
        "Otters & yaks\n\nThey\nswim, 5 < 6.",
    )


@pytest.mark.parametrize("start", ["<a ", '<a "', "<!--", "<script>", "<nav><nav ", "</", "<p a='"])
def test_a_broken_page_costs_no_more_time_than_a_good_one(start: str) -> None:
    began = time.monotonic()
    with suppress(Unreadable):
        cut(f"<p>otter</p>{start * 100_000}", ".html")

    assert time.monotonic() - began < 5


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_each_part_of_a_long_table_has_its_head(suffix: str) -> None:
    rows = [f"| row {number} | {'value ' * 9} |" for number in range(60)]
    text = "\n".join(["# Prices", "", "| item | price |", "|---|---|", *rows])
    if suffix == ".html":
        cells = "".join(f"<tr><td>row {n}<td>{'value ' * 9}" for n in range(60))
        text = f"<h1>Prices</h1><table><tr><th>item<th>price{cells}</table>"

    parts = [text for _, text in cut(text, suffix)]

    assert len(parts) > 3 and all(part.lstrip("| ").startswith("item | price") for part in parts)
    assert [int(n) for part in parts for n in re.findall(r"row (\d+)", part)] == list(range(60))


@pytest.mark.parametrize(
    ("text", "end"),
    [(" ".join(f"Otter {n} swims in the river." for n in range(200)), "river.")]
    + [("獺は川で泳ぎます。" * 300, "ます。"), ("x" * 5000, "x")],
)
def test_a_long_text_is_cut_between_sentences_or_anywhere(text: str, end: str) -> None:
    parts = [part for _, part in cut(text, ".txt")]

    assert len(parts) > 2 and all(part.endswith(end) and len(part) <= CHUNK for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


ENCODED = [
    ("gb18030", "春天的花园里开满了花。"),
    ("gb18030", "# 会议记录\n\n我们决定修理温室。下次会议在六月举行。"),
    ("big5", "我們決定修理溫室。下次會議在六月舉行。"),
    ("cp932", "会議で雨水タンクを買うことに決めました。"),
    ("euc_jp", "会議で雨水タンクを買うことに決めました。"),
    ("cp949", "우리는 온실을 수리하기로 결정했습니다. 다음 회의는 6월입니다."),
    ("cp1251", "Привет, мир"),
    ("cp1251", "На собрании решили купить бочку для дождевой воды."),
    ("koi8_r", "На собрании решили купить бочку для дождевой воды. Следующее собрание в июне."),
    ("cp1250", "Postanowiliśmy kupić beczkę na deszczówkę. Zebranie odbędzie się w czerwcu."),
    ("iso8859_2", "Postanowiliśmy kupić beczkę na deszczówkę. Zebranie odbędzie się w czerwcu."),
    ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy."),
    ("cp1252", "Der Otter sagt äöü."),
    ("cp1252", "Nous avons décidé d’acheter un tonneau. L’été prochain à Orléans."),
    ("cp1252", "El niño comió piñas mañana."),
    ("cp1253", "Αποφασίσαμε να αγοράσουμε ένα βαρέλι για το νερό της βροχής."),
    ("cp1254", "Toplantıda yağmur suyu için bir fıçı almaya karar verdik."),
    ("cp1255", "החלטנו לקנות חבית למי גשם. הפגישה הבאה ביוני."),
    ("cp1256", "قررنا شراء برميل لمياه الأمطار. الاجتماع القادم في يونيو."),
    ("cp874", "เราตัดสินใจซื้อถังเก็บน้ำฝน การประชุมครั้งต่อไปในเดือนมิถุนายน"),
]


@pytest.mark.parametrize(("encoding", "text"), ENCODED)
def test_an_encoding_that_is_not_told_is_guessed_and_said(encoding: str, text: str) -> None:
    found, guess = decoded(text.encode(encoding))

    assert found == text
    assert guess


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso2022_jp"])
def test_an_encoding_that_is_told_is_no_guess(encoding: str) -> None:
    assert decoded("雨水, 東京".encode(encoding)) == ("雨水, 東京", "")
    assert decoded('<meta charset="koi8-r">бочка'.encode("koi8-r"))[1] == ""


@pytest.mark.parametrize("data", [bytes(range(256)) * 40, b"\0" * 5000, b"\x89PNG\r\n\x1a\n\0\1\2"])
def test_what_is_no_text_is_left_out(data: bytes) -> None:
    with pytest.raises(Unreadable, match="is not text"):
        decoded(data)


def a_pdf(*pages: str) -> bytes:
    """Return a PDF with one line of text on each page."""
    writer = PdfWriter()
    fonts = "<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    for text in pages:
        page, stream = writer.add_blank_page(612, 792), DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
        page[NameObject("/Resources")] = read_object(io.BytesIO(fonts.encode()), None)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def test_a_pdf_is_read_by_pages() -> None:
    pages = [("page 1", "Contents"), ("page 3", "Turn the otter off.")]
    assert cut(a_pdf("Contents", "", "Turn the otter off."), ".pdf") == pages
    with pytest.raises(Unreadable, match="only pictures"):
        cut(a_pdf("", ""), ".pdf")


Load = Callable[..., AbstractAsyncContextManager[Rag]]

# For what does not depend on the store, or is of one kind of it
IN_A_FILE = pytest.mark.parametrize("where", ["sqlite"], indirect=True)
IN_POSTGRESQL = pytest.mark.parametrize("where", ["postgresql"], indirect=True)


@asynccontextmanager
async def loaded(store: Store, notes: Path, **settings: Any) -> AsyncIterator[Rag]:
    """Set the agent up as the registry of a proxy does."""
    agent = Rag()
    agent.settings = CONFIG["settings"] | {"folder": str(notes), "wait": 20} | settings
    agent._store = lambda: store
    await agent.setup()
    try:
        yield agent
    finally:
        await agent.teardown()


@pytest.fixture
def load(open_store: OpenStore, tmp_path: Path) -> Load:
    return lambda **settings: loaded(open_store("rag", SCHEMA), tmp_path / "notes", **settings)


@pytest.fixture
async def rag(notes: Path, load: Load) -> AsyncIterator[Rag]:
    async with load() as rag:
        yield rag


def an_instance(rag: Rag, prompt: str, model: Any = no_model, **values: Any) -> Rag:
    """Return the agent as one request has it; `values` are its arguments and of its context."""
    agent = copy.copy(rag)
    agent.pieces = []
    agent.arguments = {"k": values.pop("k", 4), "in": values.pop("within", "")}
    agent.context = a_context(prompt, model, **values)
    return agent


async def ask(rag: Rag, *texts: str, answer: str = "ok", **values: Any) -> tuple[str, str]:
    """Return what the model reads last, and what stands under its answer.

    `texts` are those of user and model in turn, the last one the prompt.
    """
    agent = an_instance(rag, texts[-1], **values)
    roles = itertools.cycle(("user", "assistant"))
    payload = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}
    changed = await agent.on_request(payload)
    shown = "".join([await agent.on_chunk(sign) for sign in answer]) + await agent.on_end()
    return changed["messages"][-1]["content"], shown.removeprefix(answer)


async def sources(rag: Rag, *texts: str, **values: Any) -> list[str]:
    """Return the sources under an answer, without their links."""
    return re.findall(r"\n- (.*) <.*>", (await ask(rag, *texts, **values))[1])


MAY = "minutes.md, Minutes > Meeting of 12 May"
APRIL = "minutes.md, Minutes > Meeting of 14 April"
KEYS = "house/keys.txt"


async def test_what_fits_stands_before_the_question_and_its_sources_under_the_answer(
    rag: Rag, notes: Path
) -> None:
    text, below = await ask(rag, "What did we decide in May?")

    assert text.startswith(f"{INSTRUCTION}\n\n[1] {MAY}\nWe decided to buy a rain barrel.\n\n[2] ")
    assert text.endswith("\n\nWhat did we decide in May?")
    link = (notes / "minutes.md").as_uri()
    assert below == f"\n\nSources:\n- {MAY} <{link}>\n- {APRIL} <{link}>"


@IN_A_FILE
async def test_a_link_may_begin_with_an_address_of_the_operator(notes: Path, load: Load) -> None:
    write(notes / "Größe [1] (alt).txt", "otter")
    async with load(base_url="https://wiki.example/notes/") as rag:
        _, below = await ask(rag, "otter")

    assert below.endswith(" <https://wiki.example/notes/Gr%C3%B6%C3%9Fe%20%5B1%5D%20%28alt%29.txt>")


@pytest.mark.parametrize(
    ("question", "source"),
    [("house", KEYS), ("April", APRIL), ("GREENHOUSES", APRIL), ("repairing", APRIL)],
)
async def test_names_headings_and_other_forms_of_a_word_are_found(
    rag: Rag, question: str, source: str
) -> None:
    assert source in await sources(rag, question)


LANGUAGES = tomllib.loads((FOLDER / "bench/languages.toml").read_text(encoding="utf-8"))
ARTICLES = tomllib.loads((FOLDER / "bench/rag.toml").read_text(encoding="utf-8"))["articles"]


async def test_in_each_language_the_right_passage_is_among_five_for_nine_of_ten_questions(
    rag: Rag, notes: Path
) -> None:
    shutil.rmtree(notes)
    for language, pairs in LANGUAGES.items():
        for number, (text, _) in enumerate(pairs):
            write(notes / f"{language}{number}.txt", text)
    hits = {}
    for language, pairs in LANGUAGES.items():
        answers = [(text, await ask(rag, question, k=5)) for text, question in pairs]
        hits[language] = sum(passage in text for passage, (text, _) in answers) / len(pairs)

    assert len(hits) >= 12
    assert {language: share for language, share in hits.items() if share < 0.9} == {}


@pytest.mark.parametrize("model", ["", "brain"])
async def test_over_articles_the_right_passage_is_among_five_for_nine_of_ten_questions(
    tmp_path: Path, model: str, load: Load
) -> None:
    """An embedding model that knows nothing at all must not spoil that."""
    rng = random.Random(7)
    brain = Brain(lambda text: [rng.gauss(0, 1) for _ in range(8)])
    for article in ARTICLES:
        write(tmp_path / "notes" / article["name"], article["text"])
    asked = [question for article in ARTICLES for question in article["questions"]]
    asked = [question for question in asked if question[2] == "words"]
    async with load(embed_model=model, embed_batch=1000) as rag:
        texts = [(await ask(rag, question, k=5, model=brain))[0] for question, *_ in asked]

    hits = [a[1] in " ".join(text.split()) for a, text in zip(asked, texts, strict=True)]
    assert len(hits) >= 40 and sum(hits) >= 0.9 * len(hits)
    assert len(brain.asked) >= len(hits) * bool(model)


@IN_POSTGRESQL
async def test_in_postgresql_the_same_is_found_in_the_same_order_as_in_sqlite(
    tmp_path: Path, load: Load
) -> None:
    for article in ARTICLES:
        write(tmp_path / "notes" / article["name"], article["text"])
    for language, pairs in LANGUAGES.items():
        write(tmp_path / f"notes/{language}.txt", "\n\n".join(text for text, _ in pairs))
    asked = [question for article in ARTICLES for question, *_ in article["questions"]]
    asked += [question for pairs in LANGUAGES.values() for _, question in pairs]
    found = []
    file = SQLite("rag", tmp_path, SCHEMA)
    async with load() as rag, loaded(file, tmp_path / "notes") as other:
        for agent in (rag, other):
            await ask(agent, "otter")
            async with agent.index.transaction() as execute:
                words = [telling_words(question) for question in asked]
                engine = agent.store.engine
                found.append([await by_words(execute, some, engine) for some in words])

    assert len(asked) > 150 and found[0] == found[1]
    assert sum(map(len, found[0])) > 500


SMALL_TALK = [
    *("hi", "Thanks!", "ok", "Good, thank you very much", "¡Hola!", "Merci !", "danke schön"),
    *("谢谢", "你好！", "ありがとうございます", "こんにちは", "감사합니다", "ขอบคุณครับ", "спасибо!"),
    *("teşekkürler", "شكرا", "How are you?", "Was ist das?", "", " \n", "?!"),
]


@pytest.mark.parametrize("prompt", SMALL_TALK)
@IN_A_FILE
async def test_small_talk_is_no_search(rag: Rag, notes: Path, prompt: str) -> None:
    write(notes / "all.txt", "\n".join(SMALL_TALK))

    assert await ask(rag, prompt) == (prompt, "")


@pytest.mark.parametrize(
    "prompt", ["And when?", "und wann?", "それはいつですか？", "为什么？", "متى؟"]
)
@IN_A_FILE
async def test_a_question_without_a_telling_word_is_about_the_last_that_had_one(
    rag: Rag, prompt: str
) -> None:
    said = ("spare key", "ok", "the barrel", "ok", "thanks", "ok", prompt)

    assert await sources(rag, *said) == [MAY]
    assert (await ask(rag, *said))[0].endswith(f"\n\n{prompt}")
    assert await ask(rag, "hi", "ok", prompt) == (prompt, "")


async def test_where_nothing_fits_only_who_asked_is_told(rag: Rag) -> None:
    assert await ask(rag, "quokka?") == (f"{NOTHING}\n\nquokka?", NOT_FOUND)
    assert await ask(rag, "quokka?", asked=False) == ("quokka?", "")


@IN_A_FILE
async def test_a_continuation_is_left_alone(rag: Rag) -> None:
    assert await ask(rag, "barrel", continuation=True) == ("barrel", "")


@pytest.mark.parametrize(
    "answer", ["", " \n", '{"a": 1}', " [1, 2]\n", '```json\n{"a": "```"}\n```', "```\n[]\n```\n"]
)
@IN_A_FILE
async def test_under_json_and_nothing_there_are_no_sources(rag: Rag, answer: str) -> None:
    for question in ("rain barrel", "quokka"):
        assert (await ask(rag, question, answer=answer))[1] == ""
    assert await sources(rag, "barrel", answer=f"See: {answer}") == [MAY]


@pytest.mark.parametrize(
    "own", ["Sources:\n- a.md", "**Sources:**\n\n* a\n* b\n", "Sources:\n[1] a"]
)
@IN_A_FILE
async def test_a_list_of_sources_that_the_model_began_goes_on(rag: Rag, own: str) -> None:
    _, below = await ask(rag, "rain barrel", answer=f"A barrel.\n\n{own}")

    assert below.startswith(f"\n- {MAY} <")


@IN_A_FILE
async def test_earlier_sources_are_taken_out_of_the_conversation(rag: Rag) -> None:
    shown = ["A barrel." + (await ask(rag, text))[1] for text in ("barrel April", "quokka")]
    shown.append("It says:\n\nSources: none")
    parts = [{"type": "text", "text": shown[0] + "\n\n[signed]"}, {"type": "image_url"}]
    messages = [{"role": "assistant", "content": it} for it in (*shown, parts, None)]
    user = {"role": "user", "content": shown[0]}
    changed = await an_instance(rag, "hi").on_request({"messages": [*messages, user]})

    contents = [message["content"] for message in changed["messages"]]
    assert contents[:3] == ["A barrel.", "A barrel.", shown[2]]
    assert contents[3][0]["text"] == "A barrel.\n\n[signed]" and contents[5] == shown[0]


@pytest.mark.parametrize("model", ["", "brain"])
async def test_of_copies_one_is_given(notes: Path, load: Load, model: str) -> None:
    for number in range(30):
        write(notes / f"copy{number}/minutes.md", MINUTES)
    write(notes / "other.txt", "A barrel is no cask.")
    async with load(embed_model=model, embed_batch=1000) as rag:
        text, below = await ask(rag, "rain barrel", k=5, model=Brain())

    assert text.count("We decided to buy a rain barrel.") == 1
    assert "- other.txt <" in below


async def test_a_prompt_may_choose_one_of_several_folders(
    notes: Path, tmp_path: Path, load: Load
) -> None:
    write(tmp_path / "home/cellar.md", "# Cellar\n\nAn old barrel of wine.")
    folders = {"work": str(notes), "home": str(tmp_path / "home")}
    async with load(folders=folders, folder="/nowhere", embed_model="brain") as rag:
        brain = Brain()
        work = await sources(rag, "barrel", within="work", k=1, model=brain)
        home = await sources(rag, "barrel", within="HOME", k=1, model=brain)
        both = await sources(rag, "barrel", k=10, model=brain)
        with pytest.raises(Reply) as reply:
            await ask(rag, "barrel", within="/etc")
        assert await ask(rag, "hi", within="work") == ("hi", "")

    assert str(reply.value.text).endswith("no folder of that name; known are: work, home")
    assert (work, home) == ([f"work/{MAY}"], ["home/cellar.md, Cellar"])
    assert {*work, *home} < set(both)


async def test_only_the_best_passages_that_fit_are_given(notes: Path, load: Load) -> None:
    for number in range(30):
        write(notes / f"{number:02}.txt", f"otter {number} {'x' * 80}")
    async with load(max_chars=250) as rag:
        text, below = await ask(rag, "otter")
        assert text.count("otter ") == below.count("\n- ") == 2
        assert (await ask(rag, "baker"))[0].count("baker") == 2
    async with load(max_chars=20) as rag:
        assert (await ask(rag, "baker"))[0].split("\n\n")[1] == f"[1] {KEYS}\nT"
    async with load(max_chars=100_000) as rag:
        for k, count in ((-5, 1), (0, 1), (3, 3), (20, 20), (10**9, 20)):
            assert len(await sources(rag, "otter", k=k)) == count


@pytest.mark.parametrize(
    "question",
    [
        *('" OR text : "', "NEAR(baker key, 5)", "baker AND NOT (key OR", "; DROP TABLE files; --"),
        *("baker* ^key {file}: -text + 'x'", "🦦 \0 \ud83d _ __ \u0301"),
        " ".join(map(str, range(50_000))),
    ],
)
async def test_no_question_is_a_syntax_error(rag: Rag, question: str) -> None:
    assert (await ask(rag, question))[0].endswith(question)
    assert await sources(rag, "baker") == [KEYS]


async def test_the_folder_is_followed(rag: Rag, notes: Path, load: Load) -> None:
    assert await sources(rag, "quokka") == []
    write(notes / "later/zoo.markdown", "A quokka moved in.")
    assert await sources(rag, "quokka") == ["later/zoo.markdown"]
    before = os.stat(notes / KEYS)
    write(notes / KEYS, "The pilot: has a spare key")  # of the same size and time
    os.utime(notes / KEYS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await sources(rag, "pilot") == [KEYS] and await sources(rag, "baker") == []
    shutil.rmtree(notes / "house")
    assert await sources(rag, "pilot") == []
    ids = await rag.index.execute("SELECT name, id FROM files~")
    async with load() as again:
        await ask(again, "otter")
        assert await rag.index.execute("SELECT name, id FROM files~") == ids  # not read again
        assert again.progress == f"{notes}: 2 files, 3 passages"


async def test_two_proxies_with_two_folders_have_two_indexes(
    rag: Rag, tmp_path: Path, load: Load
) -> None:
    write(tmp_path / "other/zoo.md", "A quokka moved in.")
    async with load(folder=str(tmp_path / "other")) as two:
        for _ in range(3):
            assert await sources(rag, "barrel quokka") == [MAY]
            assert await sources(two, "barrel quokka") == ["zoo.md"]


async def test_an_index_that_no_proxy_follows_is_deleted_after_some_days(
    notes: Path, load: Load
) -> None:
    async with load(max_file=5000) as old:
        await ask(old, "otter")
        await old.index.execute("UPDATE work SET until = until - 8 * 86400")
    async with load() as rag:
        assert await sources(rag, "rain barrel") == [MAY]

        assert len(await rag.index.execute("SELECT name FROM work")) == 2
        with pytest.raises(StoreError):
            await old.index.execute("SELECT id FROM files~")


BUILDS = "UPDATE work SET owner = 'another proxy', until = now + 4 FROM clock"


async def test_while_another_proxy_reads_the_folder_a_question_uses_what_there_is(
    notes: Path, load: Load
) -> None:
    async with load() as rag:
        await ask(rag, "otter")
        write(notes / "late.txt", "otter")
        await rag.index.execute(BUILDS)
        async with load(wait=0.1) as late:  # setup does not wait for the folder
            found, missing = await ask(late, "rain barrel", k=1), await ask(late, "otter")
            assert late.progress == f"{notes}: 1 of 3 files are still to be read"
            await rag.index.execute("UPDATE work SET owner = ''")
            deadline = time.monotonic() + 20
            while "late.txt" not in await sources(late, "otter"):
                assert time.monotonic() < deadline

    note = "\n(The folder is still being read.)"
    assert f"- {MAY} <" in found[1] and found[1].endswith(note)
    assert missing == (f"{NOTHING}\n\notter", NOT_FOUND + note)


async def test_a_folder_that_goes_away_is_found_as_it_was_until_it_is_back(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, load: Load
) -> None:
    async with load() as rag:
        await ask(rag, "rain barrel")
        os.rename(notes, tmp_path / "away")
        for _ in range(3):
            assert await sources(rag, "rain barrel") == [MAY]
        assert "not followed" in rag.progress
        os.rename(tmp_path / "away", notes)
        write(notes / "zoo.md", "A quokka moved in.")

        assert await sources(rag, "quokka") == ["zoo.md"]
        assert rag.progress == f"{notes}: 3 files, 4 passages"
    assert caplog.text.count("folder is not followed") == 1
    assert "rag" not in [thread.name for thread in threading.enumerate()]


@IN_A_FILE
async def test_only_visible_texts_of_the_folder_are_read(rag: Rag, notes: Path) -> None:
    write(notes.parent / "secret/plan.md", "otter")
    for name in (".hidden.md", ".git/notes.md", "otter.py", "otter.md.bak"):
        write(notes / name, "otter")
    for name, target in (("link.md", "plan.md"), ("linked", ""), ("nowhere.md", "x.md")):
        (notes / name).symlink_to(notes.parent / "secret" / target)
    (notes / "folder.md").mkdir()
    os.mkfifo(notes / "pipe.md")  # to open it would wait for a writer

    assert (await ask(rag, "otter"))[1] == NOT_FOUND


async def test_what_cannot_be_read_is_left_out_with_the_reason(
    notes: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "rubbish.md", bytes(range(256)))
    write(notes / "broken.pdf", "otter")
    write(notes / "pets.txt", "Собака спит, кошка ест.".encode("cp1251"))
    write(Path(os.fsdecode(os.fsencode(notes) + b"/k\xe4se.txt")), "x" * 2000)
    async with load(max_file=1000) as rag:
        await ask(rag, "otter")
        found, progress = await sources(rag, "кошка или baker"), rag.progress
    async with load() as rag:
        await ask(rag, "otter")
        assert "k\ufffdse" not in rag.progress

    assert sorted(found) == [KEYS, "pets.txt"]
    reasons = dict(re.findall(r"file is left out: (.+?): (.+)", caplog.text))
    assert reasons["k\ufffdse.txt"] == "has more than 1000 bytes"
    assert reasons["rubbish.md"] == "is not text" and "is broken" in reasons["broken.pdf"]
    start = f"{notes}: 3 files, 4 passages, encoding guessed: pets.txt (cp1251), left out: "
    assert progress.startswith(start) and "rubbish.md (is not text)" in progress


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"folder": "/nowhere"}, r"no folder /nowhere; change \[agents\.rag\.settings\] folder = "),
        ({"folders": {"a": "/nowhere"}}, r"no folder /nowhere; change .* folders\.a = '/nowhere'"),
        ({"max_chars": 0}, "max_chars: 0 must be above 0"),
        ({"wait": 0}, "wait: 0 must be above 0"),
    ],
)
@IN_A_FILE
async def test_settings_that_cannot_work_are_named(
    notes: Path, load: Load, settings: dict[str, Any], error: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        async with load(**settings):
            pass


@IN_A_FILE
async def test_the_folder_starts_at_home_or_beside_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    write(tmp_path / "mine/zoo.md", "A quokka moved in.")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))

    async with load(folder="~/mine") as rag:
        assert await sources(rag, "quokka") == ["zoo.md"]
    async with load(folder="sample") as rag:
        found = await sources(rag, "What did we decide in May?")
        assert found[0] == "decisions.md, Decisions > Meeting of 12 May 2026"


def no_database(file: Path) -> None:
    file.write_bytes(b"no database at all" * 100)


def damaged_inside(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


def gone(file: Path) -> None:
    shutil.rmtree(file.parent)


@IN_A_FILE
@pytest.mark.parametrize("damage", [no_database, damaged_inside, gone])
async def test_a_damaged_index_is_made_anew(
    notes: Path, tmp_path: Path, damage: Callable[[Path], None], load: Load
) -> None:
    for _ in range(2):
        async with load() as rag:
            assert await sources(rag, "rain barrel") == [MAY]
            damage(tmp_path / "data/index.db")
            assert await sources(rag, "rain barrel") == [MAY]
            damage(tmp_path / "data/index.db")


async def test_proxies_with_one_store_read_a_folder_once_and_find_the_same(
    notes: Path, load: Load
) -> None:
    async with load() as one, load() as two:
        assert [await sources(it, "barrel") for it in (one, two)] == [[MAY], [MAY]]
        for number in range(50):
            write(notes / f"{number}.txt", f"otter {number}")
        found = await asyncio.gather(*(sources(it, "otter 42", k=1) for it in (one, two) * 4))
        ids = await two.index.execute("SELECT count(*), max(id) FROM files~")

    assert found == [["42.txt"]] * 8
    assert ids == [(52, 52)]


async def test_copies_of_a_folder_on_several_machines_are_no_changes(
    notes: Path, load: Load
) -> None:
    async with load() as one, load() as two:
        await ask(one, "otter")
        for rag in (two, one):
            for file in (notes / "minutes.md", notes / KEYS):
                write(file, file.read_bytes())  # the same at another time
            assert await sources(rag, "rain barrel") == [MAY]
            assert await rag.index.execute("SELECT max(id) FROM files~") == [(2,)]


INDEXING = """
import asyncio, sys
from pathlib import Path
from kernel.postgres import Postgres
from kernel.sqlite import SQLite
from plugins.rag_agent.follower import Follower
from plugins.rag_agent.index import SCHEMA, Index

async def main(where, name, folder):
    url = where.startswith("postgresql:")
    store = Postgres(where).store("rag", SCHEMA) if url else SQLite("rag", Path(where), SCHEMA)
    Follower(Index(store, name), {"": Path(folder)}, 10**7)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_when_the_proxy_that_reads_a_folder_is_killed_another_one_goes_on(
    notes: Path, load: Load, where: str
) -> None:
    async with load() as rag:
        await ask(rag, "otter")  # the tables are there
    for number in range(200):
        write(notes / f"{number:03}.txt", "\n\n".join([f"otter{number} {'swims ' * 120}"] * 9))
    command = [sys.executable, "-c", INDEXING, where, rag.index.name, str(notes)]
    process = await asyncio.create_subprocess_exec(*command, cwd=FOLDER.parents[1])
    try:
        await some_are_read(rag.index, 20)
        async with load(wait=0.1) as other:
            assert await sources(other, "otter1", k=1) == ["001.txt"]
            process.kill()
            before = await some_are_read(rag.index, 21)
            await some_are_read(rag.index, 202)
            await other.follower.catch_up(20)
            found = [await sources(other, f"otter{n}", k=1) for n in (100, 150, 199)]
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    assert before < 202 and found == [["100.txt"], ["150.txt"], ["199.txt"]]
    ((last,),) = await rag.index.execute("SELECT max(id) FROM files~")
    assert last <= 203  # each was read once, but for the one that was being read


async def some_are_read(index: Index, least: int) -> int:
    """Wait until so many files are in an index; return how many are."""
    async with asyncio.timeout(60):
        while True:
            ((count,),) = await index.execute("SELECT count(*) FROM files~")
            if count >= least:
                return int(count)


@IN_POSTGRESQL
async def test_a_database_that_goes_away_is_found_again(
    notes: Path, load: Load, postgres: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with load() as rag:
        assert await sources(rag, "rain barrel") == [MAY]
        postgres.stop()
        try:
            for _ in range(2):
                with pytest.raises(StoreError):
                    await ask(rag, "rain barrel")
            assert "not followed" in rag.progress
        finally:
            postgres.start()
        write(notes / "zoo.md", "A quokka moved in.")

        assert await sources(rag, "quokka") == ["zoo.md"]
    assert caplog.text.count("folder is not followed") == 1
    assert "quokka" not in caplog.text and "barrel" not in caplog.text


@IN_POSTGRESQL
async def test_from_a_database_that_only_reads_a_question_gets_what_is_there(
    notes: Path, load: Load, postgres: Cluster, where: str
) -> None:
    async with load(embed_model="brain") as rag:
        await ask(rag, "cask", model=Brain())
    name = where.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    write(notes / "zoo.md", "A quokka moved in.")
    async with load(embed_model="brain") as rag:
        assert await sources(rag, "cask", k=1, model=Brain()) == [MAY]
        assert (await ask(rag, "quokka", model=Brain(), k=1))[1].endswith("still being read.)")
        assert "not followed" in rag.progress


class Brain:
    """An embedding model that knows which words mean the same; it stands for `context.ask`.

    `error`, `embed`, `dims` and `most` may be changed; `asked` is what was to be embedded.
    """

    MEANINGS = {"physician": 0, "doctor": 0, "barrel": 1, "cask": 1, "key": 2, "baker": 2}

    def __init__(self, embed: Callable[[str], Any] | None = None) -> None:
        self.error: Exception | None = None
        self.dims = 8
        self.embed = embed or self.meaning
        self.most = 1000  # vectors in one answer
        self.asked: list[list[str]] = []

    def meaning(self, text: str) -> list[float]:
        vector = [0.01] * self.dims
        for word in re.findall(r"\w+", text.lower()):
            vector[self.MEANINGS.get(word, self.dims - 1)] += 1 if word in self.MEANINGS else 0.1
        return vector

    async def __call__(self, path: str, body: Payload) -> Any:
        assert path == "/api/embed" and body["model"] == "brain"
        self.asked.append(body["input"])
        if self.error:
            raise self.error
        return {"embeddings": [self.embed(text) for text in body["input"]][: self.most]}


@pytest.fixture
async def meaning(notes: Path, load: Load) -> AsyncIterator[Rag]:
    """The agent with an embedding model."""
    async with load(embed_model="brain") as rag:
        yield rag


async def all_embedded(rag: Rag, brain: Brain) -> None:
    """Wait until what has no vector was given one, or could not be."""
    await rag.vectors.begin(a_context("otter", brain))


async def test_with_an_embedding_model_other_words_of_that_meaning_are_found(
    notes: Path, load: Load
) -> None:
    brain = Brain()
    for _ in range(2):
        async with load(embed_model="brain") as rag:
            assert await sources(rag, "cask", k=1, model=brain) == [MAY]
            assert rag.progress == f"{notes}: 2 files, 3 passages; 3 of 3 passages have vectors"
    found = await rag.index.execute("SELECT vector FROM vectors~")
    stored = [array("f", data) for (data,) in found]

    assert f"{MAY}\nWe decided to buy a rain barrel." in brain.asked[0]
    assert [len(texts) for texts in brain.asked] == [3, 1, 1]  # a passage once
    assert [math.hypot(*vector) for vector in stored] == pytest.approx([1, 1, 1])


async def test_only_what_changed_is_embedded_again(
    meaning: Rag, notes: Path, tmp_path: Path
) -> None:
    brain = Brain()
    await ask(meaning, "cask", model=brain)
    write(notes / KEYS, "The doctor has a spare key.")
    (notes / "minutes.md").unlink()

    assert await sources(meaning, "physician", model=brain) == [KEYS]
    assert [len(texts) for texts in brain.asked] == [3, 1, 1, 1]
    assert await meaning.index.execute("SELECT count(*) FROM vectors~") == [(1,)]


async def test_until_most_passages_have_vectors_words_alone_decide(notes: Path, load: Load) -> None:
    brain = Brain()
    async with load(embed_model="brain", embed_batch=2) as rag:
        first = await ask(rag, "cask", model=brain)  # three are missing: not waited for
        await all_embedded(rag, brain)

        assert first[1] == NOT_FOUND and await sources(rag, "cask", k=1, model=brain) == [MAY]
    assert [len(texts) for texts in brain.asked] == [2, 1, 1]


@pytest.mark.parametrize(
    "nonsense", [OSError("down"), [], [math.nan] * 8, [None] * 8, ["a"], None, 7, {}]
)
@IN_A_FILE
async def test_a_model_that_fails_costs_nothing_but_meaning(
    meaning: Rag, caplog: pytest.LogCaptureFixture, nonsense: Any
) -> None:
    brain = Brain(lambda text: nonsense)
    brain.error = nonsense if isinstance(nonsense, Exception) else None
    assert await sources(meaning, "barrel", model=brain) == [MAY]
    assert "passages have no vectors" in caplog.text
    assert meaning.progress.endswith("; 0 of 3 passages have vectors")
    brain.error, brain.embed = None, brain.meaning
    assert await sources(meaning, "cask", k=1, model=brain) == [MAY]
    brain.error = OSError("down")
    assert await sources(meaning, "barrel", model=brain) == [MAY]
    assert caplog.messages[-1].startswith("question has no vector: ")


async def test_vectors_of_several_lengths_or_too_few_are_none(meaning: Rag, tmp_path: Path) -> None:
    brain = Brain(lambda text: [1.0] * len(text))
    assert await sources(meaning, "barrel", model=brain) == [MAY]
    brain.embed, brain.most = brain.meaning, 2
    assert await sources(meaning, "barrel", model=brain) == [MAY]
    assert await meaning.index.execute("SELECT count(*) FROM vectors~") == [(0,)]


@IN_A_FILE
async def test_one_passage_that_the_model_cannot_read_does_not_stop_the_others(
    notes: Path, load: Load
) -> None:
    for number in range(20):
        write(notes / f"{number}.txt", f"{'doctor ' * 9} {number}")
    brain = Brain()
    brain.embed = lambda text: [math.nan] if "baker" in text else brain.meaning(text)
    async with load(embed_model="brain", embed_batch=1) as rag:
        for _ in range(2):  # each time until one fails
            await ask(rag, "cask", model=brain)
            await all_embedded(rag, brain)

        assert rag.progress.endswith("22 of 23 passages have vectors")
        assert await sources(rag, "cask", k=1, model=brain) == [MAY]
        assert await rag.index.execute("SELECT count(*) FROM vectors~") == [(22,)]


async def test_vectors_of_another_length_take_the_place_of_the_first(
    meaning: Rag, tmp_path: Path
) -> None:
    brain = Brain()
    await ask(meaning, "cask", model=brain)
    brain.dims = 16

    assert (await ask(meaning, "cask", k=1, model=brain))[1] == NOT_FOUND
    assert await sources(meaning, "cask", k=1, model=brain) == [MAY]
    assert await meaning.index.execute("SELECT DISTINCT length(vector) FROM vectors~") == [(64,)]


ROW = ("otter", "otter", "", "otter")  # title, body, headings, text
FILE = (b"a", "a", "", "", "", "")  # path, name, stamp, digest, guess, problem


@pytest.fixture
async def index(open_store: OpenStore) -> Index:
    index = Index(open_store("rag", SCHEMA), "test")
    await index.known()
    return index


async def test_a_vector_that_comes_too_late_belongs_to_no_passage(index: Index) -> None:
    vectors = Vectors(index, "brain", 1)
    await index.put(FILE, [ROW], 1)
    ((late,),) = await index.execute("SELECT id FROM passages~")
    await index.put(FILE, [ROW], 1)
    await vectors.store([late], [normalised([1.0, 2.0])])

    assert await vectors.count() == (1, 0, None)


@IN_A_FILE
async def test_the_end_of_the_proxy_does_not_wait_for_vectors(notes: Path, load: Load) -> None:
    arrived = asyncio.Event()

    async def forever(path: str, body: Payload) -> None:
        arrived.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(5), load(embed_model="brain", embed_batch=1) as rag:
        await ask(rag, "cask", model=forever)
        await arrived.wait()


@pytest.mark.parametrize(
    ("where", "extension"),
    [("sqlite", False), ("postgresql", False), ("postgresql", True)],
    indirect=["where"],
)
async def test_of_many_vectors_the_nearest_are_found(index: Index, extension: bool) -> None:
    """The codes leave out most vectors: the nearest must not be among those."""
    rng = random.Random(7)
    vectors = Vectors(index, "random", 1)
    middle = [[rng.gauss(0, 1) for _ in range(96)] for _ in range(30)]

    def near_one() -> array[float]:
        return normalised([x + rng.gauss(0, 1) for x in rng.choice(middle)])

    many = [near_one() for _ in range(2000)]
    await index.put(FILE, [ROW] * len(many), len(many))
    ids = [row for (row,) in await index.execute("SELECT id FROM passages~ ORDER BY id")]
    await vectors.store(ids, many)
    if extension:
        await vectors.hasten()
        if not (await index.execute(HAS_INDEX, index.sql("near~")))[0][0]:
            pytest.skip("there is no pgvector here")
    hits = 0
    for _ in range(20):
        asked = near_one()
        scores = [sum(map(operator.mul, asked, other)) for other in many]
        best = sorted(range(len(many)), key=scores.__getitem__, reverse=True)[:5]
        async with index.transaction() as execute:
            near = (await vectors.near(execute, asked))[:5]
        hits += len({ids[place] for place in best} & set(near))

    assert hits >= 90  # of 100
