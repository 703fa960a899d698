"""Text: one spelling for a question and for the text that answers it, in every script.

Both go through `index_words`: the text on its way into an index, the question on its way to a
search. Authors of agents import these from `kernel.agent`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff\u0640\ufe00-\ufe0f]")  # not what one reads
DIVIDED = re.compile(r"(?<=\w)[-\u2010\u00ad][ \t\r]*\n\s*(?=[^\W\d_])")  # at the end of a line
DIVIDED_WORD = re.compile(r"\b(\w{1,40})[-\u2010\u00ad][ \t\r]*\n\s*([^\W\d_]\w{0,40})")
# Accents of Latin, Greek and Cyrillic, points of Hebrew, vowel signs of Arabic; not those of Indic
# scripts and Thai, which are letters of their own.
ACCENTS = re.compile("[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670]")
LETTERS = str.maketrans(
    {"ł": "l", "đ": "d", "ħ": "h", "ŧ": "t", "ø": "o", "ı": "i", "ð": "d", "þ": "th", "æ": "ae"}
    | {"œ": "oe", "\u06cc": "\u064a", "\u0649": "\u064a", "\u06a9": "\u0643", "\u0629": "\u0647"}
)
# ae, oe and ue stand for ä, ö and ü (Mueller), å for aa; not in queue, Frauen, value, continued
UMLAUT = re.compile(r"(?<![aeoqu])([aou])e(?!\b|(?<=\w{4})[ds]\b)|\ba(?=a)")
# Scripts without spaces: Thai, Lao, Myanmar, Khmer, kana, ideographs; and Hangul, whose words end
# with particles. Marks (vowels, tones) belong to the letter before them.
UNSPACED = (
    "\u0e01-\u0edf\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff"
)
UNSPACED += "\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
RUN = re.compile(f"[{UNSPACED}]+")
WORD = re.compile(r"[^\W_](?:[^\W_]|[\u0900-\u0963\u0966-\u1049\u1050-\u109f\u1780-\u17d3])*")


def fold(text: str) -> str:
    """Return text in one spelling: without case, accents, ligatures, widths and unseen signs.

    It is compatibility normalised (NFKC) and case folded (ß is ss); `ü` and `ue` become `u`, as ä,
    å, ö, ø, æ and œ do with theirs, `Ł` becomes `l`; and a word that a hyphen divides at the end of
    a line is whole again. It is for comparing, not for reading.
    """
    text = UNSEEN.sub("", DIVIDED.sub("", text))
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    text = unicodedata.normalize("NFC", ACCENTS.sub("", text)).translate(LETTERS)
    return UMLAUT.sub(r"\1", text)


def index_words(text: str) -> str:
    """Return the folded words of a text, separated by spaces, as a full-text index wants them.

    Where a script has no spaces the words are pairs of letters, and the last letter alone:
    「東京都」 is "東京 京都 都". For SQLite: `fts5(text, tokenize = "porter ascii")`.
    """
    text = fold(DIVIDED_WORD.sub(r"\1\2 \1 \2", text))
    return " ".join(WORD.findall(RUN.sub(_pairs, text)))


def telling_words(text: str) -> list[str]:
    """Return the words of `index_words` that tell what a text is about, each once, in order.

    Left out are those of stop_words.txt, which any question can hold ("what is our"), small talk
    ("thanks"), and in scripts without spaces single letters, unless there is nothing else.
    """
    words = [w for w in dict.fromkeys(index_words(text).split()) if w not in _stop_words()]
    return [word for word in words if len(word) > 1 or not RUN.match(word)] or words


def beginning(word: str) -> str:
    """Return what words of one stem share, for languages whose stems the index does not know.

    It is 60 % of a word, four letters at least; of a pair of ideographs it is the first one.
    """
    return word[:1] if "\u3400" <= word[:1] <= "\u9fff" else word[: max(4, -(-len(word) * 6 // 10))]


def _pairs(run: re.Match[str]) -> str:
    letters = re.findall(r"\w\W*", run[0])  # each with its marks
    pairs = (first + second for first, second in zip(letters, [*letters[1:], ""], strict=True))
    return f" {' '.join(pairs)} "


@cache
def _stop_words() -> frozenset[str]:
    text = Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8")
    return frozenset(index_words(text).split())
