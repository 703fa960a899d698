"""Commands: what a user types before a prompt to ask for agents, and how it is read.

    /rag what did we decide?          one command
    /rag:k=6 /translate:de why?       arguments, and one agent after the other
    /translate:"Swiss German" why?    quotes where a value has spaces
    /rag&/remember what colour?       agents at the same time
    /explain /rag what?               shows the request; the model is not asked
    /help, /help rag                  answered by the proxy; counts only as the whole text
    /yes                              behind a question of the proxy: makes the calls it shows
    //rag                             the text "/rag"

Only a known name is a command: `/etc/passwd` and `/shrug` are text. The header `X-OSP-Agents` and
presets use the same grammar. Signs may be full-width (`／rag：k＝2`), as East Asian keyboards type
them. The patterns never backtrack (`*+`, `?+`, `(?>`), so that reading is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from kernel.config import WORDS
from kernel.errors import BadRequest
from kernel.plugin import Plugin

EXPLAIN, HELP, YES = "explain", "help", "yes"
MOST = 16  # commands of one text, and values of one command
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_-"
LIMIT = 10**18  # of numbers, that databases can hold them
SWITCHES = dict.fromkeys("true yes on 1".split(), True)
SWITCHES |= dict.fromkeys("false no off 0".split(), False)
WIDE = 0xFEE0  # from a sign of ASCII to the same one, full-width

# White space, and the signs without width that keyboards and copied text leave before a command
BLANK = r"[\s\u061c\u180e\u200b\u200e\u200f\u2060-\u2064\ufeff]"
GAP = r"[ \t\u00a0\u3000]*+"
KEY = rf"[^\W\d][\w-]{{0,63}}+(?={GAP}[=＝])"
# An opening quote, then those that close it. Phones write ” where a quote follows a colon.
PAIRS = "\"\" “”“ „“” ”” ＂＂ «» »«» ‹› ›‹› 「」 『』 ‚‘’ ‘’ ’’ ''".split()
# An apostrophe between letters closes nothing.
QUOTED = "|".join(rf"{q[0]}[^{q[1:]}]*+(?:\b['’]\b[^{q[1:]}]*+)*+[{q[1:]}]" for q in PAIRS)
UNQUOTED = f"(?![{''.join(q[0] for q in PAIRS)}])"
VALUE = rf"(?P<quoted>{QUOTED})|(?P<plain>[^,，]*+)"
ARGUMENT = re.compile(rf"(?:\A|[,，]){GAP}(?:(?P<key>{KEY}){GAP}[=＝]{GAP})?+(?:{VALUE})")


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name in lower case, and the text of its arguments."""

    name: str
    arguments: str = ""
    together: tuple[str, ...] = ()  # the names before it that & joins it to


class Grammar:
    """Finds commands that begin with `prefix`; an empty prefix finds none.

    `known(name)` tells whether there is an agent of that name, loaded or not.
    """

    def __init__(self, prefix: str, known: Callable[[str], bool]) -> None:
        self.prefix, self._known = prefix, known
        signs = [f"[{re.escape(sign)}{chr(ord(sign) + WIDE)}]" for sign in prefix]
        sign = "".join(signs) or "(?!)"  # which matches nothing
        word = rf"{sign}(?P<name>[\w-]{{1,64}}+)"
        join = f"[&＆](?={sign})"
        colon, comma = (f"(?>{GAP}[{s}]{GAP}(?={KEY})|[{s}])" for s in ("：:", "，,"))
        plain = f"{UNQUOTED}(?:[^,，&＆{BLANK[1:-1]}]++|[&＆]++(?!{sign}))*+"
        value = f"(?:{KEY}{GAP}[=＝](?:{GAP}(?!{sign}))?+)?+(?:{QUOTED}|{plain})"
        arguments = f"{colon}(?P<arguments>{value}(?:{comma}{value}){{0,{MOST - 1}}}+)"
        end = rf"(?P<join>{join})|{BLANK}++|\Z"
        self._begins = re.compile(f"{BLANK}*+{sign}")
        self._command = re.compile(f"{BLANK}*+{word}(?:{arguments})?+(?:{end})")
        self._literal = re.compile(f"{BLANK}*+{sign}(?={word}(?:[:：]|{end}))")

    def split(self, text: str) -> tuple[list[Command], str]:
        """Return the commands that lead a text, and the text without them.

        A text without commands comes back unchanged; a literal loses one sign. `explain` is listed
        where another command follows it. `help` stands alone; its arguments are an agent or "".
        """
        if not self._begins.match(text):  # most texts do not
            return [], text
        found = self._command.match(text)
        if found and fold(found["name"]) == HELP:
            about = fold(f"{found['arguments'] or ''} {text[found.end() :]}").strip()
            about = about.removeprefix(fold(self.prefix))
            if not about or self._known(about):
                return [Command(HELP, about)], ""
        commands, end = self._commands(text)
        literal = self._literal.match(text, end)
        if literal and self._is_command(fold(literal["name"])):
            end = literal.end()
        return commands, text[end:]

    def _commands(self, text: str) -> tuple[list[Command], int]:
        """Return the commands that lead a text, and where the text behind them begins."""
        commands: list[Command] = []
        joined: tuple[str, ...] = ()
        at = count = end = 0  # count and end stay behind until a group is complete
        while len(commands) < MOST and (found := self._command.match(text, at)):
            name, arguments = fold(found["name"]), found["arguments"] or ""
            explain = name == EXPLAIN and not (joined or found["join"] or arguments)
            if not (explain or self._known(name)):
                break
            commands.append(Command(name, arguments, joined))
            at = found.end()
            joined = (*joined, name) if found["join"] else ()
            if not (joined or explain):
                count, end = len(commands), at
        return commands[:count], end

    def agrees(self, text: str) -> bool:
        """Tell whether a text says yes, and nothing else."""
        found = self._command.match(text)
        word = found["name"] if found and not text[found.end("name") :].strip() else ""
        return fold(word) == YES

    def near(self, text: str) -> str | None:
        """Return the command that a text's first word misses by one letter, or None.

        Meant for a hint: the word stays text. None if no text follows the word.
        """
        found = self._command.match(text)
        word = fold(found["name"]) if found and found.end() < len(text) else ""
        if not 2 <= len(word) <= 64 or self._is_command(word):
            return None
        return next(filter(self._is_command, one_letter_away(word)), None)

    def _is_command(self, word: str) -> bool:
        return word in (EXPLAIN, HELP) or self._known(word)


def fold(text: str) -> str:
    """Return a name as it is compared: full-width letters and capitals count as plain ones."""
    return normalize("NFKC", text).casefold()


def one_letter_away(word: str) -> Iterator[str]:
    for at in range(len(word) + 1):
        head, tail = word[:at], word[at:]
        yield from (head + tail[1:], head + tail[1:2] + tail[:1] + tail[2:])
        yield from (head + letter + end for letter in LETTERS for end in (tail, tail[1:]))


def parse_arguments(text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `defaults` with the values in `text` over them, each of its default's type.

    A value without a key goes to the first argument that has none yet. Raises BadRequest, which
    says what would be right.
    """
    names = {fold(name): name for name in defaults}
    pieces = [piece for piece in ARGUMENT.finditer(text) if piece[0].strip(" ,，")]
    keys = {fold(piece["key"] or "") for piece in pieces}
    free = (name for key, name in names.items() if key not in keys)
    given: dict[str, Any] = {}
    for piece in pieces:
        key, quoted, plain = piece.group("key", "quoted", "plain")
        value = quoted[1:-1] if quoted else plain.strip()
        name = names.get(fold(key)) if key else next(free, None)
        if name is None:
            wrong, known = piece[0].strip(" ,，")[:60], ", ".join(defaults) or "none"
            raise BadRequest(f"{wrong!r} is no argument here; known are: {known}")
        given[name] = typed(name, value, defaults[name])
    return {**defaults, **given}


def typed(name: str, text: str, default: Any) -> Any:
    """Return `text` as the type of `default`: a boolean, a number or a string."""
    try:
        value = SWITCHES[fold(text)] if isinstance(default, bool) else type(default)(text)
        if not isinstance(value, str) and not abs(value) < LIMIT:
            raise ValueError(text)
    except (LookupError, ValueError) as exc:
        raise BadRequest(f"{name} must be {WORDS[type(default)]}, not {text[:60]!r}") from exc
    return value


def help_text(plugins: Iterable[Plugin], prefix: str) -> str:
    """Return the answer to `/help`: each agent, its description, and the arguments it takes."""
    agents = (f"{prefix}{plugin.name}: {about(plugin)}" for plugin in plugins)
    return "\n".join(agents) or "No agents are loaded."


def about(plugin: Plugin) -> str:
    if plugin.status != "loaded":
        return unavailable(plugin)
    arguments = [f"{name}={value!r}" for name, value in plugin.config.arguments.items()]
    return "\n    ".join([plugin.description or "no description", *arguments])


def unavailable(plugin: Plugin) -> str:
    """Say why a plugin cannot be used, without the text of its error: that may hold a secret."""
    if plugin.error is None:
        return "is disabled by the operator"
    return f"failed to load: {plugin.error.kind} at {plugin.error.where}"
