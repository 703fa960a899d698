"""Chunks: cuts texts into passages that can be found, and read, on their own.

A passage has at most CHUNK characters, ends with a paragraph or a sentence where it can, and knows
the headings that it stands under ("Decisions > Meeting of 12 May"). First come the sections of a
text, by its headings, then the passages of a section.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

Section = tuple[str, str]  # the headings that a text stands under, and the text

CHUNK = 900  # characters: a few paragraphs, so that some chunks together fit a small model
TITLE = 120  # characters of one heading, which each chunk below it repeats

HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)")
# A line with a row of = or - below it and a blank line above: what closes a front matter is none.
UNDERLINED = re.compile(rf"\n\n([^\s#].{{0,{TITLE - 1}}})\n(=|-)\2+[ \t]*(?=\n|\Z)")
FENCE = re.compile(r"\s*(```[^`]*|~~~.*)")
# A first line that stands alone, is no sentence, and has more below it.
FIRST_LINE = re.compile(rf"\s*(\S.{{0,{TITLE - 1}}}(?<![.,:;!?]))\n[ \t]*\n\s*(?=\S)")
# At most CHUNK characters of a paragraph: its rest, or to the end of a sentence or a line in the
# second half, or to a space, or, where there is none, just as many.
PIECE = re.compile(
    rf"\S(?:.{{0,{CHUNK - 1}}}\Z|.{{{CHUNK // 2},{CHUNK - 1}}}(?:(?<=[.!?])(?=\s)|(?=\n))"
    rf"|.{{0,{CHUNK - 1}}}(?=\s)|\S{{0,{CHUNK - 1}}})",
    re.DOTALL,
)


def plain(text: str) -> Iterator[Section]:
    """Yield a text without markup as one section, under its title where it has one."""
    title = FIRST_LINE.match(text)
    yield (title[1].rstrip(), text[title.end() :]) if title else ("", text)


def markdown(text: str) -> Iterator[Section]:
    """Yield what stands between two headings.

    Where nothing stands under a heading, it counts if it has no subheadings: it is a text itself.
    """
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fenced = False
    for line in UNDERLINED.sub(with_signs, f"\n\n{text}").splitlines():
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


def with_signs(underlined: re.Match[str]) -> str:
    return f"\n\n{'#' if underlined[2] == '=' else '##'} {underlined[1]}"


def heading_path(path: list[tuple[int, str]]) -> str:
    return " > ".join(title for _, title in path)


def chunks(sections: Iterable[Section]) -> Iterator[Section]:
    """Yield the passages of all sections, each with the headings that it stands under."""
    for heading, text in sections:
        for piece in pieces(text) if text.strip() or not heading else [""]:
            yield heading, piece


def pieces(text: str) -> Iterator[str]:
    """Yield pieces of at most CHUNK characters: whole paragraphs, unless one is longer."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for match in PIECE.finditer(paragraph):
            part = match[0]
            if piece and len(piece) + len(part) + 2 > CHUNK:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece
