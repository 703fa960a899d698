"""Commands: what a user types before a prompt to ask for agents, and how it is read.

    /rag what did we decide?          one command
    /rag:k=6 /translate:de why?       arguments, and one agent after the other
    /translate:"Swiss German" why?    quotes where a value has spaces
    /rag&/remember what colour?       agents at the same time
    /explain /rag what?               what the model would be sent
    //rag                             the text "/rag"

Only a known name is a command: `/etc/passwd` and `/shrug` are text. The same grammar reads the
header `X-OSP-Agents` and, with `+` for `/`, the suffix of a model's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kernel.errors import BadRequest
from kernel.plugin import Plugin

EXPLAIN = "explain"
VALUE = r'"[^"]*"|“[^”]*”'
ARGUMENT = re.compile(rf"(?:(?P<key>[A-Za-z_]\w*)=)?(?P<value>{VALUE}|[^,]*)(?:,|$)")
SWITCHES = {"true": True, "yes": True, "on": True, "1": True}
SWITCHES |= {"false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Command:
    """One command: the agent's name in lower case, and what stood behind the colon."""

    name: str
    arguments: str = ""
    together: tuple[str, ...] = ()  # the names that it was joined to by &


class Grammar:
    """Finds commands that begin with `prefix`; an empty prefix finds none.

    `known` tells whether a name is one of an agent.
    """

    def __init__(self, prefix: str, known: Callable[[str], bool]) -> None:
        self.prefix = prefix
        self._known = known
        sign = re.escape(prefix)
        name = r"(?P<name>[A-Za-z0-9][\w-]*)"
        arguments = rf'(?P<arguments>(?:{VALUE}|(?!&{sign})[^\s"“])*)'
        self._command = re.compile(rf"\s*{sign}{name}(?::{arguments})?(?=\s|$|&{sign})")
        self._literal = re.compile(rf"\s*{sign}(?={sign}{name}(?![\w-]))")
        self._help = re.compile(rf"\s*{sign}help(?:\s+(?:{sign})?{name})?\s*$", re.IGNORECASE)
        self._explain = re.compile(rf"\s*{sign}explain(?=\s)", re.IGNORECASE)

    def split(self, text: str) -> tuple[list[Command], str]:
        """Return the commands that lead a text, and the text without them.

        `explain` is one of them where others follow it, and leads them.
        """
        if not self._may_lead(text):
            return [], text
        explain = self._explain.match(text)
        commands: list[Command] = []
        at = explain.end() if explain else 0
        while found := self._together(text, at):
            commands += found[0]
            at = found[1]
        if explain:
            if not commands:
                return [], text
            commands.insert(0, Command(EXPLAIN))
        literal = self._literal.match(text, at)
        if literal and self._known(literal["name"].lower()):
            return commands, text[literal.end() :]
        return commands, text[at:].lstrip() if commands else text

    def _may_lead(self, text: str) -> bool:
        return bool(self.prefix) and text.lstrip().startswith(self.prefix)

    def _together(self, text: str, at: int) -> tuple[list[Command], int] | None:
        """Return the commands that `&` joins at a place, and where they end."""
        commands: list[Command] = []
        while found := self._command.match(text, at):
            name = found["name"].lower()
            if not self._known(name):
                return None
            partners = tuple(command.name for command in commands)
            commands.append(Command(name, found["arguments"] or "", partners))
            if not text.startswith("&", found.end()):
                return commands, found.end()
            at = found.end() + 1
        return None

    def help_wanted(self, text: str) -> str | None:
        """Return the name that `/help NAME` asks about, "" for `/help` alone, None for text."""
        found = self._help.match(text) if self._may_lead(text) else None
        if not found:
            return None
        name = (found["name"] or "").lower()
        return name if not name or self._known(name) else None


def parse_arguments(text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `defaults` with what `text` says over them; a bare value goes to the next free one.

    Raises BadRequest, which says what would be right.
    """
    given: dict[str, Any] = {}
    for found in ARGUMENT.finditer(text):
        if not found[0].strip(","):
            continue
        free = next((key for key in defaults if key not in given), "")
        key = (found["key"] or free).lower()
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise BadRequest(f"{found[0].strip(',')!r} is no argument here; known are: {known}")
        given[key] = typed(key, unquoted(found["value"]), defaults[key])
    return {**defaults, **given}


def unquoted(text: str) -> str:
    return text[1:-1] if text[:1] in ('"', "“") and len(text) > 1 else text


def typed(key: str, text: str, default: Any) -> Any:
    """Return `text` as the type of `default`: a boolean, a number or a string."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    try:
        if isinstance(default, bool):
            return SWITCHES[text.lower()]
        value = type(default)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (ValueError, KeyError) as exc:
        raise BadRequest(f"{key} must be {kinds[type(default)]}, not {text!r}") from exc


def help_text(plugins: Iterable[Plugin], prefix: str) -> str:
    """Return what `/help` says: each agent, what it does, and the arguments it takes."""
    lines = [line for plugin in plugins for line in help_lines(plugin, prefix)]
    return "\n".join(lines) or "No agents are loaded."


def help_lines(plugin: Plugin, prefix: str) -> list[str]:
    if plugin.status != "loaded":
        return [f"{prefix}{plugin.name}: {unavailable(plugin)}"]
    arguments = [f"    {key}={value!r}" for key, value in plugin.config.arguments.items()]
    about = plugin.description or "no description"
    about += "" if plugin.config.typed else " (by header, model suffix or preset only)"
    return [f"{prefix}{plugin.name}: {about}", *arguments]


def unavailable(plugin: Plugin) -> str:
    """Say why a plugin cannot be used, without the text of its error: that may hold a secret."""
    if plugin.error is None:
        return "is disabled by the operator"
    return f"failed to load: {plugin.error.kind} at {plugin.error.where}"
