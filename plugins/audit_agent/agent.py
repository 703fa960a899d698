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
from itertools import pairwise
from pathlib import Path

from kernel.agent import BaseAgent, Payload


class Audit(BaseAgent):
    """Notes each chat in a file."""

    log: RotatedFile
    parts: list[str]  # of the answer

    # The disk is waited for in a thread (`def`), never on the loop.
    def setup(self) -> None:  # type: ignore[override]
        limits = {name: self.settings[name] for name in ("max_bytes", "files")}
        for name, limit in limits.items():
            if not limit > 0:
                raise ValueError(f"settings: {name}: {limit} must be above 0")
        self.log = RotatedFile(self.data_dir / "audit.jsonl", *limits.values())

    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        if "parts" in vars(self):  # it is a guard, and tools ran
            return payload
        self.parts = []
        known = {key: getattr(self.context, key) for key in ("user", "model", "dialect", "agents")}
        self.note("request", **known, prompt=self.shown(self.context.prompt))
        return payload

    async def on_chunk(self, text: str) -> str:
        self.parts.append(text)
        return text

    def on_end(self) -> str:  # type: ignore[override]
        self.note("answer", finish=self.context.finish, answer=self.shown("".join(self.parts)))
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
        self.most = most
        self.paths = [path, *(Path(f"{path}.{n}") for n in range(1, count))]
        self.lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Append a whole line or nothing. Raises OSError."""
        path = self.paths[0]
        with self.lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size + len(line) > self.most:
                self.rotate()
            path.touch(0o600)
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rotate(self) -> None:
        self.paths[-1].unlink(missing_ok=True)
        for newer, older in reversed([*pairwise(self.paths)]):
            if newer.exists():
                newer.replace(older)
