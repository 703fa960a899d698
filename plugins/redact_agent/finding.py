"""Finding: what a rule is, what it finds, and how finds become places in a text.

A rule prefers to find too much: a value comes back letter for letter, so that a wrong find costs
the model a word and the user nothing. Every repetition in a pattern is bounded or possessive, and
so the time grows with the text and no faster, whatever the text is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

KINDS = ("NAME", "EMAIL", "PHONE", "IBAN", "CARD", "SECRET")
SHORTEST = 6  # signs of a value that is looked for again: a shorter one is also an ordinary word
HEAD = 64  # signs by which a longer one is known
KEY = 16  # signs of a run that are enough to look closer
RUN = re.compile(r"[^\W_]+")
REST = re.compile(r"(?:[^\s\"'`<>,;(){}\[\]|]*(?<![.:?!]))?")


@dataclass(frozen=True, slots=True)
class Span:
    """A value's place in a text; `told` means that only a word before it gave it away."""

    start: int
    end: int
    kind: str
    told: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern whose group `value` is private where `check` says so, too."""

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = bool
    told: bool = False

    def find(self, text: str) -> Iterator[Span]:
        for found in self.pattern.finditer(text):
            if self.check(found["value"]):
                yield Span(*found.span("value"), self.kind, self.told)


def find(rules: Iterable[Rule], text: str) -> list[Span]:
    return [span for rule in rules for span in rule.find(text)]


class Known:
    """Finds values by their own letters: an answer repeats a password without `password:`.

    A value is known by its first run of letters and digits. Behind such a run in a text one look
    for each length is enough, however many values begin alike; and of a long value the head is
    looked for, so that there are few lengths.
    """

    def __init__(self, values: Iterable[tuple[str, str]]) -> None:
        """`values` are pairs of value and kind."""
        self._kinds = {value[:HEAD]: kind for value, kind in values if len(value) >= SHORTEST}
        places: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for head in self._kinds:
            if run := RUN.search(head):
                places[run[0][:KEY]].add((run.start(), len(head)))
        self._places = dict(places)

    def find(self, text: str) -> Iterator[Span]:
        rest = 0  # where the last long value ended
        for start, end in self._heads(text):
            kind = self._kinds[text[start:end]]
            if end - start == HEAD and end > rest:  # else this one is a part of that
                rest = end + len(REST.match(text, end)[0])  # type: ignore[index]
            yield Span(start, rest if end - start == HEAD else end, kind)

    def _heads(self, text: str) -> Iterator[tuple[int, int]]:
        for run in RUN.finditer(text) if self._places else ():
            for before, length in self._places.get(run[0][:KEY], ()):
                start = run.start() - before
                if start >= 0 and text[start : start + length] in self._kinds:
                    yield start, start + length


def merged(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the spans in order, those that overlap as one of the longest one's kind."""
    last: Span | None = None
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if last and span.start < last.end:
            longer = max(last, span, key=lambda span: span.end - span.start)
            last = Span(last.start, max(last.end, span.end), longer.kind)
            continue
        if last:
            yield last
        last = span
    if last:
        yield last
