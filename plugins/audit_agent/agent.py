"""Audit: notes who asked when, which model and which agents, and digests of question and answer.

`audit.jsonl` in its data folder gets two lines for each chat, one when it comes and one when its
answer is complete; "id" is the same in both, and in the proxy's log. A chat with one line alone was
refused, failed or was left by its client. With `texts = true` the texts stand there in place of
their digests (SHA-256): the question as the user typed it, the answer as the client got it. A full
file becomes `audit.jsonl.1` and so on; the oldest goes. A line that cannot be written is a line in
the proxy's log, and the chat goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from kernel.agent import BaseAgent, Payload


class Audit(BaseAgent):
    """Notes each chat in a file."""

    log: RotatedFile
    parts: list[str]  # of the answer

    # The disk is waited for in a thread (`def`), never on the loop.
    def setup(self) -> None:  # type: ignore[override]
        for name in ("max_bytes", "files"):
            if not self.settings[name] > 0:
                raise ValueError(f"settings: {name}: {self.settings[name]} must be above 0")
        path = self.data_dir / "audit.jsonl"
        self.log = RotatedFile(path, self.settings["max_bytes"], self.settings["files"])

    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        self.parts = []
        context = self.context
        who = {"user": context.user, "model": context.model, "dialect": context.dialect}
        self.note("request", agents=list(context.agents), **who, prompt=self.shown(context.prompt))
        return payload

    async def on_chunk(self, text: str) -> str:
        self.parts.append(text)
        return text

    def on_end(self) -> str:  # type: ignore[override]
        text = "".join(self.parts)
        self.note("answer", finish=self.context.finish, answer=self.shown(text))
        return ""

    def shown(self, text: str) -> str:
        """Return a text as it is noted: as a digest, unless the operator wants texts."""
        if self.settings["texts"]:
            return text
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def note(self, event: str, **fields: object) -> None:
        if self.context.explaining:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "id": self.context.request_id, **fields}
        self.log.write(json.dumps(line).encode() + b"\n")


class RotatedFile:
    """A file of at most `most` bytes and its predecessors, `count` files in all."""

    def __init__(self, path: Path, most: int, count: int) -> None:
        self.path, self.most, self.count = path, most, count
        self.lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Append a whole line or nothing. Raises OSError."""
        with self.lock:
            if self.path.exists() and self.path.stat().st_size + len(line) > self.most:
                self.rotate()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0, opener=private) as file:
                size = file.tell()
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rotate(self) -> None:
        names = [self.path, *(Path(f"{self.path}.{n}") for n in range(1, self.count))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)
        if self.count == 1:
            self.path.unlink()


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
