"""Passages: cuts the blocks of a file into texts that can be found, and read, on their own.

A passage has about CHUNK characters at most, ends with a block, a sentence or a line where it can,
and knows the headings that it stands under ("Decisions > Meeting of 12 May").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .reader import Block

CHUNK = 900  # characters: a few paragraphs, so that some passages together fit a small model
# At most CHUNK characters of a paragraph: its rest, or to the end of a sentence or a line in the
# second half, or to a space, or, where there is none, just as many.
PIECE = re.compile(
    rf"\S(?:.{{0,{CHUNK - 1}}}\Z"
    rf"|.{{{CHUNK // 2},{CHUNK - 1}}}(?:(?<=[.!?])(?=\s)|(?<=[。！？؟।])|(?=\n))"
    rf"|.{{0,{CHUNK - 1}}}(?=\s)|\S{{0,{CHUNK - 1}}})",
    re.DOTALL,
)


def passages(blocks: Iterable[Block]) -> Iterator[tuple[str, str]]:
    """Yield (headings, text) of each passage.

    Where nothing stands under a heading, it counts if it has no subheadings: it is a text itself.
    """
    path, texts = list[Block](), list[str]()
    for block in [*blocks, Block("", 1)]:
        if not block.level:
            texts += parts(block)
        else:
            if texts or (path and path[-1].level >= block.level):
                heading = " > ".join(above.text for above in path)
                yield from ((heading, text) for text in joined(texts, "\n\n", CHUNK))
            path, texts = [*(above for above in path if above.level < block.level), block], []


def parts(block: Block) -> Iterator[str]:
    """Yield a block as a whole, or what is left of it when it is too long for one passage."""
    text = block.text.strip("\n")
    if len(block.head) + len(text) < CHUNK:
        yield from filter(str.strip, ["\n".join(filter(None, (block.head, text)))])
    elif block.head:
        rows = (piece[0] for row in text.splitlines() for piece in PIECE.finditer(row))
        head = block.head[: CHUNK // 3]
        yield from (f"{head}\n{some}" for some in joined(rows, "\n", CHUNK - len(head)))
    else:
        for paragraph in re.split(r"\n\s*\n", text):
            yield from (piece[0] for piece in PIECE.finditer(paragraph))


def joined(parts: Iterable[str], between: str, room: int) -> Iterator[str]:
    """Yield as many parts at a time as have room in so many characters."""
    some = ""
    for part in parts:
        if some and len(some) + len(between) + len(part) > room:
            yield some
            some = ""
        some = f"{some}{between}{part}" if some else part
    yield some
