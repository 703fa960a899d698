"""Markdown: what of an answer is thought, what is program text, and what form its lines have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from markdown_it import MarkdownIt

PARSER = MarkdownIt("commonmark").enable("table").disable("inline")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")  # as CommonMark ends lines
# Thoughts, but not in code; some templates open them, and only their end is in the answer.
THOUGHT = re.compile(
    r"(?P<code>^[ \t]*(?P<fence>`{3,}|~{3,}).*?(?:^[ \t]*(?P=fence)|\Z))"
    r"|(?<!`)<(?P<name>think(?:ing)?)>.*?(?:</(?P=name)>\s*|\Z)"
    r"|\A(?:(?!<think|```).)*?^[ \t]*</think(?:ing)?>[ \t]*$\s*",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
# What a translation has to keep: inline code, which as many backticks end as opened it, before its
# paragraph ends; and the form of a line (of a list, a heading, a quotation, a fence, a table).
KEPT = re.compile(
    r"(?<!`)(?P<ticks>`{1,9})(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`)"
    r"|^[ \t]*(?:(?:[-*+]|\d{1,9}[.)]|#{1,6}|>)(?=[ \t]|$)|```|~~~)|(?<!\\)\|",
    re.DOTALL | re.MULTILINE,
)


def without_thoughts(text: str) -> str:
    return THOUGHT.sub(lambda found: found["code"] or "", text)


def pieces(text: str, most: int) -> Iterator[tuple[str, bool]]:
    """Yield a text in pieces, each with whether it is code; others have at most `most` characters.

    They end between two blocks if they can, else between lines, else between words.
    """
    parts = re.compile(rf"(?s).{{1,{most}}}(?<=\n)|.{{1,{most}}}(?<=\s)|.{{1,{most}}}")
    piece = ""
    for block, is_code in blocks(text):
        if is_code:
            yield piece, False
            yield block, True
            piece = ""
            continue
        for part in parts.findall(block) if len(block) > most else [block]:
            if len(piece) + len(part) > most:
                yield piece, False
                piece = ""
            piece += part
    yield piece, False


def blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the blocks of a text, each with whether it is code."""
    maps = [(token, token.map) for token in PARSER.parse(text) if token.map]
    starts = {at[0] for token, at in maps if token.level == 0}
    fences = [at for token, at in maps if token.type in ("fence", "code_block")]
    code = {line for at in fences for line in range(*at)}
    lines = LINE.findall(text)
    changes = {n for n in range(len(lines)) if (n in code) != (n - 1 in code)}
    for first, end in pairwise(sorted({0, *starts, *changes, len(lines)})):
        yield "".join(lines[first:end]), first in code


def kept(text: str) -> list[str]:
    """Return the inline code and the forms of lines in a text, in any order."""
    return sorted(found[0].strip() for found in KEPT.finditer(text))


def split(separator: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of a text and the separator behind it; the last separator is empty."""
    at = 0
    for found in separator.finditer(text):
        yield text[at : found.start()], found[0]
        at = found.end()
    yield text[at:], ""
