"""Messages: where the texts of a chat are, in both dialects.

Every string of a message is text, but for labels (roles, types, ids, names of tools) and what is
no text at all: images and other parts. A tool's arguments and its result are read as JSON where
they are JSON, so that nothing hides behind an escape and the JSON stays whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

from kernel.agent import Message

Edit = Callable[[str], str]

LABELS = ("role", "type", "id", "index", "tool_call_id", "tool_name", "images")
CALLS = ("tool_calls", "function_call")
# What a model said under placeholders and nobody restored: those in there are our own.
UNRESTORED = ("thinking", "reasoning", *CALLS)


def edited(message: Message, edit: Edit) -> Message:
    """Return a copy of a message with `edit` applied to each of its texts."""
    by_tool = str(message.get("role")).lower() in ("tool", "function")
    labels = (*LABELS, "name") if by_tool else LABELS
    return {
        key: value if key in labels else edited_field(key, value, edit, by_tool=by_tool)
        for key, value in message.items()
    }


def edited_field(key: str, value: Any, edit: Edit, *, by_tool: bool) -> Any:
    if key in CALLS:
        return walked(value, edit, (*LABELS, "name"))
    if key != "content":
        return walked(value, edit)
    if isinstance(value, list):
        return [part if is_opaque(part) else walked(part, edit, LABELS) for part in value]
    return in_json(value, edit) if by_tool else walked(value, edit)


def walked(value: Any, edit: Edit, labels: Collection[str] = ()) -> Any:
    """Return a JSON value with every text in it edited, and every whole number that is private.

    Where there are no labels, keys are data as well.
    """
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, list):
        return [walked(item, edit, labels) for item in value]
    if isinstance(value, dict):
        return {
            key if labels else edit(key): item if key in labels else inner(key, item, edit, labels)
            for key, item in value.items()
        }
    if type(value) is int:
        text = edit(str(value))
        return value if text == str(value) else text
    return value


def inner(key: str, value: Any, edit: Edit, labels: Collection[str]) -> Any:
    return in_json(value, edit) if key == "arguments" else walked(value, edit, labels)


def in_json(value: Any, edit: Edit) -> Any:
    """Return a value edited, inside of its JSON if it is a string that holds some."""
    parsed = parse(value) if isinstance(value, str) else None
    if parsed is None:
        return walked(value, edit)
    changed = walked(parsed, edit)
    return value if changed == parsed else json.dumps(changed, ensure_ascii=False)


def parse(text: str) -> Any:
    """Return the object or the list that a text is, or None."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict | list) else None


def is_opaque(part: Any) -> bool:
    """Tell whether a part of a content is no text."""
    return not isinstance(part, dict) or part.get("type") != "text"


def opaque_kinds(message: Message) -> Iterator[str]:
    """Yield what a message holds that is no text: "images", or the type of a part."""
    if message.get("images"):
        yield "images"
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if is_opaque(part):
            yield str(part.get("type"))


def texts_of(message: Message) -> list[str]:
    texts: list[str] = []
    edited(message, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    return texts


def restored_part(message: Message) -> Message:
    """Return a message without what the model said that no agent could restore."""
    return {key: value for key, value in message.items() if key not in UNRESTORED}
