"""Redact: the model never sees names, addresses, numbers and keys, and the answer still has them.

Each becomes a placeholder (`[EMAIL_1]`) in all messages of the conversation, the same value the
same one, and comes back in the answer. `names.py`, `patterns.py` and `keys.py` say what is
private, `messages.py` where text is, and `placeholders.py` what stands for what: for this request
and nowhere else. What cannot be searched or not be restored is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernel.agent import Abort, BaseAgent, Payload

from . import keys, patterns
from .finding import Known, Rule, Span, find
from .messages import edited, opaque_kinds, restored_part, texts_of
from .names import names_rule
from .placeholders import Placeholders

CHOICES = ("refuse", "pass")


class Redact(BaseAgent):
    """Keeps private values from the model."""

    last = True  # what other agents add is searched, and what they ask the model has placeholders
    rules: list[Rule]
    placeholders: Placeholders

    def setup(self) -> None:  # type: ignore[override]
        names = self.settings["names"]
        if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError("settings: names: must be a list of names")
        for key in ("images", "tools"):
            if self.settings[key] not in CHOICES:
                raise ValueError(f"settings: {key}: must be {' or '.join(CHOICES)}")
        self.rules = [*keys.RULES, *patterns.RULES, *([names_rule(names)] if names else [])]

    # `def`, because it searches the whole conversation: in a thread it holds nobody up.
    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        self.refuse(payload)
        messages = payload["messages"]
        texts = dict.fromkeys(text for message in messages for text in texts_of(message))
        found = {text: find(self.rules, text) for text in texts}
        known = Known(told(found))
        written = [text for message in messages for text in texts_of(restored_part(message))]
        self.placeholders = Placeholders(written, escaped=wants_json(payload))

        def hide(text: str) -> str:
            return self.placeholders.hide(text, [*found[text], *known.find(text)])

        payload["messages"] = [edited(message, hide) for message in messages]
        return payload

    async def on_chunk(self, text: str) -> str:
        return self.placeholders.feed(text)

    async def on_end(self) -> str:
        return self.placeholders.end()

    def refuse(self, payload: Payload) -> None:
        """Raise Abort for what cannot be searched, or would come back with placeholders in it."""
        for kind in (kind for message in payload["messages"] for kind in opaque_kinds(message)):
            if self.settings["images"] == "refuse":
                raise Abort(403, f"redact cannot look into {kind}, and so it lets none pass")
        if payload.get("tools") and self.settings["tools"] == "refuse":
            raise Abort(403, "redact cannot restore the arguments of tool calls: send no tools")
        if payload.get("logprobs"):
            raise Abort(403, "redact cannot restore an answer with logprobs: do not ask for them")


def told(found: dict[str, list[Span]]) -> Iterator[tuple[str, str]]:
    """Yield the values, with their kinds, that only a word before them gave away."""
    for text, spans in found.items():
        yield from ((text[s.start : s.end], s.kind) for s in spans if s.told)


def wants_json(payload: Payload) -> bool:
    """Tell whether the answer will be JSON: `format` is Ollama's word, the other OpenAI's."""
    form = payload.get("response_format")
    typed = isinstance(form, dict) and form.get("type") == "text"
    return bool(payload.get("format")) or bool(form) and not typed
