"""Finding: what a rule is, what it finds, and how finds become places in a text.

Every repetition in a pattern is bounded or possessive, so that the time grows with the text and no
faster. A long text is searched in windows: one call into `re` holds the interpreter's lock, and a
window takes it for a few milliseconds only.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from .folding import Folded

WINDOW = 16_384  # signs
BEFORE, AFTER = 256, 4_096  # signs around a window: for a label, and for values that reach beyond
REST = re.compile(r"(?:[^\s\"'`<>,;(){}\[\]|]{0,65536}+(?<![.:?!]))?")


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

    `sign` is a text without which there is nothing to find: to look for that is quicker.
    """

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = bool
    labelled: bool = False
    sign: str = ""

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        return self.pattern.finditer(text) if self.sign in text else iter(())

    def find(self, text: str) -> Iterator[Span]:
        for found in self.matches(text):
            if self.check(found["value"]):
                yield Span(*found.span("value"), self.kind, self.labelled)


def windows(text: str) -> range:
    return range(0, len(text), WINDOW)


def find(rules: Iterable[Rule], text: str) -> list[Span]:
    """Return the places of private values in a text of any length, in order."""
    rules = list(rules)
    places = (sorted(find_in_window(rules, text, at), key=order) for at in windows(text) if rules)
    return [span for window in places for span in window]


def order(span: Span) -> tuple[int, int]:
    return span.start, -span.end


def find_in_window(rules: Iterable[Rule], text: str, at: int) -> Iterator[Span]:
    low, high = max(0, at - BEFORE), at + WINDOW + AFTER
    folded = Folded(text[low:high])
    for span in (span for rule in rules for span in rule.find(folded.text)):
        start, end = low + folded.starts[span.start], low + folded.ends[span.end - 1]
        if at <= start < at + WINDOW:
            end = REST.match(text, end).end() if end == high else end  # type: ignore[union-attr]
            yield Span(start, end, span.kind, span.labelled)


def merged(*finds: list[Span]) -> Iterator[Span]:
    """Yield the spans in order, those that overlap as one of the longest one's kind."""
    last: Span | None = None
    for span in heapq.merge(*finds, key=order):
        if last and span.start < last.end:
            longer = max(last, span, key=lambda span: span.end - span.start)
            last = Span(last.start, max(last.end, span.end), longer.kind)
            continue
        if last:
            yield last
        last = span
    if last:
        yield last
