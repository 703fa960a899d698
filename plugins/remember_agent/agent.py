"""Remember: keeps short notes, and gives the model those that fit what is asked.

    /remember that my bike is red         notes "my bike is red": the word "that" makes it a note
    /remember what colour is my bike?     anything else goes to the model, with the notes that fit
    /remember:list                        lists the notes with their numbers
    /remember:forget=3                    forgets one

Where keys are used each key has notes of its own, without keys all users share them. An agent that
is always on adds notes to every conversation, and still notes only what it is told to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kernel.agent import BaseAgent, Payload, Reply, add_context, prompt

from .notes import Note, Notes

NOTE = re.compile(r"that(?:\s+(.*))?", re.IGNORECASE | re.DOTALL)
USAGE = """\
/remember that my bike is red: keeps a note
/remember what colour is my bike?: asks the model, with the notes that fit
/remember:list: lists your notes
/remember:forget=3: forgets note 3"""
INSTRUCTION = "These are notes of mine, the newest last. Use those that help with what follows."
NOTHING = "None of my notes fits what follows, and nothing new was noted."


class Remember(BaseAgent):
    """Keeps short notes, and gives the model those that fit."""

    notes: Notes

    # Both are `def`, so that the disk is waited for in a thread and never on the loop.
    def setup(self) -> None:  # type: ignore[override]
        for name, limit in self.settings.items():
            if not limit > 0:
                raise ValueError(f"settings: {name}: {limit} must be above 0")
        if self.settings["max_context"] < self.settings["max_chars"]:
            raise ValueError("settings: max_context must have room for a note of max_chars")
        self.notes = Notes(self.data_dir / "notes.db")

    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        text = prompt(payload).strip()
        if self.context.continuation:
            return payload
        if self.context.asked and (answer := self.obey(text)):
            raise Reply(answer)
        if not text:
            return payload
        found = self.notes.find(self.context.user, text, self.settings["max_matches"])
        lines = fitting(found, self.settings["max_context"])
        if lines:
            return add_context(payload, "\n".join([INSTRUCTION, *lines]))
        return add_context(payload, NOTHING) if self.context.asked else payload

    def obey(self, text: str) -> str:
        """Do what the model has no part in and return what to say, or "" where it is asked."""
        if self.arguments["forget"]:
            return self.forget(self.arguments["forget"])
        if self.arguments["do"]:
            return self.listed() if self.arguments["do"].lower() == "list" else USAGE
        found = NOTE.fullmatch(text)
        return self.note(" ".join((found[1] or "").split())) if found else ""

    def note(self, text: str) -> str:
        most = self.settings["max_chars"]
        if not text:
            return USAGE
        if len(text) > most:
            return f"Not noted: a note has at most {most} characters, this one has {len(text)}."
        number = self.notes.add(self.context.user, text, self.settings["max_notes"])
        if number is None:
            return "Not noted: there is no room for more notes. /remember:forget=1 forgets note 1."
        return f"Noted as {number}: {text}"

    def listed(self) -> str:
        # No list of Markdown's own: that would be numbered anew where it is shown.
        lines = [f"- {note.number}: {note.text}" for note in self.notes.all(self.context.user)]
        return "\n".join(lines) or "There are no notes."

    def forget(self, number: int) -> str:
        text = self.notes.forget(self.context.user, number)
        return f"There is no note {number}." if text is None else f"Forgotten: {text}"


def fitting(notes: Sequence[Note], room: int) -> list[str]:
    """Return the best notes as the model reads them, by age, as many as have room."""
    lines: dict[int, str] = {}
    for note in notes:
        room -= len(note.text)
        if room < 0:
            break
        lines[note.number] = f"- {note.text}"
    return [lines[number] for number in sorted(lines)]
