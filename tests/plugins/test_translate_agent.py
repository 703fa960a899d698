"""The agent translate: the answer arrives in the language that was named, but for its code."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.translate_agent.markdown import KEPT, kept, pieces, split, without_thoughts
from tests.support import CHAT, NOTICE, PATHS, SENT, House, chat, done, outcomes, running, said

PLUGINS = Path(__file__).parents[2] / "plugins"
FAILED = NOTICE.format("translate")
BLOCK = "```sh\n$ pip  install x \n# why `not`?\n```"
ANSWER = f"First do `that`, then:\n\n{BLOCK}\n\nand ``a ` b`` is\n`that` too.\n"
SHOUTED = f"FIRST DO `that`, THEN:\n\n{BLOCK}\n\nAND ``a ` b`` IS\n`that` TOO.\n"
TABLE = "| one | two |\n|-----|-----|\n| a   | b c |\n"
LIST = "1. one\n2. two\n   - three\n"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("typed", "language"),
    [
        ("/translate:DE", "German"),
        ("/translate:to=fr", "French"),
        ('/translate:"Swiss German"', "Swiss German"),
        ("/translate", "English"),
    ],
)
async def test_the_answer_is_translated_with_a_second_question(
    demo_url: str, tmp_path: Path, path: str, stream: bool, typed: str, language: str
) -> None:
    """The demo model repeats what it was sent: so its answer shows what the translator is told."""
    async with running(demo_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post(path, json=chat(path, f"{typed} why is it blue?", stream=stream))

    text = said(answer.content)
    assert f"[system] You are a translator. Translate what the user sends into {language}." in text
    assert text.endswith(f"[user] {SENT}[user] why is it blue?")


async def translated(
    house: House, answer: str, translate: Callable[[str], Any], **settings: Any
) -> tuple[str, list[str], str]:
    """Return the text of an answer as it arrives, the translator's questions, and the outcome.

    `translate` returns the model's translation of a question, or a whole frame.
    """
    house.link("translate")
    ollama = house.ollama

    async def again() -> None:
        reply = translate(ollama.asked[-1].json["messages"][-1]["content"])
        frame = reply if isinstance(reply, bytes) else done(reply)
        ollama.answers(frame, kind="application/json", before=again)

    async def first() -> None:
        ollama.answers(before=again)

    ollama.answers(done(answer), first, kind="application/json")
    async with house.open(agents={"translate": {"settings": settings}}) as client:
        response = await house.post(client, CHAT, "/translate:de how?", stream=False)
    questions = [asked.json["messages"][-1]["content"] for asked in ollama.asked[1:]]
    return said(response.content), questions, outcomes(response)


CASES: list[tuple[str, Callable[[str], Any], str, list[str] | None]] = [
    # code, and what models make of it
    (
        "see ``a ` b``",
        lambda text: text.replace("see", "siehe"),
        "siehe ``a ` b``",
        ["see ``a ` b``"],
    ),
    ("copy `a` to `b`", lambda _: "nach `b` kopiere `a`", "nach `b` kopiere `a`", None),
    (ANSWER, str.upper, SHOUTED, None),
    (f"{BLOCK}\n\n{BLOCK}\n", str.upper, f"{BLOCK}\n\n{BLOCK}\n", []),
    ("1. `x`:\n\n~~~\na", str.upper, "1. `x`:\n\n~~~\na", []),
    ("- a\n\n      code b\n", str.upper, "- A\n\n      code b\n", ["- a"]),
    ("\n see `a` \n\n", lambda text: text.replace("`", "").upper(), "\n SEE `a` \n\n", None),
    ("see `a`, `b`.", lambda _: "siehe", "siehe `a`, `b`.", ["see `a`, `b`.", "see"]),
    (
        "one `a`\n\ntwo `b`",
        lambda text: text.upper().replace("`A`", "`a`"),
        "ONE `a`\n\nTWO `b`",
        ["one `a`\n\ntwo `b`", "one `a`", "two `b`", "two"],
    ),
    # tables and lists, and a model that spoils them
    (f"{TABLE}\n{LIST}", str.upper, f"{TABLE}\n{LIST}".upper(), None),
    (TABLE, lambda text: text.upper().replace("|", ""), TABLE.upper(), None),
    (LIST, lambda text: re.sub(r"[^a-z]+", " ", text).upper(), LIST.upper(), None),
    ("# a\n> b", lambda text: f"```\n{text}\n```" if "\n" in text else text, "# a\n> b", None),
    # thoughts
    ("<think>a\n\nb</think>\nc", str.upper, "C", ["c"]),
    ("c", lambda _: "<think>hm</think>C", "C", ["c"]),
    # A long answer is cut between paragraphs, and comes back whole.
    ("Ein Satz. " * 30 + "\n\n", str.upper, ("EIN SATZ. " * 30 + "\n\n"), None),
]


@pytest.mark.parametrize(("answer", "translate", "shown", "asked"), CASES)
async def test_all_but_words_comes_back_as_it_was(
    house: House,
    answer: str,
    translate: Callable[[str], Any],
    shown: str,
    asked: list[str] | None,
) -> None:
    text, questions, outcome = await translated(house, answer, translate)

    assert (text, outcome) == (shown, "translate;ok")
    assert asked is None or questions == asked


async def test_a_long_answer_is_asked_about_piece_by_piece(house: House) -> None:
    answer = "".join(f"Paragraph {n}. {'word ' * 100}\n\n" for n in range(120))

    text, questions, _ = await translated(house, answer, str.upper)

    assert len(answer) > 61_000 and text == answer.upper()
    assert all(len(q) <= 2000 and q.startswith("Paragraph") for q in questions)


@pytest.mark.parametrize(
    "reply", ["", " \n", b"no json", b'{"error":"gone"}', done("Ein", done_reason="length")]
)
async def test_half_a_translation_is_an_error_and_the_answer_is_there(
    house: House, reply: Any
) -> None:
    """Whichever piece fails: here the second one."""
    answer = "\n\n".join(["word " * 300] * 3)

    def translate(text: str) -> Any:
        return text.upper() if len(house.ollama.asked) < 3 else reply

    text, _, outcome = await translated(house, answer, translate)

    assert (text, outcome) == (answer + FAILED, "translate;error")


async def test_an_answer_that_is_a_thought_without_an_end_is_an_error(house: House) -> None:
    thought = "<think>I should"

    text, questions, outcome = await translated(house, thought, str.upper)

    assert (text, questions, outcome) == (thought + FAILED, [], "translate;error")


async def test_the_model_is_told_the_glossary_and_asked_coolly(house: House) -> None:
    words = {"rain barrel": "Tonne", "plot": "Parzelle"}
    await translated(house, "a rain barrel", str.upper, glossary=words)

    told = "Where this glossary is German, use its words:\n- rain barrel: Tonne\n- plot: Parzelle"
    assert house.ollama.asked[1].json["messages"][0]["content"].endswith(f"\n\n{told}")
    assert house.ollama.asked[1].json["options"] == {"temperature": 0}


@pytest.mark.parametrize("wrong", [["rain"], {"rain": 1}])
async def test_a_wrong_glossary_is_said_at_the_start(
    demo_url: str, tmp_path: Path, wrong: Any
) -> None:
    agents = {"translate": {"settings": {"glossary": wrong}}}
    async with running(demo_url, PLUGINS, tmp_path, agents=agents) as client:
        listed = (await client.get("/plugins")).text

    assert "settings: glossary: must be a table of terms and their translations" in listed


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<THINK>a\n```\nx</think>\nb", "b"),
        ("a\n</think>\n\nb", "b"),
        ("b <thinking>x</thinking> c", "b c"),
        ("`<think>` is a tag", "`<think>` is a tag"),
        ("```\n<think>x</think>\n```\nb", "```\n<think>x</think>\n```\nb"),
        ("see `</think>` there", "see `</think>` there"),
    ],
)
def test_thoughts_are_taken_out_but_not_of_code(text: str, left: str) -> None:
    assert without_thoughts(text) == left


@given(st.text("`~\n >-a1.<c/ |#\r", max_size=60), st.integers(1, 30))
def test_nothing_is_lost_when_an_answer_is_cut(text: str, most: int) -> None:
    cut = [*pieces(text, most)]

    assert "".join(piece for piece, _ in cut) == text
    assert all(code or len(piece) <= most for piece, code in cut)
    assert "".join(part + by for part, by in split(KEPT, text)) == text


@pytest.mark.parametrize(
    "unit", ["`", "``` ", "```\n", "~~~a\n", "`a", "`a``b```c", "\n", "> ", "<think>", "|a|\n|-|\n"]
)
def test_no_answer_takes_longer_than_its_length(unit: str) -> None:
    text = (unit * 200_000)[:200_000]

    began = time.process_time()
    kept("".join(piece for piece, _ in pieces(without_thoughts(text), 2000)))

    assert time.process_time() - began < 15  # a quadratic one needs minutes
