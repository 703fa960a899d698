"""Cache: gives the same answer to the same conversation, without the model.

"The same" is the whole request as it comes here: model, messages with their images, options, think;
all but how the answer is sent. Each user has answers of their own. `/cache:fresh=true` asks the
model anew and keeps that answer instead. Only a whole answer in text is kept: none that was cut
off or that calls tools. A request with tools always goes to the model, and so does a turn that goes
on after a tool's result, which may be another one tomorrow.

Answers lie in the agent's store, by a digest of their request. What is too old is not given; what
is too much goes, the oldest first. The database's clock counts, which is one for all proxies.
"""

from __future__ import annotations

import hashlib
import json
from random import random

from kernel.agent import BaseAgent, Payload, Reply, Schema

LIMITS = ("max_age", "max_entries", "max_bytes")
LOOKED_THROUGH = 1000  # entries, after each answer; where more may be kept, after fewer answers
DELIVERY = ("stream", "stream_options", "keep_alive")  # they change nothing about the text
# Bytes, because half a character is text in JSON; `made` and `age` are seconds.
TABLE = (
    "CREATE TABLE answers (key TEXT PRIMARY KEY, answer BYTEA, made DOUBLE PRECISION DEFAULT {})"
)
AGED = "CREATE VIEW aged AS SELECT key, answer, {} - made AS age FROM answers"
SQLITE_CLOCK = "((julianday('now') - 2440587.5) * 86400.0)"
CLOCK = "extract(epoch FROM clock_timestamp())"
# An answer from the future has no age: the clock was wrong then, or is now.
GET = "SELECT answer FROM aged WHERE key = $1 AND age BETWEEN 0 AND $2"
PUT = (
    "INSERT INTO answers (key, answer) VALUES ($1, $2) ON CONFLICT (key)"
    " DO UPDATE SET answer = excluded.answer, made = excluded.made"
)
MAKE_ROOM = """
DELETE FROM answers WHERE key IN (SELECT key FROM (
  SELECT key, age, row_number() OVER newest AS place, sum(length(answer)) OVER newest AS size
  FROM aged WINDOW newest AS (ORDER BY age, key)
) AS kept WHERE place > $1 OR size > $2 OR age NOT BETWEEN 0 AND $3)
"""


class Cache(BaseAgent):
    """Answers at once what was answered before."""

    schema = Schema(
        sqlite=[TABLE.format(SQLITE_CLOCK), AGED.format(SQLITE_CLOCK)],
        postgresql=[TABLE.format(CLOCK), AGED.format(CLOCK)],
        durable=False,
    )
    innermost = True  # next to the model: it keeps what was sent there, and what came back
    key: str = ""  # of this request; empty: its answer is not kept
    parts: list[str]  # of the answer, as they came

    async def setup(self) -> None:
        for name, limit in self.settings.items():
            if not limit > 0:
                raise ValueError(f"settings: {name}: {limit} must be above 0")

    async def on_request(self, payload: Payload) -> Payload:
        if self.context.continuation or payload.get("tools") or payload.get("functions"):
            return payload
        self.key = key_of(payload, self.context.dialect, self.context.user)
        self.parts = []
        if not self.arguments["fresh"]:
            for (answer,) in await self.store.execute(GET, self.key, self.settings["max_age"]):
                raise Reply(answer.decode("utf-8", "surrogatepass"))
        return payload

    async def on_chunk(self, text: str) -> str:
        if self.key:
            self.parts.append(text)
        return text

    async def on_end(self) -> str:
        # Answers in JSON or with logprobs never come here, so none is kept.
        if self.key and self.context.finish == "stop":
            answer = "".join(self.parts).encode("utf-8", "surrogatepass")
            age, entries, size = map(self.settings.__getitem__, LIMITS)
            if len(answer) <= size:
                await self.store.execute(PUT, self.key, answer)
                if random() * entries < LOOKED_THROUGH:
                    await self.store.execute(MAKE_ROOM, entries, size, age)
        return ""


def key_of(payload: Payload, dialect: str, user: str) -> str:
    """Return a digest of what the answer depends on, whatever the order of its keys."""
    parts = {key: value for key, value in payload.items() if key not in DELIVERY}
    text = json.dumps([dialect, user, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
