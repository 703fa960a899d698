"""Tools: what agents offer to the model, what it calls, and what the user is asked before.

A call of a tool that needs consent is shown to the user, and made after `/yes`. Nothing is stored:
the call is read from the text in which it was shown, and a code behind it, made with a key in the
proxy's data folder, says that this text is what the user of this request was shown.

Where the model calls a tool of the client, the client gets that call alone. What tools of agents
have said in this answer, and calls of them that the model made in the same breath, travel in the id
of the client's call: they are in the history when it comes back with its result.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import getattr_static
from pathlib import Path
from typing import Any

from kernel.agent import BaseAgent, Call, Message, Tool
from kernel.dialects import dumps, loads, table
from kernel.dialects.calls import Made, Result, ToolCall, contents_of
from kernel.errors import PluginExecutionError
from kernel.foreign import plain

NAME = re.compile(r"\S{1,128}")  # of a tool
MARK = "_osp_"  # in the id of a call: behind it stand other calls
CARRIED = re.compile(rf"{MARK}([\w-]+)\Z", re.ASCII)
IDS = ("id", "call_id", "tool_call_id", "tool_use_id")
KEY = 32  # bytes
MOST = 2**14  # characters of what an id can carry

CONTENTS = {"text": ("text",), "image": ("data", "mimeType")}  # of a result

ASKED = "This would be called:"
SHOWN = re.compile(rf"{ASKED}\n\n(`{{3,}})\n(.*)\n\1\n\n[^\n]*\(osp:(\w+)\)", re.S)
ALTERED = "this is not what you were asked, so nothing was done"
LOST = "This was done after the user had agreed; what it returned is not known any more."


def offered_by(agent: BaseAgent) -> list[Tool]:
    """Return the tools that an agent offers, as plain values. Raises PluginExecutionError."""
    offered = plain(vars(agent).get("tools", getattr_static(agent, "tools")))
    if not isinstance(offered, list):
        raise PluginExecutionError("self.tools must be a list of tools")
    for tool in offered:
        name, schema = table(tool).get("name"), table(tool).get("parameters", {})
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise PluginExecutionError(f"self.tools: a tool needs a name without spaces: {name!r}")
        if not (isinstance(schema, dict) and isinstance(tool.get("description", ""), str)):
            text = "needs a text as its description, and a JSON schema as its parameters"
            raise PluginExecutionError(f"self.tools: {name} {text}")
    check_sent(offered, "self.tools:")
    return list(offered)


def seen(call: ToolCall, number: int, agent: str) -> Call:
    """Return a call as agents see it. Arguments that are no object stand under the name ""."""
    arguments = call.values()
    if arguments is None:
        arguments = {"": call.arguments}
    return {"id": str(number), "name": call.name, "arguments": arguments, "agent": agent}


def judged(result: Any, known: Iterable[str]) -> list[Call]:
    """Return what an agent made of calls with the ids `known`. Raises PluginExecutionError."""
    if not isinstance(result, list):
        raise PluginExecutionError("on_calls must return the list of calls")
    for call in result:
        named = isinstance(table(call).get("name"), str) and call.get("id") in known
        if not (named and isinstance(call.get("arguments"), dict)):
            raise PluginExecutionError("on_calls returned what is no call, or one of its own")
    check_sent(result, "on_calls returned what")
    return result


def check_sent(value: Any, what: str) -> None:
    """Raise PluginExecutionError for what is no JSON."""
    try:
        dumps(value)
    except (TypeError, ValueError, RecursionError) as exc:
        raise PluginExecutionError(f"{what} cannot be sent: {exc}") from None


def change(call: ToolCall, to: Call) -> None:
    """Give a call the name and the arguments that agents want."""
    arguments = to["arguments"]
    if arguments != seen(call, 0, "")["arguments"]:
        bare = list(arguments) == [""] and isinstance(arguments[""], str)
        call.arguments = arguments[""] if bare else dumps(arguments).decode()
    call.name = to["name"]


def result_of(value: Any) -> Result:
    """Return what a tool returned, if it is of the contract. Raises PluginExecutionError."""
    if isinstance(value, str):
        return value
    parts = [table(part) for part in value] if isinstance(value, list) else [{}]
    for part in parts:
        keys = CONTENTS.get(str(part.get("type")))
        if not (keys and all(isinstance(part.get(key), str) for key in keys)):
            text = "on_tool must return text, or a list of MCP's contents of the type text or image"
            raise PluginExecutionError(f"returned {type(value).__name__}, but {text}")
    return parts


def carry(call: ToolCall, made: Sequence[Made], waiting: Sequence[ToolCall]) -> None:
    """Let the id of a call carry those that were made, with their results, and those that wait.

    Results are left out where they are too long for an id.
    """
    rest = [[each.name, each.arguments, None] for each in waiting]
    told = [[each.name, each.arguments, contents_of(result)[0]] for each, result in made]
    for calls in (told + rest, rest):
        data = base64.urlsafe_b64encode(zlib.compress(dumps(calls))).rstrip(b"=")
        if calls and len(data) <= MOST:
            call.id += MARK + data.decode()
            return


def unload(
    messages: list[Message], say: Callable[[Sequence[Made]], list[Message]]
) -> list[ToolCall]:
    """Take out of all ids what they carry, and put in what was made; `say` words it as messages.

    Return the calls that wait: those of the last answer.
    """
    waiting: dict[str, None] = {}
    found: list[Message] = []  # the last one first
    answered = passed = False
    for message in reversed(messages):
        answers = message.get("role") == "assistant" or message.get("type") == "function_call"
        passed, answered = passed or (answered and not answers), answered or answers
        carried = dict.fromkeys(unloaded(message))
        waiting |= {} if passed else carried
        calls = [each for text in carried for each in decoded(text)] if answers else []
        made = [(call, result) for call, result in calls if result is not None]
        found += [message, *reversed(say(made) if made else [])]
    messages[:] = reversed(found)
    return [call for text in waiting for call, result in decoded(text) if result is None]


def unloaded(value: Any) -> Iterator[str]:
    """Yield what the ids in a message carry, and take it out of them."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if key in IDS and isinstance(item, str) and (carried := CARRIED.search(item)):
            value[key] = item[: carried.start()]
            yield carried[1]
        elif isinstance(item, dict | list):
            yield from unloaded(item)


def decoded(text: str) -> list[tuple[ToolCall, str | None]]:
    """Return the calls that an id carried, with the results that are known; none if it is wrong."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        calls = loads(zlib.decompressobj().decompress(data, 16 * MOST))
        told = [
            (str(name), str(values), None if r is None else str(r)) for name, values, r in calls
        ]
        return [(named(name, values), result) for name, values, result in told]
    except (ValueError, TypeError, RecursionError, zlib.error):
        return []


def named(name: str, arguments: str) -> ToolCall:
    """Return a call whose id is the same each time, so that Ollama's prompt cache keeps hitting."""
    number = zlib.crc32(f"{name} {arguments}".encode(errors="replace"))
    return ToolCall(name, arguments, f"call_{number:08x}")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a user was asked: the text without it, and agent and call; none if it was altered."""

    rest: str
    calls: list[tuple[str, ToolCall]]


@dataclass(frozen=True, slots=True)
class Consent:
    """Asks the user before calls are made; `folder` keeps the key, which is made when needed."""

    folder: Path
    prefix: str  # of commands

    def ask(self, user: str, calls: Iterable[tuple[str, ToolCall]]) -> str:
        """Return the text that asks; with each call stands the agent whose tool it is."""
        lines = "\n".join(f"{agent} {call.name} {visible(call)}" for agent, call in calls)
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", lines)), 0)
        cure = f"Type {self.prefix}yes to do it, or anything else."
        code = self._code(user, lines)
        return f"{ASKED}\n\n{fence}\n{lines}\n{fence}\n\n{cure} (osp:{code})"

    def shown(self, user: str, text: str) -> Shown | None:
        """Return what a text asks; None: it asks nothing."""
        at = text.rfind(ASKED)
        found = SHOWN.match(text, at) if at >= 0 else None
        if not found:
            return None
        rest = text[:at].rstrip() + text[found.end() :]  # clients may put thoughts behind it
        if not hmac.compare_digest(found[3], self._code(user, found[2])):
            return Shown(rest, [])
        lines = [line.split(" ", 2) for line in found[2].split("\n")]
        return Shown(rest, [(agent, named(name, values)) for agent, name, values in lines])

    def _code(self, user: str, lines: str) -> str:
        data = f"{user}\0{lines}".encode(errors="surrogatepass")
        return hmac.new(self._key(), data, "sha256").hexdigest()[:24]

    def _key(self) -> bytes:
        """Return the key; one that a power cut left empty, or cut off, is made anew."""
        file = self.folder / "consent.key"
        if not file.exists() or file.stat().st_size != KEY:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.folder)  # readable for its owner alone
            with open(descriptor, "wb") as new:
                new.write(secrets.token_bytes(KEY))
            Path(name).replace(file)
        return file.read_bytes()


def visible(call: ToolCall) -> str:
    """Return the arguments of a call as JSON; a sign that does not print is shown as its number."""
    text = dumps(call.values()).decode()
    return "".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)
