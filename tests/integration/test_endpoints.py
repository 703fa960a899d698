"""What curl sees: each endpoint asked directly and through the proxy, compared byte for byte."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

SAME = {"temperature": 0, "seed": 7, "num_predict": 12}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "tell me a story"}],
    "options": SAME,
}
V1_CHAT = {"model": "tiny", "messages": CHAT["messages"], "temperature": 0, "max_tokens": 12}
V1_TEXT = {"model": "tiny", "prompt": "once", "temperature": 0, "seed": 7, "max_tokens": 12}
GENERATE = {"model": "tiny", "prompt": "once upon", "options": SAME}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hear"}]}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
TOOLS = {**CHAT, "model": "tiny-tools", "tools": [WEATHER]}
COMMAND_IN_NO_CHAT = {**GENERATE, "prompt": "/rag what did we decide in May?", "stream": False}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

# What no two answers share: when, how long, and the number of an answer.
PRIVATE = re.compile(rb'"(?:created|created_at|expires_at|\w+_duration)":(?:"[^"]*"|\d+)|cmpl-\d+')
PER_HOP = {"date", "connection", "x-request-id"}

Seen = tuple[int, list[tuple[str, str]], bytes]
ASKED: list[tuple[str, Any]] = [
    ("GET /", None),
    ("HEAD /", None),
    ("GET /api/version", None),
    ("HEAD /api/version", None),
    ("GET /api/tags", None),
    ("HEAD /api/tags", None),
    ("GET /api/ps", None),
    ("POST /api/show", {"model": "tiny-tools"}),
    ("POST /api/show", {"model": "tiny-embed", "verbose": True}),
    ("POST /api/chat", CHAT),
    ("POST /api/chat", {**CHAT, "stream": False}),
    ("POST /api/chat", {**CHAT, "format": SCHEMA, "stream": False}),
    ("POST /api/chat", {**CHAT, "messages": [{"role": "user", "content": "/etc/hosts is here"}]}),
    ("POST /api/chat", TOOLS),
    ("POST /api/chat", {**TOOLS, "stream": False}),
    ("POST /api/chat", {"model": "tiny"}),
    ("POST /api/chat", {"model": "tiny-tools", "messages": [], "keep_alive": 0}),
    ("POST /api/generate", GENERATE),
    ("POST /api/generate", {**GENERATE, "stream": False}),
    ("POST /api/generate", {**GENERATE, "raw": True, "stream": False}),
    ("POST /api/generate", {"model": "tiny"}),
    ("POST /api/generate", COMMAND_IN_NO_CHAT),
    ("POST /api/embed", {"model": "tiny-embed", "input": ["the sea", "a <b> & ünïcode"]}),
    ("POST /api/embeddings", {"model": "tiny-embed", "prompt": "the sea"}),
    ("GET /v1/models", None),
    ("GET /v1/models/tiny", None),
    ("POST /v1/chat/completions", V1_CHAT),
    ("POST /v1/chat/completions", {**V1_CHAT, "stream": True}),
    (
        "POST /v1/chat/completions",
        {**V1_CHAT, "stream": True, "stream_options": {"include_usage": True}},
    ),
    ("POST /v1/chat/completions", {**V1_CHAT, "messages": PARTS}),
    ("POST /v1/completions", V1_TEXT),
    ("POST /v1/completions", {**V1_TEXT, "stream": True}),
    ("POST /v1/embeddings", {"model": "tiny-embed", "input": "the sea"}),
    ("POST /v1/embeddings", {"model": "tiny-embed", "input": ["a"], "encoding_format": "base64"}),
]
MODEL_WANTED = ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show"]
MODEL_WANTED += ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
REFUSED: list[tuple[str, Any]] = [
    *((f"POST {path}", {**V1_CHAT, "model": "no-such-model"}) for path in MODEL_WANTED),
    *((f"POST {path}", b"") for path in MODEL_WANTED),
    *((f"POST {path}", b'{"model": tiny}') for path in MODEL_WANTED),
    *((f"GET {path}", None) for path in MODEL_WANTED),
    ("POST /api/chat", b"null"),
    ("POST /api/chat", b'{"model":"tiny","messages":[{"role":"user","content":["parts"]}]}'),
    ("POST /api/chat", b'{"model":"tiny","messages":"/rag x"}'),
    ("POST /api/chat", {**CHAT, "options": {"temperature": "hot"}}),
    ("POST /api/chat", {**CHAT, "model": "tiny-embed"}),
    ("POST /api/chat", {**CHAT, "tools": [WEATHER]}),
    ("POST /v1/chat/completions", {**V1_CHAT, "messages": []}),
    ("GET /v1/models/no-such-model", None),
    ("GET /v1/models/a%2Fb", None),
    ("HEAD /api/ps", None),
    ("HEAD /api/blobs/sha256:" + "0" * 64, None),
    ("HEAD /api/blobs/nonsense", None),
    ("PUT /api/tags", None),
    ("OPTIONS /api/chat", None),
    ("PROPFIND /api/chat", None),
    ("GET /nope", None),
    ("POST /api/nope?a=1&a=%20", {"model": "tiny"}),
    ("GET /api/tags/", None),
    ("POST /api/chat/", CHAT),
    ("GET //api/tags", None),
    ("DELETE /api/delete", {"model": "no-such-model"}),
    ("POST /api/copy", {"source": "no-such-model", "destination": "x"}),
]


def seen(http: httpx.Client, url: str, line: str, body: Any) -> Seen:
    """Return status, headers and body of an answer, less what is its own."""
    method, target = line.split(" ", 1)
    # As one URL: httpx would tidy up a path that is merged with a base.
    content = {"content": body} if isinstance(body, bytes) else {"json": body} if body else {}
    answer = http.request(method, url + target, **content)
    headers = [(k, v) for k, v in answer.headers.multi_items() if k not in PER_HOP]
    shared = PRIVATE.sub(b"", answer.content)
    if shared != answer.content:
        headers = [(k, v) for k, v in headers if k != "content-length"]  # a duration has digits
    return answer.status_code, headers, shared


@pytest.mark.parametrize(("line", "body"), ASKED)
def test_an_answer_is_the_same_through_the_proxy(
    http: httpx.Client, direct: str, proxied: str, line: str, body: Any
) -> None:
    seen(http, direct, "POST /api/generate", {"model": "tiny"})  # for what /api/ps lists

    expected = seen(http, direct, line, body)

    assert expected[0] == 200
    assert seen(http, proxied, line, body) == expected


@pytest.mark.parametrize(("line", "body"), REFUSED)
def test_a_refusal_is_the_same_through_the_proxy(
    http: httpx.Client, direct: str, proxied: str, line: str, body: Any
) -> None:
    expected = seen(http, direct, line, body)

    assert expected[0] != 200
    assert seen(http, proxied, line, body) == expected


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://evil.example"])
@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
def test_a_web_page_is_let_in_or_not_by_ollama(
    http: httpx.Client, direct: str, proxied: str, method: str, origin: str
) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}

    one, other = (http.request(method, f"{u}/api/tags", headers=headers) for u in (direct, proxied))

    assert other.status_code == one.status_code
    for name in ("access-control-allow-origin", "access-control-allow-headers", "vary"):
        assert other.headers.get(name) == one.headers.get(name)


def test_a_name_that_is_not_this_machines_is_refused(
    http: httpx.Client, direct: str, proxied: str
) -> None:
    headers = {"Host": "evil.example"}

    one, other = (http.get(f"{url}/api/tags", headers=headers) for url in (direct, proxied))

    assert (other.status_code, other.content) == (one.status_code, one.content) == (403, b"")
