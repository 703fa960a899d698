"""Metrics: the central collector, and its text for Prometheus.

Every metric stands in `HELP`; slices and agents add to them through the methods of `Metrics`.
`GET /metrics` prints them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator

HELP = {  # name: (type, what it says, labels)
    "osp_requests_total": ("counter", "Requests answered", ("route", "status")),
    "osp_request_seconds": ("summary", "Time until the last byte", ("route",)),
    "osp_first_byte_seconds": ("summary", "Time until the answer began", ("route",)),
    "osp_tokens_total": ("counter", "Tokens, by Ollama's own count", ("model", "kind")),
    "osp_agents_activated_total": ("counter", "Requests in which an agent took part", ("agent",)),
    "osp_agent_failures_total": ("counter", "Hooks that failed", ("agent",)),
    "osp_agent_seconds": ("summary", "Time spent in an agent's hooks", ("agent",)),
}

# Ollama's own counters, as both dialects write them at the end of an answer: the last ones count.
# A quote inside of the text of an answer is escaped, so that no text can look like them.
PROMPT = re.compile(rb'(?s:.*)"(?:prompt_eval_count|prompt_tokens)":(\d{1,15})')
ANSWER = re.compile(rb'(?s:.*)"(?:eval_count|completion_tokens)":(\d{1,15})')
MODEL = re.compile(rb'"model":"([^"\\]{1,200})"')
MODELS = 50  # a name is free text: without a limit every typo were a time series


class Metrics:
    """Counters of one app, kept as {name: {label values: number}}."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {
            line: defaultdict(float) for name in HELP for line in lines_of(name)
        }
        self._models: set[str] = set()

    def request(self, route: str, status: int, seconds: float, first: float) -> None:
        """Count one request; status 0 is one that nobody waited for."""
        self._numbers["osp_requests_total"][route, str(status)] += 1
        self._observe("osp_request_seconds", route, seconds)
        self._observe("osp_first_byte_seconds", route, first)

    def tokens(self, head: bytes, tail: bytes) -> None:
        """Count what Ollama says of an answer that begins with `head` and ends with `tail`."""
        prompt, answer = PROMPT.match(tail), ANSWER.match(tail)
        model = MODEL.search(head) or MODEL.search(tail)  # behind the vectors of an embedding
        if not model or not (prompt or answer):
            return
        name = model[1].decode(errors="replace")
        if len(self._models) < MODELS:
            self._models.add(name)
        label = name if name in self._models else "other"
        tokens = self._numbers["osp_tokens_total"]
        tokens[label, "prompt"] += int(prompt[1]) if prompt else 0
        tokens[label, "answer"] += int(answer[1]) if answer else 0

    def activated(self, agent: str) -> None:
        self._numbers["osp_agents_activated_total"][(agent,)] += 1

    def hook(self, agent: str, seconds: float, *, failed: bool) -> None:
        """Count one run of an agent's hook."""
        self._observe("osp_agent_seconds", agent, seconds)
        if failed:
            self._numbers["osp_agent_failures_total"][(agent,)] += 1

    def agent(self, agent: str) -> dict[str, int]:
        """Return one agent's counts, for `GET /plugins`."""
        return {
            "activated": int(self._numbers["osp_agents_activated_total"].get((agent,), 0)),
            "failures": int(self._numbers["osp_agent_failures_total"].get((agent,), 0)),
        }

    def _observe(self, name: str, label: str, seconds: float) -> None:
        self._numbers[f"{name}_sum"][(label,)] += seconds
        self._numbers[f"{name}_count"][(label,)] += 1

    def text(self) -> str:
        """Return everything in the text format of Prometheus, version 0.0.4."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, (kind, text, labels) in HELP.items():
            yield f"# HELP {name} {text}."
            yield f"# TYPE {name} {kind}"
            for line in lines_of(name):
                for values, number in self._numbers[line].items():
                    # Of what JSON escapes, no label here has more than Prometheus escapes alike.
                    said = [json.dumps(value, ensure_ascii=False) for value in values]
                    pairs = ",".join(map("=".join, zip(labels, said, strict=True)))
                    yield f"{line}{{{pairs}}} {number:.12g}"


def lines_of(name: str) -> list[str]:
    """Return the names under which a metric is counted: a summary is a sum and a count."""
    return [f"{name}_sum", f"{name}_count"] if HELP[name][0] == "summary" else [name]
