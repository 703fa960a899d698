"""HTTP/1: requests as they are read, and heads of answers as they are written.

Requests are read as Go's net/http reads them, because Ollama is served by that.

Bytes in, values out, no I/O. llhttp is too strict here (it refuses a bare LF, a folded line, the
same length twice and unknown methods, all of which Go takes) and too lax (trailers become headers,
nothing has a limit), and it does not tell where a request ends. What is read here is forwarded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

Headers = list[tuple[bytes, bytes]]

HEAD_LIMIT = 2**20  # bytes, as in Go
LINES_LIMIT = 10_000  # of a head: a header costs some 200 bytes of memory, however short it is
CHUNK_LINE_LIMIT = 4096  # bytes, also of all trailers together, as in Go

STATUS = {code.value: b"%d %b" % (code, code.phrase.encode()) for code in HTTPStatus}
TEXT = bytes({*range(0x20, 0x100), 0x09, 0x0A} - {0x7F})  # the bytes that a head may have
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
LINE = re.compile(rb"(" + TOKEN.pattern + rb") (\S+) HTTP/(1\.[01])")
HOST = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")  # httpguts.ValidHostHeader
ABSOLUTE = re.compile(rb"(?i:https?)://(" + HOST.pattern[:-1] + rb"+)(/.*)")
FIELD = re.compile(rb"(?m)^(" + TOKEN.pattern + rb"):(.*)$")
END = re.compile(rb"\n\r?\n")  # of a head
FOLD = re.compile(rb"\n[ \t]+")
# The lines between the pieces of a chunked body: before a chunk, behind one, behind the last one
SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r\n")
BREAK = re.compile(rb"\r\n")
TRAILER = re.compile(rb"(?:(?:[ \t]|" + TOKEN.pattern + rb":).*)?\r?\n")
DECISIVE = frozenset((b"host", b"connection", b"content-length", b"transfer-encoding", b"expect"))
SCOPE = {"type": "http", "asgi": {"version": "3.0"}, "scheme": "http", "root_path": ""}


@dataclass
class Refused(Exception):
    """A request that cannot be served."""

    status: int
    why: bytes = b""  # in net/http's words

    def answer(self) -> bytes:
        text = STATUS[self.status] + self.why
        kind = (b"content-type", b"text/plain; charset=utf-8")
        length = (b"content-length", b"%d" % len(text))
        return answer_head(self.status, [kind, length, (b"connection", b"close")]) + text


def answer_head(status: int, headers: Headers) -> bytes:
    """Return the head of an answer. Raises ValueError for a header that would be two."""
    lines = [b"HTTP/1.1 " + STATUS.get(status, b"%d " % status)]
    lines += [name + b": " + value for name, value in headers]
    head = b"\r\n".join([*lines, b"", b""])
    if not head.count(b"\n") == head.count(b"\r") == len(lines) + 1:
        raise ValueError("a header has a line break")
    return head


@dataclass(slots=True)
class Request:
    """A request whose head has come."""

    scope: dict[str, Any]  # as ASGI has it
    body: Body
    keep_alive: bool
    awaits_continue: bool


def read_head(data: bytes, client: object) -> Request:
    """Return the request that begins with the head `data`. Raises Refused."""
    text = data.replace(b"\r\n", b"\n")
    if len(data) > HEAD_LIMIT or text.count(b"\n") > LINES_LIMIT:
        raise Refused(431)
    first, _, rest = text.partition(b"\n")
    line = LINE.fullmatch(first)
    if not line or text.translate(None, TEXT):
        raise Refused(400)
    method, target, version = line[1].decode(), line[2], line[3].decode()
    headers = read_fields(FOLD.sub(b" ", rest))
    fields = decisive(headers)
    host = fields.get(b"host")
    if host is None and version == "1.1":
        raise Refused(400, b": missing required Host header")
    if host and not HOST.fullmatch(host):
        raise Refused(400, b"" if b"\n" in host else b": malformed Host header")
    if not target.startswith(b"/") and target != b"*":
        # Go takes any scheme, and for `x:/api/chat` serves that path; no client needs it.
        url = ABSOLUTE.fullmatch(target)
        if not url:
            raise Refused(400)
        host, target = url.groups()  # it overrides Host (RFC 9112, section 3.2.2)
        headers = [(b"host", host), *(pair for pair in headers if pair[0] != b"host")]
    connection = fields.get(b"connection", b"").lower()
    keep_alive = b"close" not in connection and (version == "1.1" or b"keep-alive" in connection)
    waits = version == "1.1" and fields.get(b"expect", b"").lower() == b"100-continue"
    body = Body(read_length(fields, version))
    raw_path, _, query = target.partition(b"?")
    scope = {
        **SCOPE,
        "http_version": version,
        "method": method,
        "path": unquote_to_bytes(raw_path).decode(errors="replace"),
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
        "client": client,
    }
    return Request(scope, body, keep_alive, waits and not body.done)


def read_fields(lines: bytes) -> Headers:
    """Return the headers in `lines`, with their names in lower case. Raises Refused."""
    found = FIELD.findall(lines)
    if len(found) != lines.count(b"\n") - 1:  # the last line is empty, one of the others is wrong
        raise Refused(400)
    return [(name.lower(), value.strip(b" \t")) for name, value in found]


def decisive(headers: Headers) -> dict[bytes, bytes]:
    """Return the headers on which the framing depends; values that contradict are two lines."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in DECISIVE:
            if name in fields and (name != b"content-length" or fields[name] != value):
                value = fields[name] + b"\n" + value
            fields[name] = value
    return fields


def read_length(fields: dict[bytes, bytes], version: str) -> int | None:
    """Return the length of the body, None if it comes in chunks. Raises Refused.

    Go lets chunks win over a length, and ignores them in HTTP/1.0. Others read both otherwise, so
    here they are refused (RFC 9112, section 6.1).
    """
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    if coding is None:
        if not length.isdigit() or len(length) > 18:
            raise Refused(400)
        return int(length)
    if b"content-length" in fields or version == "1.0":
        raise Refused(400)
    if coding.lower() != b"chunked":
        raise Refused(501)
    return None


class Body:
    """Takes the body of one request out of the bytes of its connection."""

    def __init__(self, length: int | None) -> None:
        self.done = length == 0
        self.data = bytearray()  # what has come and was not taken yet
        self._left = length or 0  # bytes to come of the body, or of this chunk
        self._chunked = length is None
        self._next = SIZE  # the line that comes next, where it is chunked
        self._trailers = 0  # bytes

    def feed(self, source: bytearray) -> None:
        """Cut off what `source` holds of the body, but for an unfinished line. Raises Refused."""
        while source and not self.done:
            if self._left:
                piece = source[: self._left]
                del source[: self._left]
                self.data += piece
                self._left -= len(piece)
                self.done = not (self._left or self._chunked)
            elif end := source.find(b"\n", 0, CHUNK_LINE_LIMIT) + 1:
                self._take_line(bytes(source[:end]))
                del source[:end]
            elif len(source) < CHUNK_LINE_LIMIT:
                break
            else:
                raise Refused(400)

    def _take_line(self, line: bytes) -> None:
        match = self._next.fullmatch(line)
        if not match or self._trailers > CHUNK_LINE_LIMIT:
            raise Refused(400)
        if self._next is SIZE:
            self._left = int(match[1], 16)
            self._next = BREAK if self._left else TRAILER
        elif self._next is BREAK:
            self._next = SIZE
        else:
            self._trailers += len(line)
            self.done = line in (b"\r\n", b"\n")
