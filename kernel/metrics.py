"""Metrics: the central collector, and its text for Prometheus.

Every metric stands in `HELP`; slices and agents add to them through the methods of `Metrics`.
`GET /metrics` prints them.
"""

from __future__ import annotations

import json
import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

HELP = {  # name: (type, text, label)
    "osp_requests_total": ("counter", "Requests answered", ("route", "status", "user")),
    "osp_request_seconds": ("histogram", "Time until the last byte", ("route",)),
    "osp_first_byte_seconds": ("histogram", "Time until the answer began", ("route",)),
    "osp_tokens_total": ("counter", "Tokens, by Ollama's own count", ("model", "kind", "user")),
    "osp_waiting_requests": ("gauge", "Requests that wait for their turn", ("user",)),
    "osp_waiting_seconds": ("histogram", "Time until a request had its turn", ("user",)),
    "osp_agents_activated_total": ("counter", "Requests in which an agent took part", ("agent",)),
    "osp_agent_failures_total": ("counter", "Hooks that failed", ("agent",)),
    "osp_agent_seconds": ("histogram", "Time spent in an agent's hooks", ("agent",)),
    "osp_tool_calls_total": ("counter", "Calls of tools", ("agent", "tool", "outcome")),
    "osp_tool_seconds": ("histogram", "Time until a tool had a result", ("agent",)),
}
BOUNDS = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds

# Ollama's own counters, as every dialect writes them at the end of an answer: the last ones count.
# A quote in the text of an answer is escaped, so that no text can look like them.
PROMPT = (b'"prompt_eval_count":', b'"prompt_tokens":', b'"input_tokens":')
ANSWER = (b'"eval_count":', b'"completion_tokens":', b'"output_tokens":')
NUMBER = re.compile(rb"\d{1,15}")
MODEL = re.compile(rb'"model":"([^"\\]{1,200})"')
NAMES = 50  # of models, of tools, and of users: further ones are counted as "other"

Row = list[float]  # of a histogram: a count for each bound and for what is longer, and the sum


Tokens = tuple[int, int, float]  # of a prompt, of its answer, and the seconds that this one took


class Metrics:
    """Counters and histograms of one app, by the metric's name and the values of its labels."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], int] = defaultdict(int)
        self._rows: dict[tuple[str, str], Row] = defaultdict(lambda: [0.0] * (len(BOUNDS) + 2))
        self._models: set[str] = set()
        self._tools: set[str] = set()
        self._users: set[str] = set()

    def request(
        self, route: str, status: int, seconds: float, first: float, user: str = ""
    ) -> None:
        """Count one request; status 0 is one whose client left before an answer."""
        user = bounded(self._users, user)
        self._counts["osp_requests_total", route, str(status), user] += 1
        self._observe("osp_request_seconds", route, seconds)
        self._observe("osp_first_byte_seconds", route, first)

    def tokens(self, head: bytes, tail: bytes, user: str = "") -> Tokens:
        """Count the tokens of an answer of Ollama that begins with `head` and ends with `tail`."""
        prompt, answer = last_number(tail, PROMPT), last_number(tail, ANSWER)
        model = MODEL.search(head) or MODEL.search(tail)  # behind the vectors of an embedding
        if not (model and prompt + answer):
            return 0, 0, 0.0
        name = model[1].decode(errors="replace")
        label = bounded(self._models, name)
        user = bounded(self._users, user)
        self._counts["osp_tokens_total", label, "prompt", user] += prompt
        self._counts["osp_tokens_total", label, "answer", user] += answer
        return prompt, answer, last_number(tail, (b'"eval_duration":',)) / 1e9

    @contextmanager
    def waiting(self, user: str) -> Iterator[None]:
        """Count a request that waits for its turn inside the block."""
        user, began = bounded(self._users, user), time.perf_counter()
        self._counts["osp_waiting_requests", user] += 1
        try:
            yield
        finally:
            self._counts["osp_waiting_requests", user] -= 1
            self._observe("osp_waiting_seconds", user, time.perf_counter() - began)

    def activated(self, agent: str) -> None:
        self._counts["osp_agents_activated_total", agent] += 1

    def hook(self, agent: str, seconds: float, *, failed: bool) -> None:
        """Count one run of an agent's hook."""
        self._observe("osp_agent_seconds", agent, seconds)
        if failed:
            self._counts["osp_agent_failures_total", agent] += 1

    def tool(self, agent: str, tool: str, outcome: str, seconds: float) -> None:
        """Count one call of a tool of an agent; the outcome is ok, error or timeout."""
        self._counts["osp_tool_calls_total", agent, bounded(self._tools, tool), outcome] += 1
        self._observe("osp_tool_seconds", agent, seconds)

    def agent(self, agent: str) -> dict[str, int]:
        """Return one agent's counts, for `GET /plugins`."""
        return {
            "activated": self._counts.get(("osp_agents_activated_total", agent), 0),
            "failures": self._counts.get(("osp_agent_failures_total", agent), 0),
        }

    def _observe(self, name: str, label: str, seconds: float) -> None:
        row = self._rows[name, label]
        row[bisect_left(BOUNDS, seconds)] += 1
        row[-1] += seconds

    def text(self) -> str:
        """Return everything in the text format of Prometheus, version 0.0.4."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, (kind, text, labels) in HELP.items():
            yield f"# HELP {name} {text}."
            yield f"# TYPE {name} {kind}"
            for (of, *values), number in self._counts.items():
                if of == name:
                    yield f"{name}{{{pairs(labels, values)}}} {number}"
            for (of, value), row in self._rows.items():
                if of == name:
                    yield from histogram(name, pairs(labels, [value]), row)


def bounded(known: set[str], name: str) -> str:
    """Return a label's value that is not one too many."""
    if len(known) < NAMES:
        known.add(name)
    return name if name in known else "other"


def histogram(name: str, label: str, row: Row) -> Iterator[str]:
    for bound, count in zip((*BOUNDS, "+Inf"), accumulate(row[:-1]), strict=True):
        yield f'{name}_bucket{{{label},le="{bound}"}} {count:.12g}'
    yield f"{name}_sum{{{label}}} {row[-1]:.12g}"
    yield f"{name}_count{{{label}}} {sum(row[:-1]):.12g}"


def pairs(labels: Sequence[str], values: Sequence[str]) -> str:
    # Of what JSON escapes, no label here has more than Prometheus escapes alike.
    quoted = [json.dumps(value, ensure_ascii=False) for value in values]
    return ",".join(map("=".join, zip(labels, quoted, strict=True)))


def last_number(text: bytes, keys: tuple[bytes, ...]) -> int:
    """Return the number behind the last of the first key that `text` has, else 0."""
    for key in keys:
        if (at := text.rfind(key)) >= 0:
            number = NUMBER.match(text, at + len(key))
            return int(number[0]) if number else 0
    return 0
