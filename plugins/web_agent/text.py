"""Text: what a person would read of a page, as lines, much like Markdown.

Lexbor (by selectolax) parses HTML as browsers do. Like theirs its time and memory grow with the
square of the length for pages made to hurt, so it gets no tags that it would open again in each
block, and not too many of the others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import charset_normalizer
from selectolax.lexbor import LexborHTMLParser

from .rules import FetchError

HTML = ("text/html", "application/xhtml+xml")
NOISE = "aside audio button canvas datalist dialog footer iframe math nav noframes noscript object"
NOISE += " script select style svg template textarea video"
# 34 kB of bold text cost 3 GB: https://html.spec.whatwg.org/#reconstruct-the-active-formatting-elements
FORMATTING = re.compile(
    r"</?(?:a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)(?=[\s/>])", re.IGNORECASE
)
MOST_TAGS = 20_000  # of a page; if it nests them all, Lexbor needs half a second
# The marks that stand for tags: a line's end, a space of <pre>, the end of a line's first sign (no
# line ends behind it), a cell's begin (no line ends before it), a row.
LINE, INDENT, FIRST, CELL, ROW = "\1\2\3\4\5"
BLOCKS = "address article blockquote br caption dd details div dl dt fieldset figcaption figure"
BLOCKS += " form header hr legend li main ol p pre section summary table tr ul h1 h2 h3 h4 h5 h6"
BEGINS = {"li": f"{LINE}- {FIRST}", "td": f"{CELL}| {FIRST}", "th": f"{CELL}| {FIRST}"}
BEGINS |= {"tr": ROW} | {f"h{level}": f"{LINE}{'#' * level} {FIRST}" for level in range(1, 7)}
SPACE = re.compile(r"\s+")
# Control characters, those that turn the direction of text, and those that no reader can see but a
# model reads (tags): a page could hide a text for the model in them.
UNSEEN = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)

# The labels of https://encoding.spec.whatwg.org/#names-and-labels by the codec that Python has for
# them, mostly one with more characters. Others (utf-7, punycode) are attacks, or cost time.
LABELS: dict[str, str] = json.loads(Path(__file__).with_name("labels.json").read_text("utf-8"))
CODECS = {label: codec for codec, labels in LABELS.items() for label in labels.split()}
# What is guessed, in two turns: where the second fits, the first may, too.
SCRIPTS = "cp1252 cp932 euc_jp gb18030 big5hkscs cp949 cp1251 koi8_r koi8_u cp1253 cp1254 cp1255"
GUESSES = {0.2: f"{SCRIPTS} cp1256 cp874".split(), 0.5: ["cp1250", "iso8859_2", "cp1257"]}
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
DECLARED = re.compile(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
MARKUP = re.compile(rb"<[^<>]*>")
ASCII = re.compile(rb"[\0-\x7f]+")
JIS = re.compile(rb"\x1b\$[@B]")  # here Japanese begins
HEAD = 1024  # bytes in which a page declares its charset
SAMPLE = 20_000  # bytes of which a charset is guessed


def read_text(body: bytes, kind: str, charset: str, most: int) -> tuple[str, str, bool]:
    """Return title and text of a page, up to `most` characters, and whether there is more of it.

    `kind` is its type without parameters, `charset` what its header says, or "". Raises FetchError.
    """
    text, title = UNSEEN.sub("", decode(body, kind, charset)), ""
    if kind in HTML:
        title, text = parts_of(text)
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
    return title, text[:most].rstrip(), len(text) > most


def parts_of(page: str) -> tuple[str, str]:
    """Return title and text of a page in HTML."""
    page = FORMATTING.sub(rf"\g<0>{LINE}", page)  # a tag of another name, that means nothing
    page = "<".join(page.split("<", MOST_TAGS)[:MOST_TAGS])
    tree = LexborHTMLParser(page)
    title = tree.css_first("head > title")
    tree.strip_tags(NOISE.split())
    for node in tree.css("pre:not(pre *)"):
        node.replace_with(f"{LINE}{node.text().translate({10: LINE, 32: INDENT})}{LINE}")
    for node in tree.css(", ".join(["td, th", *BLOCKS.split()])):
        node.insert_before(BEGINS.get(node.tag or "", LINE))
        if node.tag not in ("td", "th"):
            node.insert_after(ROW if node.tag == "li" else LINE)
    text = SPACE.sub(" ", tree.body.text() if tree.body else "")
    text = re.sub(rf"(?<![ {LINE}])[ {LINE}]*+{CELL}", " ", text)
    text = re.sub(rf"{FIRST}[ {LINE}]*", "", text)
    text = re.sub(rf" *[{LINE}{ROW}][ {LINE}{ROW}]*", "\n", text).replace(INDENT, " ")
    named = SPACE.sub(" ", UNSEEN.sub("", title.text() if title else ""))
    return named.strip()[:200], UNSEEN.sub("", text)


def decode(body: bytes, kind: str, charset: str) -> str:
    """Return the characters of a page. Raises FetchError where no charset fits.

    Its first bytes count most, then the header, then what HTML declares. A label that does not fit
    is not believed, nor Latin-1 (servers say it that were told nothing) where few letters are
    Latin, and no label counts against UTF-8 or ISO-2022-JP, which no other text looks like.
    """
    for bom, name in BOMS.items():
        if body.startswith(bom):
            return body.decode(name, "replace")
    found = DECLARED.search(body[:HEAD]) if kind in HTML else None
    declared = CODECS.get(found[1].decode("ascii", "replace").lower(), "") if found else ""
    if declared.startswith("utf-16"):  # it can be read byte by byte, so it is none
        declared = ""
    utf_8 = body.decode("utf-8", "replace")
    is_utf_8 = "\ufffd" not in utf_8 and len(body) - len(utf_8) > 2  # two: of another charset?
    sample = MARKUP.sub(b" ", body[: 10 * SAMPLE])[:SAMPLE]
    few_latin = len(ASCII.sub(b"", sample)) * 5 > len(sample)
    sure = ["utf-8"] if is_utf_8 else ["iso2022_jp"] if JIS.search(body) else []
    for name in filter(None, (*sure, CODECS.get(charset.lower()), declared, "utf-8")):
        if few_latin and name == "cp1252":
            continue
        text = body.decode(name, "replace")
        if text.count("\ufffd") * 100 <= len(text):
            return text
    return body.decode(guess(sample), "replace")


def guess(sample: bytes) -> str:
    """Return the charset that a text is most likely in. Raises FetchError."""
    for chaos, names in GUESSES.items():
        found = charset_normalizer.from_bytes(sample, cp_isolation=names, threshold=chaos).best()
        if found:
            return found.encoding
    raise FetchError("it is no text, or in a charset that it does not name")
