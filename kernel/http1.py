"""HTTP/1: requests as they are read, and heads of answers as they are written.

Requests are read as Go's net/http reads them, because Ollama is served by that.

Bytes in, values out, no I/O. llhttp is too strict here (it refuses a bare LF, a folded line, the
same length twice and unknown methods, all of which Go takes) and too lax (trailers become headers,
nothing has a limit), and it does not tell where a request ends. What is read here is forwarded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

Headers = list[tuple[bytes, bytes]]

HEAD_LIMIT = 2**20  # bytes, as in Go
LINES_LIMIT = 10_000  # of a head: a header costs some 200 bytes of memory, however short it is
NAME_LIMIT = 256  # bytes of a header's name: they are remembered
CHUNK_LINE_LIMIT = 4096  # bytes, as in Go
TRAILERS_LIMIT = 2**16  # bytes

STATUS = {code.value: b"%d %b" % (code, code.phrase.encode()) for code in HTTPStatus}
PLAIN = (b"content-type", b"text/plain; charset=utf-8")
VERSIONS = {b"HTTP/1.1": "1.1", b"HTTP/1.0": "1.0"}
TEXT = bytes({*range(0x20, 0x100), 0x09, 0x0A} - {0x7F})  # the bytes that a head may have
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HOST = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")  # httpguts.ValidHostHeader
ABSOLUTE = re.compile(rb"(?i)https?://([^/?#@\\]+)(/[^?]*)(\?.*)?")
END = re.compile(rb"\n\r?\n")  # of a head
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r\n")
TRAILER = re.compile(rb"[ \t]|" + TOKEN.pattern + rb":")
DECISIVE = frozenset((b"host", b"connection", b"content-length", b"transfer-encoding", b"expect"))
SCOPE = {"type": "http", "asgi": {"version": "3.0"}, "scheme": "http", "root_path": ""}


class Refused(Exception):
    """A request that cannot be served; the text is the answer's body, in net/http's words."""

    def __init__(self, status: int, why: str = "") -> None:
        super().__init__(f"{STATUS[status].decode()}{why}")
        self.status = status

    def answer(self) -> bytes:
        text = str(self).encode()
        length = (b"content-length", b"%d" % len(text))
        return answer_head(self.status, [PLAIN, length, (b"connection", b"close")]) + text


def answer_head(status: int, headers: Headers) -> bytes:
    """Return the head of an answer. Raises ValueError for a header that would be two."""
    lines = [b"HTTP/1.1 " + STATUS.get(status, b"%d " % status)]
    lines += [name + b": " + value for name, value in headers]
    head = b"\r\n".join([*lines, b"", b""])
    if not head.count(b"\n") == head.count(b"\r") == len(lines) + 1:
        raise ValueError("a header has a line break")
    return head


@dataclass(slots=True)
class Head:
    """The head of a request."""

    scope: dict[str, Any]  # as ASGI has it, but for the two addresses
    length: int | None  # of the body, in bytes; None: it comes in chunks
    keep_alive: bool
    expects_continue: bool


def head_end(data: bytearray, start: int) -> int:
    """Return where the head ends with which `data` begins, or -1; look for it from `start` on."""
    end = END.search(data, start)
    return end.end() if end else -1


def read_head(data: bytes) -> Head:
    """Return the head that `data` is. Raises Refused."""
    text = data.replace(b"\r\n", b"\n")
    if len(data) > HEAD_LIMIT or text.count(b"\n") > LINES_LIMIT:
        raise Refused(431)
    line, _, fields_text = text.partition(b"\n")
    if text.translate(None, TEXT):
        raise Refused(400)
    try:
        headers, fields = read_fields(fields_text)
    except Refused:  # perhaps there is a folded line
        headers, fields = read_fields(re.sub(rb"\n[ \t]+", b" ", fields_text))
    method, target, version = read_line(line)
    host = fields.get(b"host")
    if not target.startswith(b"/"):
        target, authority = read_absolute(target)
        if authority and host is not None:
            host = authority
            headers = [(b"host", host), *(pair for pair in headers if pair[0] != b"host")]
    if host is None and version == "1.1":
        raise Refused(400, ": missing required Host header")
    if host and not HOST.fullmatch(host):
        raise Refused(400, ": malformed Host header")
    length = read_length(fields, version)
    connection = fields.get(b"connection")
    options = connection.lower().replace(b" ", b"").split(b",") if connection else ()
    keep_alive = b"close" not in options and (version == "1.1" or b"keep-alive" in options)
    waits = fields.get(b"expect", b"").lower() == b"100-continue"
    raw_path, _, query = target.partition(b"?")
    path = unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path
    scope = {
        **SCOPE,
        "http_version": version,
        "method": method,
        "path": path.decode(errors="replace"),
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
    }
    return Head(scope, length, keep_alive, waits and version == "1.1" and length != 0)


def read_fields(text: bytes) -> tuple[Headers, dict[bytes, bytes]]:
    """Return all headers, with their names in lower case, and those that are DECISIVE."""
    headers: Headers = []
    fields: dict[bytes, bytes] = {}
    for line in text.split(b"\n")[:-2]:
        name, colon, value = line.partition(b":")
        pair = name, value = lower(name if colon else b""), value.strip(b" \t")
        headers.append(pair)
        if name in DECISIVE:
            if name == b"connection" and name in fields:
                value = fields[name] + b"," + value
            elif name in fields and (name != b"content-length" or fields[name] != value):
                raise Refused(501 if name == b"transfer-encoding" else 400)
            fields[name] = value
    return headers, fields


def read_line(line: bytes) -> tuple[str, bytes, str]:
    """Return method, target and version."""
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[1] or b"\t" in line or parts[2] not in VERSIONS:
        raise Refused(400)
    lower(parts[0])  # a token, too
    return parts[0].decode(), parts[1], VERSIONS[parts[2]]


def read_absolute(target: bytes) -> tuple[bytes, bytes]:
    """Return path with query, and authority, which overrides Host (RFC 9112, section 3.2.2).

    Go takes any scheme, and for `x:/api/chat` serves that path; no client needs it.
    """
    if target == b"*":
        return target, b""
    url = ABSOLUTE.fullmatch(target)
    if not url:
        raise Refused(400)
    return url[2] + (url[3] or b""), url[1]


@lru_cache(1000)
def lower(token: bytes) -> bytes:
    """Return the name of a header in lower case. Raises Refused where it is no name."""
    if not TOKEN.fullmatch(token):
        raise Refused(400)
    if len(token) > NAME_LIMIT:
        raise Refused(431)
    return token.lower()


def read_length(fields: dict[bytes, bytes], version: str) -> int | None:
    """Return the length of the body, None if it comes in chunks. Raises Refused.

    Go lets chunks win over a length, and ignores them in HTTP/1.0. Others read both otherwise, so
    here they are refused (RFC 9112, section 6.1).
    """
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if length is not None or version == "1.0":
            raise Refused(400)
        if coding.lower() != b"chunked":
            raise Refused(501)
        return None
    if length is None:
        return 0
    if not length.isdigit() or len(length.lstrip(b"0")) > 18:
        raise Refused(400)
    return int(length.lstrip(b"0") or b"0")


class Body:
    """Takes the body of one request out of the bytes of its connection."""

    def __init__(self, length: int | None) -> None:
        self.done = length == 0
        self.size = 0  # bytes that have come
        self.left = length or 0  # bytes to come of the body, or of this chunk
        self._chunked = length is None
        self._chunk_ends = False  # the line break behind a chunk is to come
        self._trailers = 0  # bytes of trailers so far, once the last chunk has come

    def feed(self, data: bytearray) -> bytes:
        """Return what `data` holds of the body, and cut it off there. Raises Refused.

        An unfinished line stays in `data`, and what follows the body once that is `done`.
        """
        parts = []
        while data and not self.done:
            if self.left:
                parts.append(bytes(data[: self.left]))
                del data[: self.left]
                self.left -= len(parts[-1])
                self.size += len(parts[-1])
                self._chunk_ends = self._chunked
                self.done = not (self.left or self._chunked)
                continue
            end = data.find(b"\n", 0, CHUNK_LINE_LIMIT) + 1
            if not end:
                if len(data) >= CHUNK_LINE_LIMIT:
                    raise Refused(400)
                break
            self._take_line(bytes(data[:end]))
            del data[:end]
        return b"".join(parts)

    def _take_line(self, line: bytes) -> None:
        """Take the line break behind a chunk, the line before one, or a trailer (and drop it)."""
        if self._chunk_ends:
            self._chunk_ends = False
            right = line == b"\r\n"
        elif self._trailers:
            self._trailers += len(line)
            self.done = line in (b"\r\n", b"\n")
            right = self._trailers < TRAILERS_LIMIT and bool(self.done or TRAILER.match(line))
        else:
            size = CHUNK.fullmatch(line)
            right = size is not None
            self.left = int(size[1], 16) if size else 0
            self._trailers = 0 if self.left else 1
        if not right:
            raise Refused(400)
