"""Names: the operator's list as one rule.

Capitals do not matter. A name is a whole word, also with the s of a genitive behind it, in scripts
that have capitals; Chinese or Thai put no space between words, and so there it is found anywhere.
The pattern is a tree of letters: a thousand names take hardly more time than ten.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from .finding import Rule

BEFORE = r"(?:(?<![^\W_])|(?<=\\[nrt]))"  # the letter of a line break in JSON is not the word's
BEHIND = r"(?=s?(?![^\W_]))"
UNITS = {" ": r"\s+", "'": "['’]", "’": "['’]"}


def names_rule(names: Iterable[str]) -> Rule:
    """Return the rule for `names`; of two that begin alike the longer one is found."""
    spellings = {form for name in names for form in forms(name)}
    words = pattern(tree(filter(has_case, spellings)), BEHIND)
    parts = pattern(tree(name for name in spellings if not has_case(name)), "")
    whole = re.compile(rf"(?P<value>{BEFORE}(?:{words})|(?:{parts}))", re.IGNORECASE)
    return Rule("NAME", whole)


def forms(name: str) -> Iterator[str]:
    """Yield the ways to write a name: accents as signs of their own or not, and in capitals."""
    for form in ("NFC", "NFD"):
        normal = unicodedata.normalize(form, " ".join(name.split()))
        yield from (normal, normal.upper())  # the capitals of ß are SS


def has_case(name: str) -> bool:
    return name[0].lower() != name[0].upper()


def tree(names: Iterable[str]) -> dict[str, Any]:
    """Return a dict of the first letters' patterns to the tree of what follows; "" ends a name."""
    root: dict[str, Any] = {}
    for name in names:
        node = root
        for sign in name:
            lower = sign.lower() if len(sign.lower()) == 1 else sign  # İ has two in small
            node = node.setdefault(UNITS.get(sign, re.escape(lower)), {})
        node[""] = {}
    return root


def pattern(node: dict[str, Any], end: str) -> str:
    """Return the pattern of a tree, with `end` behind each name."""
    head = ""
    while len(node) == 1 and "" not in node:
        ((unit, node),) = node.items()
        head += unit
    branches = [unit + pattern(child, end) for unit, child in node.items() if unit]
    branches += [end] if "" in node else []
    return rf"{head}(?:{'|'.join(branches)})" if branches else r"(?!)"
