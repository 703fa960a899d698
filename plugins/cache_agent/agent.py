"""Cache: gives the same answer to the same conversation, without the model.

"The same" is the whole request as it comes here: model, messages with their images, options, think;
all but how the answer is sent. Each user has answers of their own. `/cache:fresh=true` asks the
model anew and keeps that answer instead. Only a whole answer in text is kept: none that was cut
off or that calls tools. A request with tools always goes to the model, and so does a turn that goes
on after a tool's result, which may be another one tomorrow.
"""

from __future__ import annotations

import hashlib
import json

from kernel.agent import BaseAgent, Payload, Reply

from .store import Store

DELIVERY = ("stream", "stream_options", "keep_alive")  # they change nothing about the text


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
        if self.context.continuation or payload.get("tools") or payload.get("functions"):
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
        # Answers in JSON or with logprobs never come here, so none is kept.
        if self.key and self.context.finish == "stop" and not self.context.explaining:
            self.store.put(self.key, "".join(self.parts))
        return ""


def key_of(payload: Payload, dialect: str, user: str) -> bytes:
    """Return a digest of what the answer depends on, whatever the order of its keys."""
    parts = {key: value for key, value in payload.items() if key not in DELIVERY}
    text = json.dumps([dialect, user, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()
