"""Redact: the model never sees names, addresses, numbers and keys, and the answer still has them.

Each becomes a placeholder (`[EMAIL_1]`) in every text of the request, the same value the same one,
and comes back in the answer. `words.py`, `forms.py` and `phones.py` say what is private, and
`placeholders.py` what stands for what: for this request and nowhere else. A request that cannot be
searched, or whose answer could not be restored, is refused.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from kernel.agent import Abort, BaseAgent, Payload, map_texts, texts

from .finding import Pattern, Rule, Span, find
from .folding import END, START, Folded
from .forms import read_words, rules
from .phones import Phones
from .placeholders import Placeholders
from .words import names_rule

CHOICES = ("refuse", "pass")
SHORTEST = 6  # signs of a value that is looked for again: a shorter one is also an ordinary word
PIECE = 65_536  # signs of an answer that are restored at once
OPAQUE = re.compile("image|audio|video|document|file")  # in the type of a part that is no text
ENCODED = ("images", "data", "file_data", "image_url")  # keys of such parts
CALLED = ("arguments", "input")  # keys of what a tool is called with
INTEGER = re.compile(r'("(?:[^"\\]|\\.)*+")|(?<![\w.+-])\d{9,}(?![\w.])')


class Redact(BaseAgent):
    """Keeps private values from the model."""

    last = True  # what other agents add is searched, and what they ask the model has placeholders
    rules: list[Rule]
    known: list[Rule]  # of this request
    placeholders: Placeholders

    def setup(self) -> None:  # type: ignore[override]
        names = self.settings["names"]
        if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError("settings: names: must be a list of names")
        for key in ("images", "tools"):
            if self.settings[key] not in CHOICES:
                raise ValueError(f"settings: {key}: must be {' or '.join(CHOICES)}")
        words = read_words()
        self.rules = [*rules(words), Phones(words, self.settings["regions"])]
        self.rules += [names_rule(names)] if names else []

    # `def`, because it searches the whole conversation: in a thread it holds nobody up.
    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        self.refuse(payload)
        payload["messages"] = with_arguments(payload["messages"])
        found = {text: find(self.rules, text) for text in dict.fromkeys(texts(payload))}
        self.known = list(rules_for_labelled(found))
        self.placeholders = Placeholders(written(payload), escaped=wants_json(payload))
        return map_texts(payload, lambda text: self.hide(text, found[text]))

    def hide(self, text: str, found: list[Span]) -> Any:
        """Return a text with placeholders, or the arguments of a call as they were given."""
        hidden = self.placeholders.hide(text, found, find(self.known, text))
        if not isinstance(text, Arguments):
            return hidden
        if hidden == text:
            return text.given
        return hidden if isinstance(text.given, str) else json.loads(hidden)

    async def on_chunk(self, text: str) -> str:
        pieces = []
        for at in range(0, len(text), PIECE):
            pieces.append(self.placeholders.feed(text[at : at + PIECE]))
            await asyncio.sleep(0)
        return "".join(pieces)

    async def on_end(self) -> str:
        return self.placeholders.end()

    def refuse(self, payload: Payload) -> None:
        """Raise Abort for what cannot be searched, or would come back with placeholders in it."""
        kind = next(opaque_kinds(payload["messages"]), None)
        if kind and self.settings["images"] == "refuse":
            raise Abort(403, f"redact cannot look into {kind}, and so it lets none pass")
        if payload.get("tools") and self.settings["tools"] == "refuse":
            raise Abort(403, "redact cannot restore the arguments of tool calls: send no tools")
        if payload.get("logprobs"):
            raise Abort(403, "redact cannot restore an answer with logprobs: do not ask for them")


# For the seams of tools: what the model calls gets real values, what a tool returns gets none.


def restore_arguments(agent: Redact, arguments: Payload) -> Payload:
    """Return a tool call's arguments with the values of this request's placeholders."""
    return dict(agent.placeholders.restore(arguments))


def hide_result(agent: Redact, result: str) -> str:
    """Return a tool's result with placeholders, the same as in the request."""
    return str(agent.hide(result, find(agent.rules, result)))


class Arguments(str):
    """The arguments of a tool call as JSON: in one text, so that a key tells what its value is.

    Long integers are strings in it, because a placeholder is one.
    """

    given: Any

    @classmethod
    def of(cls, given: Any) -> Any:
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        arguments = cls(INTEGER.sub(lambda found: found[1] or f'"{found[0]}"', text))
        arguments.given = given
        return arguments


def with_arguments(value: Any, key: str = "") -> Any:
    """Return messages with what tools are called with as Arguments."""
    if isinstance(value, list):
        return [with_arguments(item) for item in value]
    if value and key in CALLED and isinstance(value, str | dict):
        return Arguments.of(value)
    if isinstance(value, dict):
        return {key: with_arguments(item, key) for key, item in value.items()}
    return value


def rules_for_labelled(found: dict[str, list[Span]]) -> Iterator[Rule]:
    """Yield rules for values that only a label gave away: an answer repeats them without it."""
    values: dict[str, set[str]] = defaultdict(set)
    for text, spans in found.items():
        for span in spans:
            if span.labelled and span.end - span.start >= SHORTEST:
                values[span.kind].add(re.escape(Folded(text[span.start : span.end]).text))
    for kind, forms in values.items():
        longest_first = "|".join(sorted(forms, key=len, reverse=True))
        yield Pattern(kind, re.compile(rf"{START}(?P<value>{longest_first}){END}"))


def written(payload: Payload) -> list[str]:
    """Return the texts in which a placeholder is not the agent's own.

    The client keeps the model's thoughts and calls as they came, with placeholders in them.
    """
    others = [m for m in payload["messages"] if m.get("role") not in (None, "assistant")]
    return texts(payload | {"messages": others})


def wants_json(payload: Payload) -> bool:
    """Tell whether the answer will be JSON, as each dialect asks for it."""
    form = payload.get("response_format") or (payload.get("text") or {}).get("format")
    typed = isinstance(form, dict) and form.get("type") == "text"
    return bool(payload.get("format") or payload.get("output_format")) or bool(form) and not typed


def opaque_kinds(value: Any) -> Iterator[str]:
    """Yield what messages hold that is no text: the type of a part, or "images"."""
    if isinstance(value, list):
        for item in value:
            yield from opaque_kinds(item)
    if isinstance(value, dict):
        kind = str(value.get("type"))
        if OPAQUE.search(kind) or any(value.get(key) for key in ENCODED):
            yield kind if "type" in value else "images"
        yield from opaque_kinds([it for key, it in value.items() if key not in CALLED])
