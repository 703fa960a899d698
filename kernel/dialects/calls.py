"""Calls: what a call of a tool is in every dialect, and an answer with rounds of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel.agent import Message, Payload, Tool
from kernel.dialects.strict import loads

Chunk = dict[str, Any]  # a frame's JSON object
Result = str | list[Message]  # of a tool: text, or MCP's contents


@dataclass(slots=True)
class ToolCall:
    """One call of a tool in an answer."""

    name: str
    arguments: str  # JSON, which may come in pieces
    id: str = ""
    entry: Chunk = field(default_factory=dict)  # the dialect's own object, for what is not here
    refused: bool = False  # by an agent

    def __post_init__(self) -> None:
        self.id = self.id or f"call_{secrets.token_hex(4)}"

    def values(self) -> dict[str, Any] | None:
        """Return the arguments; None: they are no JSON object."""
        try:
            found = loads(self.arguments.encode() or b"{}")
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


Made = tuple[ToolCall, Result]


@dataclass(slots=True)
class AnswerState:
    """What is remembered of one answer, which may be made of several rounds of calls."""

    asked: Payload  # the request's body as the client sent it
    hidden: frozenset[str] = frozenset()  # names of tools that the client does not know
    last: Chunk | None = None  # the last frame with text, while its text may still go on
    said: dict[str, list[str]] = field(default_factory=dict)  # edited pieces, by their item's id
    round: int = 0
    first: Chunk = field(default_factory=dict)  # what later rounds take over from the first
    places: dict[Any, int] = field(default_factory=dict)  # of a round: where its blocks stand
    blocks: int = 0  # of text, calls and thinking, in a dialect that numbers them
    frames: int = 0  # that were sent
    items: list[Chunk] = field(default_factory=list)  # blocks that the end of the answer repeats

    def place(self, block: Any) -> int:
        """Return the number that a block of this round has in the whole answer."""
        if block not in self.places:
            self.places[block] = self.blocks
            self.blocks += 1
        return self.places[block]

    def continues(self, chunk: Chunk, keys: Sequence[str]) -> bool:
        """Give a frame what the first one has under `keys`; tell whether it is of a later round."""
        self.first = self.first or {key: chunk[key] for key in keys if key in chunk}
        chunk |= self.first if self.round else {}
        return self.round > 0


def function_of(tool: Tool, schema: str) -> Chunk:
    """Return name, description and, under the key `schema`, the parameters of a tool."""
    parameters = tool.get("parameters") or {"type": "object", "properties": {}}
    return {"name": tool["name"], "description": tool.get("description", ""), schema: parameters}


def contents_of(result: Result) -> tuple[str, list[Message]]:
    """Return the text of a tool's result, and its images."""
    if isinstance(result, str):
        return result, []
    texts = [part["text"] for part in result if part["type"] == "text"]
    return "\n\n".join(texts), [part for part in result if part["type"] == "image"]


def joint(kind: str, text: str, images: Iterable[Message]) -> str | list[Message]:
    """Return a text with images, if there are any, as parts; `kind` is the type of the text's."""
    shown = [*images]
    return [{"type": kind, "text": text}, *shown] if shown else text


def data_url(image: Message) -> str:
    return f"data:{image['mimeType']};base64,{image['data']}"


def add(counts: dict[str, Any], to: dict[str, Any]) -> None:
    """Add numbers, and those in objects, to the ones of the same name."""
    for key, value in counts.items():
        if isinstance(value, dict) and isinstance(to.get(key), dict):
            add(value, to[key])
        elif type(value) in (int, float):
            to[key] = to.get(key, 0) + value
