"""Finding: what a rule is, what it finds, and how finds become places in a text.

Every repetition in a pattern is bounded or possessive, so that the time grows with the text and no
faster. A long text is searched in windows: one call into `re` holds the interpreter's lock, and a
window takes it for a few milliseconds only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from .folding import END, START, UNSPACED, Folded

WINDOW = 16_384  # signs
BEFORE, AFTER = 256, 4_096  # signs around a window: for a label, and for values that reach beyond
REST = re.compile(r"(?:[^\s\"'`<>,;(){}\[\]|]{0,65536}+(?<![.:?!]))?")
BEGIN, GENITIVE = re.compile(START), re.compile(f"s?{END}")
SPACED = re.compile(rf"[^\W{UNSPACED}]")  # a letter of a script with spaces between words


@dataclass(frozen=True, slots=True)
class Span:
    """A value's place in a text; `labelled` means that only a word before it gave it away."""

    start: int
    end: int
    kind: str
    labelled: bool = False


class Rule(Protocol):
    """Finds values in a folded text."""

    def find(self, text: str) -> Iterator[Span]: ...


@dataclass(frozen=True, slots=True)
class Pattern:
    """The rule that the group `value` of a pattern is private where `check` says so, too.

    `sign` is a text without which there is nothing to find: to look for that is quicker. Where
    there are `words`, the pattern stands behind one of them, which may be a part of a compound
    (`db_password`) if it has at least `inside` letters.
    """

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = bool
    labelled: bool = False
    sign: str = ""
    words: Collection[str] = ()
    inside: int = 100

    def find(self, text: str) -> Iterator[Span]:
        for found in self.matches(text):
            if self.check(found["value"]):
                yield Span(*found.span("value"), self.kind, self.labelled)

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        if self.words:
            yield from self.behind_words(text)
        elif self.sign in text:
            yield from self.pattern.finditer(text)

    def behind_words(self, text: str) -> Iterator[re.Match[str]]:
        lower = plain(text)
        for word in self.words:
            after = 0
            for _, end in places(lower, word, self.inside):
                if end >= after and (found := self.pattern.match(text, end)):
                    yield found
                    after = found.end()


@dataclass(frozen=True, slots=True)
class Words:
    """The rule for words of any case, also with the s of a genitive."""

    kind: str
    words: Collection[str]

    def find(self, text: str) -> Iterator[Span]:
        lower = plain(text)
        for word in self.words:
            for start, end in places(lower, word):
                if not SPACED.match(word[-1]) or GENITIVE.match(lower, end):
                    yield Span(start, end, self.kind)


def plain(text: str) -> str:
    """Return a folded text as its words are compared, sign for sign."""
    return text.lower().replace("\n", " ")


def places(text: str, word: str, inside: int = 100) -> Iterator[tuple[int, int]]:
    """Yield where a word stands: where one of the text begins, or anywhere, if that has no spaces.

    To look for each of a thousand words takes less time than one pattern of all.
    """
    anywhere = len(word) >= inside or not SPACED.match(word)
    at = text.find(word)
    while at >= 0:
        if anywhere or BEGIN.match(text, at):
            yield at, at + len(word)
        at = text.find(word, at + len(word))


def windows(text: str) -> range:
    return range(0, len(text), WINDOW)


def find(rules: Collection[Rule], text: str) -> list[Span]:
    """Return the places of private values in a text of any length, in order."""
    found = (sorted(find_in_window(rules, text, at), key=order) for at in windows(text) if rules)
    return [span for window in found for span in window]


def order(span: Span) -> tuple[int, int]:
    return span.start, -span.end


def find_in_window(rules: Iterable[Rule], text: str, at: int) -> Iterator[Span]:
    low, high = max(0, at - BEFORE), at + WINDOW + AFTER
    folded = Folded(text[low:high])
    for span in (span for rule in rules for span in rule.find(folded.text)):
        start, end = low + folded.starts[span.start], low + folded.starts[span.end]
        if at <= start < at + WINDOW:
            end = REST.match(text, end).end() if end == high else end  # type: ignore[union-attr]
            yield Span(start, end, span.kind, span.labelled)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the spans in order, those that overlap as one of the longest one's kind."""
    found: list[Span] = []
    for span in sorted(spans, key=order):
        if found and span.start < found[-1].end:
            last = found.pop()
            longer = max(last, span, key=lambda span: span.end - span.start)
            span = Span(last.start, max(last.end, span.end), longer.kind)
        found.append(span)
    return found
