"""Code: what of an answer is program text, by the rules of Markdown; and tags in its place."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A fence opens a block, also in a list or a quotation; the next such fence ends it, or the end of
# the text does.
FENCED = re.compile(
    r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*"
    r"(?:\n(?![ \t>]*(?P=fence)[`~]*[ \t\r]*$).*)*+(?:\n.*)?",
    re.MULTILINE,
)
# As many backticks as opened it end inline code, before its paragraph ends.
INLINE = re.compile(r"(?<!`)(?P<ticks>`{1,9})(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`)", re.S)
TAG = re.compile(r"(`?)<c(\d{1,9})\s?/?>\1", re.I)  # some models make inline code of a tag


def split(code: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    """Return pairs of prose and the code behind it; the last code is empty."""
    pieces, at = [], 0
    for found in code.finditer(text):
        pieces.append((text[at : found.start()], found[0]))
        at = found.end()
    return [*pieces, (text[at:], "")]


class Tags:
    """Tags like `<c1/>` in the place of code, with numbers that the text does not use itself."""

    def __init__(self, pieces: Sequence[tuple[str, str]]) -> None:
        text = "".join(prose for prose, _ in pieces)
        self._first = max((int(found[2]) for found in TAG.finditer(text)), default=0) + 1
        self._codes = [code for _, code in pieces[:-1]]
        tags = [f"<c{self._first + place}/>" for place in range(len(self._codes))]
        self.example = tags[0]
        self.text = "".join(
            prose + tag for (prose, _), tag in zip(pieces, [*tags, ""], strict=True)
        )

    def replaced(self, text: str) -> str | None:
        """Return `text` with the code again, or None if not every tag is in there once."""
        places = [int(tag[2]) - self._first for tag in TAG.finditer(text)]
        if sorted(place for place in places if place >= 0) != list(range(len(self._codes))):
            return None
        return TAG.sub(self._code, text)

    def _code(self, tag: re.Match[str]) -> str:
        place = int(tag[2]) - self._first
        return self._codes[place] if place >= 0 else tag[0]
