"""RAG: answers from the files of one folder, and names its sources.

`/rag what did we decide in May?` puts the passages that fit best before the question, and the
files they stand in under the answer. The folder is the operator's setting; how many passages
(`/rag:k=8`) is the prompt's. `follower.py` keeps the index in step with the folder, `reader.py` and
`chunks.py` cut its files, `index.py` finds passages by their words and `vectors.py` by meaning.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from kernel.agent import BaseAgent, Payload, add_context, prompt

from .follower import Follower
from .index import Damaged, Index, Passage, fetch
from .vectors import Vectors
from .words import ranked

MOST = 20  # passages for one question, whatever the prompt asks for, and places of a ranking
INSTRUCTION = (
    "Answer the question that follows from these passages of our files. If they do not hold the"
    " answer, say so."
)
NOTHING = (
    "Our files were searched for the question that follows, and hold nothing about it. Say so"
    " before anything else."
)
NOTHING_YET = (
    "Our files are still being read, and nothing about the question that follows has been found so"
    " far. Say so before anything else."
)


class Rag(BaseAgent):
    """Answers from the files of a folder."""

    index: Index
    follower: Follower
    vectors: Vectors
    found: Sequence[Passage] | None = None  # None: this request did not search
    unread = 0  # files, at that time

    def setup(self) -> None:  # type: ignore[override]
        for name in ("max_chars", "max_file", "embed_batch", "wait"):
            if not self.settings[name] > 0:
                raise ValueError(f"settings: {name}: {self.settings[name]} must be above 0")
        folder = (Path(__file__).parent / Path(self.settings["folder"]).expanduser()).resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"settings: folder: there is no folder {folder}")
        told: dict[str, str] = {}

        def tell(part: str, text: str) -> None:
            told[part] = text
            self.progress = "; ".join(told[part] for part in sorted(told))

        self.index = Index(self.data_dir / "index.db")
        with suppress(Damaged), self.index.open():
            pass  # so that what cannot be opened at all is known now
        model, batch = self.settings["embed_model"], self.settings["embed_batch"]
        self.vectors = Vectors(self.index, model, batch, partial(tell, "vectors"))
        limit = self.settings["max_file"]
        self.follower = Follower(self.index, folder, limit, partial(tell, "files"))
        self.follower.start()

    async def on_request(self, payload: Payload) -> Payload:
        question = self.question(payload)
        if self.context.continuation or not question.strip():
            return payload
        try:
            passages = await self.find(question)
        except Damaged:  # the index was removed, and is being made anew
            passages = await self.find(question)
        self.unread = self.follower.unread
        blocks = fitting(passages, self.settings["max_chars"])
        self.found = passages[: len(blocks)]
        nothing = NOTHING_YET if self.unread else NOTHING
        return add_context(payload, "\n\n".join([INSTRUCTION if blocks else nothing, *blocks]))

    def question(self, payload: Payload) -> str:
        """Return what was asked, without what other agents have put before it."""
        text, asked = prompt(payload), prompt(self.context.payload)
        return asked if text.endswith(asked) else text

    async def find(self, question: str) -> list[Passage]:
        await asyncio.to_thread(self.follower.catch_up, self.settings["wait"])
        vector = await self.vectors.of_question(self.context, question)
        return await asyncio.to_thread(self.search, question, vector)

    def search(self, question: str, vector: array[float] | None) -> list[Passage]:
        with self.index.open() as db:
            db.execute("BEGIN")  # one state of the index for all that is read
            near = self.vectors.near(db, vector, MOST) if vector else []
            return fetch(db, ranked(db, question, near, MOST), min(self.arguments["k"], MOST))

    async def on_end(self) -> str:
        if self.found is None:
            return ""
        sources = dict.fromkeys(f"- {passage.source}" for passage in self.found)
        lines = ["Sources:", *sources] if sources else ["(Nothing found in the folder.)"]
        if self.unread:
            lines.append("(The folder is still being read.)")
        return "\n\n" + "\n".join(lines)

    async def teardown(self) -> None:
        await self.vectors.stop()
        await asyncio.to_thread(self.follower.stop)


def fitting(passages: Sequence[Passage], room: int) -> list[str]:
    """Return the passages as the model reads them, as many as fit into `room` characters.

    The best one is cut where it does not fit as a whole.
    """
    blocks: list[str] = []
    for number, passage in enumerate(passages, 1):
        block = f"[{number}] {passage}"
        if blocks and len(block) > room:
            break
        blocks.append(block[:room])
        room -= len(block)
    return blocks
