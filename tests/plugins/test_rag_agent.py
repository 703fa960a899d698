"""The RAG agent over real files and a real SQLite file.

First comes how files are read and cut, then what a request becomes and what is put under the
answer, then how the folders are followed and the index heals, and last vectors, from an embedding
model that knows some words. `write` gives each file a time of its own, and a question waits until
the folder is read, unless `wait` says otherwise: so no test depends on a clock.
"""

from __future__ import annotations

import asyncio
import copy
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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from kernel.agent import Context, Payload, Reply
from plugins.rag_agent.agent import INSTRUCTION, NOTHING, Rag
from plugins.rag_agent.index import Index, is_damage, put
from plugins.rag_agent.passages import CHUNK, passages
from plugins.rag_agent.reader import Unreadable, decoded, read
from plugins.rag_agent.vectors import Vectors, normalised

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


@pytest.mark.parametrize(
    ("text", "heading"),
    [
        ("On otters\n\nThey swim.\n", "On otters"),
        ("Dear otter,\n\nThey swim.\n", ""),
        ("An otter and\na yak\n\nThey swim.\n", ""),
        ("# An otter\n", ""),
    ],
)
def test_a_first_line_that_stands_alone_is_the_title_of_a_text(text: str, heading: str) -> None:
    assert [heading for heading, _ in cut(text, ".txt")] == [heading]


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
    (
        "cp1250",
        "Postanowiliśmy kupić beczkę na deszczówkę. Następne zebranie odbędzie się w czerwcu.",
    ),
    (
        "iso8859_2",
        "Postanowiliśmy kupić beczkę na deszczówkę. Następne zebranie odbędzie się w czerwcu.",
    ),
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


@pytest.mark.parametrize(
    "data", [bytes(range(256)) * 40, b"\0" * 5000, b"\x89PNG\r\n\x1a\n\0\1\2\3"]
)
def test_what_is_no_text_is_left_out(data: bytes) -> None:
    with pytest.raises(Unreadable, match="is not text"):
        decoded(data)


def a_pdf(*pages: str) -> bytes:
    """Return a PDF with one line of text on each page."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(count))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {count}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        fonts = "/Resources<</Font<</F1 3 0 R>>>>/MediaBox[0 0 612 792]"
        objects.append(f"<</Type/Page/Parent 2 0 R{fonts}/Contents {5 + 2 * number} 0 R>>")
        objects.append(f"<</Length {len(stream)}>>\nstream\n{stream}\nendstream")
    data, places = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(data)}\n%%EOF"
    return f"{data}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode()


def test_a_pdf_is_read_by_pages() -> None:
    assert cut(a_pdf("Contents", "Turn the otter off."), ".pdf") == [
        ("page 1", "Contents"),
        ("page 2", "Turn the otter off."),
    ]
    with pytest.raises(Unreadable, match="only pictures"):
        cut(a_pdf("", ""), ".pdf")


async def no_model(path: str, body: Payload) -> Any:
    raise AssertionError("no model was to be asked")


@asynccontextmanager
async def loaded(tmp_path: Path, **settings: Any) -> AsyncIterator[Rag]:
    """Set the agent up as the registry does; its data is in `tmp_path / "data"`."""
    agent = Rag()
    agent.settings = CONFIG["settings"] | {"folder": str(tmp_path / "notes"), "wait": 20} | settings
    agent._data_dir = tmp_path / "data"
    await asyncio.to_thread(agent.setup)
    try:
        yield agent
    finally:
        await agent.teardown()


def an_instance(rag: Rag, prompt: str, model: Any = no_model, **values: Any) -> Rag:
    """Return the agent as one request has it; `values` are its arguments and of its context."""
    agent = copy.copy(rag)
    agent.arguments = {"k": values.pop("k", 4), "in": values.pop("within", "")}
    fields = {"asked": True, "continuation": False, "explaining": False} | values
    agent.context = Context(
        request_id="1",
        model="demo",
        dialect="ollama",
        streams=True,
        user="",
        prompt=prompt,
        state={},
        log=logging.LoggerAdapter(logging.getLogger("test")),
        ask=model,
        listen=no_model,  # type: ignore[arg-type]
        **fields,
    )
    return agent


async def ask(
    rag: Rag, *texts: str, answer: str = "ok", model: Any = no_model, **values: Any
) -> tuple[str, str]:
    """Return what the model reads last, and what stands under its answer.

    `texts` are those of user and model in turn, the last one the prompt.
    """
    agent = an_instance(rag, texts[-1], model, **values)
    roles = itertools.cycle(("user", "assistant"))
    payload = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}
    changed = await agent.on_request(payload)
    shown = "".join([await agent.on_chunk(sign) for sign in answer]) + await agent.on_end()
    return changed["messages"][-1]["content"], shown.removeprefix(answer)


def sources(below: str) -> list[str]:
    """Return the sources without their links."""
    return re.findall(r"\n- (.*) <.*>", below)


def rows(tmp_path: Path, query: str) -> list[Any]:
    (file,) = (tmp_path / "data").glob("index-*.db")
    with closing(sqlite3.connect(file)) as db:
        return db.execute(query).fetchall()


def left_out(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the files that the log says were left out, and why."""
    found = [record for record in caplog.records if record.message == "file is left out"]
    return [tuple(vars(record)["fields"].values()) for record in found]


MAY = "minutes.md, Minutes > Meeting of 12 May"
APRIL = "minutes.md, Minutes > Meeting of 14 April"


async def test_what_fits_stands_before_the_question_and_its_sources_under_the_answer(
    notes: Path, tmp_path: Path
) -> None:
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "What did we decide in May?")

    assert text.startswith(f"{INSTRUCTION}\n\n[1] {MAY}\nWe decided to buy a rain barrel.\n\n[2] ")
    assert text.endswith("\n\nWhat did we decide in May?")
    link = (notes / "minutes.md").as_uri()
    assert below == f"\n\nSources:\n- {MAY} <{link}>\n- {APRIL} <{link}>"


async def test_a_link_may_begin_with_an_address_of_the_operator(
    notes: Path, tmp_path: Path
) -> None:
    write(notes / "Größe [1] (alt).txt", "otter")
    async with loaded(tmp_path, base_url="https://wiki.example/notes/") as rag:
        _, below = await ask(rag, "otter")

    assert below.endswith(" <https://wiki.example/notes/Gr%C3%B6%C3%9Fe%20%5B1%5D%20%28alt%29.txt>")


@pytest.mark.parametrize("question", ["house", "April", "GREENHOUSES", "repairing"])
async def test_names_headings_and_other_forms_of_a_word_are_found(
    notes: Path, tmp_path: Path, question: str
) -> None:
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, question)

    assert ("house/keys.txt" if question == "house" else APRIL) in sources(below)


LANGUAGES = tomllib.loads((FOLDER / "bench/languages.toml").read_text(encoding="utf-8"))


async def test_in_each_language_the_right_passage_is_among_five_for_nine_of_ten_questions(
    tmp_path: Path,
) -> None:
    for language, pairs in LANGUAGES.items():
        for number, (text, _) in enumerate(pairs):
            write(tmp_path / f"notes/{language}{number}.txt", text)
    hits = {}
    async with loaded(tmp_path) as rag:
        for language, pairs in LANGUAGES.items():
            answers = [(text, await ask(rag, question, k=5)) for text, question in pairs]
            hits[language] = sum(passage in text for passage, (text, _) in answers) / len(pairs)

    assert len(hits) >= 12
    assert {language: share for language, share in hits.items() if share < 0.9} == {}


async def test_over_articles_the_right_passage_is_among_five_for_nine_of_ten_questions(
    tmp_path: Path,
) -> None:
    """An embedding model that knows nothing at all must not spoil that."""
    rng = random.Random(7)
    brain = Brain(lambda text: [rng.gauss(0, 1) for _ in range(8)])
    articles = tomllib.loads((FOLDER / "bench/rag.toml").read_text(encoding="utf-8"))["articles"]
    for article in articles:
        write(tmp_path / "notes" / article["name"], article["text"])
    for model in ("", "brain"):
        async with loaded(tmp_path, embed_model=model, embed_batch=1000) as rag:
            hits = [
                " ".join(answer.split())
                in " ".join((await ask(rag, question, k=5, model=brain))[0].split())
                for article in articles
                for question, answer, kind in article["questions"]
                if kind == "words"
            ]
        assert len(hits) >= 40 and sum(hits) >= 0.9 * len(hits)
    assert len(brain.asked) >= len(hits)


SMALL_TALK = [
    *("hi", "Thanks!", "ok", "Good, thank you very much", "¡Hola!", "Merci !", "danke schön"),
    *("谢谢", "你好！", "ありがとうございます", "こんにちは", "감사합니다", "ขอบคุณครับ", "спасибо!"),
    *("teşekkürler", "شكرا", "How are you?", "Was ist das?", "", " \n", "?!"),
]


@pytest.mark.parametrize("prompt", SMALL_TALK)
async def test_small_talk_is_no_search(notes: Path, tmp_path: Path, prompt: str) -> None:
    write(notes / "all.txt", "\n".join(SMALL_TALK))
    async with loaded(tmp_path) as rag:
        assert await ask(rag, prompt) == (prompt, "")


@pytest.mark.parametrize(
    "prompt", ["And when?", "und wann?", "それはいつですか？", "为什么？", "متى؟"]
)
async def test_a_question_without_a_telling_word_is_about_the_last_that_had_one(
    notes: Path, tmp_path: Path, prompt: str
) -> None:
    async with loaded(tmp_path) as rag:
        text, below = await ask(rag, "spare key", "ok", "the barrel", "ok", "thanks", "ok", prompt)
        assert await ask(rag, "hi", "ok", prompt) == (prompt, "")

    assert text.endswith(f"\n\n{prompt}") and sources(below) == [MAY]


async def test_where_nothing_fits_only_who_asked_is_told(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        assert await ask(rag, "quokka?") == (f"{NOTHING}\n\nquokka?", NOT_FOUND)
        assert await ask(rag, "quokka?", asked=False) == ("quokka?", "")


async def test_a_continuation_is_left_alone(notes: Path, tmp_path: Path) -> None:
    async with loaded(tmp_path) as rag:
        assert await ask(rag, "barrel", continuation=True) == ("barrel", "")


@pytest.mark.parametrize(
    "answer",
    ["", " \n", '{"a": 1}', " [1, 2]\n", '```json\n{"a": "```"}\n```', "```\n[]\n```\n"],
)
async def test_under_json_and_nothing_there_are_no_sources(
    notes: Path, tmp_path: Path, answer: str
) -> None:
    async with loaded(tmp_path) as rag:
        for question in ("rain barrel", "quokka"):
            assert (await ask(rag, question, answer=answer))[1] == ""
        assert sources((await ask(rag, "barrel", answer=f"See: {answer}"))[1]) == [MAY]


@pytest.mark.parametrize(
    "own", ["Sources:\n- a.md", "**Sources:**\n\n* a\n* b\n", "Sources:\n[1] a"]
)
async def test_a_list_of_sources_that_the_model_began_goes_on(
    notes: Path, tmp_path: Path, own: str
) -> None:
    async with loaded(tmp_path) as rag:
        _, below = await ask(rag, "rain barrel", answer=f"A barrel.\n\n{own}")

    assert below.startswith(f"\n- {MAY} <")


async def test_earlier_sources_are_taken_out_of_the_conversation(
    notes: Path, tmp_path: Path
) -> None:
    async with loaded(tmp_path) as rag:
        shown = ["A barrel." + (await ask(rag, text))[1] for text in ("barrel April", "quokka")]
        shown.append("It says:\n\nSources: none")
        parts = [{"type": "text", "text": shown[0] + "\n\n[signed]"}, {"type": "image_url"}]
        messages = [{"role": "assistant", "content": it} for it in (*shown, parts, None)]
        user = {"role": "user", "content": shown[0]}
        changed = await an_instance(rag, "hi").on_request({"messages": [*messages, user]})

    contents = [message["content"] for message in changed["messages"]]
    assert contents[:3] == ["A barrel.", "A barrel.", shown[2]]
    assert contents[3][0]["text"] == "A barrel.\n\n[signed]" and contents[5] == shown[0]


async def test_of_copies_one_is_given(notes: Path, tmp_path: Path) -> None:
    for number in range(30):
        write(notes / f"copy{number}/minutes.md", MINUTES)
    write(notes / "other.txt", "A barrel is no cask.")
    brain = Brain()
    for model in ("", "brain"):
        async with loaded(tmp_path, embed_model=model, embed_batch=1000) as rag:
            text, below = await ask(rag, "rain barrel", k=5, model=brain)

            assert text.count("We decided to buy a rain barrel.") == 1
            assert "other.txt" in sources(below)


async def test_a_prompt_may_choose_one_of_several_folders(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "home/cellar.md", "# Cellar\n\nAn old barrel of wine.")
    folders = {"work": str(notes), "home": str(tmp_path / "home")}
    async with loaded(tmp_path, folders=folders, folder="/nowhere", embed_model="brain") as rag:
        brain = Brain()
        found = {
            name: sorted(
                sources(
                    (await ask(rag, "barrel", within=name, k=1 + 9 * (not name), model=brain))[1]
                )
            )
            for name in ("", "work", "HOME")
        }
        with pytest.raises(Reply) as reply:
            await ask(rag, "barrel", within="/etc")
        assert await ask(rag, "hi", within="work") == ("hi", "")

    assert str(reply.value.text).endswith("no folder of that name; known are: work, home")
    assert found["work"] == [f"work/{MAY}"] and found["HOME"] == ["home/cellar.md, Cellar"]
    assert {f"work/{MAY}", "home/cellar.md, Cellar"} < set(found[""])


async def test_only_the_best_passages_that_fit_are_given(notes: Path, tmp_path: Path) -> None:
    for number in range(30):
        write(notes / f"{number:02}.txt", f"otter {number} {'x' * 80}")
    async with loaded(tmp_path, max_chars=250) as rag:
        text, below = await ask(rag, "otter")
        assert text.count("otter ") == 2 and len(sources(below)) == 2
        assert (await ask(rag, "baker"))[0].count("baker") == 2
    async with loaded(tmp_path, max_chars=20) as rag:
        assert (await ask(rag, "baker"))[0].split("\n\n")[1] == "[1] house/keys.txt\nT"
    async with loaded(tmp_path, max_chars=100_000) as rag:
        for k, count in ((-5, 1), (0, 1), (3, 3), (20, 20), (10**9, 20)):
            assert len(sources((await ask(rag, "otter", k=k))[1])) == count


@pytest.mark.parametrize(
    "question",
    [
        '" OR text : "',
        "NEAR(baker key, 5)",
        "baker AND NOT (key OR",
        "baker* ^key {file}: -text + 'x'",
        "; DROP TABLE files; --",
        "🦦 \0 \ud83d _ __ \u0301",
        " ".join(map(str, range(50_000))),
    ],
)
async def test_no_question_is_a_syntax_error(notes: Path, tmp_path: Path, question: str) -> None:
    async with loaded(tmp_path) as rag:
        assert (await ask(rag, question))[0].endswith(question)
        assert sources((await ask(rag, "baker"))[1]) == ["house/keys.txt"]


async def test_the_folder_is_followed(notes: Path, tmp_path: Path) -> None:
    async def found(question: str) -> list[str]:
        return sources((await ask(rag, question))[1])

    async with loaded(tmp_path) as rag:
        assert await found("quokka") == []
        write(notes / "later/zoo.markdown", "A quokka moved in.")
        assert await found("quokka") == ["later/zoo.markdown"]
        before = os.stat(notes / "house/keys.txt")
        write(notes / "house/keys.txt", "The pilot: has a spare key")  # of the same size and time
        os.utime(notes / "house/keys.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert await found("pilot") == ["house/keys.txt"] and await found("baker") == []
        shutil.rmtree(notes / "house")
        assert await found("pilot") == []
        ids = rows(tmp_path, "SELECT name, id FROM files")
    async with loaded(tmp_path) as rag:
        await found("otter")
        assert rows(tmp_path, "SELECT name, id FROM files") == ids  # not read again
        assert rag.progress == "2 files, 3 passages"


async def test_two_proxies_with_two_folders_have_two_indexes(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "other/zoo.md", "A quokka moved in.")
    async with loaded(tmp_path) as one, loaded(tmp_path, folder=str(tmp_path / "other")) as two:
        for _ in range(3):
            assert sources((await ask(one, "barrel quokka"))[1]) == [MAY]
            assert sources((await ask(two, "barrel quokka"))[1]) == ["zoo.md"]
    files = [file for file in (tmp_path / "data").iterdir() if file.suffix == ".db"]
    assert len(files) == 2


async def test_while_the_folder_is_read_a_question_uses_what_there_is(
    notes: Path, tmp_path: Path
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "otter")
    write(notes / "late.txt", "otter")
    (file,) = (tmp_path / "data").glob("*.db")
    with closing(sqlite3.connect(file)) as db:
        db.execute("BEGIN IMMEDIATE")  # what writes waits until this is closed
        async with loaded(tmp_path, wait=0.1) as rag:  # setup does not wait for the folder
            found, missing = await ask(rag, "rain barrel", k=1), await ask(rag, "otter")
            assert rag.progress == "1 of 3 files are still to be read"
            db.close()
            deadline = time.monotonic() + 20
            while "late.txt" not in (await ask(rag, "otter"))[1]:
                assert time.monotonic() < deadline

    note = "\n(The folder is still being read.)"
    assert sources(found[1]) == [MAY] and found[1].endswith(note)
    assert missing == (f"{NOTHING}\n\notter", NOT_FOUND + note)


async def test_a_folder_that_goes_away_is_found_as_it_was_until_it_is_back(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "rain barrel")
        os.rename(notes, tmp_path / "away")
        for _ in range(3):
            assert sources((await ask(rag, "rain barrel"))[1]) == [MAY]
        assert "not followed" in rag.progress
        os.rename(tmp_path / "away", notes)
        write(notes / "zoo.md", "A quokka moved in.")

        assert sources((await ask(rag, "quokka"))[1]) == ["zoo.md"]
        assert rag.progress == "3 files, 4 passages"
    assert caplog.messages.count("folder is not followed") == 1
    assert "rag" not in [thread.name for thread in threading.enumerate()]


async def test_only_visible_texts_of_the_folder_are_read(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret/plan.md", "otter")
    for name in (".hidden.md", ".git/notes.md", "otter.py", "otter.md.bak"):
        write(notes / name, "otter")
    (notes / "link.md").symlink_to(tmp_path / "secret/plan.md")
    (notes / "linked").symlink_to(tmp_path / "secret")
    (notes / "loop.md").symlink_to(notes / "loop.md")
    (notes / "folder.md").mkdir()
    os.mkfifo(notes / "pipe.md")  # to open it would wait for a writer
    (notes / "inside.md").symlink_to(notes / "house/keys.txt")
    async with loaded(tmp_path) as rag:
        assert (await ask(rag, "otter"))[1] == NOT_FOUND
        assert sources((await ask(rag, "inside"))[1]) == ["inside.md"]


async def test_what_cannot_be_read_is_left_out_with_the_reason(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(notes / "rubbish.md", bytes(range(256)))
    write(notes / "broken.pdf", "otter")
    write(notes / "pets.txt", "Собака спит, кошка ест.".encode("cp1251"))
    write(Path(os.fsdecode(os.fsencode(notes) + b"/k\xe4se.txt")), "x" * 2000)
    async with loaded(tmp_path, max_file=1000) as rag:
        await ask(rag, "otter")
        _, below = await ask(rag, "кошка или baker")
        progress = rag.progress
    async with loaded(tmp_path) as rag:
        assert sources((await ask(rag, "käse", k=1))[1]) in ([], ["k\ufffdse.txt"])
        assert "k\ufffdse" not in rag.progress

    assert sorted(sources(below)) == ["house/keys.txt", "pets.txt"]
    reasons = dict(left_out(caplog))
    assert reasons["k\ufffdse.txt"] == "has more than 1000 bytes"
    assert reasons["rubbish.md"] == "is not text" and "is broken" in reasons["broken.pdf"]
    assert progress.startswith(
        "3 files, 4 passages, encoding guessed: pets.txt (cp1251), left out: "
    )
    assert "rubbish.md (is not text)" in progress


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"folder": "/nowhere"},
            r"no folder /nowhere; change \[agents\.rag\.settings\] folder = '/nowhere'",
        ),
        (
            {"folders": {"a": "/nowhere"}},
            r"no folder /nowhere; change \[agents\.rag\.settings\] folders\.a = ",
        ),
        ({"max_chars": 0}, "max_chars: 0 must be above 0"),
        ({"wait": 0}, "wait: 0 must be above 0"),
    ],
)
async def test_settings_that_cannot_work_are_named(
    notes: Path, tmp_path: Path, settings: dict[str, Any], error: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        async with loaded(tmp_path, **settings):
            pass


async def test_the_folder_starts_at_home_or_beside_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine/zoo.md", "A quokka moved in.")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))

    async with loaded(tmp_path, folder="~/mine") as rag:
        assert sources((await ask(rag, "quokka"))[1]) == ["zoo.md"]
    async with loaded(tmp_path, folder="sample") as rag:
        _, below = await ask(rag, "What did we decide in May?")
        assert sources(below)[0] == "decisions.md, Decisions > Meeting of 12 May 2026"


def no_database(file: Path) -> None:
    file.write_bytes(b"no database at all" * 100)


def damaged_inside(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


def damaged_text(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE chunks SET text = CAST(x'ff' AS TEXT)")


def gone(file: Path) -> None:
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("damage", [no_database, damaged_inside, damaged_text, gone])
async def test_a_damaged_index_is_made_anew(
    notes: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with loaded(tmp_path) as rag:
        await ask(rag, "rain barrel")
        damage(rag.index.file)
        assert sources((await ask(rag, "rain barrel"))[1]) == [MAY]
        damage(rag.index.file)
    async with loaded(tmp_path) as rag:
        assert sources((await ask(rag, "rain barrel"))[1]) == [MAY]


@pytest.mark.parametrize(
    ("code", "damage"),
    [("CORRUPT_VTAB", True), ("NOTADB", True), ("IOERR_SHORT_READ", True), ("BUSY_SNAPSHOT", False)]
    + [("FULL", False), ("READONLY", False)],
)
def test_only_for_damage_the_index_is_removed(code: str, damage: bool) -> None:
    error = sqlite3.OperationalError()
    error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")

    assert is_damage(error) is damage


async def test_requests_at_once_find_the_same(notes: Path, tmp_path: Path) -> None:
    """Two agents stand for two processes: they share nothing but the files."""
    async with loaded(tmp_path) as one, loaded(tmp_path) as two:
        assert [sources((await ask(rag, "barrel"))[1]) for rag in (one, two)] == [[MAY], [MAY]]
        for number in range(50):
            write(notes / f"{number}.txt", f"otter {number}")
        one.index.file.unlink()
        answers = await asyncio.gather(*(ask(rag, "otter 42", k=1) for rag in (one, two) * 4))

    assert {tuple(sources(below)) for _, below in answers} == {("42.txt",)}


INDEXING = """
import sys, time
from pathlib import Path
from plugins.rag_agent.follower import Follower
from plugins.rag_agent.index import Index

file, folder = map(Path, sys.argv[1:])
Follower(Index(file), {"": folder}, 10**7, print)
time.sleep(60)
"""


async def test_a_process_that_is_killed_in_the_middle_leaves_an_index_that_heals(
    notes: Path, tmp_path: Path
) -> None:
    for number in range(400):
        write(notes / f"{number:03}.txt", "\n\n".join([f"otter{number} {'swims ' * 120}"] * 9))
    async with loaded(tmp_path) as rag:
        file = rag.index.file
    gone(file)
    kill_while_indexing(file, notes)
    (some,) = rows(tmp_path, "SELECT count(*) FROM files")[0]
    whole = rows(tmp_path, "PRAGMA integrity_check")
    async with loaded(tmp_path) as rag:
        found = [sources((await ask(rag, f"otter{number}", k=1))[1]) for number in (100, 200, 399)]

    assert 0 < some < 402 and whole == [("ok",)]
    assert found == [["100.txt"], ["200.txt"], ["399.txt"]]


def kill_while_indexing(file: Path, folder: Path) -> None:
    """Index a folder in another process, and kill that as soon as some files are there."""
    command = [sys.executable, "-c", INDEXING, str(file), str(folder)]
    out = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=FOLDER.parents[1], stdout=out) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as db:
                if db.execute("SELECT count(*) FROM files").fetchone()[0] > 20:
                    break
        process.kill()


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


async def all_embedded(rag: Rag, brain: Brain) -> None:
    """Wait until what has no vector was given one, or could not be."""
    await rag.vectors.begin(an_instance(rag, "otter", brain).context)


async def test_with_an_embedding_model_other_words_of_that_meaning_are_found(
    notes: Path, tmp_path: Path
) -> None:
    brain = Brain()
    for _ in range(2):
        async with loaded(tmp_path, embed_model="brain") as rag:
            assert sources((await ask(rag, "cask", k=1, model=brain))[1]) == [MAY]
            assert rag.progress == "2 files, 3 passages; 3 of 3 passages have vectors"
    stored = [array("f", data) for (data,) in rows(tmp_path, "SELECT vector FROM vectors")]

    assert f"{MAY}\nWe decided to buy a rain barrel." in brain.asked[0]
    assert [len(texts) for texts in brain.asked] == [3, 1, 1]  # a passage once
    assert [math.hypot(*vector) for vector in stored] == pytest.approx([1, 1, 1])


async def test_only_what_changed_is_embedded_again(notes: Path, tmp_path: Path) -> None:
    brain = Brain()
    async with loaded(tmp_path, embed_model="brain") as rag:
        await ask(rag, "cask", model=brain)
        write(notes / "house/keys.txt", "The doctor has a spare key.")
        (notes / "minutes.md").unlink()
        _, below = await ask(rag, "physician", model=brain)

    assert [len(texts) for texts in brain.asked] == [3, 1, 1, 1]
    assert sources(below) == ["house/keys.txt"]
    assert rows(tmp_path, "SELECT count(*) FROM vectors") == [(1,)]


async def test_until_most_passages_have_vectors_words_alone_decide(
    notes: Path, tmp_path: Path
) -> None:
    brain = Brain()
    async with loaded(tmp_path, embed_model="brain", embed_batch=2) as rag:
        first = await ask(rag, "cask", model=brain)  # three are missing: not waited for
        await all_embedded(rag, brain)
        then = await ask(rag, "cask", k=1, model=brain)

    assert (first[1], sources(then[1])) == (NOT_FOUND, [MAY])
    assert [len(texts) for texts in brain.asked] == [2, 1, 1]


@pytest.mark.parametrize(
    "nonsense", [OSError("down"), [], [math.nan] * 8, [None] * 8, ["a"], None, 7, {}]
)
async def test_a_model_that_fails_costs_nothing_but_meaning(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, nonsense: Any
) -> None:
    brain = Brain(lambda text: nonsense)
    brain.error = nonsense if isinstance(nonsense, Exception) else None
    async with loaded(tmp_path, embed_model="brain") as rag:
        assert sources((await ask(rag, "barrel", model=brain))[1]) == [MAY]
        assert "passages have no vectors" in caplog.messages
        assert rag.progress.endswith("; passages get no vectors, the log says why")
        brain.error, brain.embed = None, brain.meaning
        assert sources((await ask(rag, "cask", k=1, model=brain))[1]) == [MAY]
        brain.error = OSError("down")
        assert sources((await ask(rag, "barrel", model=brain))[1]) == [MAY]
    assert caplog.messages[-1].startswith("question has no vector: ")


async def test_vectors_of_several_lengths_or_too_few_are_none(notes: Path, tmp_path: Path) -> None:
    brain = Brain(lambda text: [1.0] * len(text))
    async with loaded(tmp_path, embed_model="brain") as rag:
        assert sources((await ask(rag, "barrel", model=brain))[1]) == [MAY]
        brain.embed, brain.most = brain.meaning, 2
        assert sources((await ask(rag, "barrel", model=brain))[1]) == [MAY]
        assert rows(tmp_path, "SELECT count(*) FROM vectors") == [(0,)]


async def test_one_passage_that_the_model_cannot_read_does_not_stop_the_others(
    notes: Path, tmp_path: Path
) -> None:
    for number in range(20):
        write(notes / f"{number}.txt", f"{'doctor ' * 9} {number}")
    brain = Brain()
    brain.embed = lambda text: [math.nan] if "baker" in text else brain.meaning(text)
    async with loaded(tmp_path, embed_model="brain", embed_batch=1) as rag:
        await ask(rag, "cask", model=brain)
        await all_embedded(rag, brain)

        assert rag.progress.endswith("22 of 23 passages have vectors")
        assert sources((await ask(rag, "cask", k=1, model=brain))[1]) == [MAY]
        assert rows(tmp_path, "SELECT count(*) FROM vectors") == [(22,)]


async def test_vectors_of_another_length_take_the_place_of_the_first(
    notes: Path, tmp_path: Path
) -> None:
    brain = Brain()
    async with loaded(tmp_path, embed_model="brain") as rag:
        await ask(rag, "cask", model=brain)
        brain.dims = 16
        first = await ask(rag, "cask", k=1, model=brain)
        then = await ask(rag, "cask", k=1, model=brain)

    assert (first[1], sources(then[1])) == (NOT_FOUND, [MAY])
    assert rows(tmp_path, "SELECT DISTINCT length(vector) FROM vectors") == [(64,)]


def test_a_vector_that_comes_too_late_belongs_to_no_passage(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    vectors = Vectors(index, "brain", 1, lambda text: None)
    with index.open() as db:
        put(db, "a", ["a", "", "", ""], [("", "otter")])
        ((late,),) = db.execute("SELECT id FROM chunks").fetchall()
        put(db, "a", ["a", "", "", ""], [("", "yak")])
    vectors.store([late], [normalised([1.0, 2.0])])

    assert vectors.load() == 1


async def test_the_end_of_the_proxy_does_not_wait_for_vectors(notes: Path, tmp_path: Path) -> None:
    arrived = asyncio.Event()

    async def forever(path: str, body: Payload) -> None:
        arrived.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(5), loaded(tmp_path, embed_model="brain", embed_batch=1) as rag:
        await ask(rag, "cask", model=forever)
        await arrived.wait()


def test_of_many_vectors_the_nearest_are_found(tmp_path: Path) -> None:
    """The codes leave out most vectors: the nearest must not be among those."""
    rng = random.Random(7)
    index = Index(tmp_path / "index.db")
    vectors = Vectors(index, "random", 1, lambda text: None)
    middle = [[rng.gauss(0, 1) for _ in range(96)] for _ in range(30)]

    def near_one() -> Sequence[float]:
        return normalised([x + rng.gauss(0, 1) for x in rng.choice(middle)])

    many = [near_one() for _ in range(2000)]
    with index.open() as db:
        put(db, "a", ["a", "", "", ""], [("", "otter")] * len(many))
        ids = [row for (row,) in db.execute("SELECT id FROM chunks")]
    vectors.store(ids, [array("f", vector) for vector in many])
    vectors.load()
    hits = 0
    with index.open() as db:
        for _ in range(20):
            asked = near_one()
            scores = [sum(map(operator.mul, asked, other)) for other in many]
            best = sorted(range(len(many)), key=scores.__getitem__, reverse=True)[:5]
            near = vectors.near(db, array("f", asked))[:5]
            hits += len({ids[place] for place in best} & set(near))

    assert hits >= 90  # of 100
