"""Raw requests to Ollama and to the proxy: the answers are the same.

This is about what belongs to the way between the two: targets, methods, heads, framings. What a
body says is checked with recordings, in tests/test_recordings.py. A case is one request or a few in
a row, each on a connection of its own. Of an answer all counts but what each hop or each moment has
for itself; `OWN_HEADERS` and `OWN_VALUES` say what that is.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
from contextlib import suppress
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import pytest

AUTHORITY = "HOST:PORT"  # of the side that is asked
OWN_HEADERS = ["date", "x-request-id", "connection", "transfer-encoding"]
OWN_VALUES = re.compile(
    r'"(?:created|created_at|modified_at|expires_at|\w+_duration)":(?:"[^"]*"|\d+)|cmpl-\d+'
)

Answer = tuple[int, list[tuple[str, str]], str]


def req(line: str, body: Any = None, **headers: str | list[str] | None) -> str:
    """Return a request that closes its connection, as Latin-1.

    A header may have several values, or None to leave it out. A body of bytes is sent as it is.
    """
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields: dict[str, str | list[str] | None] = {"Host": AUTHORITY, "Connection": "close"}
    if body is not None and "Transfer_Encoding" not in headers:
        fields["Content-Length"] = str(len(data))
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [line if " HTTP/" in line else f"{line} HTTP/1.1"]
    for name, values in fields.items():
        lines += [f"{name}: {value}" for value in listed(values)]
    return "\r\n".join([*lines, "", data.decode("latin-1")])


def listed(values: str | list[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else values or []


def chat(body: Any = None, line: str = "POST /api/chat", **headers: Any) -> str:
    return req(line, CHAT if body is None else body, **headers)


def chunked(size: int, data: bytes, extension: bytes = b"", trailer: bytes = b"") -> str:
    """Return a chat whose body comes in chunks of a size."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    framed = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    body = b"".join([*framed, b"0\r\n", trailer, b"\r\n"])
    return chat(body, Transfer_Encoding="chunked")


TOKENS = {"temperature": 0, "seed": 7, "num_predict": 4}
HELLO = [{"role": "user", "content": "hello there, see /etc/hosts"}]
CHAT = {"model": "tiny", "messages": HELLO, "options": TOKENS}
PLAIN = json.dumps(CHAT).encode()
V1 = {"model": "tiny", "temperature": 0, "seed": 7, "max_tokens": 4}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": "tiny", "prompt": "/rag what did we decide?", "options": TOKENS},
    "/api/embed": {"model": "tiny-embed", "input": ["the sea", "a <b> & \xfcn\xefcode"]},
    "/api/embeddings": {"model": "tiny-embed", "prompt": "the sea"},
    "/api/show": {"model": "tiny-tools"},
    "/v1/chat/completions": {**V1, "messages": HELLO, "stream_options": {"include_usage": True}},
    "/v1/completions": {**V1, "prompt": "once"},
    "/v1/embeddings": {"model": "tiny-embed", "input": "the sea", "encoding_format": "base64"},
}
BODIES: dict[str, bytes] = {
    "none": b"",
    "spaces": b" \r\n\t ",
    "not JSON": b'{"model": tiny}',
    "more behind": PLAIN + b" and more",
    "UTF-16": PLAIN.decode().encode("utf-16"),
    "bytes that are no UTF-8": PLAIN.replace(b"hello", b"h\xff\xfello"),
    "a key twice": PLAIN.replace(b'"content"', b'"content":"/help","content"'),
    "a key in capitals": PLAIN.replace(b'"content"', b'"Content"'),
    "nested beyond Go": b'{"model":"tiny","x":' + b'{"a":' * 12000 + b"1" + b"}" * 12001,
    "long": PLAIN[:-1] + b',"x":"' + b"x" * 300_000 + b'"}',
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"]
METHODS += ["PROPFIND", "SEARCH", "FOO", "get"]
PATHS = ["/", "/api/chat", "/api/tags", "/api/blobs/x", "/v1/models", "/v1/chat/completions"]
PATHS += ["/nope"]
TARGETS = """
    /api/tags/ //api/tags /api//tags /./api/tags /api/./tags /api/../api/tags /../api/tags
    /api/tags/.. /api/chat/ /API/tags /api/t%61gs /api%2Ftags /v1/models/a%2Fb /v1/models/tiny%0A
    /a%0Ab /a%00b /a%zz /a% /a%25b /a%20b /%C3%A9 /%FF /api/tags%3Fx /api/version? /?
    /api/version?ts=1&&x=%20 /api/version?a=%zz;b /api/version?x=/../y /api/version??
    /api/version;x=1 /a"<b>{c}|d\\^` /a'b /* * //evil.example/api/tags ///
    http://HOST:PORT/api/version https://HOST:PORT/api/version
    http://HOST:PORT//api/tags http://localhost/api/version /http://HOST:PORT/api/version
    http://evil.example/api/tags http://evil.example/nope /v1/models/tiny /v1/models/nope /v1
    /\xc3\xa9 /api/version?a=\xc3\xa9 /api/version#x
""".split()
HOSTS = """
    localhost LOCALHOST localhost:1 127.0.0.1 127.9.9.9 [::1] [::1]:80 ::1 0.0.0.0 10.1.2.3 8.8.8.8
    evil.example foo.local foo.localhost foo.internal foo.local.evil.example localhost. :80 a/b
    [::ffff:127.0.0.1] [fe80::1] [fd00::1] 2001:db8::1 ::8888 :evil.example [::1 2130706433 127.1
    user@localhost
""".split()
ORIGINS = f"""
    http://localhost http://localhost:3000 https://127.0.0.1:8443 http://0.0.0.0 file:// file://x
    app://obsidian.md vscode-webview://abc chrome-extension://abc null * http://evil.example
    http://localhost.evil.example HTTP://LOCALHOST:3000 http://{AUTHORITY} https://{AUTHORITY}
    http://[::1]:3000
""".split()
MADE = {"model": "own-model"}

CASES: dict[str, str | list[str]] = {
    **{f"{path}, streamed {stream}": req(f"POST {path}", {**body, "stream": stream})
       for path, body in ENDPOINTS.items() for stream in (True, False)},
    **{f"{path}, no such model": req(f"POST {path}", {**body, "model": "nope"})
       for path, body in ENDPOINTS.items()},
    **{f"{path}, body: {name}": chat(body, f"POST {path}")
       for path in ("/api/chat", "/api/generate", *PATHS[4:]) for name, body in BODIES.items()},
    **{f"{method} {path}": req(f"{method} {path}") for method in METHODS for path in PATHS},
    **{f"GET {target}": req(f"GET {target}") for target in TARGETS},
    **{f"POST {target}": chat(line=f"POST {target}") for target in TARGETS[:6]},
    "running models": [req("POST /api/generate", {"model": "tiny"}), req("GET /api/ps")],
    "tools": chat({**CHAT, "model": "tiny-tools", "tools": [WEATHER]}),
    "tools for a model without": chat({**CHAT, "tools": [WEATHER]}),
    "unload, then load": [chat({"model": "tiny", "keep_alive": 0}), chat({"model": "tiny"})],
    "a model is made, used, deleted, and missing": [
        req("POST /api/create", {**MADE, "from": "tiny", "system": "be brief"}),
        chat({**CHAT, **MADE}),
        *[req("DELETE /api/delete", MADE)] * 2,
    ],
    "pull from nowhere": req("POST /api/pull", {"model": "http://127.0.0.1:1/x/y"}),
    "a blob of a wrong digest": req("POST /api/blobs/sha256:" + "0" * 64, b"something else"),
    # Heads
    "a header of 30 kB": req("GET /api/version", X_Long="x" * 30_000),
    "a target of 30 kB": req("GET /api/version?" + "x" * 30_000),
    "many headers": req("GET /api/version", **{f"X_{n}": str(n) for n in range(200)}),
    "one header often": req("GET /api/version", X_A=[str(n) for n in range(99)]),
    "two content types": chat(Content_Type=["text/plain", "application/json"]),
    "a type of nonsense": chat(Content_Type="no/such; ;charset"),
    "an empty header": req("GET /api/version", X_A=""),
    "Latin-1 in a header": req("GET /api/version", X_A="caf\xe9"),
    "a cookie and a key": req("GET /api/tags", Cookie="a=b", Authorization="Bearer x"),
    "a range and a condition": req("GET /api/tags", Range="bytes=0-3", If_None_Match="*"),
    "Copilot": req("POST /api/show", {"model": "tiny-tools"}, User_Agent="GitHubCopilotChat/1"),
    "accepting gzip": chat(Accept_Encoding="gzip, br"),
    "Connection lists a header": chat(
        Content_Type="application/json", Connection="close, X-A, content-type", X_A="1"
    ),
    "h2c offered": chat(Upgrade="h2c", Connection="Upgrade, HTTP2-Settings, close"),
    "a WebSocket offered": req("GET /api/tags", Upgrade="websocket", Connection="Upgrade, close"),
    "HTTP/1.0": req("GET /api/version HTTP/1.0"),
    "HTTP/1.0 without Host": req("GET /api/version HTTP/1.0", Host=None),
    "HTTP/1.0 and a stream": chat(line="POST /api/chat HTTP/1.0"),
    "HTTP/1.1 without Host": req("GET /api/version", Host=None),
    "two hosts": req("GET /api/version", Host=["localhost", "127.0.0.1"]),
    # Framings
    **{f"in chunks of {size}": chunked(size, PLAIN) for size in (1, 17, 9999)},
    "in chunks with an extension": chunked(20, PLAIN, extension=b";name=value"),
    "in chunks with a trailer": chunked(20, PLAIN, trailer=b"X-Sum: 1\r\n"),
    "in no chunk": chunked(1, b""),
    "no body and no length": req("POST /api/chat"),
    "a body with a GET": req("GET /api/version", CHAT),
    "a body with a HEAD": req("HEAD /", CHAT),
    "expecting 100": chat(Expect="100-continue"),
    "expecting 100 where nobody reads": req("GET /api/version", CHAT, Expect="100-continue"),
    "gzip": chat(gzip.compress(PLAIN, mtime=0), Content_Encoding="gzip"),
    "gzip that is none": chat(b"\x1f\x8bxx", Content_Encoding="gzip"),
    "an unknown encoding": chat(Content_Encoding="rot13"),
    # Hosts and origins
    **{f"{line} for Host {host!r}": req(line, Host=host)
       for line in ("GET /api/version", "GET /nope") for host in [*HOSTS, "", "a b"]},
    **{f"{line} for Origin {origin!r}": chat(line=line, Origin=origin)
       for line in ("GET /api/tags", "POST /api/chat") for origin in [*ORIGINS, ""]},
    **{f"pre-flight for {origin!r}": req(
        "OPTIONS /api/chat", Origin=origin, Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="content-type, x-stainless-os",
        Access_Control_Request_Private_Network="true")
       for origin in ORIGINS},
    "no pre-flight without a method": req("OPTIONS /api/chat", Origin="http://localhost"),
    "two origins": req("GET /api/tags", Origin=["http://localhost", "http://evil.example"]),
    "same origin by name": chat(Host="foo.local:8000", Origin="http://foo.local:8000"),
    "same name, other port": chat(Host="foo.local:8000", Origin="http://foo.local"),
    "OPTIONS for all": req("OPTIONS *"),
}  # fmt: skip


def ask(url: str, requests: str | list[str]) -> list[Answer]:
    return [exchange(url, request) for request in listed(requests)]


def exchange(url: str, request: str) -> Answer:
    """Send a raw request, and return what is not the side's own of the answer."""
    parts, method = urlsplit(url), request.partition(" ")[0]
    with socket.create_connection((parts.hostname, parts.port), 30) as connection:
        with suppress(OSError):  # refused before it was read; the answer says why
            connection.sendall(request.replace(AUTHORITY, parts.netloc).encode("latin-1"))
        answer = HTTPResponse(connection, method=method)
        answer.begin()
        text = answer.read().decode("utf-8", "backslashreplace")
    text = OWN_VALUES.sub("", text).replace(parts.netloc, AUTHORITY)
    own = OWN_HEADERS if method == "HEAD" else [*OWN_HEADERS, "content-length"]
    headers = [(k.lower(), v.replace(parts.netloc, AUTHORITY)) for k, v in answer.getheaders()]
    return answer.status, [pair for pair in headers if pair[0] not in own], text


@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_the_same(direct: str, proxied: str, case: str) -> None:
    assert ask(proxied, CASES[case]) == ask(direct, CASES[case])
