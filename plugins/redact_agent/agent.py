"""Redact: the model never sees names, addresses, numbers and keys, and the answer still has them.

Each becomes a placeholder (`[EMAIL_1]`) in every text of the request, the same value the same one,
and comes back in the answer and in the calls of tools. `forms.py` and `phones.py` say what is
private, and `placeholders.py` what stands for what: for this request and nowhere else. A request
that cannot be searched, or whose answer could not be restored, is refused.

When tools have run, `on_request` runs again: it leaves what the model was sent already as it is,
and searches what is new. A placeholder that the model wrote is the agent's own. The same text from
anybody else, in a tool's result say, stands for itself and becomes a placeholder, too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from kernel.agent import Abort, BaseAgent, Call, Payload, map_texts, texts

from .finding import Rule, Span, Words, find
from .forms import folded, names_rule, read_words, rules
from .phones import Phones
from .placeholders import Marked, Placeholders

SHORTEST = 6  # signs of a value that is looked for again: a shorter one is also an ordinary word
PIECE = 65_536  # signs of an answer that are restored at once
OPAQUE = re.compile("image|audio|video|document|file")  # in the type of a part that is no text
ENCODED = ("images", "data", "file_data", "image_url")  # keys of such parts
CALLED = ("arguments", "input")  # keys of what a tool is called with
# Roles, types and keys of what a model said or thought
OWN = ("assistant", "function_call", "reasoning", "thinking", "reasoning_content", "summary")


class Redact(BaseAgent):
    """Keeps private values from the model."""

    last = True  # what other agents add is searched, and what they ask the model has placeholders
    rules: list[Rule]
    placeholders: Placeholders  # of this request, from its first `on_request` on
    known: list[Words] = []  # rules for values of this request that a label gave away
    sent: Counter[str] = Counter()  # the texts that the model was sent last, and how often each

    def setup(self) -> None:  # type: ignore[override]
        names = self.settings["names"]
        if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError("settings: names: must be a list of names")
        if self.settings["images"] not in ("refuse", "pass"):
            raise ValueError("settings: images: must be refuse or pass")
        words = read_words()
        self.rules = [*rules(words), Phones(words, self.settings["regions"]), names_rule(names)]

    # `def`, because it searches the whole conversation: in a thread it holds nobody up.
    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        self.refuse(payload)
        again = vars(self).get("placeholders")
        self.placeholders = again or Placeholders(escaped=wants_json(payload))
        own = [again and m.get("role", m.get("type")) in OWN for m in payload["messages"]]
        payload["messages"] = [*map(marked, payload["messages"], own)]
        before, self.sent = self.sent.copy(), Counter()
        found = {t: find(self.rules, t) for t in dict.fromkeys(texts(payload)) if t not in before}
        self.known = [*self.known, *rules_for_labelled(found)]
        self.placeholders.reserve(t for t in found if again or not getattr(t, "own", False))
        payload = map_texts(payload, lambda text: self.hide(text, found.get(text, []), before))
        tools = [table(table(it).get("function") or it) for it in payload.get("tools") or []]
        self.forms = {str(t.get("name")): t.get("parameters", t.get("input_schema")) for t in tools}
        return payload

    def hide(self, text: str, spans: list[Span], before: Counter[str]) -> Any:
        """Return a text with placeholders, or the arguments of a call in the form they had.

        A text that was sent `before` stays; one that stands there more often than then is new.
        """
        mark, hidden = text if isinstance(text, Marked) else Marked(text), text
        before[text] -= 1
        if before[text] < 0:
            hidden = self.placeholders.hide(mark, spans + find(self.known, text))
        self.sent[hidden] += 1
        return json.loads(hidden) if isinstance(mark.given, dict) else hidden

    async def on_calls(self, calls: list[Call]) -> list[Call]:
        return [self.restored(call, {"arguments": self.forms.get(call["name"])}) for call in calls]

    def restored(self, value: Any, schema: Any) -> Any:
        """Return a call, or a part of it, with its values.

        A number was hidden as text. It is a number again where the tool's JSON schema asks for one.
        """
        schema = table(schema)
        if isinstance(value, dict):
            inner, restore = table(schema.get("properties", schema)), self.placeholders.restore
            return {restore(key): self.restored(it, inner.get(key)) for key, it in value.items()}
        if isinstance(value, list):
            return [self.restored(item, schema.get("items")) for item in value]
        if not isinstance(value, str) or (text := self.placeholders.restore(value)) == value:
            return value
        integer = re.fullmatch("[1-9][0-9]{0,99}", text)
        return int(text) if integer and schema.get("type") in ("integer", "number") else text

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
        if payload.get("logprobs"):
            raise Abort(403, "redact cannot restore an answer with logprobs: do not ask for them")


def marked(value: Any, own: Any, key: str = "") -> Any:
    """Return a message in which each text of the model, and what it calls tools with, is Marked."""
    own = own or key in OWN
    if isinstance(value, list):
        return [marked(item, own) for item in value]
    called = bool(value) and key in CALLED and isinstance(value, str | dict)
    if isinstance(value, dict) and not called:
        return {key: marked(item, own, key) for key, item in value.items()}
    if not called and not (own and isinstance(value, str)):
        return value
    text = Marked(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    text.own, text.given = bool(own), value if called else None
    return text


def table(value: Any) -> dict[str, Any]:
    """Return an object as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def rules_for_labelled(found: dict[str, list[Span]]) -> Iterator[Words]:
    """Yield rules for values that only a label gave away: an answer repeats them without it."""
    values: dict[str, set[str]] = defaultdict(set)
    for text, spans in found.items():
        for span in spans:
            if span.labelled and span.end - span.start >= SHORTEST:
                values[span.kind].add(folded(text[span.start : span.end]))
    yield from itertools.starmap(Words, values.items())


def wants_json(payload: Payload) -> bool:
    """Tell whether the answer will be JSON, as each dialect asks for it."""
    asked = [payload, table(payload.get("text")), table(payload.get("output_config"))]
    forms = [it.get(key) for it in asked for key in ("format", "response_format", "output_format")]
    return any(form and table(form).get("type") != "text" for form in forms)


def opaque_kinds(value: Any) -> Iterator[str]:
    """Yield what messages hold that is no text: the type of a part, or "images"."""
    inner = value if isinstance(value, list) else []
    if isinstance(value, dict):
        kind = str(value.get("type"))
        if OPAQUE.search(kind) or any(value.get(key) for key in ENCODED):
            yield kind if "type" in value else "images"
        inner = [item for key, item in value.items() if key not in CALLED]
    for item in inner:
        yield from opaque_kinds(item)
