"""Chunks: cuts a text into pieces that can be found, and read, on their own.

A piece has at most CHUNK characters, ends with a paragraph where it can, and knows the headings
that it stands under ("Decisions > Meeting of 12 May").
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CHUNK = 900  # characters: a few paragraphs, so that some chunks together fit a small model
TITLE = 120  # characters of one heading, which each chunk below it repeats

HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)")
FENCE = re.compile(r"\s*(```[^`]*|~~~.*)")
# At most CHUNK characters of a paragraph: its rest, or to the end of a sentence or a line in the
# second half, or to a space, or, where there is none, just as many.
PIECE = re.compile(
    rf"\S(?:.{{0,{CHUNK - 1}}}\Z|.{{{CHUNK // 2},{CHUNK - 1}}}(?:(?<=[.!?])(?=\s)|(?=\n))"
    rf"|.{{0,{CHUNK - 1}}}(?=\s)|\S{{0,{CHUNK - 1}}})",
    re.DOTALL,
)


def chunks(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield `(heading path, text)` of each chunk; `.txt` files have no headings."""
    plain = name.lower().endswith(".txt")
    for heading, body in [("", text)] if plain else sections(text):
        for piece in pieces(body) if body.strip() or not heading else [""]:
            yield heading, piece


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield `(heading path, text)` of what stands between two headings.

    Where nothing stands under a heading, it counts if it has no subheadings: it is a text itself.
    """
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= bool(FENCE.fullmatch(line))
        match = None if fenced else HEADING.match(line)
        if not match:
            lines.append(line)
            continue
        level = len(match[1])
        if any(map(str.strip, lines)) or (path and path[-1][0] >= level):
            yield heading_path(path), "\n".join(lines)
        title = re.sub(r"[ \t]+#*[ \t]*$", "", match[2][:TITLE])
        path = [*(above for above in path if above[0] < level), (level, title)]
        lines = []
    yield heading_path(path), "\n".join(lines)


def heading_path(path: list[tuple[int, str]]) -> str:
    return " > ".join(title for _, title in path)


def pieces(text: str) -> Iterator[str]:
    """Yield pieces of at most CHUNK characters: whole paragraphs, unless one is longer."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for part in PIECE.findall(paragraph):
            if piece and len(piece) + len(part) + 2 > CHUNK:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece
