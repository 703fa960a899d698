"""Rules: what settings may say, which of a server's tools can be offered, what a result says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from kernel.agent import Message, Tool

# The keys of a server in an `mcpServers` file, and `allow` and `ask`: patterns of names of tools.
KEYS: dict[str, type] = dict.fromkeys("command cwd url type transport".split(), str)
KEYS |= {"args": list, "allow": list, "ask": list, "env": dict, "headers": dict}
WORDS: dict[type, str] = {str: "text", list: "a list of texts", dict: "a table of texts"}
DESCRIPTION = 4000  # characters of a tool's description that are offered
SCHEMA = 20_000  # characters of a schema; a tool with a longer one is left out
# What Ollama takes in a schema and its properties (ToolFunction, ToolProperty in its api/types.go);
# it refuses the whole chat for a value of another type.
SHAPES: dict[str, Any] = {"type": str | list | None, "description": str | None}
SHAPES |= dict.fromkeys(("enum", "required", "anyOf"), list | None) | {"properties": dict | None}


class ToolError(Exception):
    """A tool failed, or its server does not answer."""


def check_server(name: str, config: Any) -> None:
    """Raise ValueError for wrong settings of a server, with its name and the key."""
    where = f"servers.{name}"
    for key, value in config.items() if isinstance(config, dict) else ():
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(KEYS)}")
        inner = value.values() if isinstance(value, dict) else value
        if not isinstance(value, KEYS[key]) or not all(isinstance(text, str) for text in inner):
            raise ValueError(f"{where}: {key} must be {WORDS[KEYS[key]]}")
    if not isinstance(config, dict) or ("command" in config) == ("url" in config):
        raise ValueError(f"{where}: must be a table with a command or a url, and not both")
    if "sse" in (config.get("type"), config.get("transport")):
        raise ValueError(f"{where}: sse is not spoken here; use the url of streamable HTTP")


def tool_name(server: str, tool: str) -> str:
    """Return the name that the model knows a tool by: its server's, then its own."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{server}_{tool}")[:64]


def offerable(config: Mapping[str, Any], tool: Any) -> Tool | None:
    """Return a server's tool without its name; None where it cannot be offered."""
    schema = {"type": "object", **tool.input_schema}
    made = {"description": (tool.description or "")[:DESCRIPTION], "parameters": schema}
    with suppress(ValueError, RecursionError):  # no JSON: NaN
        fine = is_readable(schema) and len(json.dumps(schema, allow_nan=False)) <= SCHEMA
        if fine and tool.name and fits(tool.name, config.get("allow", ["*"])):
            return made | ({"consent": True} if fits(tool.name, config.get("ask", [])) else {})
    return None


def fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_readable(schema: Any) -> bool:
    """Tell whether Ollama can read a schema, and the properties in it."""
    items = schema.items() if isinstance(schema, dict) else [("properties", "no schema")]
    if not all(isinstance(value, SHAPES.get(key, object)) for key, value in items):
        return False
    inner = [*(schema.get("properties") or {}).values(), *(schema.get("anyOf") or [])]
    return all(map(is_readable, inner))


def contents(result: Any, most: int, *, images: bool) -> str | list[Message]:
    """Return what a CallToolResult says, cut after `most` characters, and its images if wanted.

    What is not shown is named. Raises ToolError with the text where the tool failed.
    """
    shown = [block for block in result.content if images and block.type == "image"]
    texts = [text_of(block) for block in result.content if block not in shown]
    if result.structured_content is not None and all(b.type != "text" for b in result.content):
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(texts)
    if len(text) > most:
        text = f"{text[:most]}\n[cut: the first {most} of {len(text)} characters]"
    if result.is_error:
        raise ToolError(text)
    parts = [{"type": "image", "data": b.data, "mimeType": b.mime_type} for b in shown]
    return [{"type": "text", "text": text}, *parts] if parts else text


def text_of(block: Any) -> str:
    """Return the text of a block of content; where it has none, say what it is."""
    if block.type == "resource_link":
        return f"[{block.name}: {block.uri}]"
    held = block.resource if block.type == "resource" else block
    if (text := getattr(held, "text", None)) is not None:
        return str(text)
    data = held.blob if block.type == "resource" else held.data
    return f"[{held.mime_type or 'data'}, {len(data) * 3 // 4000} kB, not shown]"
