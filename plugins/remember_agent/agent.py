"""Remember: keeps short notes, and gives the model those that fit what is asked.

    /remember that my bike is red         notes "my bike is red": the word "that" makes it a note
    /remember what colour is my bike?     anything else goes to the model, with the notes that fit
    /remember:list                        lists the notes with their numbers
    /remember:forget=3                    forgets one

Where keys are used each key has notes of its own, without keys all users share them. An agent that
is always on adds notes to every conversation, and still notes only what it is told to, unless the
operator sets `auto = true`: then the model is asked after each answer what is worth keeping.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from kernel.agent import BaseAgent, Payload, Reply, add_context

from .notes import SCHEMA, Note, Notes

NOTE = re.compile(r"that(?:\s+(.*))?", re.IGNORECASE | re.DOTALL)
USAGE = "That makes no sense here: /help remember says what does."
INSTRUCTION = "These are notes of mine, the newest last. Use those that help with what follows."
NOTHING = "None of my notes fits what follows."
NOT_NOTED = "What follows was not noted."
UNDER = "(Nothing was noted. To keep a note, begin with: /remember that)"
NO_EFFECT = "/explain changes nothing: without it, this would note or forget something."
AUTO = (
    "List what the user tells about themselves that is worth keeping for later conversations:"
    " names, places, dates, preferences, plans. One short sentence each, in the user's language."
    " Leave out questions, small talk and what the assistant says. Mostly there is nothing: []."
)
FACTS = {"type": "array", "items": {"type": "string"}, "maxItems": 3}
FORMAT = {"type": "object", "properties": {"facts": FACTS}, "required": ["facts"]}


class Remember(BaseAgent):
    """Keeps short notes, and gives the model those that fit."""

    schema = SCHEMA
    notes: Notes
    pieces: list[str] = []  # of the answer to this request
    under: bool = False  # it was asked something, and says under the answer that it noted nothing

    async def setup(self) -> None:
        for name, limit in self.settings.items():
            if not limit > 0 and name != "auto":
                raise ValueError(f"settings: {name}: {limit} must be above 0")
        if self.settings["max_context"] < self.settings["max_chars"]:
            raise ValueError("settings: max_context must have room for a note of max_chars")
        self.notes = Notes(self.store)
        if self.store.engine == "sqlite":  # a file that is damaged stays so; a server comes back
            await self.notes.all("")

    async def on_request(self, payload: Payload) -> Payload:
        text, asked = self.context.prompt.strip(), self.context.asked
        if self.context.continuation:
            return payload
        if asked and (answer := await self.obey(text)):
            raise Reply(answer)
        self.under = asked
        found = await self.notes.find(self.context.user, text, self.settings["max_matches"])
        lines = fitting(found, self.settings["max_context"])
        if not text or not (asked or lines):
            return payload
        lines = [INSTRUCTION, *lines] if lines else [NOTHING]
        return add_context(payload, "\n".join([*lines, NOT_NOTED] if asked else lines))

    async def obey(self, text: str) -> str:
        """Do what the model has no part in and return what to say, or "" where it is asked."""
        note, number = NOTE.fullmatch(text), self.arguments["forget"]
        if self.arguments["do"]:
            return await self.listed() if self.arguments["do"].lower() == "list" else USAGE
        if self.context.explaining:
            return NO_EFFECT if note or number else ""
        if number:
            text = await self.notes.forget(self.context.user, number)
            return f"Forgotten: {text}" if text else f"There is no note {number}."
        return await self.note(note[1] or "") if note else ""

    async def note(self, text: str) -> str:
        text, most = in_one_line(text), self.settings["max_chars"]
        if not text:
            return USAGE
        if len(text) > most:
            return f"Not noted: a note has at most {most} characters, this one has {len(text)}."
        number, _ = await self.notes.add(self.context.user, text, self.settings["max_notes"])
        if not number:
            return "Not noted: there is no room for more notes. /remember:forget=1 forgets note 1."
        return f"Noted as {number}: {text}"

    async def listed(self) -> str:
        # No list of Markdown's own: that would be numbered anew where it is shown.
        notes = await self.notes.all(self.context.user)
        lines = [f"- {note.number}: {note.text}" for note in notes]
        return "\n".join(lines) or "There are no notes."

    async def on_chunk(self, text: str) -> str:
        self.pieces.append(text)
        return text

    async def on_end(self) -> str:
        prompt, answer = self.context.prompt.strip(), "".join(self.pieces)
        lines: list[str] = []
        if self.settings["auto"] and not self.context.explaining and self.context.finish == "stop":
            facts = await self.facts(prompt, answer) if prompt else []
            lines = await self.kept(facts)
        elif self.under and answer.strip():
            lines = [UNDER] * (prompt[-1:] not in "?？؟;")
        return "".join(f"\n\n{line}" for line in lines)

    async def facts(self, prompt: str, answer: str) -> list[Any]:
        """Ask the model what is worth keeping; it may answer anything, or not at all."""
        messages = [
            {"role": "system", "content": AUTO},
            {"role": "user", "content": f"User: {prompt}\n\nAssistant: {answer}"},
        ]
        try:
            text = await self.context.chat(messages, format=FORMAT, temperature=0)
            return list(json.loads(text)["facts"])[:3]
        except Exception as exc:  # the answer stands without it
            self.context.log.warning("nothing was noted: %s", type(exc).__name__)
            return []

    async def kept(self, facts: list[Any]) -> list[str]:
        """Note what is new, and return what to say of it."""
        lines = []
        for fact in facts:
            text = in_one_line(str(fact))[: self.settings["max_chars"]]
            number, new = await self.notes.add(self.context.user, text, self.settings["max_notes"])
            lines += [f"(Noted as {number}: {text})"] * new
        return lines


def in_one_line(text: str) -> str:
    """Return what every store can keep: no half characters, which are text in JSON, and no NUL."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split())


def fitting(notes: Sequence[Note], room: int) -> list[str]:
    """Return the best notes as the model reads them, by age, as many as have room."""
    sizes = accumulate(len(note.text) for note in notes)
    some = [note for note, size in zip(notes, sizes, strict=True) if size <= room]
    return [f"- {note.text}" for note in sorted(some)]
