"""Placeholders: `[EMAIL_1]` in the place of a value, and the value in the place of `[EMAIL_1]`.

One object serves one request. Models write a placeholder in many ways: in small letters, without
brackets, with others, with a space or nothing before its number, in bold, or with backslashes for
Markdown or JSON. It is known all the same. A number that somebody used already is not given out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress

from .finding import Span, merged, places, windows

KIND = "NAME|EMAIL|PHONE|IBAN|CARD|SECRET"
OPEN = r"(?P<left>\\{0,2})(?:[\[［【〔]|(?<=\\)u005b)"
CLOSE = r"(?P<right>\\{0,2})(?:[\]］】〕]|(?<=\\)u005d)"
BOLD = r"[*`_ ]{0,4}"
LINK = r"\\{0,2}[_＿ \u00a0\u2010\u2011-]"
BARE = r"(?:(?<![A-Za-z0-9_])|(?<=\\[nrt]))"  # the letter of JSON's line break is not the word's
SHAPE = re.compile(
    rf"{OPEN}(?P<bold>{BOLD})(?P<kind>{KIND})(?:{LINK})?(?P<number>[1-9]\d{{0,6}})(?P<end>{BOLD})"
    rf"{CLOSE}|{BARE}(?P<word>{KIND})\\{{0,2}}_(?P<digits>[1-9]\d{{0,6}})(?=s?(?![A-Za-z0-9_]))",
    re.I | re.A,
)
HALF = r"\\{0,2}(?:(?<=\\)u(?:0(?:05?)?)?)?"  # of a bracket in JSON
BEGINNING = re.compile(
    rf"{OPEN}{BOLD}(?P<kind>[A-Z]{{0,6}})(?:{LINK}|\\{{1,2}})?(?P<number>\d{{0,7}}){BOLD}{HALF}"
    rf"|{BARE}(?P<word>[A-Z]{{1,6}})\\{{0,2}}_?(?P<digits>\d{{0,7}})s?|(?=\\){HALF}",
    re.I | re.A,
)
LONGEST = 40  # signs of a placeholder with all its decoration
# In JSON: a string, or what stands outside of strings: a number of which a part was hidden
UNQUOTED = re.compile(r'("(?:[^"\\]|\\.)*+"?)|[\d.-]{0,30}(?:\[[A-Z]+_\d+\][\d.]{0,30})+', re.S)
LETTERS = re.compile(r"(?:\\{1,4}u[0-9a-fA-F]{4})+")  # as JSON may escape them


class Marked(str):
    """A text of a message; in one that is the model's `own`, placeholders are the agent's.

    Arguments of a call, `given` as an object or as text, are one text in JSON, so that a key tells
    what its value is.
    """

    own: bool = False
    given: object = None


class Placeholders:
    """The placeholders of one conversation; `escaped` means that its answer is JSON."""

    def __init__(self, *, escaped: bool) -> None:
        self._escaped = escaped
        self._taken: set[str] = set()
        self._numbers: Counter[str] = Counter()
        self._of: dict[str, str] = {}  # value to placeholder
        self._values: dict[str, str] = {}  # placeholder, without brackets, to value
        self._held = ""
        self._before = ""  # the last signs of what was sent already

    def reserve(self, texts: Iterable[str]) -> None:
        """Never give out what already stands in some texts."""
        self._taken |= {name_of(found) for text in texts for found in shapes(text)}

    def hide(self, text: Marked, spans: Iterable[Span]) -> str:
        """Return `text` with a placeholder for each span of what `find` found.

        Placeholders in a text of the model's own stay; in others they are hidden like a value. In
        arguments known values of four signs are found anywhere: a placeholder may have stood there.
        """
        values = [json.dumps(v, ensure_ascii=False)[1:-1] for v in self._of if text.given]
        found = [at for value in values if len(value) > 3 for at in places(text, value, 0)]
        repeated = [Span(*at, "SECRET") for at in found if text[at[0] - 1] != "\\"]  # of an escape
        pieces, at = [], 0
        for span in merged([*spans, *self._given(text), *repeated]):
            value = text[span.start : span.end]
            if text.own and self._given(value):
                continue
            with suppress(ValueError):  # it is more than a piece of one string
                value = json.loads(f'"{value}"', strict=False) if text.given else value
            value = LETTERS.sub(unescaped, value)
            pieces += [text[at : span.start], self._of.get(value) or self._new(span.kind, value)]
            at = span.end
        hidden = "".join([*pieces, text[at:]])
        return UNQUOTED.sub(lambda it: it[1] or f'"{it[0]}"', hidden) if text.given else hidden

    def _given(self, text: str) -> list[Span]:
        """Return the places of placeholders that stand for a value."""
        found = [(it.span(), name_of(it)) for it in shapes(text)] if self._values else []
        return [Span(*at, name.partition("_")[0]) for at, name in found if name in self._values]

    def _new(self, kind: str, value: str) -> str:
        name = ""
        while not name or name in self._taken:
            self._numbers[kind] += 1
            name = f"{kind}_{self._numbers[kind]}"
        self._of[value], self._values[name] = f"[{name}]", value
        return self._of[value]

    def restore(self, text: str) -> str:
        """Return a text that is no part of the answer with its values."""
        return SHAPE.sub(self._value, text)

    def feed(self, text: str) -> str:
        """Return the next piece of the answer with its values, and hold back what may still
        become a placeholder."""
        text = self._held + text
        cut = self._cut(self._before + text) - len(self._before)
        self._held = text[cut:]
        return self._restored(text[:cut])

    def end(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return self._restored(held)

    def _restored(self, text: str) -> str:
        at, text = len(self._before), self._before + text
        self._before = text[-2:]
        return SHAPE.sub(lambda found: self._value(found, self._escaped), text)[at:]

    def _value(self, found: re.Match[str], escaped: bool = False) -> str:
        value = self._values.get(name_of(found))
        if value is None:
            return found[0]
        if escaped:
            value = json.dumps(value, ensure_ascii=False)[1:-1]
        if found["word"]:
            return value
        # A backslash on one side only is not Markdown's: it is that of a path.
        left = "" if found["left"] == found["right"] else found["left"]
        return left + found["bold"].strip() + value + found["end"].strip()

    def _cut(self, text: str) -> int:
        """Return where the beginning of a placeholder stands at the end of a text."""
        for at in range(max(len(self._before), len(text) - LONGEST), len(text)):
            found = BEGINNING.fullmatch(text, at)
            if found and self._may_become(name_of(found).rstrip("_")):
                return at
        return len(text)

    def _may_become(self, beginning: str) -> bool:
        return not beginning or any(name.startswith(beginning) for name in self._values)


def shapes(text: str) -> Iterator[re.Match[str]]:
    """Yield what looks like a placeholder, also twice; a window after the other, as `find` does."""
    for at in windows(text):
        yield from SHAPE.finditer(text, at, at + windows(text).step + LONGEST)


def name_of(found: re.Match[str]) -> str:
    kind, number = found["kind"] or found["word"] or "", found["number"] or found["digits"] or ""
    return f"{kind.upper()}_{number}"


def unescaped(found: re.Match[str]) -> str:
    return bytes.fromhex(re.sub(r"\\+u", "", found[0])).decode("utf-16-be", "replace")
