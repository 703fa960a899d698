"""Reader: turns the bytes of a file into sections, each with the headings that it stands under.

Markdown, plain text and HTML are read by ourselves. PDF needs `pypdf`, which is no part of the
proxy: where it cannot be imported such files are left out, and the reason says so.
"""

from __future__ import annotations

import html
import importlib
import io
import re
from collections.abc import Iterator

from .chunks import Section, markdown, plain

SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".pdf")
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})  # bytes that a text does not hold

# A tag of HTML, or what nobody reads as a whole. Each alternative matches or fails within a
# bounded distance, or goes on to the end: a broken page costs no more time than a good one.
TAG = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style|template|nav)\b.*?(?:</\1\s*>|\Z)"
    r"""|</?([a-z][a-z0-9]*)(?:[^<>"']|"[^"]{0,2000}+"|'[^']{0,2000}+')*+>|<[!?][^<>]*+>""",
    re.IGNORECASE | re.DOTALL,
)
TITLE = re.compile(r"<title[^<]*</title\s*>", re.IGNORECASE)
# What stands in Markdown where such a tag begins; where it ends stands a blank line.
BLOCKS = dict.fromkeys(
    "address article aside blockquote dd details div dl dt fieldset figcaption figure footer form"
    " header hr main ol p pre section summary table ul".split(),
    "\n\n",
)
BLOCKS |= {f"h{level}": f"\n\n{'#' * level} " for level in range(1, 7)} | {"title": "\n\n# "}
WITHIN = {"br": "\n", "tr": "\n", "li": "\n- ", "td": " ", "th": " "}  # these end with nothing


class Unreadable(Exception):
    """A file that is left out; the text is the reason."""


def sections(data: bytes, suffix: str) -> list[Section]:
    """Return the sections of a file. Raises Unreadable, and whatever a foreign parser raises."""
    if suffix == ".pdf":
        return list(pdf(data))
    text = decoded(data)
    if suffix in (".html", ".htm"):
        text = page(text)
    return list(plain(text) if suffix == ".txt" else markdown(text))


def decoded(data: bytes) -> str:
    """Return the text of bytes in UTF-8, in marked UTF-16, or else in Windows' old encoding."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    elif len(data) - len(data.translate(None, CONTROLS)) > len(data) / 100:
        raise Unreadable("is not text")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252", "replace")
    return text.replace("\r\n", "\n").replace("\0", "")


def page(text: str) -> str:
    """Return a page of HTML as Markdown; its title counts where it has no heading of its own."""
    if "<h1" in text.lower():
        text = TITLE.sub("", text)
    return html.unescape(TAG.sub(mark, " ".join(text.split())))


def mark(tag: re.Match[str]) -> str:
    name = (tag[2] or "").lower()
    if tag[0].startswith("</"):
        return "\n\n" if name in BLOCKS else ""
    return BLOCKS.get(name) or WITHIN.get(name, "")


def pdf(data: bytes) -> Iterator[Section]:
    """Yield each page that holds text."""
    try:
        pypdf = importlib.import_module("pypdf")
    except ImportError:
        raise Unreadable("pypdf is not installed") from None
    pages = pypdf.PdfReader(io.BytesIO(data)).pages
    texts = [page.extract_text().encode(errors="replace").decode() for page in pages]
    if not any(map(str.strip, texts)):
        raise Unreadable("holds no text, or only pictures of it")
    for number, text in enumerate(texts, 1):
        if text.strip():
            yield f"page {number}", text
