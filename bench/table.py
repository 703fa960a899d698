"""Table: the bench's numbers as a table, as JSON and as a picture.

`Report.add` takes one sample of one row and column, a round at a time; what is shown are medians,
and beside each how many times the naive forwarder's it is.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

BASE = "naive"  # the column that the others are compared with


@dataclass(frozen=True)
class Row:
    key: str
    label: str
    digits: int = 0
    compared: bool = True  # to the naive forwarder


ROWS = (
    Row("chat", "requests/s, 16 connections: chat that no agent touches"),
    Row("embed", "requests/s, 16 connections: pass-through, body as long"),
    Row("chat_cpu", "  processor time of one chat, us"),
    Row("embed_cpu", "  processor time of one pass-through, us"),
    Row("untouched", "  an untouched chat costs so many % more", 1, compared=False),
    Row("layers", "  log, id, metrics, guard: % of a pass-through", 1, compared=False),
    Row("p50", "one connection: ms added to direct, median", 3),
    Row("p99", "  99th percentile", 3),
    Row("stream", "streams of 200 frames per second, 8 connections"),
    Row("stream_cpu", "  processor time of one frame, us", 2),
    Row("piece", "  edited by an agent with on_chunk"),
    Row("whole", "  edited by an agent with on_response"),
    Row("edited", "  with on_chunk: % of untouched", compared=False),
    Row("slow_p50", "slow streams: ms added to a frame, median", 2),
    Row("slow_p99", "  99th percentile", 2),
    Row("slow_cpu", "  % of one core", compared=False),
    Row("slow_memory", "  KiB for each stream", compared=False),
    Row("ready", "ms from start to first answer"),
    Row("memory", "MiB resident after the streams", 1),
    Row("growth", "  grown by so many MiB in ten times as many", 1, compared=False),
)
LABELS = {row.key: row.label.strip() for row in ROWS}

# The picture: one panel for each of these rows
PANELS = {
    "chat": "Requests per second (more is better)",
    "stream": "Streams of 200 frames per second (more is better)",
    "p50": "Milliseconds added to a request (less is better)",
    "memory": "MiB of memory (less is better)",
}
BAR, GAP, NAMES, WIDTH, ROOM = 18, 6, 70, 640, 80
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
rect { fill: #8c959f }
.osp { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  rect { fill: #6e7681 }
  .osp { fill: #58a6ff }
}
"""


def two_levels() -> defaultdict[str, defaultdict[str, list[float]]]:
    return defaultdict(lambda: defaultdict(list))


@dataclass
class Report:
    """All samples of a run: {row: {column: [a number per round]}}."""

    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)
    samples: defaultdict[str, defaultdict[str, list[float]]] = field(default_factory=two_levels)

    def add(self, row: str, column: str, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self.samples[row][column].append(value)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def value(self, row: str, column: str) -> float | None:
        """Return the median of a row and column, or None where nothing was measured."""
        samples = self.samples[row].get(column)
        return median(samples) if samples else None

    def text(self) -> str:
        """Return the table, with the notes below it."""
        head = ["", *self.columns]
        lines = [[row.label, *self._cells(row)] for row in ROWS if self.samples[row.key]]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        table = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
            for name, *cells in [head, *lines]
        ]
        return "\n".join([*table, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def _cells(self, row: Row) -> Iterator[str]:
        base = self.value(row.key, BASE) if row.compared else None
        for column in self.columns:
            value = self.value(row.key, column)
            if value is None:
                yield "-"
                continue
            times = f" {value / base:.2g}x" if base and column not in ("direct", BASE) else ""
            yield f"{value:,.{row.digits}f}{times}"

    def json(self) -> str:
        """Return each row as {"label", "median": {column: number}, "rounds": {column: [...]}}."""
        rows: dict[str, Any] = {}
        for row in ROWS:
            if rounds := self.samples[row.key]:
                medians = {column: median(values) for column, values in rounds.items()}
                rows[row.key] = {"label": LABELS[row.key], "median": medians, "rounds": rounds}
        return json.dumps({"notes": self.notes, "rows": rows}, indent=1)

    def svg(self) -> str:
        """Return a picture of bars that is readable on light and on dark pages."""
        parts: list[str] = []
        top = 0
        for row, title in PANELS.items():
            values = {column: self.value(row, column) for column in self.columns}
            known = {name: v for name, v in values.items() if v is not None and name != "direct"}
            if known:
                digits = next(r.digits for r in ROWS if r.key == row)
                parts += panel(title, known, digits, top)
                top += (BAR + GAP) * (len(known) + 1) + 2 * GAP
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}">'
        return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def panel(title: str, values: dict[str, float], digits: int, top: int) -> Iterator[str]:
    """Yield a title and a bar for each value, the longest as long as there is room."""
    longest = max(max(values.values()), 1e-9)
    yield f'<text class="title" x="0" y="{top + BAR - 4}">{escape(title)}</text>'
    for number, (name, value) in enumerate(values.items(), start=1):
        y = top + number * (BAR + GAP)
        length = max(value / longest * (WIDTH - NAMES - ROOM), 1)
        kind = ' class="osp"' if name == "osp" else ""
        yield f'<text x="0" y="{y + BAR - 4}">{escape(name)}</text>'
        yield f'<rect{kind} x="{NAMES}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3"/>'
        end = NAMES + length + GAP
        yield f'<text x="{end:.1f}" y="{y + BAR - 4}">{value:,.{digits}f}</text>'
