"""Redact: the model never sees names, addresses, numbers and keys, and the answer still has them.

Each becomes a placeholder (`[EMAIL_1]`) in every text of the request, the same value the same one,
and comes back in the answer. `words.py`, `forms.py` and `phones.py` say what is private, and
`placeholders.py` what stands for what: for this request and nowhere else. A request that cannot be
searched, or whose answer could not be restored, is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from kernel.agent import Abort, BaseAgent, Payload, map_texts, texts

from .finding import Rule, Span, Words, find
from .forms import folded, names_rule, read_words, rules
from .phones import Phones
from .placeholders import Placeholders

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
    placeholders: Placeholders  # of this request

    def setup(self) -> None:  # type: ignore[override]
        names = self.settings["names"]
        if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError("settings: names: must be a list of names")
        for key in ("images", "tools"):
            if self.settings[key] not in CHOICES:
                raise ValueError(f"settings: {key}: must be {' or '.join(CHOICES)}")
        words = read_words()
        self.rules = [*rules(words), Phones(words, self.settings["regions"]), names_rule(names)]

    # `def`, because it searches the whole conversation: in a thread it holds nobody up.
    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        self.refuse(payload)
        payload["messages"] = with_arguments(payload["messages"])
        found = {text: find(self.rules, text) for text in dict.fromkeys(texts(payload))}
        known = list(rules_for_labelled(found))
        self.placeholders = Placeholders(written(payload), escaped=wants_json(payload))
        return map_texts(payload, lambda text: self.hide(text, found[text] + find(known, text)))

    def hide(self, text: str, spans: list[Span]) -> Any:
        """Return a text with placeholders, or the arguments of a call as they were given."""
        hidden = self.placeholders.hide(text, spans)
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


class Arguments(str):
    """The arguments of a tool call as JSON: in one text, so that a key tells what its value is.

    Long integers are strings in it, because a placeholder is one.
    """

    given: Any


def with_arguments(value: Any, key: str = "") -> Any:
    """Return messages with what tools are called with as Arguments."""
    if isinstance(value, list):
        return [with_arguments(item) for item in value]
    if value and key in CALLED and isinstance(value, str | dict):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        arguments = Arguments(INTEGER.sub(lambda found: found[1] or f'"{found[0]}"', text))
        arguments.given = value
        return arguments
    if isinstance(value, dict):
        return {key: with_arguments(item, key) for key, item in value.items()}
    return value


def rules_for_labelled(found: dict[str, list[Span]]) -> Iterator[Words]:
    """Yield rules for values that only a label gave away: an answer repeats them without it."""
    values: dict[str, set[str]] = defaultdict(set)
    for text, spans in found.items():
        for span in spans:
            if span.labelled and span.end - span.start >= SHORTEST:
                values[span.kind].add(folded(text[span.start : span.end]))
    yield from itertools.starmap(Words, values.items())


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
