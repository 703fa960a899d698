"""Text: what a person would read of a page, as lines.

`html.parser` is not used: what it does with 80 kB of `<a <a <a ` takes a minute, in time that grows
with the square of the length, and a thread cannot be stopped. Here each character is looked at
once: what is never closed goes on to the end of the page, as in a browser. There is no tree and no
recursion, so nesting costs nothing.
"""

from __future__ import annotations

import codecs
import html
import re
from dataclasses import dataclass, field

HTML = ("text/html", "application/xhtml+xml")

# A tag, as the HTML standard cuts it: quotes count only behind an equals sign.
TAG = re.compile(
    r"""<(/?[a-z][^\s/>]*+)(?:[^>=]++|=\s*+(?:"[^"]*+"|'[^']*+'|(?!["'])[^\s>]*+))*+>""",
    re.IGNORECASE,
)
MARKUP = re.compile(r"<(?:/?[a-z]|[!?/])", re.IGNORECASE)  # any other < is text

RAW = frozenset(("script", "style", "textarea", "title"))  # no markup in them
NOISE = frozenset(
    "aside audio button canvas dialog footer iframe nav noscript object select svg template video"
    "".split()
)
BLOCKS = frozenset(
    "address article blockquote body br caption dd details div dl dt fieldset figcaption figure"
    " form h1 h2 h3 h4 h5 h6 head header hr legend li main ol option p pre section summary table"
    " tbody tfoot thead tr ul".split()
)
MARKS = {"li": "- "} | {f"h{level}": f"{'#' * level} " for level in range(1, 7)}
CELLS = ("td", "th")
TITLE = 200  # characters of it

PIECE = 2**15  # characters: while one is searched, all other threads stand still
SPACE = re.compile(r"\s+")
# html.unescape() fails on a number of more than 4300 digits; no character needs more than 7.
LONG_NUMBER = re.compile(r"&#[0-9]{8,};?")
# Control characters, those that turn the direction of text, and those that nobody can see but a
# model reads (tags): a page could hide a text for the model in them.
UNSEEN = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)

# The charsets of the web; others (utf-7, punycode) are attacks, or cost time.
CHARSETS = re.compile(
    "utf-8|utf-16(?:le|be)?|iso-8859-(?:[2-9]|1[013-6])|windows-125[0-8]|koi8-[ru]"
    "|gb2312|gbk|gb18030|big5|shift_jis|euc-jp|euc-kr"
)
SAME = {"utf8": "utf-8", "iso-8859-1": "windows-1252", "us-ascii": "windows-1252"}
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DECLARED = re.compile(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
HEAD = 1024  # bytes in which a page declares its charset


@dataclass(frozen=True, slots=True)
class Text:
    """A page as text."""

    title: str
    text: str
    cut: bool  # there is more of it


def read_text(body: bytes, kind: str, charset: str, most: int) -> Text:
    """Return up to `most` characters of a page.

    `kind` is its type without parameters, `charset` what its header says, or "".
    """
    text = decode(body, kind, charset)
    if kind in HTML:
        return read_html(text, most)
    lines = Lines(most, pre=True)
    lines.add(text)
    return lines.finish()


def decode(body: bytes, kind: str, charset: str) -> str:
    """Return the characters: by its first bytes, the header, what HTML declares, else UTF-8."""
    for bom, name in BOMS.items():
        if body.startswith(bom):
            return body.decode(name, "replace")
    declared = DECLARED.search(body[:HEAD]) if kind in HTML else None
    inside = declared[1].decode("ascii", "replace") if declared else ""
    # A declaration that can be read byte by byte is none of UTF-16.
    names = charset, "" if inside.lower().startswith("utf-16") else inside
    return body.decode(next(filter(None, map(known, names)), "utf-8"), "replace")


def known(charset: str) -> str:
    """Return Python's name of a charset of the web, or ""."""
    name = charset.lower()
    name = SAME.get(name, name)
    return name if CHARSETS.fullmatch(name) else ""


@dataclass(slots=True)
class Lines:
    """Text that grows line by line; blank lines and white space are folded."""

    most: int  # characters
    pre: bool = False  # inside of <pre>: as it stands
    mark: str = ""  # what the next line begins with
    more: bool = False  # than was taken
    size: int = 0
    parts: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.size > 2 * self.most  # up to half of it are spaces, which fall away at the end

    def add(self, text: str) -> None:
        for at in range(0, len(text), PIECE):
            if self.full:
                self.more |= not text[at:].isspace()
                return
            self._add(text[at : at + PIECE])

    def _add(self, text: str) -> None:
        text = UNSEEN.sub("", text)
        if not self.pre:
            text = SPACE.sub(" ", text)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                text = text.lstrip()
        if text:
            text, self.mark = self.mark + text, ""
            self.parts.append(text)
            self.size += len(text)

    def end_line(self) -> None:
        if self.parts and not self.parts[-1].endswith("\n"):
            self.parts.append("\n")

    def finish(self, title: str = "") -> Text:
        text = "\n".join(line.rstrip() for line in "".join(self.parts).splitlines()).strip("\n")
        return Text(title, text[: self.most].rstrip(), self.more or len(text) > self.most)


def read_html(page: str, most: int) -> Text:
    """Return title and text of a page in HTML, however it is broken."""
    lines, title, at = Lines(most), "", 0
    unclosed: set[str] = set()  # noise that is not closed from here on: not searched for again
    while at < len(page) and not lines.full:
        text, tag, at = next_piece(page, at)
        lines.add(unescape(text))
        mark_up(lines, tag)
        if tag in RAW or tag in NOISE - unclosed:
            end = find_end(page, tag, at)
            if end is None:
                unclosed.add(tag)
                continue
            if tag == "title" and not title:
                title = SPACE.sub(" ", UNSEEN.sub("", unescape(page[at:end]))).strip()[:TITLE]
            at = end
    lines.more |= at < len(page)
    return lines.finish(title)


def next_piece(page: str, at: int) -> tuple[str, str, int]:
    """Return the text from `at` on, the tag behind it, and where that ends.

    An end tag is "/p", and so is a tag that closes itself; what is no tag is "".
    """
    markup = MARKUP.search(page, at)
    if not markup:
        return page[at:], "", len(page)
    start = markup.start()
    text = page[at:start]
    if page.startswith("<!--", start):
        return text, "", past(page, "-->", start + 2)  # <!--> is a whole one
    if found := TAG.match(page, start):
        closes = found[0].endswith("/>") and not found[1].startswith("/")
        return text, f"{'/' * closes}{found[1].lower()}", found.end()
    is_tag = markup[0][-1].isalpha()  # and one that is never closed
    return text, "", len(page) if is_tag else past(page, ">", start)


def past(page: str, end: str, at: int) -> int:
    found = page.find(end, at)
    return len(page) if found < 0 else found + len(end)


def find_end(page: str, tag: str, at: int) -> int | None:
    """Return where the end tag stands; script and the like go on to the end without one."""
    found = re.compile(rf"</{tag}(?=[\s/>])", re.IGNORECASE).search(page, at)
    if found:
        return found.start()
    return len(page) if tag in RAW else None


def mark_up(lines: Lines, tag: str) -> None:
    """Let a tag change how the text goes on."""
    name = tag.removeprefix("/")
    if name in CELLS:
        lines.add(" ")
    elif name in BLOCKS:
        lines.end_line()
        lines.mark = MARKS.get(tag, "" if name in MARKS else lines.mark)
        lines.pre = tag == name if name == "pre" else lines.pre


def unescape(text: str) -> str:
    return html.unescape(LONG_NUMBER.sub("\ufffd", text))
