"""Markdown: what of an answer is thought, what is program text, and what form its lines have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from markdown_it import MarkdownIt

PARSER = MarkdownIt("commonmark").enable("table").disable("inline")
CODE = ("fence", "code_block")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")  # as CommonMark ends lines
# As many backticks as opened it end inline code, before its paragraph ends.
INLINE = re.compile(r"(?<!`)(?P<ticks>`{1,9})(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`)", re.S)
# Thoughts, but not in code; some templates open them, and only their end is in the answer.
THOUGHT = re.compile(
    r"(?P<code>^[ \t]*(?P<fence>`{3,}|~{3,}).*?(?:^[ \t]*(?P=fence)|\Z))"
    r"|(?<!`)<(?P<name>think(?:ing)?)>.*?(?:</(?P=name)>\s*|\Z)"
    r"|\A(?:(?!<think|```).)*?^[ \t]*</think(?:ing)?>[ \t]*$\s*",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
# The form of a line: of a list, a heading, a quotation, a fence, or the cells of a table.
FORM = re.compile(r"^[ \t]*(?:(?:[-*+]|\d{1,9}[.)]|#{1,6}|>)(?=[ \t]|$)|```|~~~)|(?<!\\)\|", re.M)
TAG = re.compile(r"(`?)<c(\d{1,9})\s?/?>\1", re.I)  # some models make inline code of a tag


def without_thoughts(text: str) -> str:
    return THOUGHT.sub(lambda found: found["code"] or "", text)


def pieces(text: str, most: int) -> Iterator[tuple[str, bool]]:
    """Yield a text in pieces, each with whether it is code; others have at most `most` characters.

    They end between two blocks if they can, else between lines, else between words.
    """
    maps = [(token, token.map) for token in PARSER.parse(text) if token.map]
    code = {line for token, at in maps if token.type in CODE for line in range(*at)}
    starts = {at[0] for token, at in maps if token.level == 0}
    lines = LINE.findall(text)
    changes = {n for n in range(len(lines)) if (n in code) != (n - 1 in code)}
    piece = ""
    for first, end in pairwise([*sorted({0, *starts, *changes}), len(lines)]):
        block = "".join(lines[first:end])
        for part in [block] if first in code else shortened(block, lines[first:end], most):
            if piece and (first in code or len(piece) + len(part) > most):
                yield piece, False
                piece = ""
            if first in code:
                yield part, True
            else:
                piece += part
    if piece:
        yield piece, False


def shortened(block: str, lines: list[str], most: int) -> list[str]:
    """Return a block, or if it is too long its lines, and words of lines that are too long."""
    words = re.compile(rf"(?s).{{1,{most}}}(?<=\s)|.{{1,{most}}}")
    return [block] if len(block) <= most else [p for line in lines for p in words.findall(line)]


def split(separator: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    """Return pairs of a text and the separator behind it; the last separator is empty."""
    found = [*separator.finditer(text)]
    starts = [0, *(one.end() for one in found)]
    ends = [*(one.start() for one in found), len(text)]
    separators = [*(one[0] for one in found), ""]
    return [(text[a:b], s) for a, b, s in zip(starts, ends, separators, strict=True)]


def tagged(text: str) -> tuple[str, dict[int, str]]:
    """Return a text with tags like `<c1/>` in place of inline code, and the code of each tag."""
    first = max((int(found[2]) for found in TAG.finditer(text)), default=0) + 1
    codes: dict[int, str] = {}

    def tag(found: re.Match[str]) -> str:
        codes[first + len(codes)] = found[0]
        return f"<c{first + len(codes) - 1}/>"

    return INLINE.sub(tag, text), codes


def restored(question: str, answer: str, codes: dict[int, str]) -> str | None:
    """Return the answer with its code, or None if a tag is missing or lines have another form."""
    numbers = [int(found[2]) for found in TAG.finditer(answer)]
    forms = [[form.strip() for form in FORM.findall(text)] for text in (question, answer)]
    kept = sorted(n for n in numbers if n in codes) == [*codes] and forms[0] == forms[1]
    if not kept or not answer:
        return None
    return TAG.sub(lambda found: codes.get(int(found[2]), found[0]), answer)
