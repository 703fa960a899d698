"""The grammar of commands: what is one, what is text, and what its arguments mean."""

from __future__ import annotations

from typing import Any

import pytest

from kernel.commands import Command, Grammar, parse_arguments
from kernel.errors import BadRequest

GRAMMAR = Grammar("/", {"rag", "translate", "to-do"}.__contains__)


@pytest.mark.parametrize(
    ("text", "commands", "rest"),
    [
        ("/rag hi", [("rag", "")], "hi"),
        ("\n\t /RAG\thi  there ", [("rag", "")], "hi  there "),
        ("/rag", [("rag", "")], ""),
        ("/rag:k=6 /translate:de why?", [("rag", "k=6"), ("translate", "de")], "why?"),
        ("/rag /rag:2 x", [("rag", ""), ("rag", "2")], "x"),
        ("/to-do x", [("to-do", "")], "x"),
        ("/rag\nfoo\n\nbar", [("rag", "")], "foo\n\nbar"),
        ('/translate:"Swiss German" why', [("translate", '"Swiss German"')], "why"),
        ("/translate:to=“a b”,k=“c” x", [("translate", "to=“a b”,k=“c”")], "x"),
        ("/rag: what", [("rag", "")], "what"),
        ("/rag /unknown x", [("rag", "")], "/unknown x"),
        ("//rag is", [], "/rag is"),
        ("/rag //rag x", [("rag", "")], "/rag x"),
        ("//unknown", [], "//unknown"),
        ("///rag", [], "///rag"),
        ("/etc/passwd", [], "/etc/passwd"),
        ("/rag, no", [], "/rag, no"),
        ("/rag/x", [], "/rag/x"),
        ("/ragtime", [], "/ragtime"),
        ("/ rag", [], "/ rag"),
        ("x /rag", [], "x /rag"),
        ('/translate:"open x', [], '/translate:"open x'),
        ("", [], ""),
        ("  spaces stay ", [], "  spaces stay "),
    ],
)
def test_only_known_names_that_lead_a_text_are_commands(
    text: str, commands: list[tuple[str, str]], rest: str
) -> None:
    assert GRAMMAR.split(text) == ([Command(*pair) for pair in commands], rest)


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("/help", ""),
        (" /HELP\n", ""),
        ("/help rag", "rag"),
        ("/help /Rag ", "rag"),
        ("/help unknown", None),
        ("/help rag now", None),
        ("/helpful", None),
        ("help", None),
    ],
)
def test_help_is_wanted_alone_or_before_one_name(text: str, about: str | None) -> None:
    assert GRAMMAR.help_wanted(text) == about


@pytest.mark.parametrize("text", ["/rag x", "rag x", "//rag", "/help", ""])
def test_without_a_prefix_nothing_typed_is_a_command(text: str) -> None:
    grammar = Grammar("", {"rag"}.__contains__)

    assert grammar.split(text) == ([], text)
    assert grammar.help_wanted(text) is None


@pytest.mark.parametrize("prefix", ["!", "$", "::", "\\"])
def test_a_prefix_may_be_any_sign(prefix: str) -> None:
    grammar = Grammar(prefix, {"rag"}.__contains__)

    assert grammar.split(f"{prefix}rag:2 x") == ([Command("rag", "2")], "x")
    assert grammar.split(f"{prefix}{prefix}rag x") == ([], f"{prefix}rag x")


DEFAULTS = {"k": 4, "name": "", "exact": False, "limit": 0.5}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("", {}),
        ("7", {"k": 7}),
        ("K=7", {"k": 7}),
        ("name=x,3", {"name": "x", "k": 3}),
        ("3,x,yes", {"k": 3, "name": "x", "exact": True}),
        ('name="a, b",limit=2', {"name": "a, b", "limit": 2.0}),
        ("name=“a b”", {"name": "a b"}),
        ("name=https://x/?a=b", {"name": "https://x/?a=b"}),
        ("exact=off,limit=-1e3", {"exact": False, "limit": -1000.0}),
        ("name=", {"name": ""}),
    ],
)
def test_arguments_are_typed_by_their_defaults(text: str, given: dict[str, Any]) -> None:
    assert parse_arguments(text, DEFAULTS) == {**DEFAULTS, **given}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("k=many", "k must be a whole number, not 'many'"),
        ("k=1.5", "k must be a whole number, not '1.5'"),
        ("limit=nan", "limit must be a number, not 'nan'"),
        ("exact=perhaps", "exact must be true or false, not 'perhaps'"),
        ("colour=red", "'colour=red' is no argument here; known are: k, name, exact, limit"),
        ("1,a,on,2,more", "'more' is no argument here; known are: k, name, exact, limit"),
    ],
)
def test_a_wrong_argument_says_what_is_right(text: str, complaint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_arguments(text, DEFAULTS)

    assert str(caught.value) == complaint


def test_an_agent_without_arguments_takes_none() -> None:
    with pytest.raises(BadRequest, match="known are: none"):
        parse_arguments("x", {})
