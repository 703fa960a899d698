"""Reader: turns the bytes of a file into blocks: headings, tables and other text.

Markdown is read as CommonMark has it, HTML as a browser reads it, a PDF page by page. A file that
does not say how it is encoded is guessed at, and the guess is told.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from charset_normalizer import from_bytes
from markdown_it import MarkdownIt
from pypdf import PdfReader
from selectolax.lexbor import LexborHTMLParser

SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".pdf")
TITLE = 120  # characters of one heading, which each passage below it repeats

CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})  # bytes that a text does not hold
SAMPLE = 2**16  # bytes that are enough to guess an encoding
OTHERS = (
    "gb18030 big5 cp932 euc_jp cp949 cp1251 koi8_r koi8_u iso8859_5 cp1253 cp1255 cp1256 cp874"
).split()
# The letters beside ASCII of each language in Latin letters: short texts mislead the library.
CENTRAL = "ąćęłńóśźż áčďéěíňóřšťúůýž áéíóöőúüű ăâîşţ čćđšž áäčďéíĺľňóôŕšťúýž"
ALPHABETS = {
    "cp1252": "äöüßéèêàçïñô àâæçéèêëîïôœùûü áéíñóúüªº ãáàâçéêíóôõúüªº àèéìíîòóùú åäöæøéü ëïéèóöü",
    "cp1254": "çğıöşüâîû",
    "cp1250": CENTRAL,
    "iso8859_2": CENTRAL,
    "cp1257": "ąčęėįšųūž āčēģīķļņšūž",
}
PUNCTUATION = "“”„‘’‚‹›«»–—…•·€£°§©®™´¿¡\xa0"
DECLARED = re.compile(rb"(?i)<(?:meta|\?xml)[^>]+(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)")

# A first line that stands alone, is no sentence, and has more below it.
FIRST_LINE = re.compile(rf"\s*(\S.{{0,{TITLE - 1}}}(?<![.,:;!?]))\n[ \t]*\n\s*(?=\S)")
FRONT_MATTER = re.compile(
    r"(---|\+{3})[ \t]*\n((?:[ \t]*(?:#.*)?\n)*[\w\"'-]+[ \t]*[:=].*\n(?s:.*?)\n?)"
    r"(?:\1|\.{3})[ \t]*(?:\n|\Z)"
)
FENCES = ("```", "~~~")
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)

UNREAD = "script, style, template, noscript, nav, svg, iframe, title"  # of a page
HEADINGS = "h1, h2, h3, h4, h5, h6"
BLOCKS = (
    f"{HEADINGS}, address, article, aside, blockquote, dd, details, div, dl, dt, fieldset, figure,"
    " figcaption, footer, form, header, hr, main, ol, p, pre, section, summary, table, ul"
)
# Marks in the text of a page; other white space there is layout. Behind BLOCK stands what follows:
# the level of a heading, a table with a head, or a blank before other text.
BLOCK, LINE, HEAD, SPACE = "\x01", "\x02", "\x03", "\x04"
TEXT = BLOCK + " "
MARKS = str.maketrans("", "", BLOCK + LINE + HEAD + SPACE)
UNCLOSED = 20_000  # tags: the parser's time grows with the square of how many are open
WITHIN = {"br": LINE, "tr": LINE, "li": f"{LINE}- ", "td + td, th + td, td + th, th + th": " | "}


class Unreadable(Exception):
    """A file that is left out; the text is the reason."""


class Block(NamedTuple):
    """A heading of level 1 to 6, or a text; of a table that can be cut, `head` is repeated."""

    text: str
    level: int = 0
    head: str = ""


def read(data: bytes, suffix: str) -> tuple[list[Block], str]:
    """Return the blocks of a file, and its encoding where that is a guess.

    Raises Unreadable, and whatever a foreign parser raises.
    """
    if suffix == ".pdf":
        return list(pdf(data)), ""
    text, guess = decoded(data)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    if suffix in (".html", ".htm"):
        return list(page(text)), guess
    return list(plain(text) if suffix == ".txt" else markdown(text)), guess


def decoded(data: bytes) -> tuple[str, str]:
    """Return the text of bytes, and the encoding that was guessed or "". Raises Unreadable."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace"), ""
    if len(data) - len(data.translate(None, CONTROLS)) > len(data) / 100:
        raise Unreadable("is not text")
    named = [name.decode() for name in DECLARED.findall(data[:2048])]
    for encoding in ["iso2022_jp"] * (b"\x1b$" in data) + ["utf-8-sig", *named]:
        with suppress(UnicodeDecodeError, LookupError):
            return data.decode(encoding), ""
    encoding = latin(data) or guessed(data)
    return data.decode(encoding, "replace"), encoding


def latin(data: bytes) -> str:
    """Return the encoding in which all letters are those of one language, or ""."""
    for encoding, alphabets in ALPHABETS.items():
        text = data.decode(encoding, "replace").lower()
        beyond = set(re.sub(f"[\\0-\x7f{PUNCTUATION}]", "", text))
        if any(beyond <= set(letters) for letters in alphabets.split()):
            return encoding
    return ""


def guessed(data: bytes) -> str:
    sample = data if len(data) < SAMPLE else data[:SAMPLE].rpartition(b"\n")[0] or data
    if not (best := from_bytes(sample, cp_isolation=OTHERS).best()):
        raise Unreadable("its encoding is not known")
    text = str(best)
    hangul, ideographs = (len(re.findall(r, text)) for r in ("[가-힣]", "[\u4e00-\u9fff]"))
    chinese = best.encoding == "cp949" and 8 * ideographs > hangul  # at a second look
    return "gb18030" if chinese else best.encoding


def plain(text: str) -> Iterator[Block]:
    """Yield the paragraphs of a text without markup, under its title where it has one."""
    if title := FIRST_LINE.match(text):
        yield Block(title[1].rstrip(), 1)
        text = text[title.end() :]
    yield from map(Block, re.split(r"\n\s*\n", text))


def markdown(text: str) -> Iterator[Block]:
    if front := FRONT_MATTER.match(text):
        yield Block(front[2])
        text = text[front.end() :]
    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").disable("inline").parse(text)
    for token, inner in zip(tokens, [*tokens[1:], None], strict=True):
        if token.level or token.map is None or token.type == "hr":
            continue
        first, last = token.map
        source = "\n".join(lines[first:last])
        if token.type == "heading_open" and inner:
            yield Block(COMMENT.sub("", inner.content)[:TITLE].strip(), int(token.tag[1]))
        elif token.type == "table_open":
            yield Block("\n".join(lines[first + 2 : last]), 0, "\n".join(lines[first : first + 2]))
        elif token.type == "html_block":
            yield from page(source)
        else:
            yield Block(source if token.markup[:3] in FENCES else COMMENT.sub("", source))


def page(text: str) -> Iterator[Block]:
    """Yield what one reads of HTML; the title counts where there is no heading of level 1."""
    if text.count("<") > 3 * text.count("</") + UNCLOSED:
        raise Unreadable("is no page: too many of its tags are not closed")
    tree = LexborHTMLParser(text.translate(MARKS))
    title = tree.css_first("title")
    if title and not tree.css_first("h1"):
        yield Block(" ".join(title.text().split())[:TITLE], 1)
    marked(tree)
    for part in tree.text().split(BLOCK):
        lines = " ".join(part[1:].split()).replace(SPACE, " ").replace(LINE, "\n").strip("\n")
        head, _, rows = lines.partition("\n")
        if part[:1].isdigit():
            yield Block(lines[:TITLE], int(part[0]))
        else:
            yield Block(rows, 0, head) if part[:1] == HEAD else Block(lines)


def marked(tree: LexborHTMLParser) -> None:
    """Put marks into the tree, so that its text keeps what the tags say."""
    for node in tree.css(UNREAD):
        node.decompose()
    for node in tree.css("pre"):
        node.replace_with(f"{TEXT}{node.text().translate({10: LINE, 32: SPACE})}{TEXT}")
    for selector, mark in WITHIN.items():
        for node in tree.css(selector):
            node.insert_before(mark)
    for node in tree.css(BLOCKS):
        tag = node.tag or ""
        level = f"{BLOCK}{tag[1]}" if tag in HEADINGS.split(", ") else TEXT
        table = tag == "table" and node.css_first("tr:first-child th")
        node.insert_before(BLOCK + HEAD if table else level)
        node.insert_after(TEXT)


def pdf(data: bytes) -> Iterator[Block]:
    """Yield each page that holds text, under its number."""
    pages = PdfReader(io.BytesIO(data)).pages
    texts = [page.extract_text().encode(errors="replace").decode() for page in pages]
    if not any(map(str.strip, texts)):
        raise Unreadable("holds no text, or only pictures of it")
    for number, text in enumerate(texts, 1):
        if text.strip():
            yield Block(f"page {number}", 1)
            yield Block(text)
