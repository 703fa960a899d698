"""RAG: answers from the files of one folder or of several, and names its sources.

`/rag what did we decide in May?` puts the passages that fit best before the question, and links to
their files under the answer. The folders are the operator's settings; how many passages
(`/rag:k=8`) and which folder (`/rag:in=work`) are the prompt's. `follower.py` keeps the index in
step with the folders, `reader.py` and `passages.py` cut the files, `index.py` keeps the passages in
the agent's store, `words.py` finds them by their words and `vectors.py` by meaning.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from heapq import nlargest
from itertools import accumulate
from pathlib import Path
from urllib.parse import quote
from zlib import crc32

from kernel.agent import (
    BaseAgent,
    Payload,
    Reply,
    add_context,
    is_user,
    map_texts,
    telling_words,
    text_of,
)

from .follower import Follower
from .index import SCHEMA, Index, Passage, fetch
from .vectors import Vectors
from .words import by_words

VERSION = 5  # of the index, and of how texts are cut: raise it when either changes
MOST = 20  # passages for one question, whatever the prompt asks for, and places of a ranking
RANK = 5  # of reciprocal rank fusion: small, or what is far down twice comes before the best ones
INSTRUCTION = (
    "Answer the question that follows from these passages of our files. If they do not hold the"
    " answer, say so."
)
NOTHING = "Nothing about the question that follows was found in our files. Say so first."
NOT_FOUND = "(Nothing found in the folder.)"
STILL_READ = "(The folder is still being read.)"
UNDER = re.compile(  # what stands under earlier answers
    rf"\n\n(?:Sources:(?:\n- .*)+|{re.escape(NOT_FOUND)})(?:\n{re.escape(STILL_READ)})?"
)
# What the model itself wrote at the end.
OWN = re.compile(r"\n[\s*_#]*Sources:[*_]*(?:\s*\n[ \t]*[-*•\[\d].*)*\s*\Z")


class Rag(BaseAgent):
    """Answers from the files of a folder."""

    schema = SCHEMA
    index: Index
    follower: Follower
    vectors: Vectors
    folders: dict[str, Path]  # by the name of each; "" is the name of a single one
    found: Sequence[Passage] | None = None  # None: this request did not search
    unread = 0  # files, at that time
    pieces: list[str] = []  # of the answer

    async def setup(self) -> None:
        for name in ("max_chars", "max_file", "embed_batch", "wait"):
            if not self.settings[name] > 0:
                raise ValueError(f"settings: {name}: {self.settings[name]} must be above 0")
        folders = self.settings["folders"] or {"": self.settings["folder"]}
        self.folders = {name.lower(): resolved(name, text) for name, text in folders.items()}
        limit, model = self.settings["max_file"], self.settings["embed_model"]
        # An index belongs to these settings: another proxy with other ones has another.
        owner = repr((VERSION, sorted(self.folders.items()), limit, model)).encode()
        self.index = Index(self.store, f"{crc32(owner):08x}")
        self.vectors = Vectors(self.index, model, self.settings["embed_batch"])
        self.follower = Follower(self.index, self.folders, limit)

    @property
    def progress(self) -> str:  # type: ignore[override]
        where = ", ".join(map(str, self.folders.values()))
        return f"{where}: {'; '.join(filter(None, (self.follower.state, self.vectors.state)))}"

    async def on_request(self, payload: Payload) -> Payload:
        without_sources(payload)
        within = self.within()
        question = "" if self.context.continuation else self.question(payload)
        if not question:
            return payload
        passages = await self.find(question, within)
        if not passages and not self.context.asked:
            return payload
        blocks = fitting(passages, self.settings["max_chars"])
        self.found, self.unread = passages[: len(blocks)], self.follower.unread
        return add_context(payload, "\n\n".join([INSTRUCTION if blocks else NOTHING, *blocks]))

    def within(self) -> Path | None:
        """Return the folder that the prompt asks for; None: all of them. Raises Reply."""
        name = self.arguments["in"].lower()
        if name and name not in self.folders:
            names = ", ".join(filter(None, self.folders)) or "none"
            raise Reply(f"/rag:in={name}: there is no folder of that name; known are: {names}")
        return self.folders.get(name)

    def question(self, payload: Payload) -> str:
        """Return what is to be searched for, or "".

        A question that tells nothing by itself ("and when?") is about what was last asked before;
        anything else without a telling word is small talk.
        """
        prompt = self.context.prompt
        if telling_words(prompt):
            return prompt
        if not re.search("[?？؟;՞]", prompt):
            return ""
        earlier = [text_of(message) for message in payload["messages"] if is_user(message)][:-1]
        return next((text for text in reversed(earlier) if telling_words(text)), "")

    async def find(self, question: str, within: Path | None) -> list[Passage]:
        await self.follower.catch_up(self.settings["wait"])
        vector = await self.vectors.of_question(self.context, question)
        return await self.search(question, vector, within)

    async def search(
        self, question: str, vector: array[float] | None, within: Path | None = None
    ) -> list[Passage]:
        """Return the best passages by words and by meaning; of copies one."""
        scores, passages = defaultdict[str, float](float), dict[str, Passage]()
        words = await asyncio.to_thread(telling_words, question)
        async with self.index.transaction() as execute:
            rankings = [await by_words(execute, words, self.store.engine)]
            rankings += [await self.vectors.near(execute, vector)] if vector else []
            for ids in rankings:
                found = await fetch(execute, ids, within, MOST)
                passages |= found
                for place, text in enumerate(found, 1):
                    scores[text] += 1 / (RANK + place)
        count = min(max(1, self.arguments["k"]), MOST)
        return [passages[text] for text in nlargest(count, scores, key=scores.__getitem__)]

    async def on_chunk(self, text: str) -> str:
        self.pieces.append(text)
        return text

    async def on_end(self) -> str:
        answer = "".join(self.pieces)
        if self.found is None or not answer.strip() or is_json(answer):
            return ""
        links = dict.fromkeys(f"- {p.source} <{self.link(p)}>" for p in self.found)
        heading = "" if OWN.search(answer) else "\nSources:\n"  # else the list goes on
        lines = [heading + "\n".join(links)] if links else [f"\n{NOT_FOUND}"]
        return "\n" + "\n".join(lines + [STILL_READ] * bool(self.unread))

    def link(self, passage: Passage) -> str:
        if base := self.settings["base_url"]:
            return f"{base.rstrip('/')}/{quote(passage.name)}"
        return Path(os.fsdecode(passage.path)).as_uri()

    async def teardown(self) -> None:
        await self.vectors.stop()
        await self.follower.stop()


def resolved(name: str, text: str) -> Path:
    """Return the folder that a setting means. Raises FileNotFoundError."""
    folder = (Path(__file__).parent / Path(text).expanduser()).resolve()
    if not folder.is_dir():
        key = f"[agents.rag.settings] folder{name and f's.{name}'}"
        raise FileNotFoundError(f"there is no folder {folder}; change {key} = {text!r}")
    return folder


def fitting(passages: Sequence[Passage], room: int) -> list[str]:
    """Return the passages as the model reads them, as many as fit into `room` characters.

    The best one is cut where it does not fit as a whole.
    """
    blocks = [f"[{n}] {passage.source}\n{passage.text}" for n, passage in enumerate(passages, 1)]
    sizes = accumulate(map(len, blocks))
    some = [block for block, size in zip(blocks, sizes, strict=True) if size <= room]
    return some or [block[:room] for block in blocks[:1]]


def without_sources(payload: Payload) -> None:
    """Take out what stood under earlier answers: it is not the model's, which would imitate it."""
    for message in payload["messages"]:
        if message.get("role") == "assistant":
            message |= map_texts(message, lambda text: UNDER.sub("", text))


def is_json(answer: str) -> bool:
    with suppress(ValueError, RecursionError):
        value = json.loads(answer.strip().removeprefix("```json").strip("`\n"))
        return isinstance(value, dict | list)
    return False
