"""Cache: gives the same answer to the same conversation, without the model.

"The same" is the whole request as it comes here: model, messages with their images, options, think;
all but how the answer is sent. Each user has answers of their own. `/cache:fresh=true` asks the
model anew and keeps that answer instead. Only a whole answer in text is kept: none that was cut
off or that calls tools. A request with tools always goes to the model, and so does a turn that goes
on after a tool's result, which may be another one tomorrow.

Each answer is a file, named by a digest of its request. What is too old is not given; what is too
much goes, the oldest first. Threads, processes and the operator may delete files at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from kernel.agent import BaseAgent, Payload, Reply

DELIVERY = ("stream", "stream_options", "keep_alive")  # they change nothing about the text


class Cache(BaseAgent):
    """Answers at once what was answered before."""

    innermost = True  # next to the model: it keeps what was sent there, and what came back
    key: str = ""  # of this request; empty: its answer is not kept
    parts: list[str]  # of the answer, as they came

    async def setup(self) -> None:
        for name, limit in self.settings.items():
            if not limit > 0:
                raise ValueError(f"settings: {name}: {limit} must be above 0")

    # The disk is waited for in a thread (`def`), never on the loop.
    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        if self.context.continuation or payload.get("tools") or payload.get("functions"):
            return payload
        self.key = key_of(payload, self.context.dialect, self.context.user)
        self.parts = []
        with suppress(FileNotFoundError, UnicodeDecodeError):  # no such answer, or a damaged one
            if not self.arguments["fresh"] and self.is_fresh(file := self.data_dir / self.key):
                raise Reply(file.read_text("utf-8", "surrogatepass"))
        return payload

    async def on_chunk(self, text: str) -> str:
        if self.key:
            self.parts.append(text)
        return text

    def on_end(self) -> str:  # type: ignore[override]
        # Answers in JSON or with logprobs never come here, so none is kept.
        if self.key and self.context.finish == "stop" and not self.context.explaining:
            answer = "".join(self.parts).encode("utf-8", "surrogatepass")
            if len(answer) <= self.settings["max_bytes"]:
                self.keep(answer)
        return ""

    def keep(self, answer: bytes) -> None:
        """Store this request's answer, and delete what there is no room for."""
        handle, part = tempfile.mkstemp(dir=self.data_dir)  # for its owner alone
        with open(handle, "wb") as file:
            file.write(answer)
        os.replace(part, self.data_dir / self.key)
        size = 0
        with suppress(FileNotFoundError):  # another process makes room, too
            newest = sorted(self.data_dir.iterdir(), key=modified, reverse=True)
            for count, path in enumerate(newest, 1):
                size += path.stat().st_size
                full = count > self.settings["max_entries"] or size > self.settings["max_bytes"]
                if full or not self.is_fresh(path):
                    path.unlink()

    def is_fresh(self, file: Path) -> bool:
        # Later than now: the clock was wrong then or is now, so the age is unknown. Empty: a
        # power cut came before the text was on the disk.
        age = time.time() - modified(file)
        return 0 <= age <= float(self.settings["max_age"]) and file.stat().st_size > 0


def modified(file: Path) -> float:
    return file.stat().st_mtime


def key_of(payload: Payload, dialect: str, user: str) -> str:
    """Return a digest of what the answer depends on, whatever the order of its keys."""
    parts = {key: value for key, value in payload.items() if key not in DELIVERY}
    text = json.dumps([dialect, user, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
