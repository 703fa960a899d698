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

# The lines between need not be YAML: nothing else stands between such lines and begins at once.
FRONT_MATTER = re.compile(r"(---|\+{3})[ \t]*\n(\S.*?\n)(?:\1|\.{3})[ \t]*(?:\n|\Z)", re.DOTALL)
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# CommonMark's blocks, and tables; lines, and what stands in them, are left as they were written.
MARKDOWN = MarkdownIt("zero", {"html": True, "breaks": True}).enable(
    "blockquote code fence heading hr html_block lheading list newline table".split()
)

UNREAD = "script, style, template, noscript, nav, svg, iframe, html:has(h1) title"  # of a page
HEADINGS = "h1, h2, h3, h4, h5, h6"
BLOCKS = (
    f"{HEADINGS}, address, article, aside, blockquote, body, dd, details, div, dl, dt, fieldset,"
    " figcaption, figure, footer, form, header, hr, main, ol, p, pre, section, summary, table,"
    " title, ul"
)
# Marks in the text of a page; other white space there is layout. Behind BLOCK stands what follows:
# the level of a heading, a table with a head, or a blank before other text.
BLOCK, LINE, HEAD, SPACE = "\x01\x02\x03\x04"
TEXT = BLOCK + " "
BEFORE = {BLOCKS: TEXT, "table:has(tr:first-child th)": BLOCK + HEAD, "title": f"{BLOCK}1"}
BEFORE |= {f"h{level}": f"{BLOCK}{level}" for level in range(1, 7)}
BEFORE |= {"br, tr": LINE, ":not(ol) > li": f"{LINE}- ", ":is(td, th) + :is(td, th)": " | "}
UNCLOSED = 20_000  # tags: the parser's time grows with the square of how many are open


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
    text = "\n".join(text.translate(dict.fromkeys(range(5))).splitlines())  # without marks
    if suffix == ".txt":
        return [Block(text)], guess
    return list(page(text) if suffix in (".html", ".htm") else markdown(text)), guess


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
    if not (best := from_bytes(data, cp_isolation=OTHERS).best()):
        raise Unreadable("its encoding is not known")
    hangul, ideographs = (len(re.findall(r, str(best))) for r in ("[가-힣]", "[\u4e00-\u9fff]"))
    chinese = best.encoding == "cp949" and 8 * ideographs > hangul  # at a second look
    return "gb18030" if chinese else best.encoding


def markdown(text: str) -> Iterator[Block]:
    if front := FRONT_MATTER.match(text):
        yield Block(front[2])
        text = text[front.end() :]
    yield from page(MARKDOWN.render(text).replace("<br />", LINE))


def page(text: str) -> Iterator[Block]:
    """Yield what one reads of HTML; the title counts where there is no heading of level 1."""
    if text.count("<") > 3 * text.count("</") + UNCLOSED:
        raise Unreadable("is no page: too many of its tags are not closed")
    tree = LexborHTMLParser(text)
    mark(tree)
    for part in tree.text().split(BLOCK):
        kind, line = part[:1], " ".join(part[1:].split())
        text = re.sub(f" ?{LINE} ?", "\n", line).replace(SPACE, " ").strip("\n")
        if kind.isdigit():
            yield Block(COMMENT.sub("", text)[:TITLE].strip(), int(kind))
        elif kind == HEAD:
            head, _, rows = text.partition("\n")
            yield Block(rows, 0, head)
        else:
            yield Block(text)


def mark(tree: LexborHTMLParser) -> None:
    """Put marks into the tree, so that its text keeps what the tags say."""
    for node in tree.css(UNREAD):
        node.decompose()
    for node in tree.css(f"li > p:first-child, :is(li, blockquote) :is({HEADINGS})"):
        node.unwrap()
    for node in tree.css("pre"):
        node.replace_with(f"{TEXT}{node.text().translate({10: LINE, 32: SPACE})}{TEXT}")
    for items in tree.css("ol"):
        for number, node in enumerate((it for it in items.iter() if it.tag == "li"), 1):
            node.insert_before(f"{LINE}{number}. ")
    for selector, sign in BEFORE.items():
        for node in tree.css(selector):
            node.insert_before(sign)
    for node in tree.css(BLOCKS):
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
