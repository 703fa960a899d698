"""Explain: what the model would have been sent, agent by agent, for `/explain` before commands.

A request is shown as lines: its messages, then its other fields. What an agent added stands behind
a `+`, what it took away behind a `-`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator

from kernel.agent import Payload
from kernel.dialects import dumps
from slices.chat.chain import Run, Trace

LONGEST = 300  # signs of what is no text: an image, say


def explanation(trace: Trace, payload: Payload, reply: str | None) -> str:
    """Return the answer to `/explain`; `reply` is what an agent answered without the model."""
    parts = [part_of(run, before, after) for run, before, after in trace]
    if reply is None:
        sent = "\n".join(lines_of(dumps(payload)))
        end = f"The model would have been sent:\n{sent}"
    else:
        end = f"The model would not have been asked. The answer would have been:\n{reply}"
    return "\n\n".join([*parts, end])


def part_of(run: Run, before: bytes, after: bytes) -> str:
    title = f"/{run.plugin.name} ({run.outcome}, {run.seconds * 1000:.0f} ms)"
    changes = difflib.unified_diff(list(lines_of(before)), list(lines_of(after)), n=0, lineterm="")
    shown = [line[0] + " " + line[1:] for line in list(changes)[2:] if not line.startswith("@@")]
    return "\n".join([title, *(shown or ["changed nothing"])])


def lines_of(body: bytes) -> Iterator[str]:
    payload = json.loads(body)
    for message in payload.pop("messages"):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        for part in parts:
            text = part.get("text") if part.get("type") == "text" else short(part)
            yield from f"[{message.get('role')}] {text}".splitlines()
        rest = {k: v for k, v in message.items() if k not in ("role", "content")}
        yield from (f"    {key}: {short(value)}" for key, value in rest.items())
    yield from (f"{key}: {short(value)}" for key, value in payload.items())


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
