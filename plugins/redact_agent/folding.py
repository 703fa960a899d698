"""Folding: one plain spelling for the many of a text, and the way back to the original.

A text is searched in its folded form: plain spaces, hyphens, quotes and digits, letters without
accents, full-width signs as ASCII, escapes of JSON decoded, invisible signs left out. `Folded` maps
places in it to places in the original, which is what becomes a placeholder.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Scripts that put no space between words, or particles right behind one: Thai to Khmer, Chinese,
# Japanese, Korean. Beside their letters a value may begin and end.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
LETTER = rf"[^\W_{UNSPACED}]"  # a letter or a digit of all other scripts
START, END = rf"(?<!{LETTER})", rf"(?!{LETTER})"

INVISIBLE = (
    "\u00ad\u034f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff"
)
CHANGE = re.compile(  # besides signs that fold to one sign
    rf"[{INVISIBLE}\u0300-\u036f]+|(?<=[ \n])[ \n]+"
    r"|\\{1,4}(?:u(?P<code>[\da-fA-F]{4})|(?P<sign>[nrt\"/]))"
)
ESCAPES = {"n": "\n", "r": "\n", "t": " "}
SAME = {
    " ": "\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000",
    "-": "\u2010-\u2015\u2212\ufe58\ufe63",
    "'": "\u2018\u2019\u201b\u02bc\u2032",
    '"': "\u201c-\u201f\u00ab\u00bb\u300c-\u300f",
    "o": "\u00f8\u00d8", "l": "\u0142\u0141", "d": "\u0111\u0110", "i": "\u0131",
}  # fmt: skip


def make_table() -> dict[int, str]:
    """Return the translation of signs that fold to one sign."""
    every = "".join(map(chr, (*range(0xA0, 0xD800), *range(0xF900, 0x10000))))
    table = {ord(c): plain for plain, same in SAME.items() for c in re.findall(f"[{same}]", every)}
    table |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    for sign in every:
        base = unicodedata.normalize("NFD", sign)
        if sign.isdecimal():
            table[ord(sign)] = str(unicodedata.decimal(sign))
        elif len(base) > 1 and all("\u0300" <= mark <= "\u036f" for mark in base[1:]):
            table[ord(sign)] = base[0]
    return table | {ord("\t"): " ", ord("\r"): "\n"}


TABLE = make_table()


class Folded:
    """A folded text; `starts` is where each of its signs lies in the original, and its end."""

    def __init__(self, original: str) -> None:
        self.text = original.translate(TABLE)
        self.starts: Sequence[int] = range(len(original) + 1)
        if CHANGE.search(self.text):
            self._change()

    def _change(self) -> None:
        pieces, starts, at = list[str](), list[int](), 0
        for change in CHANGE.finditer(self.text):
            sign = decoded(change)
            pieces += [self.text[at : change.start()], sign]
            starts += [*range(at, change.start()), *[change.start()] * len(sign)]
            at = change.end()
        self.starts = [*starts, *range(at, len(self.text) + 1)]
        self.text = "".join([*pieces, self.text[at:]])


def decoded(change: re.Match[str]) -> str:
    """Return the sign that an escape stands for; other changes leave nothing."""
    if change["code"]:
        sign = chr(int(change["code"], 16)).translate(TABLE)
        return "" if CHANGE.fullmatch(sign) else sign
    return ESCAPES.get(change["sign"], change["sign"] or "")
