"""Words: lists of them as one pattern, the operator's names, and what stands behind a label.

A word is a whole word in scripts with spaces between words; in others it is found anywhere. The
pattern is a tree of letters: a thousand names take hardly more time than ten.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .finding import Pattern
from .folding import END, START, UNSPACED, Folded

BEGIN = re.compile(START)
SPACED = re.compile(rf"[^\W{UNSPACED}]")  # a letter of a script with spaces
UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})


def names_rule(names: Iterable[str]) -> Pattern:
    """Return the rule for names, also with the s of a genitive; the longest one is found."""
    return Pattern("NAME", re.compile(f"(?P<value>{any_of(names, r's?')})", re.IGNORECASE))


def forms(word: str) -> Iterator[str]:
    """Yield the ways to write a word: signs decomposed or not, ß as ss, umlauts as ae, oe, ue."""
    word = unicodedata.normalize("NFC", " ".join(word.split()))
    for form in (word, unicodedata.normalize("NFD", word), word.upper(), word.translate(UMLAUTS)):
        yield Folded(form).text


def any_of(words: Iterable[str], tail: str = "") -> str:
    """Return the pattern of any of the words; `tail` may stand behind one, outside of the match."""
    found = {form for word in words for form in forms(word)}
    spaced = pattern(tree(filter(SPACED.match, found)), rf"(?={tail}{END})")
    return rf"(?:{START}(?:{spaced})|{pattern(tree(w for w in found if not SPACED.match(w)))})"


def tree(words: Iterable[str]) -> dict[str, Any]:
    """Return a dict of the first letters' patterns to the tree of what follows; "" ends a word."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for sign in word.lower():
            node = node.setdefault(r"\s+" if sign == " " else re.escape(sign), {})
        node[""] = {}
    return root


def pattern(node: dict[str, Any], end: str = "") -> str:
    """Return the pattern of a tree, with `end` behind each word."""
    head = ""
    while len(node) == 1 and "" not in node:
        ((unit, node),) = node.items()
        head += unit
    branches = [unit + pattern(child, end) for unit, child in node.items() if unit]
    branches += [end] if "" in node else []
    return rf"{head}(?:{'|'.join(branches)})" if branches else r"(?!)"


@dataclass(frozen=True, slots=True)
class Labels(Pattern):
    """The rule for what stands behind one of some words, which `pattern` describes.

    A word begins where a word of the text does, or anywhere (`db_password`) if it has at least
    `inside` letters. To look for each of them takes less time than one pattern of all.
    """

    words: tuple[str, ...] = ()
    inside: int = 100

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        lower = text.lower()
        for word in self.words:
            at = lower.find(word)
            while at >= 0:
                end = at + len(word)
                if len(word) >= self.inside or not SPACED.match(word) or BEGIN.match(text, at):
                    if found := self.pattern.match(text, end):
                        yield found
                        end = max(end, found.end())
                at = lower.find(word, end)
