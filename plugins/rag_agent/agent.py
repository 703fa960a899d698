"""RAG: answers from the text and Markdown files of one folder, and names its sources.

`/rag what did we decide in May?` puts the passages that fit best before the question, and the
files they stand in under the answer. The folder is the operator's setting; how many passages
(`/rag:k=8`) is the prompt's. How they are found is the business of `index.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel.agent import BaseAgent, Payload, add_context, prompt

from .index import Index, Passage

MOST = 20  # passages for one question, whatever the prompt asks for
INSTRUCTION = (
    "Answer the question that follows from these passages of our files. If they do not hold the"
    " answer, say so."
)
NOTHING = (
    "Our files were searched for the question that follows, and hold nothing about it. Say so"
    " before anything else."
)


class Rag(BaseAgent):
    """Answers from the files of a folder."""

    index: Index
    found: Sequence[Passage] | None = None  # None: this request did not search

    # Both are `def`, so that the disk is waited for in a thread and never on the loop.
    def setup(self) -> None:  # type: ignore[override]
        folder = Path(__file__).parent / Path(self.settings["folder"]).expanduser()
        if not self.settings["max_chars"] > 0:
            raise ValueError(f"settings: max_chars: {self.settings['max_chars']} must be above 0")
        self.index = Index(folder.resolve(), self.data_dir / "index.db")
        self.index.update()

    def on_request(self, payload: Payload) -> Payload:  # type: ignore[override]
        question = prompt(payload)
        if self.context.continuation or not question.strip():
            return payload
        k = max(1, min(self.arguments["k"], MOST))
        passages = self.index.search(question, k)
        blocks = fitting(passages, self.settings["max_chars"])
        self.found = passages[: len(blocks)]
        return add_context(payload, "\n\n".join([INSTRUCTION if blocks else NOTHING, *blocks]))

    async def on_end(self) -> str:
        if self.found is None:
            return ""
        if not self.found:
            return "\n\n(Nothing found in the folder.)"
        sources = dict.fromkeys(f"- {passage.source}" for passage in self.found)
        return "\n".join(["\n\nSources:", *sources])


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
