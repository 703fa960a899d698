"""The words of a text: two spellings of one word are one, and no language goes without words."""

from __future__ import annotations

import time

import pytest

from kernel.agent import beginning, fold, index_words, telling_words

ALIKE = [
    ("Müller", "Mueller", "muller"),
    ("Süd", "Sued", "SÜD"),
    ("Tür", "Tuer"),
    ("Häuser", "Haeuser", "hauser"),
    ("Größe", "Groesse", "GRÖSSE"),
    ("Straße", "STRASSE", "straẞe"),
    ("Ærøskøbing", "Aeroeskoebing"),
    ("Århus", "Aarhus", "arhus"),
    ("Łódź", "lodz"),
    ("Đorđe", "dorde"),
    ("IŞIK", "ışık", "isik"),
    ("İstanbul", "istanbul"),
    ("cœur", "coeur"),
    ("ﬁsh", "fish"),
    ("Ｆｕｌｌ", "full"),
    ("cafe\u0301", "CAFÉ", "cafe"),
    ("Donau\u00addampf", "Donau\u200bdampf", "Donaudampf", "Donau-\n  dampf", "Donau\u00ad\ndampf"),
    ("ё", "е"),
    ("ΟΔΌΣ", "οδος"),
    ("أحمد", "احمد", "أَحْمَد"),
    ("مكتبة", "مكتبه"),
    ("שָׁלוֹם", "שלום"),
    ("\u1112\u1161\u11ab\u1100\u1173\u11af", "한글"),
    ("ｶﾞｲﾄﾞ", "ガイド"),
    ("Đà Nẵng", "da nang"),
]


@pytest.mark.parametrize("spellings", ALIKE)
def test_spellings_of_one_word_are_one(spellings: tuple[str, ...]) -> None:
    assert len({fold(text) for text in spellings}) == 1


@pytest.mark.parametrize(
    "word", ["queue", "frauen", "value", "continued", "issues", "glued", "bauer", "x-ray", "1-\n2"]
)
def test_what_only_looks_like_an_umlaut_or_a_divided_word_stays(word: str) -> None:
    assert fold(word) == word


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The foo_bar's 3.5 €!", "the foo bar s 3 5"),
        ("well-\nknown", "wellknown well known"),
        ("東京都", "東京 京都 都"),
        ("RAG用の猫", "rag 用の の猫 猫"),
        ("スーパー・マーケット", "スー ーパ パー ー マー ーケ ケッ ット ト"),
        ("회의를 했다", "회의 의를 를 했다 다"),
        ("สวัสดี", "สวั วัส สดี ดี"),
        ("हिन्दी है।", "हिन्दी है"),
        ("", ""),
    ],
)
def test_words_are_those_that_an_index_wants(text: str, words: str) -> None:
    assert index_words(text) == words


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What did we decide in May?", ["decide", "may"]),
        ("Wo ist die Straße?", ["strasse"]),
        ("雨水桶在哪里？", ["雨水", "水桶", "桶在"]),
        ("猫?", ["猫"]),
        ("and when?", []),
    ],
)
def test_telling_words_say_what_is_asked(question: str, words: list[str]) -> None:
    assert telling_words(question) == words


def test_a_beginning_is_what_forms_of_a_word_share() -> None:
    assert [beginning(word) for word in ("otter", "meetings", "猫は")] == ["otte", "meeti", "猫"]


@pytest.mark.parametrize("text", ["a" * 10**6, "a-" * 500_000, "ae" * 500_000, "\u0301" * 10**6])
def test_no_text_takes_long(text: str) -> None:
    began = time.monotonic()
    index_words(text)

    assert time.monotonic() - began < 3
