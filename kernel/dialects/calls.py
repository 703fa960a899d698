"""Calls: what a call of a tool is in every dialect, and its result."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kernel.agent import Message, Tool
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
