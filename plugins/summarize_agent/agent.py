"""Summarize: keeps long conversations short, with a summary in place of their older turns.

A conversation of more than `limit` tokens (characters / 4) loses its older turns to a summary of at
most a quarter of that. The last `keep` turns stay as they are, and so do system messages. Turns are
cut off many at a time, until half of the limit is left: in between, the same history gets the same
summary (it is kept by a digest of what it sums up), so that Ollama's prompt cache holds. Each
summary is made of the one before and the turns since.
"""

from __future__ import annotations

import asyncio
import hashlib
from itertools import pairwise
from pathlib import Path

from kernel.agent import BaseAgent, Message, Payload, is_user, texts

MOST = 1000  # summaries that are kept
SYSTEM = ("system", "developer")
INSTRUCTION = (
    "Sum up the conversation that the user sends, in its language and in at most {words} words:"
    " facts, names, numbers, decisions, open questions. Answer with the summary alone."
)
TITLE = "Summary of the conversation so far:\n"
Part = tuple[str, str]  # the digest of a conversation up to a cut, its text since the cut before


class Summarize(BaseAgent):
    """Puts a summary in place of a long conversation's older turns."""

    async def setup(self) -> None:
        if self.settings["keep"] < 1 or self.settings["limit"] < 100:
            raise ValueError("settings: keep must be at least 1, and limit at least 100")

    async def on_request(self, payload: Payload) -> Payload:
        messages, limit, keep = payload["messages"], self.settings["limit"], self.settings["keep"]
        shorten = asyncio.to_thread(parts_of, messages, limit, keep, self.context.model)
        parts, first, end = await shorten
        if parts:
            summary = {"role": "system", "content": TITLE + await self.summary(parts)}
            within = [m for m in messages[first:end] if m.get("role") in SYSTEM]
            payload["messages"] = [*messages[:first], summary, *within, *messages[end:]]
        return payload

    async def summary(self, parts: list[Part]) -> str:
        """Return the summary of all parts, from the last one that is kept. Raises UpstreamError."""
        files = [self.data_dir / f"{digest}.txt" for digest, _ in parts]
        kept = (n for n, file in enumerate(files, 1) if file.exists() and file.stat().st_size)
        made = max(kept, default=0)  # an empty one was not on the disk yet when the power failed
        summary = files[made - 1].read_text("utf-8") if made else ""
        if self.context.explaining and made < len(parts):
            return "(one that the model would be asked for)"
        for file, (_, text) in zip(files[made:], parts[made:], strict=True):
            summary = await self.ask(summary, text)
            await asyncio.to_thread(store, file, summary)
        return summary

    async def ask(self, summary: str, text: str) -> str:
        """Return a summary of a summary and the text behind it, which is read piece by piece."""
        most = self.settings["limit"]  # characters of a summary: a quarter of as many tokens
        system = {"role": "system", "content": INSTRUCTION.format(words=most // 8)}
        for at in range(0, len(text), 4 * most):
            piece = f"{TITLE}{summary}\n\n{text[at : at + 4 * most]}".removeprefix(f"{TITLE}\n\n")
            question = [system, {"role": "user", "content": piece}]
            answer = await self.context.chat(question, temperature=0, num_predict=most // 4)
            summary = answer.strip()[:most]
        return summary


def parts_of(
    messages: list[Message], limit: int, keep: int, model: str
) -> tuple[list[Part], int, int]:
    """Return the parts of a conversation that are summed up, and where they begin and end."""
    starts = turns(messages)
    spoken = [transcript(messages[at:end]) for at, end in pairwise([*starts, len(messages)])]
    parts: list[Part] = []
    at, digest = 0, f"{model} {limit}"
    for end in cuts([len(text) // 4 for text in spoken], limit, keep):
        text = "\n\n".join(spoken[at:end])
        digest = hashlib.sha256(f"{digest} {text}".encode("utf-8", "replace")).hexdigest()
        parts.append((digest, text))
        at = end
    return parts, starts[0], starts[at]


def transcript(messages: list[Message]) -> str:
    """Return what was said in some messages, tool calls and results too."""
    said = [m for m in messages if m.get("role") not in SYSTEM]
    return "\n".join(f"{m.get('role', 'tool')}: {' '.join(texts({'messages': [m]}))}" for m in said)


def turns(messages: list[Message]) -> list[int]:
    """Return where turns begin: at the user's messages, but between a tool call and its result."""
    starts: list[int] = []
    calls = False
    for at, message in [*enumerate(messages)][::-1]:
        calls = is_result(message) or (calls and message.get("role") not in ("assistant", None))
        if is_user(message) and not calls:
            starts.insert(0, at)
    first = next((n for n, m in enumerate(messages) if m.get("role") not in SYSTEM), 0)
    return [first, *starts[1:]]  # what stands before the first question belongs to it


def is_result(message: Message) -> bool:
    """Tell whether a message holds the result of a tool, in any dialect."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    kinds = {message.get("role"), message.get("type"), *(part.get("type") for part in parts)}
    return not kinds.isdisjoint(("tool", "function_call_output", "tool_result"))


def cuts(sizes: list[int], limit: int, keep: int) -> list[int]:
    """Return the turns before which the conversation was cut, in its order.

    A turn that is under way does not count, so that its cut does not move with each tool's result.
    """
    found: list[int] = []
    first, size = 0, 0
    for last in range(1, len(sizes)):
        size += sizes[last - 1]
        if size <= limit:
            continue
        while first <= last - keep and size > limit // 2:
            size -= sizes[first]
            first += 1
        if first != (found or [0])[-1]:
            found.append(first)
    return found


def store(file: Path, summary: str) -> None:
    """Keep a summary, and drop the oldest ones. Raises OSError."""
    part = file.with_suffix(".part")
    part.touch(0o600)
    part.write_text(summary, "utf-8")
    part.replace(file)
    for old in sorted(file.parent.glob("*.txt"), key=lambda f: f.stat().st_mtime)[:-MOST]:
        old.unlink(missing_ok=True)
