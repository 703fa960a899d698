"""Files: tools with which the model lists, reads and searches folders that the operator names.

`/files what is in my notes on rain barrels?` offers the tools of `tools.json`. A path comes from a
model, which may have been talked into it by a text that it read: `folders.py` opens nothing but
what lies in the folders, and no result or error holds a path of the machine. `write` is offered
only where `write = true`, and each call waits for the user's consent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernel.agent import BaseAgent, Payload, Reply

from .folders import Folders, Parts

ENTRIES, LINE = 100, 200  # of a result, characters of a line that was found
SECONDS, WORDS = 10, 20  # of a search
RIGHT = {"folders": {"notes": "~/notes"}, "write": False, "hidden": False, "max_chars": 8000}
USAGE = (
    "No folder is open. To open one, put this into osp.toml and start the proxy again:\n\n"
    '[agents.files.settings.folders]\nnotes = "~/notes"'
)


class Files(BaseAgent):
    """Lets the model list, read and search folders."""

    folders: Folders

    # The disk is waited for in a thread (`def`), never on the loop.
    def setup(self) -> None:  # type: ignore[override]
        for name, right in RIGHT.items():
            if type(value := self.settings[name]) is not type(right):  # the text "false" is true
                raise ValueError(f"settings: {name}: {value!r} is wrong, {right!r} would be right")
        self.folders = Folders(self.settings["folders"], hidden=self.settings["hidden"])
        self.progress = names = " or ".join(self.folders.roots)
        text = Path(__file__).with_name("tools.json").read_text(encoding="utf-8")
        tools = json.loads(text.replace("FOLDERS", json.dumps(names)[1:-1])) if names else []
        self.tools = [tool for tool in tools if tool["name"] != "write" or self.settings["write"]]

    async def on_request(self, payload: Payload) -> Payload:
        if self.context.asked and not self.tools:
            raise Reply(USAGE)
        return payload

    def on_tool(self, name: str, arguments: dict[str, Any]) -> str:  # type: ignore[override]
        if name not in [tool["name"] for tool in self.tools]:
            raise ValueError(f"there is no tool {name!r}")
        try:
            parts = self.folders.parse(str(arguments.get("path") or ""))
            return str(getattr(self, f"{name}_")(parts, arguments))
        except OSError as exc:
            if exc.errno is None:
                raise
            raise OSError(exc.strerror) from exc  # its own text can hold a path of the machine

    def list_(self, parts: Parts, arguments: dict[str, Any]) -> str:
        names = self.folders.entries(parts)
        return self.cut(f"{len(names)} there", names)

    def read_(self, parts: Parts, arguments: dict[str, Any]) -> str:
        text, note = self.folders.read(parts)
        lines, first = text.split("\n"), max(1, int(arguments.get("line") or 1))
        rest = "\n".join(lines[first - 1 :])
        shown = rest[: self.settings["max_chars"]]
        last = first + shown.count("\n")
        note += f"; it goes on with line={max(last, first + 1)}" if shown != rest else ""
        return f"Lines {first} to {last} of {len(lines)}{note}:\n{shown}"

    def search_(self, parts: Parts, arguments: dict[str, Any]) -> str:
        words = str(arguments.get("text") or "").casefold().split()[:WORDS]
        if not words:
            raise ValueError("text is missing: words that a line holds")
        hits: list[str] = []
        until = time.monotonic() + SECONDS
        for path, text in self.folders.walk(parts):
            hits += [path] * holds(path.rpartition("/")[2], words)
            if holds(text, words):  # of all lines together: most files have none
                lines = enumerate(text.split("\n"), 1)
                hits += [f"{path}:{n}: {excerpt(t, words)}" for n, t in lines if holds(t, words)]
            if len(hits) > ENTRIES or time.monotonic() > until:
                return self.cut("Some of what there is; with more words there is less", hits)
        return self.cut(f"{len(hits)} found", hits)

    def write_(self, parts: Parts, arguments: dict[str, Any]) -> str:
        if not isinstance(content := arguments.get("content"), str):
            raise ValueError("content must be a text")
        before = self.folders.write(parts, data := content.encode())
        done = "created" if before is None else f"replaced, it had {before} bytes"
        return f"{'/'.join(parts)}: {done}, {len(data)} bytes written"

    def cut(self, head: str, lines: Sequence[str]) -> str:
        head += f", the first {ENTRIES}" * (len(lines) > ENTRIES)
        return "\n".join([f"{head}:", *lines[:ENTRIES]])[: self.settings["max_chars"]]


def holds(text: str, words: Sequence[str]) -> bool:
    text = text.casefold()
    return all(word in text for word in words)


def excerpt(line: str, words: Sequence[str]) -> str:
    start = max(0, line.casefold().find(words[0]) - LINE // 4)
    return line[start : start + LINE].strip()
