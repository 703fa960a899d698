"""RAG: answers from the files of one folder or of several, and names its sources.

`/rag what did we decide in May?` puts the passages that fit best before the question, and links to
their files under the answer. The folders are the operator's settings; how many passages
(`/rag:k=8`) and which folder (`/rag:in=work`) are the prompt's. `follower.py` keeps the index in
step with the folders, `reader.py` and `passages.py` cut the files, `index.py` finds passages by
their words and `vectors.py` by meaning.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from kernel.agent import BaseAgent, Payload, Reply, add_context, is_user, telling_words, text_of

from .follower import Follower
from .index import Damaged, Index, Passage, by_words, fetch
from .vectors import Vectors

VERSION = 3  # of the index, and of how texts are cut: raise it when either changes
MOST = 20  # passages for one question, whatever the prompt asks for, and places of a ranking
RANK = 60  # of reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009
# What has less than this part of the best score by words does not count beside vectors: or passages
# that share one common word, and are far down in both rankings, come before the best of one.
SHARE = 0.5
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
OWN = re.compile(
    r"\n[\s*_#]*Sources:[*_]*(?:\s*\n[ \t]*[-*•\[\d].*)*\s*\Z"
)  # of the model, at the end
JSON = re.compile(r"\s*(?:```(?:json)?\s*)?([\[{].*?)\s*(?:```\s*)?", re.DOTALL)


class Rag(BaseAgent):
    """Answers from the files of a folder."""

    index: Index
    follower: Follower
    vectors: Vectors
    folders: dict[str, Path]  # by the name of each; "" is the name of a single one
    found: Sequence[Passage] | None = None  # None: this request did not search
    unread = 0  # files, at that time
    pieces: list[str]  # of the answer

    def setup(self) -> None:  # type: ignore[override]
        for name in ("max_chars", "max_file", "embed_batch", "wait"):
            if not self.settings[name] > 0:
                raise ValueError(f"settings: {name}: {self.settings[name]} must be above 0")
        folders = self.settings["folders"] or {"": self.settings["folder"]}
        self.folders = {name.lower(): resolved(name, text) for name, text in folders.items()}
        limit, model = self.settings["max_file"], self.settings["embed_model"]
        owner = repr((VERSION, sorted(self.folders.items()), limit, model)).encode()
        name = f"index-{blake2b(owner, digest_size=8).hexdigest()}.db"  # no other settings' own
        self.index = Index(self.data_dir / name)
        with suppress(Damaged), self.index.open():
            pass  # so that what cannot be opened at all is known now
        states: dict[str, str] = {}

        def report(part: str, text: str) -> None:
            states[part] = text
            self.progress = "; ".join(states[part] for part in sorted(states))

        batch = self.settings["embed_batch"]
        self.vectors = Vectors(self.index, model, batch, partial(report, "vectors"))
        self.follower = Follower(self.index, self.folders, limit, partial(report, "files"))

    async def on_request(self, payload: Payload) -> Payload:
        without_sources(payload)
        within = self.within()
        question = "" if self.context.continuation else self.question(payload)
        if not question:
            return payload
        try:
            passages = await self.find(question, within)
        except Damaged:  # the index was removed, and is being made anew
            passages = await self.find(question, within)
        if not passages and not self.context.asked:
            return payload
        self.unread, self.pieces = self.follower.unread, []
        blocks = fitting(passages, self.settings["max_chars"])
        self.found = passages[: len(blocks)]
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
        await asyncio.to_thread(self.follower.catch_up, self.settings["wait"])
        vector = await self.vectors.of_question(self.context, question)
        return await asyncio.to_thread(self.search, question, vector, within)

    def search(
        self, question: str, vector: array[float] | None, within: Path | None = None
    ) -> list[Passage]:
        """Return the best passages by words and by meaning; of copies one."""
        scores: dict[bytes, float] = {}
        passages: dict[bytes, Passage] = {}
        with self.index.open() as db:
            db.execute("BEGIN")  # one state of the index for all that is read
            words = by_words(db, telling_words(question), SHARE if vector else 0)
            rankings: list[Iterable[int]] = [words]
            rankings += [self.vectors.near(db, vector)] if vector else []
            for ids in rankings:
                for place, passage in enumerate(islice(fetch(db, ids, within), MOST), 1):
                    key = passages.setdefault(passage.digest, passage).digest
                    scores[key] = scores.get(key, 0) + 1 / (RANK + place)
        best = sorted(scores, key=scores.__getitem__, reverse=True)
        return [passages[key] for key in best[: min(max(1, self.arguments["k"]), MOST)]]

    async def on_chunk(self, text: str) -> str:
        if self.found is not None:
            self.pieces.append(text)
        return text

    async def on_end(self) -> str:
        answer = "" if self.found is None else "".join(self.pieces)
        if not answer.strip() or is_json(answer):
            return ""
        links = dict.fromkeys(f"- {p.source} <{self.link(p)}>" for p in self.found or ())
        heading = "" if OWN.search(answer) else "\nSources:\n"  # else the list goes on
        lines = [heading + "\n".join(links)] if links else [f"\n{NOT_FOUND}"]
        return "\n" + "\n".join(lines + [STILL_READ] * bool(self.unread))

    def link(self, passage: Passage) -> str:
        if base := self.settings["base_url"]:
            return f"{base.rstrip('/')}/{quote(passage.name)}"
        return Path(os.fsdecode(passage.path)).as_uri()

    async def teardown(self) -> None:
        await self.vectors.stop()
        await asyncio.to_thread(self.follower.stop)


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
    blocks: list[str] = []
    for number, passage in enumerate(passages, 1):
        block = f"[{number}] {passage.source}\n{passage.text}"
        if blocks and len(block) > room:
            break
        blocks.append(block[:room])
        room -= len(block)
    return blocks


def without_sources(payload: Payload) -> None:
    """Take out what stood under earlier answers: it is not the model's, which would imitate it."""
    for message in payload["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else [message]
        for part in parts if message.get("role") == "assistant" else ():
            for key in part.keys() & {"text", "content"}:
                part[key] = UNDER.sub("", part[key]) if isinstance(part[key], str) else part[key]


def is_json(answer: str) -> bool:
    found = JSON.fullmatch(answer)
    with suppress(ValueError, RecursionError):
        return bool(found and json.loads(found[1]) is not None)
    return False
