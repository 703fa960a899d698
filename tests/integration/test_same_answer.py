"""What no client library would send: raw requests to Ollama and to the proxy, and answers compared.

A case is one request or a few in a row, each on a connection of its own. What belongs to a side
(its authority, the name of a model that it makes, the digest of what it uploads) stands as a
placeholder in the request and is put back into the answer. Of an answer all counts but what each
hop or each moment has for itself; `OWN_HEADERS` and `OWN_VALUES` say what that is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

PATIENCE = 30.0  # seconds
AUTHORITY = "HOST:PORT"  # of the side that is asked
NAME = "OWN-MODEL"  # a model that only this side has
DIGEST = "sha256:OF-THE-BODY"

OWN_HEADERS = re.compile(
    "date|content-length|x-request-id|x-osp-.*"
    "|connection|keep-alive|te|trailer|transfer-encoding|upgrade"  # hop-by-hop
)
OWN_VALUES = re.compile(
    r'"(created_at|modified_at|expires_at|created|\w+_duration|id)":("[^"]*"|\d+)'
)

TOKENS = {"temperature": 0, "seed": 7, "num_predict": 4}
HELLO = [{"role": "user", "content": "hello there"}]
CHAT = {"model": "tiny", "messages": HELLO, "options": TOKENS}
GENERATE = {"model": "tiny", "prompt": "once", "options": TOKENS}
V1_CHAT = {"model": "tiny", "messages": HELLO, "temperature": 0, "seed": 7, "max_tokens": 4}
V1_TEXT = {"model": "tiny", "prompt": "once", "temperature": 0, "seed": 7, "max_tokens": 4}
CLAUDE = {"model": "tiny", "max_tokens": 4, "messages": HELLO}
RESPONSES = {"model": "tiny", "input": "hello", "max_output_tokens": 4, "temperature": 0}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
NOWHERE = "127.0.0.1:1"  # nobody listens there
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"


@dataclass(frozen=True, slots=True)
class Request:
    head: str
    body: bytes

    def bytes_for(self, url: str, name: str) -> bytes:
        body = self.body.replace(NAME.encode(), name.encode())
        head = self.head.replace(AUTHORITY, urlsplit(url).netloc).replace(NAME, name)
        head = head.replace(DIGEST, f"sha256:{hashlib.sha256(body).hexdigest()}")
        return head.replace("BODY-LENGTH", str(len(body))).encode("latin-1") + body


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: str


def req(
    method: str,
    target: str,
    body: Any = None,
    *,
    version: str = "1.1",
    raw: str = "",
    **headers: str | list[str] | None,
) -> Request:
    """Return a request that closes its connection; `body` is JSON if it is neither bytes nor None.

    `Content_Type="x"` is a header; a list gives several of the name, None leaves out one that
    would be there. `raw` is more of the head as it stands.
    """
    data = body if isinstance(body, bytes) else b"" if body is None else encode(body)
    fields: dict[str, str | list[str] | None] = {"Host": AUTHORITY, "Connection": "close"}
    if body is not None and "Transfer_Encoding" not in headers:
        fields["Content-Length"] = "BODY-LENGTH"
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, values in fields.items() for value in listed(values)]
    return Request(f"{method} {target} HTTP/{version}\r\n{''.join(lines)}{raw}\r\n", data)


def listed(values: str | list[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else values or []


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def post(path: str, body: Any = None, **headers: Any) -> Request:
    return req("POST", path, body, **headers)


def chat(**fields: Any) -> Request:
    return post("/api/chat", CHAT | fields)


def message(**fields: Any) -> Request:
    return chat(messages=[HELLO[0] | fields])


def generate(**fields: Any) -> Request:
    return post("/api/generate", GENERATE | fields)


def v1(**fields: Any) -> Request:
    return post("/v1/chat/completions", V1_CHAT | fields)


def options(target: str = "/api/chat", **headers: Any) -> Request:
    return req("OPTIONS", target, **headers)


def preflight(origin: str, **headers: Any) -> Request:
    return options(Origin=origin, Access_Control_Request_Method="POST", **headers)


def chunked(sizes: Sequence[int], data: bytes, extension: bytes = b"", end: bytes = b"") -> Request:
    """Return a chat whose body comes in chunks of these sizes, over and over."""
    return post(
        "/api/chat", b"".join(chunks(sizes, data, extension, end)), Transfer_Encoding="chunked"
    )


def chunks(sizes: Sequence[int], data: bytes, extension: bytes, end: bytes) -> Iterator[bytes]:
    number = 0
    while data:
        piece, data = data[: (size := sizes[number % len(sizes)])], data[size:]
        yield b"%x%b\r\n%b\r\n" % (len(piece), extension, piece)
        number += 1
    yield b"0\r\n%b\r\n" % end


PLAIN = encode(CHAT | {"max_tokens": 4})  # short as a /v1 chat, too
# What may stand where a chat should.
BODIES: dict[str, bytes] = {
    "empty": b"",
    "spaces": b" \r\n\t ",
    "null": b"null",
    "true": b"true",
    "list": b"[]",
    "list of a chat": b"[" + PLAIN + b"]",
    "string": b'"tiny"',
    "number": b"17",
    "empty object": b"{}",
    "truncated": PLAIN[:-9],
    "truncated in a string": PLAIN[:20],
    "garbage": b"<html>",
    "garbage behind": PLAIN + b" and more",
    "a second object behind": PLAIN + b"\n" + PLAIN,
    "comma behind": PLAIN[:-1] + b",}",
    "single quotes": PLAIN.replace(b'"', b"'"),
    "BOM": b"\xef\xbb\xbf" + PLAIN,
    "UTF-16": PLAIN.decode().encode("utf-16"),
    "UTF-32": PLAIN.decode().encode("utf-32"),
    "bad UTF-8": PLAIN.replace(b"hello", b"h\xff\xfello"),
    "UTF-8 of a surrogate": PLAIN.replace(b"hello", b"h\xed\xa0\x80llo"),
    "lone surrogate": PLAIN.replace(b"hello", b"h\\ud800llo"),
    "bad escape": PLAIN.replace(b"hello", b"h\\qllo"),
    "control character": PLAIN.replace(b"hello", b"h\x01llo"),
    "NUL": PLAIN.replace(b"hello", b"h\x00llo"),
    "NaN": PLAIN.replace(b'"temperature":0', b'"temperature":NaN'),
    "Infinity": PLAIN.replace(b'"temperature":0', b'"temperature":Infinity'),
    "1e999": PLAIN.replace(b'"temperature":0', b'"temperature":1e999'),
    "leading zero": PLAIN.replace(b'"temperature":0', b'"temperature":00'),
    "huge integer": PLAIN.replace(b'"seed":7', b'"seed":' + b"9" * 5000),
    "model twice": b'{"model":"nope",' + PLAIN[1:],
    "messages twice": PLAIN[:-1] + b',"messages":[]}',
    "content twice": PLAIN.replace(b'"content"', b'"content":"/help","content"'),
    "MODEL": PLAIN.replace(b'"model"', b'"MODEL"'),
    "Messages": PLAIN.replace(b'"messages"', b'"Messages"'),
    "messages with a long s": PLAIN.replace(b'"messages"', '"me\u017fsages"'.encode()),
    "Content": PLAIN.replace(b'"content"', b'"Content"'),
    "ROLE": PLAIN.replace(b'"role"', b'"ROLE"'),
    "model escaped": PLAIN.replace(b'"model"', b'"\\u006dodel"'),
    "form": b"model=tiny&stream=false",
    "nested": b'{"model":"tiny","messages":' + b"[" * 3000 + b"]" * 3000 + b"}",
    "nested beyond Go": b'{"model":"tiny","x":' + b'{"a":' * 12000 + b"1" + b"}" * 12001,
    "unknown and nested": PLAIN[:-1] + b',"x":' + b"[" * 3000 + b"]" * 3000 + b"}",
    "long": PLAIN[:-1] + b',"x":"' + b"x" * 300_000 + b'"}',
}

WRONG: dict[str, Any] = {
    "model": 1,
    "messages": "hello",
    "stream": "yes",
    "options": [],
    "keep_alive": "forever",
    "format": "xml",
    "tools": {},
    "think": "deeply",
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"]
METHODS += ["PROPFIND", "SEARCH", "PURGE"]
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
""".split()
HOSTS = [
    *("localhost", "LOCALHOST", "localhost:1", "127.0.0.1", "127.0.0.1:1", "127.9.9.9", "[::1]"),
    *(
        "[::1]:80",
        "::1",
        "0.0.0.0",
        "10.1.2.3",
        "192.168.0.9",
        "8.8.8.8",
        "evil.example",
        "foo.local",
    ),
    *(
        "foo.localhost",
        "foo.internal",
        "foo.local.evil.example",
        "localhost.",
        ":80",
        "",
        "a b",
        "a/b",
    ),
    *(
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "[fd00::1]",
        "2001:db8::1",
        "::8888",
        ":evil.example",
        "[::1",
        "2130706433",
        "127.1",
        "user@localhost",
    ),
]
ORIGINS = [
    *("http://localhost", "http://localhost:3000", "https://127.0.0.1:8443", "http://0.0.0.0"),
    *("app://obsidian.md", "file://", "file://x", "vscode-webview://abc", "null", "", "*"),
    *("http://evil.example", "http://localhost.evil.example", "HTTP://LOCALHOST:3000"),
    *("chrome-extension://abc", f"http://{AUTHORITY}", f"https://{AUTHORITY}", "http://[::1]:3000"),
]
V1_INPUTS: dict[str, dict[str, Any]] = {
    "base64": {"input": "the sea", "encoding_format": "base64"},
    "an unknown format": {"input": "the sea", "encoding_format": "hex"},
    "nothing": {},
    "empty": {"input": ""},
    "numbers": {"input": [1, 2]},
    "an object": {"input": {}},
    "dimensions": {"input": "the sea", "dimensions": 8},
}


def both_ways(**fields: Any) -> list[Request]:
    """Load or unload by a chat and by a generate."""
    return [post("/api/chat", fields), post("/api/generate", fields)]


def model_of_its_own(*requests: Request, **fields: Any) -> list[Request]:
    """Make a model, ask, and delete it twice: the second time it is missing."""
    made = post("/api/create", {"model": NAME, "from": "tiny", **fields})
    return [made, *requests, *[req("DELETE", "/api/delete", {"model": NAME})] * 2]


CASES: dict[str, Request | list[Request]] = {
    # Bodies
    **{f"chat body: {name}": post("/api/chat", body) for name, body in BODIES.items()},
    **{f"v1 body: {name}": post("/v1/chat/completions", body) for name, body in BODIES.items()},
    **{f"generate body: {k}": post("/api/generate", BODIES[k]) for k in list(BODIES)[:14]},
    **{f"embed body: {k}": post("/api/embed", BODIES[k]) for k in list(BODIES)[:14]},
    **{f"chat, wrong {key}": chat(**{key: value}) for key, value in WRONG.items()},
    **{f"chat, null {key}": chat(**{key: None}) for key in WRONG},
    **{f"generate, wrong {key}": generate(**{key: value}) for key, value in WRONG.items()},
    **{f"v1, wrong {key}": v1(**{key: value}) for key, value in WRONG.items()},
    "no body and no length": post("/api/chat"),
    "a body with a GET": req("GET", "/api/version", CHAT),
    "a body with a HEAD": req("HEAD", "/", CHAT),
    "a form's type": post("/api/chat", CHAT, Content_Type="application/x-www-form-urlencoded"),
    "a type of nonsense": post("/api/chat", CHAT, Content_Type="no/such; ;charset"),
    # Messages
    "content a number": message(content=1),
    "content null": message(content=None),
    "content an object": message(content={"text": "x"}),
    "content of parts": message(content=[{"type": "text", "text": "x"}]),
    "content empty": message(content=""),
    "role a number": message(role=1),
    "role null": message(role=None),
    "role unknown": message(role="wizard"),
    "role in capitals": message(role="USER"),
    "a message that is a string": chat(messages=["hello"]),
    "a message that is null": chat(messages=[None]),
    "images bad": message(images=["not base64"]),
    "images of a URL": message(images=["data:image/png;base64," + PIXEL]),
    "images for a model without eyes": message(images=[PIXEL]),
    "images a string": message(images=PIXEL),
    "tool calls with a string": message(
        tool_calls=[{"function": {"name": "f", "arguments": '{"a":1}'}}]
    ),
    "fields unknown": message(x={"y": [1, 2.50, 1e3, None]}),
    "text with separators": message(content="a\u2028b\u2029c\u0085d \U0001f600 <&>"),
    "a path as text": message(content="/etc/passwd is a file"),
    # Paths, methods and targets
    **{f"{method} {path}": req(method, path) for method in METHODS for path in PATHS},
    **{f"GET {target}": req("GET", target.encode().decode("latin-1")) for target in TARGETS},
    **{f"POST {target}": post(target, CHAT) for target in TARGETS[:6]},
    "HEAD of a redirect": req("HEAD", "//api/tags"),
    # Heads
    "a header of 30 kB": req("GET", "/api/version", X_Long="x" * 30_000),
    "a target of 30 kB": req("GET", "/api/version?" + "x" * 30_000),
    "many headers": req("GET", "/api/version", **{f"X_{n}": str(n) for n in range(200)}),
    "one header often": req("GET", "/api/version", X_A=[str(n) for n in range(99)]),
    "two content types": post("/api/chat", CHAT, Content_Type=["text/plain", "application/json"]),
    "an empty header": req("GET", "/api/version", X_A=""),
    "Latin-1 in a header": req("GET", "/api/version", X_A="caf\xe9"),
    "a cookie and a key": req("GET", "/api/tags", Cookie="a=b", Authorization="Bearer x"),
    "a range": req("GET", "/api/tags", Range="bytes=0-3"),
    "a condition": req("GET", "/api/tags", If_None_Match="*"),
    "accepting gzip": post("/api/chat", CHAT, Accept_Encoding="gzip, br"),
    "accepting nothing": req("GET", "/api/tags", Accept_Encoding="identity;q=0, *;q=0"),
    "Connection lists a header": req("GET", "/api/tags", Connection="close, X-A", X_A="1"),
    "Connection lists the type": post(
        "/api/chat", CHAT, Content_Type="application/json", Connection="close, content-type"
    ),
    "h2c offered": post(
        "/api/chat",
        CHAT,
        Upgrade="h2c",
        Connection="Upgrade, HTTP2-Settings, close",
        HTTP2_Settings="AAMAAABk",
    ),
    "h2c offered without a body": req(
        "GET", "/api/tags", Upgrade="h2c", Connection="Upgrade, HTTP2-Settings, close"
    ),
    "a WebSocket offered": req(
        "GET",
        "/api/tags",
        Upgrade="websocket",
        Connection="Upgrade, close",
        Sec_WebSocket_Key="AQIDBAUGBwgJCgsMDQ4PEA==",
        Sec_WebSocket_Version="13",
    ),
    "HTTP/1.0": req("GET", "/api/version", version="1.0"),
    "HTTP/1.0 without Host": req("GET", "/api/version", version="1.0", Host=None),
    "HTTP/1.0 and a stream": post("/api/chat", CHAT, version="1.0"),
    "HTTP/1.1 without Host": req("GET", "/api/version", Host=None),
    "two hosts": req("GET", "/api/version", Host=["localhost", "127.0.0.1"]),
    "two hosts, the same": req("GET", "/api/version", Host=["localhost", "localhost"]),
    # Framings
    "in one chunk": chunked([9999], PLAIN),
    "in chunks of one byte": chunked([1], PLAIN),
    "in chunks of odd sizes": chunked([1, 17, 3], PLAIN),
    "in chunks with an extension": chunked([20], PLAIN, extension=b";name=value"),
    "in chunks with a trailer": chunked([20], PLAIN, end=b"X-Sum: 1\r\n"),
    "in no chunk": chunked([1], b""),
    "chunks with a garbage body": chunked([5], BODIES["garbage behind"]),
    "chunks for a GET": req("GET", "/api/version", b"0\r\n\r\n", Transfer_Encoding="chunked"),
    "Chunked in capitals": post(
        "/api/chat", b"%X\r\n%b\r\n0\r\n\r\n" % (len(PLAIN), PLAIN), Transfer_Encoding="Chunked"
    ),
    "expecting 100": post("/api/chat", CHAT, Expect="100-continue"),
    "expecting 100 where nobody reads": req("GET", "/api/version", CHAT, Expect="100-continue"),
    "gzip": post("/api/chat", gzip.compress(PLAIN, mtime=0), Content_Encoding="gzip"),
    "gzip for v1": post(
        "/v1/chat/completions", gzip.compress(PLAIN, mtime=0), Content_Encoding="gzip"
    ),
    "gzip that is none": post("/api/chat", b"\x1f\x8bxx", Content_Encoding="gzip"),
    "gzip that is plain": post("/api/chat", CHAT, Content_Encoding="gzip"),
    "zstd that is none": post("/v1/responses", b"\x28\xb5\x2f\xfdxx", Content_Encoding="zstd"),
    "zstd that is plain": post("/v1/chat/completions", V1_CHAT, Content_Encoding="zstd"),
    "an unknown encoding": post("/api/chat", CHAT, Content_Encoding="rot13"),
    # Hosts and origins
    **{f"Host {host!r}": req("GET", "/api/version", Host=host) for host in HOSTS},
    **{f"POST for Host {host!r}": post("/api/chat", CHAT, Host=host) for host in HOSTS[:9]},
    **{f"no path for Host {host!r}": req("GET", "/nope", Host=host) for host in HOSTS[:9]},
    **{f"Origin {o!r}": req("GET", "/api/tags", Origin=o) for o in ORIGINS},
    **{f"POST for Origin {o!r}": post("/api/chat", CHAT, Origin=o) for o in ORIGINS},
    **{f"pre-flight for {o!r}": preflight(o) for o in ORIGINS},
    "pre-flight with headers": preflight(
        "http://localhost:3000", Access_Control_Request_Headers="content-type, x-stainless-os"
    ),
    "pre-flight for a path that is none": options(
        "/nope", Origin="http://localhost", Access_Control_Request_Method="GET"
    ),
    "pre-flight without a method": options(Origin="http://localhost:3000"),
    "pre-flight for a private network": preflight(
        "http://localhost:3000", Access_Control_Request_Private_Network="true"
    ),
    "two origins": req("GET", "/api/tags", Origin=["http://localhost", "http://evil.example"]),
    "a foreign Host and Origin": req(
        "GET", "/api/tags", Host="evil.example", Origin="http://evil.example"
    ),
    "same origin by name": post(
        "/api/chat", CHAT, Host="foo.local:8000", Origin="http://foo.local:8000"
    ),
    "same name, other port": post(
        "/api/chat", CHAT, Host="foo.local:8000", Origin="http://foo.local"
    ),
    "OPTIONS for an address": options(),
    "OPTIONS for a path that is none": options("/nope"),
    "OPTIONS for all": options("*"),
    # Models
    "blob missing": req("HEAD", "/api/blobs/sha256:" + "0" * 64),
    "blob of a bad digest": [req(m, "/api/blobs/sha256:abc", b"x") for m in ("HEAD", "POST")],
    "blob of a wrong digest": post("/api/blobs/sha256:" + "0" * 64, b"something else"),
    "blob twice": [
        *[post(f"/api/blobs/{DIGEST}", f"bytes for {NAME}".encode())] * 2,
        req("HEAD", "/api/blobs/" + "sha256:" + "0" * 63),
    ],
    "copy": [
        post("/api/copy", {"source": "tiny-tools", "destination": NAME}),
        post("/api/show", {"model": NAME}),
        req("DELETE", "/api/delete", {"name": NAME}),
    ],
    "copy of nothing": post("/api/copy", {"source": "nope", "destination": "x"}),
    "copy to a bad name": post("/api/copy", {"source": "tiny", "destination": "a b/"}),
    "copy without fields": post("/api/copy", {}),
    "delete without a body": req("DELETE", "/api/delete"),
    "delete of a bad name": req("DELETE", "/api/delete", {"model": "a b"}),
    "create": model_of_its_own(post("/api/chat", CHAT | {"model": NAME})),
    "create, whole": model_of_its_own(stream=False, system="be brief", parameters=TOKENS),
    "create from nothing": post("/api/create", {"model": NAME}),
    "create from a blob that is missing": post(
        "/api/create", {"model": NAME, "files": {"a.gguf": "sha256:" + "0" * 64}}
    ),
    "create under a bad name": post("/api/create", {"model": "a b", "from": "tiny"}),
    "create with a bad template": post(
        "/api/create", {"model": NAME, "from": "tiny", "template": "{{"}
    ),
    **{
        f"{verb} {'streamed' if stream else 'whole'}": post(
            f"/api/{verb}",
            {"model": f"http://{NOWHERE}/{who}", "insecure": True, "stream": stream},
        )
        for verb, who in (("pull", "x/y"), ("push", "x/nope"))
        for stream in (True, False)
    },
    "pull of a bad name": post("/api/pull", {"model": "a b"}),
    "push of a model that is here": [
        post("/api/copy", {"source": "tiny", "destination": f"http://{NOWHERE}/x/{NAME}"}),
        post("/api/push", {"model": f"http://{NOWHERE}/x/{NAME}", "insecure": True}),
        req("DELETE", "/api/delete", {"model": f"http://{NOWHERE}/x/{NAME}"}),
    ],
    "show without a model": post("/api/show", {}),
    "show by name": post("/api/show", {"name": "tiny-tools:latest"}),
    "show for Copilot": post(
        "/api/show", {"model": "tiny-tools"}, User_Agent="GitHubCopilotChat/1.0"
    ),
    # Loading and unloading
    **{
        f"keep_alive {alive!r}": both_ways(model="tiny", keep_alive=alive)
        for alive in (-1, "5m", 300, 0, "0", "0s", "0m", -1.5, "", None, True)
    },
    "load without messages": both_ways(model="tiny", messages=[], prompt="", stream=True),
    "load, messages null": both_ways(model="tiny", messages=None, prompt=None),
    "load of an embedding model": both_ways(model="tiny-embed", keep_alive="5m"),
    "unload what is missing": both_ways(model="nope", keep_alive=0),
    "unload, streamed": both_ways(model="tiny", messages=[], keep_alive=0, stream=True),
    # Answers of a model
    "stops": chat(options=TOKENS | {"stop": ["a", "e"]}),
    "options unknown": chat(options=TOKENS | {"warmth": 3}),
    "options of a wrong type": chat(options=TOKENS | {"num_ctx": "many"}),
    "one token": chat(options=TOKENS | {"num_predict": 1}),
    "format json": chat(format="json", stream=False),
    "format empty": chat(format=""),
    "format schema": chat(format=SCHEMA, options=TOKENS | {"num_predict": 12}),
    "format a bad schema": chat(format={"type": "nothing"}),
    "think": chat(think=True),
    "think not": chat(think=False, stream=False),
    "tools": chat(model="tiny-tools", tools=[WEATHER]),
    "tools, whole": chat(model="tiny-tools", tools=[WEATHER], stream=False),
    "tools for a model without": chat(tools=[WEATHER]),
    "tools bad": chat(model="tiny-tools", tools=[1]),
    "tool result": chat(
        model="tiny-tools", messages=[*HELLO, {"role": "tool", "tool_name": "w", "content": "sun"}]
    ),
    "name with a tag": chat(model="tiny:latest"),
    "name with a host": chat(model="evil.example/library/tiny"),
    "name bad": chat(model="a b"),
    "name empty": chat(model=""),
    "raw": generate(raw=True),
    "raw with a template": generate(raw=True, template="{{ .Prompt }}"),
    "suffix": generate(suffix="end"),
    "template": generate(template="x {{ .Prompt }}", system="be brief"),
    "template bad": generate(template="{{"),
    "context": generate(context=[1, 2, 3], stream=False),
    "generate with images": generate(images=["!"]),
    "generate json": generate(format="json", stream=False),
    "generate think": generate(think=True),
    "generate with an embedding model": generate(model="tiny-embed"),
    # Embeddings
    "embed": post("/api/embed", {"model": "tiny-embed", "input": ["a", "b"]}),
    "embed nothing": post("/api/embed", {"model": "tiny-embed"}),
    "embed an empty list": post("/api/embed", {"model": "tiny-embed", "input": []}),
    "embed a number": post("/api/embed", {"model": "tiny-embed", "input": 7}),
    "embed numbers": post("/api/embed", {"model": "tiny-embed", "input": [1, 2]}),
    "embed without cutting": post(
        "/api/embed", {"model": "tiny-embed", "input": "a " * 5000, "truncate": False}
    ),
    "embeddings": post("/api/embeddings", {"model": "tiny-embed", "prompt": "the sea"}),
    "embeddings of nothing": post("/api/embeddings", {"model": "tiny-embed"}),
    "embeddings of a list": post("/api/embeddings", {"model": "tiny-embed", "prompt": ["a"]}),
    **{
        f"v1 embeddings, {name}": post("/v1/embeddings", {"model": "tiny-embed", **fields})
        for name, fields in V1_INPUTS.items()
    },
    # OpenAI's and Anthropic's paths
    "v1": v1(),
    "v1 streamed": v1(stream=True, stream_options={"include_usage": True}),
    "v1 with parts": v1(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
    "v1 with an image of the web": v1(
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://evil.example/x"}}],
            }
        ]
    ),
    "v1 with a part unknown": v1(messages=[{"role": "user", "content": [{"type": "smell"}]}]),
    "v1 with content null": v1(messages=[{"role": "user", "content": None}]),
    "v1 without messages": v1(messages=[]),
    "v1 json": v1(response_format={"type": "json_object"}),
    "v1 schema": v1(
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    ),
    "v1 with a format unknown": v1(response_format={"type": "xml"}),
    "v1 tools": v1(model="tiny-tools", tools=[WEATHER], stream=True),
    "v1 tool call with an object": v1(
        messages=[
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        ]
    ),
    "v1 with effort": v1(reasoning_effort="none"),
    "v1 of a missing model": v1(model="nope", stream=True),
    "v1 completions": post("/v1/completions", V1_TEXT),
    "v1 completions streamed": post(
        "/v1/completions", V1_TEXT | {"stream": True, "stream_options": {"include_usage": True}}
    ),
    "v1 completions of a list": post("/v1/completions", V1_TEXT | {"prompt": ["a", "b"]}),
    "v1 completions with a suffix": post("/v1/completions", V1_TEXT | {"suffix": "end"}),
    "v1 models": req("GET", "/v1/models"),
    "v1 model": req("GET", "/v1/models/tiny"),
    "v1 model missing": req("GET", "/v1/models/nope"),
    "v1 model with a slash": req("GET", "/v1/models/a/b"),
    "v1 alone": req("GET", "/v1"),
    "messages": post("/v1/messages?beta=true", CLAUDE, anthropic_version="2023-06-01"),
    "messages streamed": post("/v1/messages", CLAUDE | {"stream": True}),
    "messages empty": post("/v1/messages", b""),
    "messages counted": post("/v1/messages/count_tokens", CLAUDE),
    "responses": post("/v1/responses", RESPONSES),
    "responses streamed": post("/v1/responses", RESPONSES | {"stream": True}),
    "responses got": req("GET", "/v1/responses/resp_1"),
}

# What is not HTTP to the parser of the listening side, and so its own 400. Go's parser, httptools
# and h11 differ in what they let pass, so the answer may as well be the same.
NOT_HTTP: dict[str, Request] = {
    "a method that is unknown": req("FOO", "/api/version"),
    "a method in lower case": req("get", "/api/version"),
    "bytes in a path": req("GET", "/\xc3\xa9"),
    "bytes in a query": req("GET", "/api/version?a=\xc3\xa9"),
    "an absolute form without a path": req("GET", "http://HOST:PORT"),
    "an absolute form with a query alone": req("GET", "http://HOST:PORT?x=1"),
    "the same length twice": post("/api/chat", CHAT, Content_Length=["BODY-LENGTH"] * 2),
    "a fragment": req("GET", "/api/version#x"),
    "a length and chunks": post(
        "/api/chat", b"0\r\n\r\n", Content_Length="5", Transfer_Encoding="chunked"
    ),
    "a negative length": post("/api/chat", b"", Content_Length="-1"),
    "a blank before the colon": req("GET", "/api/version", raw="X-A : b\r\n"),
}


def ask(url: str, requests: Request | Sequence[Request], name: str) -> list[Answer]:
    """Return the answers to the requests of a case, less what is the side's own."""
    sent = [requests] if isinstance(requests, Request) else requests
    return [answer_of(exchange(url, one.bytes_for(url, name)), url, name) for one in sent]


def exchange(url: str, data: bytes) -> bytes:
    """Send the bytes of a request, and return all that comes back until the end."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), PATIENCE) as connection:
        try:
            connection.sendall(data)
        except OSError:
            pass  # refused before it was read; the answer says why
        return b"".join(received(connection))


def received(connection: socket.socket) -> Iterator[bytes]:
    try:
        while data := connection.recv(2**16):
            yield data
    except ConnectionResetError:
        yield b""


def answer_of(data: bytes, url: str, name: str) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    while re.match(rb"HTTP/1.1 1\d\d ", head):
        head, _, body = body.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(":", 1) for line in lines]
    headers = [(key.lower(), value.strip()) for key, value in pairs]
    text = unchunked(dict(headers), body).decode("utf-8", "backslashreplace")
    return Answer(
        status=int(first.split()[1]) if first else 0,
        headers=sorted((k, own(v, url, name)) for k, v in headers if not OWN_HEADERS.fullmatch(k)),
        body=own(OWN_VALUES.sub(r'"\1":0', text), url, name),
    )


def own(text: str, url: str, name: str) -> str:
    return text.replace(urlsplit(url).netloc, AUTHORITY).replace(name, NAME)


def unchunked(headers: Mapping[str, str], body: bytes) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return body
    data = b""
    while match := re.match(rb"([0-9a-fA-F]+)\r\n", body):
        size, start = int(match[1], 16), match.end()
        data, body = data + body[start : start + size], body[start + size + 2 :]
        if not size:
            return data
    return data + b" and cut off"


@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_the_same(direct: str, proxied: str, case: str) -> None:
    expected = ask(direct, CASES[case], "sent-to-ollama")

    assert all(answer.status for answer in expected)
    assert ask(proxied, CASES[case], "sent-to-proxy") == expected


@pytest.mark.parametrize("case", NOT_HTTP)
def test_what_is_not_http_is_refused_or_answered_the_same(
    direct: str, proxied: str, case: str
) -> None:
    [expected] = ask(direct, NOT_HTTP[case], "sent-to-ollama")

    [answer] = ask(proxied, NOT_HTTP[case], "sent-to-proxy")

    assert answer == expected or (answer.status, answer.body[:3]) == (400, "400")


@pytest.mark.parametrize("host", ["localhost", "foo.local"])
def test_options_for_a_name_are_answered_as_for_an_address(
    direct: str, proxied: str, host: str
) -> None:
    """Ollama tells names from addresses here, and is sent its own address as Host."""
    [by_name] = ask(direct, options(Host=host), "sent-to-ollama")
    [by_address] = ask(direct, options(), "sent-to-ollama")

    assert (by_name.status, by_address.status) == (204, 405)
    assert ask(proxied, options(Host=host), "sent-to-proxy") == [by_address]


@pytest.mark.parametrize("path", ["/api/version", "/api/tags", "/nope"])
def test_a_foreign_authority_in_the_target_counts_as_host(
    direct: str, proxied: str, path: str
) -> None:
    request = req("GET", f"http://evil.example{path}")

    expected = ask(direct, request, "sent-to-ollama")

    assert ask(proxied, request, "sent-to-proxy") == expected


def test_a_client_may_wait_for_the_go_ahead(direct: str, proxied: str) -> None:
    data = post("/api/chat", CHAT, Expect="100-continue").bytes_for(direct, "")
    head, _, body = data.partition(b"\r\n\r\n")

    for url in (direct, proxied):
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), PATIENCE) as connection:
            connection.sendall(head + b"\r\n\r\n")
            assert connection.recv(99).startswith(b"HTTP/1.1 100 ")
            connection.sendall(body)
            assert b"".join(received(connection)).startswith(b"HTTP/1.1 200 ")
