"""Cache: gives the same answer to the same conversation, without the model.

"The same" is the whole request as it comes here: model, messages with their images, options; all
but how the answer is sent. Each user has answers of their own. `/cache:fresh=true` asks the model
anew and keeps that answer instead. Tools, structured output and logprobs always go to the model.
"""

from __future__ import annotations

import hashlib
import json

from kernel.agent import BaseAgent, Payload, Reply

from .store import Store

DELIVERY = ("stream", "stream_options", "keep_alive")  # they change nothing about the text
# What is more than text cannot be kept, and what a tool said yesterday may be wrong today.
NEVER = ("tools", "functions", "format", "response_format", "logprobs")


class Cache(BaseAgent):
    """Answers at once what was answered before."""

    innermost = True  # next to the model: it keeps what was sent there, and what came back
    store: Store
    key: bytes = b""  # of this request; empty: its answer is not kept
    parts: list[str]  # of the answer, as they came

    # The disk is waited for in a thread (`def`), never on the loop.
    def setup(self) -> None:  # type: ignore[override]
        for name, limit in self.settings.items():
            if not limit > 0:
                raise ValueError(f"settings: {name}: {limit} must be above 0")
        self.store = Store(self.data_dir / "answers.db", **self.settings)

    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        if not is_repeatable(payload):
            return payload
        self.key = key_of(payload, self.context.dialect, self.context.user)
        self.parts = []
        answer = None if self.arguments["fresh"] else self.store.get(self.key)
        if answer is not None:
            raise Reply(answer)
        return payload

    async def on_chunk(self, text: str) -> str:
        if self.key:
            self.parts.append(text)
        return text

    def on_end(self) -> str:  # type: ignore[override]
        # Only an answer that is complete comes here.
        if self.key:
            self.store.put(self.key, "".join(self.parts))
        return ""


def is_repeatable(payload: Payload) -> bool:
    """Tell whether the answer will be text and nothing else, and does not rest on a tool."""
    if any(payload.get(key) for key in NEVER):
        return False
    messages = payload["messages"]
    roles = [str(message.get("role")).lower() for message in messages]
    called = any(message.get("tool_calls") for message in messages)
    return not called and "tool" not in roles


def key_of(payload: Payload, dialect: str, user: str) -> bytes:
    """Return a digest of what the answer depends on, whatever the order of its keys."""
    asked = {key: value for key, value in payload.items() if key not in DELIVERY}
    text = json.dumps([dialect, user, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()
