"""The grammar of commands: what is one, what is text, and what its arguments mean."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.agent import BaseAgent
from kernel.commands import Command, Grammar, help_text, parse_arguments
from kernel.errors import BadRequest, PluginLoadError
from kernel.plugin import AgentConfig, Plugin

KNOWN = {"rag", "translate", "to-do", "up"}
GRAMMAR = Grammar("/", KNOWN.__contains__)
MIB = 1 << 20
WORDS = "/ // ／ rag help explain translate : ： k= = , & “ ” „ \" ' « 」 \u200b \n 6 why"
TYPED = st.lists(st.sampled_from([*WORDS.split(" "), " "])).map("".join) | st.text()


def spelled(commands: list[Command]) -> str:
    """Return the commands in the form `rag:k=6 &translate`."""
    joined = ["&" if command.together else "" for command in commands]
    pairs = zip(joined, commands, strict=True)
    return " ".join(
        f"{sign}{command.name}:{command.arguments}".rstrip(":") for sign, command in pairs
    )


TEXTS = """/etc/passwd|/shrug|/rag, no|/rag/x|/ rag|x /rag|/ragtime|| \u200b|  spaces stay |/|//
|/help me|/help rag now|/helpful|help|/explain x|/explain&/rag x|/explain:1 /rag
|/rag&/nope x|/rag&/help|/rag& /rag|/rag&&/rag x
|//unknown|//rag.example.org/x|///rag|/translate:"open x|/rag:'tis x|/rag:"a"b x"""


@pytest.mark.parametrize(
    ("text", "commands", "rest"),
    [
        *((text, "", text) for text in TEXTS.replace("\n", "").split("|")),
        *(("/rag", "rag", ""), ("/rag: what", "rag", "what"), ("/rag :) x", "rag", ":) x")),
        *(("\n\t /RAG\thi  a ", "rag", "hi  a "), ("/rag\nfoo\n\nbar", "rag", "foo\n\nbar")),
        ("\ufeff\u200b \u2060/rag \u200bhi", "rag", "hi"),
        ("／ＲＡＧ：ｋ＝２，n＝3＆／rag　何", "rag:ｋ＝２，n＝3 &rag", "何"),
        ("/rag:k=6 /translate:de why?", "rag:k=6 translate:de", "why?"),
        *(("/rag:k = 2 x", "rag:k = 2", "x"), ("/rag: k=2 x", "rag:k=2", "x")),
        *(("/rag : k= 2 , n =3 x = 4", "rag:k= 2 , n =3", "x = 4"), ("/rag:k=\nx", "rag:k=", "x")),
        ("/rag:k= /translate:de x", "rag:k= translate:de", "x"),
        *(("/rag&/to-do x", "rag &to-do", "x"), ("/rag:x&y&/rag x", "rag:x&y &rag", "x")),
        *(("/rag /rag&/nope x", "rag", "/rag&/nope x"), ("/rag /help x", "rag", "/help x")),
        *(("/explain /rag /x", "explain rag", "/x"), ("/rag /explain x", "rag", "/explain x")),
        ("/rag /EXPLAIN\n/rag x", "rag explain rag", "x"),
        *((text, "help", "") for text in ("/help", " /HELP\n")),
        *(
            (t, "help:rag", "")
            for t in ("/help rag", "／ＨＥＬＰ /Rag\n", "/help:rag", "/help\u200b／rag")
        ),
        ("//help", "", "/help"),
        *(("//rag&/nope", "", "/rag&/nope"), (" //rag:k=2 is", "", "/rag:k=2 is")),
        ("/rag //rag x", "rag", "/rag x"),
        ("/rag:" + "a," * 20 + " x", "", "/rag:" + "a," * 20 + " x"),
        ("/rag&" * 20 + "/rag", "", "/rag&" * 20 + "/rag"),
        ("/rag " * 20, "rag " * 15 + "rag", "/rag " * 4),
        ("/rag " * 15 + "/rag&/rag x", "rag " * 14 + "rag", "/rag&/rag x"),
    ],
)
def test_only_known_names_that_lead_a_text_are_commands(
    text: str, commands: str, rest: str
) -> None:
    found, left = GRAMMAR.split(text)

    assert (spelled(found), left) == (commands, rest)


def test_a_command_names_all_that_it_is_joined_to() -> None:
    group = [Command("rag"), Command("to-do", "1", ("rag",)), Command("rag", "", ("rag", "to-do"))]

    assert GRAMMAR.split("/rag&/to-do:1&/rag /rag x") == ([*group, Command("rag")], "x")


@pytest.mark.parametrize("pair", "\"\" “” „“ „” ”” «» »« »» ‹› 「」 『』 ‘’ ‚‘ '' ＂＂".split())
def test_quotes_of_every_language_hold_spaces_and_signs(pair: str) -> None:
    quoted = f"{pair[0]}it/is, l’été &/rag{pair[1]}"

    commands, rest = GRAMMAR.split(f"/translate:k=1,to={quoted}&/rag x")

    assert (spelled(commands), rest) == (f"translate:k=1,to={quoted} &rag", "x")
    found = parse_arguments(commands[0].arguments, {"to": "", "k": 0})
    assert found == {"to": "it/is, l’été &/rag", "k": 1}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["/rga", "/rg", "/ragg", "/rog", " ／ＲＡＣ"], "rag"),
        (["/explan /rag", "/xplain"], "explain"),
        (["/rag", "/xrga", "/u", "/rga/x", "//rga", "rga", "x /rga", "/" + "r" * 65], None),
    ],
)
def test_a_word_one_letter_away_from_a_command_is_near(words: list[str], name: str | None) -> None:
    assert [GRAMMAR.near(f"{word} what?") for word in words] == [name] * len(words)
    assert {GRAMMAR.near(word) for word in words if " " not in word.strip()} == {None}


@pytest.mark.parametrize("text", ["/rag x", "rag x", "//rag", "/help", "/rga x", "help", ""])
def test_without_a_prefix_nothing_typed_is_a_command(text: str) -> None:
    grammar = Grammar("", KNOWN.__contains__)

    assert grammar.split(text) == ([], text)
    assert grammar.near(text) is None


@pytest.mark.parametrize("prefix", ["!", "！", "$", "::", "\\", "^", "-", "]"])
def test_a_prefix_may_be_any_sign(prefix: str) -> None:
    grammar = Grammar(prefix, KNOWN.__contains__)

    assert grammar.split(f"{prefix}rag:2&{prefix}rag x")[1] == "x"
    assert grammar.split(f"{prefix}{prefix}rag x") == ([], f"{prefix}rag x")
    assert grammar.split("/rag x") == ([], "/rag x")


@given(TYPED)
def test_a_text_loses_no_more_than_its_commands(text: str) -> None:
    commands, rest = GRAMMAR.split(text)

    assert text.endswith(rest) and len(commands) <= 16
    if not commands and text.lstrip("\u200b \n")[:2] not in ("//", "／/", "/／", "／／"):
        assert rest == text
    for command in commands:
        try:
            parse_arguments(command.arguments, {"k": 1, "to": ""})
        except BadRequest as error:
            assert len(str(error)) < 300
    assert {command.name for command in commands} <= KNOWN | {"help", "explain"}
    assert GRAMMAR.near(text) in {None, "help", "explain"} | KNOWN


@pytest.mark.parametrize(
    "text",
    [
        *("/rag&" * 10_000, "/rag " * 200_000, "/explain " * 100_000, "/" * MIB, "/" + "a" * MIB),
        *('/translate:x"' + ",to=“" * 200_000, "/rag:„" + ",„" * 500_000, "/rag:" + "a," * 500_000),
        *(f"{start}{' ' * MIB}x" for start in ("", "/rag", "/help", "/rag:k", "/rag:k=", "/nope")),
        *("\u200b" * MIB + "/rag x", "/rag:" + "&" * MIB, "/rag:'" + "a'" * 500_000 + " x"),
        *("/rag:" + "k=" * 500_000, "/rag" + " :" * 500_000, "/rag:“" + "x " * 500_000 + "”"),
    ],
    ids=lambda text: text.strip()[:16],
)
def test_reading_is_linear_in_the_text(text: str) -> None:
    begin = time.process_time()

    commands, rest = GRAMMAR.split(text)
    GRAMMAR.near(rest)

    assert time.process_time() - begin < 0.25  # a quadratic one needs minutes
    assert len(commands) <= 16


DEFAULTS = {"k": 4, "name": "", "exact": False, "limit": 0.5, "maxAge": 1}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("", {}),
        ("K=７,MAXAGE=2", {"k": 7, "maxAge": 2}),
        ("k = 2 , ｎａｍｅ＝ x://y?a=b", {"k": 2, "name": "x://y?a=b"}),
        ("3,x，yes", {"k": 3, "name": "x", "exact": True}),
        ("x,k=3", {"name": "x", "k": 3}),
        (",3,", {"k": 3}),
        ('name="a, b",limit=2', {"name": "a, b", "limit": 2.0}),
        ("name='it's'", {"name": "it's"}),
        ("exact=ＯＦＦ,limit=-1e3", {"exact": False, "limit": -1000.0}),
        ("name=", {"name": ""}),
    ],
)
def test_arguments_are_typed_by_their_defaults(text: str, given: dict[str, Any]) -> None:
    assert parse_arguments(text, DEFAULTS) == {**DEFAULTS, **given}


KEYS = "known are: k, name, exact, limit, maxAge"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("k=many", "k must be a whole number, not 'many'"),
        ("k=", "k must be a whole number, not ''"),
        ("k=1" + "0" * 18, "k must be a whole number, not '1000000000000000000'"),
        ("k=" + "9" * 5000, "k must be a whole number, not '" + "9" * 60 + "'"),
        *((f"limit={x}", f"limit must be a number, not '{x}'") for x in ("nan", "-inf", "1e999")),
        ("exact=perhaps", "exact must be true or false, not 'perhaps'"),
        ("colour = red", f"'colour = red' is no argument here; {KEYS}"),
        ("1,a,on,2,3,more", f"'more' is no argument here; {KEYS}"),
    ],
)
def test_a_wrong_argument_says_what_is_right(text: str, complaint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_arguments(text, DEFAULTS)

    assert str(caught.value) == complaint
    with pytest.raises(BadRequest, match="is no argument here; known are: none"):
        parse_arguments(text, {})


def test_help_lists_arguments_and_hides_the_text_of_errors() -> None:
    error = PluginLoadError("a secret", "KeyError", "agent.py:3")
    config = AgentConfig(description="Finds.", arguments={"k": 5, "to": ""})
    plugins = [Plugin("off", Path()), Plugin("bad", Path(), error=error)]
    plugins += [Plugin("rag", Path(), config, BaseAgent(), description="Finds.")]

    lines = help_text(plugins, "!").splitlines()

    assert lines[0] == "!off: is disabled by the operator"
    assert lines[1] == "!bad: failed to load: KeyError at agent.py:3"
    assert lines[2:] == ["!rag: Finds.", "    k=5", "    to=''"]
    assert help_text([], "/") == "No agents are loaded."
