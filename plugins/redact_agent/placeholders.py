"""Placeholders: `[EMAIL_1]` in the place of a value, and the value in the place of `[EMAIL_1]`.

One object serves one request. Models write a placeholder in small letters or, for Markdown, with
backslashes before its signs (`\\[EMAIL\\_1\\]`); it is known all the same. A number that somebody
wrote in a placeholder of his own is not used.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from .finding import KINDS, Span, merged

SHAPE = re.compile(
    rf"(\\{{0,2}})\[({'|'.join(KINDS)})\\{{0,2}}_([1-9]\d{{0,6}})(\\{{0,2}})\]", re.I | re.A
)
BEGINNING = re.compile(r"\\{0,2}(?:\[(?:[A-Z]+(?:\\{0,2}(?:_(?:\d+\\{0,2})?)?)?)?)?", re.I | re.A)
LONGEST = 24  # signs of a placeholder with all its backslashes


class Placeholders:
    """The placeholders of one conversation; `escaped` means that its answer is JSON."""

    def __init__(self, texts: Iterable[str], *, escaped: bool) -> None:
        self._escaped = escaped
        self._taken = {key(found) for text in texts for found in SHAPE.finditer(text)}
        self._numbers: Counter[str] = Counter()
        self._of: dict[str, str] = {}  # value to placeholder
        self._values: dict[str, str] = {}  # placeholder to what is put in its place
        self._beginnings: set[str] = set()
        self._held = ""

    def hide(self, text: str, spans: Iterable[Span]) -> str:
        """Return `text` with a placeholder for each span."""
        pieces, at = [], 0
        for span in merged(spans):
            value = text[span.start : span.end]
            pieces += [text[at : span.start], self._of.get(value) or self._new(span.kind, value)]
            at = span.end
        return "".join([*pieces, text[at:]])

    def _new(self, kind: str, value: str) -> str:
        while True:
            self._numbers[kind] += 1
            placeholder = f"[{kind}_{self._numbers[kind]}]"
            if placeholder not in self._taken:
                break
        self._of[value] = placeholder
        shown = json.dumps(value, ensure_ascii=False)[1:-1] if self._escaped else value
        self._values[placeholder] = shown
        self._beginnings |= {placeholder[:length] for length in range(len(placeholder))}
        return placeholder

    def feed(self, text: str) -> str:
        """Return the next piece of the answer with its values, and hold back what may still
        become a placeholder."""
        text = self._held + text
        cut = self._cut(text)
        self._held = text[cut:]
        return SHAPE.sub(self._value, text[:cut])

    def end(self) -> str:
        """Return what was held back: it did not become one."""
        held, self._held = self._held, ""
        return held

    def _value(self, found: re.Match[str]) -> str:
        value = self._values.get(key(found))
        if value is None:
            return found[0]
        # A backslash on one side only is not Markdown's: it is that of a path.
        return value if found[1] == found[4] else found[1] + value

    def _cut(self, text: str) -> int:
        """Return where the beginning of a placeholder stands at the end of a text."""
        for at in range(max(0, len(text) - LONGEST), len(text)):
            if text[at] in "\\[" and BEGINNING.fullmatch(text, at):
                if text[at:].replace("\\", "").upper() in self._beginnings:
                    return at
        return len(text)


def key(found: re.Match[str]) -> str:
    return f"[{found[2].upper()}_{found[3]}]"
