"""The agent translate: the answer arrives in the language that was named, but for its code."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.config import PluginsConfig
from kernel.registry import PluginRegistry
from plugins.translate_agent.code import FENCED, INLINE, Tags, split
from tests.support import FakeOllama, done, event, line, running, said, turn

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("typed", "language"),
    [
        ("/translate:de", "German"),
        ("/translate:DE", "German"),
        ("/translate:to=fr", "French"),
        ("/translate:Klingon", "Klingon"),
        ('/translate:"Swiss German"', "Swiss German"),
        ("/translate", "English"),
    ],
)
async def test_the_answer_is_translated_with_a_second_question(
    demo_url: str, tmp_path: Path, path: str, stream: bool, typed: str, language: str
) -> None:
    """The demo model repeats what it was sent: so its answer shows what the translator is told."""
    async with running(demo_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post(path, json=turn(f"{typed} why is it blue?", stream=stream))

    text = said(answer.content)
    assert f"[system] You are a translator. Translate what the user sends into {language}." in text
    assert text.endswith("[user] I am the demo model. I was sent:\n[user] why is it blue?")


async def test_the_translator_is_asked_coolly_and_once(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    async def second() -> None:
        if len(ollama.asked) == 1:
            ollama.answers(done(" Hallo \n"), kind="application/json", before=second)

    ollama.answers(line("Hel"), line("lo"), second, done())

    async with running(ollama_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de greet", stream=True))

    assert said(answer.content) == "Hallo"
    (asked,) = ollama.asked[1:]
    assert asked.json["options"] == {"temperature": 0}
    assert asked.json["messages"][1] == {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("reply", [done(""), done("  \n"), b"no json", b'{"error":"gone"}'])
async def test_an_answer_is_never_lost_to_its_translation(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path, reply: bytes
) -> None:
    async def second() -> None:
        ollama.answers(reply, kind="application/json")

    ollama.answers(line("Hello"), second, done())

    async with running(ollama_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de greet", stream=True))

    assert said(answer.content).startswith("Hello")


async def test_tool_calls_are_not_translated(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    calls: dict[str, Any] = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    ollama.answers(done("", message=calls))

    async with running(ollama_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de x", tools=[{}]))

    assert json.loads(answer.content)["message"]["tool_calls"] == calls["tool_calls"]
    assert len(ollama.asked) == 1


async def test_translate_shows_in_the_openai_dialect_frame_by_frame(
    demo_url: str, tmp_path: Path
) -> None:
    async with running(demo_url, PLUGINS, data=tmp_path) as client:
        body = turn("/translate:de x", stream=True)
        answer = await client.post("/v1/chat/completions", json=body)

    events = answer.content.split(b"\n\n")
    assert events[-2] == b"data: [DONE]" and len(events) > 5
    assert event("")[:6] == b"data: "


def translates(ollama: FakeOllama, answer: str, translator: Callable[[str], str]) -> None:
    """Let the upstream give `answer`, and from then on what `translator` makes of a question."""

    async def second() -> None:
        text = ollama.asked[-1].json["messages"][-1]["content"]
        ollama.answers(done(translator(text)), kind="application/json", before=second)

    async def first() -> None:
        ollama.answers(before=second)

    ollama.answers(line(answer), first, done())


async def translated(ollama_url: str, tmp_path: Path, **settings: Any) -> str:
    agents = {"translate": {"settings": settings}} if settings else {}
    async with running(ollama_url, PLUGINS, data=tmp_path, agents=agents) as client:
        answer = await client.post("/api/chat", json=turn("/translate:de how?", stream=True))
    return said(answer.content)


def questions(ollama: FakeOllama) -> list[str]:
    """Return what the translator was asked to translate."""
    return [asked.json["messages"][-1]["content"] for asked in ollama.asked[1:]]


BLOCK = "```sh\n$ pip  install x \n# why `not`?\n```"
ANSWER = f"First do `that`, then:\n\n{BLOCK}\n\nand ``a ` b`` is\n`that` too.\n"


async def test_code_goes_round_the_translation(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    translates(ollama, ANSWER, str.upper)

    text = await translated(ollama_url, tmp_path)

    assert text == f"FIRST DO `that`, THEN:\n\n{BLOCK}\n\nAND ``a ` b`` IS\n`that` TOO.\n"
    assert questions(ollama) == ["First do <c1/>, then:", "and <c1/> is\n<c2/> too."]
    assert "A tag like <c1/> stands for a word." in ollama.asked[1].json["messages"][0]["content"]


@pytest.mark.parametrize("answer", [BLOCK, f"{BLOCK}\n\n{BLOCK}\n", "`x`", "1. `x`:\n\n~~~\na"])
async def test_an_answer_that_is_only_code_is_no_question(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path, answer: str
) -> None:
    translates(ollama, answer, str.upper)

    assert await translated(ollama_url, tmp_path) == answer
    assert not questions(ollama)


@pytest.mark.parametrize("spoilt", ["", "<c1/><c1/>", "<c7/>", "<d1/>"])
async def test_code_stays_in_its_place_when_the_model_spoils_a_tag(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path, spoilt: str
) -> None:
    """Then paragraphs are asked for one by one, and at last what stands around the code."""
    translates(ollama, ANSWER, lambda text: re.sub("<c1/>", spoilt, text.upper(), flags=re.I))

    text = await translated(ollama_url, tmp_path)

    assert text == f"FIRST DO `that`, THEN:\n\n{BLOCK}\n\nAND ``a ` b`` IS\n`that` TOO.\n"
    assert questions(ollama)[1:3] == ["First do", ", then:"]


async def test_what_has_no_letters_is_no_question(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    translates(ollama, "see `a`, `b`.", lambda text: "siehe")

    assert await translated(ollama_url, tmp_path) == "siehe `a`, `b`."
    assert questions(ollama) == ["see <c1/>, <c2/>.", "see"]


async def test_a_good_paragraph_is_kept_when_another_one_lost_its_tag(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    translates(ollama, "one `a`\n\ntwo `b`", lambda text: text.upper().replace("TWO <C2/>", "TWO"))

    assert await translated(ollama_url, tmp_path) == "ONE `a`\n\nTWO `b`"
    assert questions(ollama) == ["one <c1/>\n\ntwo <c2/>", "one <c1/>", "two <c1/>"]


@pytest.mark.parametrize(
    ("answer", "translation", "shown"),
    [
        ("copy `a` to `b`", "nach <c2/> kopiere <c1/>", "nach `b` kopiere `a`"),
        ("see `a`", "siehe `<c1/>`", "siehe `a`"),
        ("see `a`", "siehe <C1 >", "siehe `a`"),
        ("<c1/> is `a`", "<c1/> ist <c2/>", "<c1/> ist `a`"),
        ("\n see `a` \n\n", "siehe <c1/>", "\n siehe `a` \n\n"),
        ("see `a`", "", "see `a`"),
    ],
)
async def test_a_tag_becomes_its_code_where_the_model_put_it(
    ollama: FakeOllama,
    ollama_url: str,
    tmp_path: Path,
    answer: str,
    translation: str,
    shown: str,
) -> None:
    translates(ollama, answer, lambda text: translation)

    assert await translated(ollama_url, tmp_path) == shown
    assert len(questions(ollama)) == 1


async def test_the_model_is_told_the_glossary(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path
) -> None:
    translates(ollama, "a rain barrel", lambda text: "eine Tonne")

    await translated(ollama_url, tmp_path, glossary={"rain barrel": "Tonne", "plot": "Parzelle"})

    told = ollama.asked[1].json["messages"][0]["content"]
    assert told.endswith(
        "\n\nWhere this glossary is German, use its words:\n- rain barrel: Tonne\n- plot: Parzelle"
    )


@pytest.mark.parametrize("wrong", [["rain"], {"rain": 1}])
async def test_a_wrong_glossary_is_said_at_the_start(tmp_path: Path, wrong: Any) -> None:
    config = PluginsConfig(dirs=(PLUGINS,), only=("translate",))
    agents = {"translate": {"settings": {"glossary": wrong}}}

    async with PluginRegistry(config, agents, tmp_path, {}) as registry:
        error = str(registry.plugins["translate"].error)

    assert error == "settings: glossary: must be a table of terms and their translations"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a\n```\nb\n```\nc", ["```\nb\n```"]),
        ("```py title=`x`\nb\n```", ["```"]),
        ("~~~ `x`\nb\n~~~~ \nc", ["~~~ `x`\nb\n~~~~ "]),
        ("````md\n```\nb\n```\n````\nc", ["````md\n```\nb\n```\n````"]),
        ("```\nnever ends\n~~~\n``", ["```\nnever ends\n~~~\n``"]),
        ("1. do\n   ```\n   b\n   ```\nc", ["   ```\n   b\n   ```"]),
        ("- ```sh\n  b\n  ```", ["- ```sh\n  b\n  ```"]),
        ("> ```\n> b\n> ```\n> c", ["> ```\n> b\n> ```"]),
        ("```\r\nb\r\n```\r\nc", ["```\r\nb\r\n```\r"]),
        ("```\na\n```\nb\n```\nc\n```", ["```\na\n```", "```\nc\n```"]),
        ("a ``` b", []),
    ],
)
def test_fenced_code_is_what_markdown_says(text: str, code: list[str]) -> None:
    assert [code for _, code in split(FENCED, text)][:-1] == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a `b` c `d`", ["`b`", "`d`"]),
        ("``a`b`` `` ` ``", ["``a`b``", "`` ` ``"]),
        ("`over\na line`", ["`over\na line`"]),
        ("`over\n \na paragraph`", []),
        ("it`s `a` b", ["`s `"]),
        ("``a` b", []),
    ],
)
def test_inline_code_is_what_markdown_says(text: str, code: list[str]) -> None:
    assert [code for _, code in split(INLINE, text)][:-1] == code


@given(st.text("`~\n >-a1.<c/ ", max_size=60))
def test_nothing_is_lost_when_code_is_taken_out(text: str) -> None:
    for code in (FENCED, INLINE):
        pieces = split(code, text)
        assert "".join(prose + code for prose, code in pieces) == text

    if len(pieces) > 1:
        tags = Tags(pieces)
        assert tags.replaced(tags.text) == text
        assert tags.replaced("") is None


@pytest.mark.parametrize(
    "unit", ["`", "``` ", "```\n", "~~~a\n", "`a", "`a``b```c", "\n", " ", "> "]
)
def test_no_answer_takes_longer_than_its_length(unit: str) -> None:
    text = (unit * 200_000)[:200_000]

    began = time.process_time()
    for code in (FENCED, INLINE):
        split(code, text)

    assert time.process_time() - began < 1
