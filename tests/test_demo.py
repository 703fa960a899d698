"""The stand-in for Ollama, over a real socket: it answers as Ollama was seen to answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator
from itertools import groupby
from operator import mul
from typing import Any

import anyio
import httpx
import ollama
import pytest
from starlette.types import Receive, Scope, Send

import demo
from tests.support import CHAT, COMPLETIONS, MESSAGES, RESPONSES, message, parts
from tests.test_osp import free_port
from tests.test_recordings import RECORDINGS

API, V1, TEXT = "application/json; charset=utf-8", "application/json", "text/plain"


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with demo.serve(demo.create_app()) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        yield client


FIXED = "type object status role stop_reason done_reason finish_reason message error done".split()
FREE = "input arguments parameters context embedding embeddings created_at completed_at".split()


def shape(value: Any, key: str = "") -> Any:
    """Return a value of JSON with its keys in their order, and its texts and numbers left out."""
    if isinstance(value, dict) and key not in FREE:
        return [(name, shape(part, name)) for name, part in value.items()]
    if isinstance(value, list) and key not in FREE:
        return [shape(part, key) for part in value]
    return value if key in FIXED or value is None else key


def frames(text: str) -> list[Any]:
    """Return event, shape and end of each frame, equal ones once; a whole answer is one frame."""
    found = re.findall(r"((?:event: .+\n)?(?:data: )?)(.+)(\n*)", text)
    shapes = [
        (head, shape(json.loads(data)), end) for head, data, end in found if "[DONE]" not in data
    ]
    return [frame for frame, _ in groupby(shapes)] + ["[DONE]"] * text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind", "allow", "body"),
    [
        ("GET", "/", 200, "text/plain; charset=utf-8", None, "Ollama is running"),
        ("HEAD", "/api/tags", 200, API, None, ""),
        ("POST", "/api/nope", 404, TEXT, None, "404 page not found"),
        ("OPTIONS", "/api/chat", 405, TEXT, "POST", "405 method not allowed"),
        ("POST", "/", 405, TEXT, "HEAD, GET", "405 method not allowed"),
        ("HEAD", "/api/ps", 405, TEXT, "GET", ""),
    ],
)
async def test_a_route_answers_as_recorded(
    client: httpx.AsyncClient, method: str, path: str, status: int, kind: str, allow: Any, body: str
) -> None:
    answer = await client.request(method, path)

    assert (answer.status_code, answer.headers["content-type"], answer.text) == (status, kind, body)
    assert (answer.headers.get("allow"), answer.headers.get("server")) == (allow, None)
    assert len(answer.headers.get_list("date")) == 1


SAME = """
chat_plain_whole chat_plain_stream chat_length_stream chat_missing_whole chat_missing_stream
chat_embed_model chat_tools_tools_call_whole chat_tools_tools_call_stream
generate_plain_whole generate_plain_stream generate_missing_stream
v1chat_plain_whole v1chat_plain_stream v1chat_missing_whole v1chat_usage_stream
v1chat_tools_tools_call_whole v1chat_tools_tools_call_stream
v1completions_plain_whole embed embeddings v1embeddings_float
messages_plain_whole messages_plain_stream messages_length_whole messages_length_stream
messages_tools_tools_call_whole messages_tools_tools_call_stream messages_missing_whole
messages_embed_model messages_body_null messages_body_empty messages_req_max_absent
messages_req_messages_empty messages_req_content_empty messages_req_tool_result_string
responses_plain_whole responses_plain_stream responses_tools_tools_call_whole
responses_tools_tools_call_stream responses_missing_whole responses_embed_model responses_body_null
responses_body_empty responses_req_input_empty responses_req_instructions responses_req_schema
responses_req_sampling responses_req_custom_tool
""".split()


@pytest.mark.parametrize("name", SAME)
async def test_it_answers_as_ollama_was_seen_to_answer(
    client: httpx.AsyncClient, name: str
) -> None:
    request, expected = RECORDINGS[f"rc_{name}"].values()
    limit = 3 if "length" in name else 99
    body = re.sub('"s-(?:plain|tools|think)"', '"demo"', request["body"]).replace(
        "s-embed", "demo-embed"
    )
    body = body.replace("<<call>>", "the tool").replace(
        '"max_tokens": 50', f'"max_tokens": {limit}'
    )
    body = body.replace('"stream"', f'"options": {{"num_predict": {limit}}}, "stream"')

    answer = await client.post(request["target"], content=body)

    headers = [
        (k.lower(), v) for k, v in expected["headers"] if k in ("Content-Type", "Cache-Control")
    ]
    kept = sorted((k, v) for k, v in answer.headers.items() if k in dict(headers))
    assert (answer.status_code, kept) == (expected["status"], sorted(headers))
    assert frames(answer.text) == frames(expected["body"].replace("s-embed", "demo-embed"))


SAID = [message("System", "Brief."), message("user", "  a \n\u2028<é🙂 ", images=["x"])]
PARTS = parts(COMPLETIONS, "a", {"type": "image_url"}, "b")
BLOCKS = [
    message("user", parts(MESSAGES, "a", "b")),
    message("assistant", [{"type": "tool_use", "id": "1", "name": "clock"}]),
    message("user", [{"type": "tool_result", "content": parts(MESSAGES, "noon")}]),
]
ITEMS = [
    message("user", parts(RESPONSES, "a", {"type": "input_image"})),
    {"type": "function_call", "name": "clock"},
    {"type": "function_call_output", "output": "noon"},
]
READ: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"Messages": SAID}, "[system] Brief.\n[user]   a \n\u2028<é🙂  (1 image)"),
    (COMPLETIONS, {"messages": [message("user", PARTS)]}, "[user] a b (1 image)"),
    (
        MESSAGES,
        {"messages": BLOCKS, "max_tokens": 99, "system": parts(MESSAGES, "Brief.")},
        "[system] Brief.\n[user] ab\n[assistant] (1 tool call)\n[tool] noon",
    ),
    (
        RESPONSES,
        {"input": ITEMS, "instructions": "Brief."},
        "[system] Brief.\n[user] a (1 image)\n[assistant] (1 tool call)\n[tool] noon",
    ),
]


@pytest.mark.parametrize(("path", "body", "text"), READ)
@pytest.mark.parametrize("stream", [True, False])
async def test_it_repeats_what_it_was_sent(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], text: str, stream: bool
) -> None:
    answer = await client.post(path, json={"model": "DEMO", "stream": stream, **body})

    said = [json.loads(data) for data in re.findall(r"\{.*\}", answer.text)]
    assert spoken(said) == f"I am the demo model. I was sent:\n{text}"


def spoken(value: Any, key: str = "") -> str:
    if isinstance(value, dict):
        repeats = str(value.get("type")).endswith((".done", ".completed"))
        return "" if repeats else "".join(spoken(part, name) for name, part in value.items())
    if isinstance(value, list):
        return "".join(map(spoken, value))
    return value if isinstance(value, str) and key in ("content", "text", "delta") else ""


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(("keep", "reason"), [("5m", "load"), (0, "unload"), ("0s", "unload")])
async def test_loading_and_unloading_is_one_plain_object(
    client: httpx.AsyncClient, path: str, keep: Any, reason: str
) -> None:
    answer = await client.post(path, json={"model": "demo", "stream": True, "keep_alive": keep})

    assert answer.headers["content-type"] == API
    assert (answer.json()["done"], answer.json()["done_reason"]) == (True, reason)


async def test_a_model_that_is_made_is_one_like_the_others(
    url: str, client: httpx.AsyncClient
) -> None:
    asked = {"from": "demo", "system": "Brief.", "parameters": {"num_ctx": 99, "num_predict": 9}}

    made = await client.post("/api/create", json={"model": "Mine", **asked})

    steps = [json.loads(line)["status"].partition(" sha256:")[0] for line in made.text.splitlines()]
    assert steps == ["using existing layer", "writing manifest", "success"]
    own = ollama.AsyncClient(host=url, trust_env=False)
    assert [model.model for model in (await own.list()).models][2:] == ["Mine:latest"]
    assert [model.context_length for model in (await own.ps()).models] == [4096, 4096, 99]
    shown = await own.show("mine")
    assert (shown.parameters or "").split() == ["num_ctx", "99", "num_predict", "9"]
    assert shown.details and shown.details.parent_model == "demo:latest"
    said = (await own.chat("MINE:latest", [{"role": "user", "content": "hi"}])).message.content
    assert said == "I am the demo model. I was sent:\n[system]"
    assert (await client.get("/v1/models/mine")).json()["id"] == "mine"
    await own.delete("mine")
    assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == [
        *("demo:latest", "demo-embed:latest")
    ]
    with pytest.raises(ollama.ResponseError, match="stay"):
        await own.delete("demo")
    await own.close()  # type: ignore[no-untyped-call]


async def test_texts_that_share_words_are_near_one_another(client: httpx.AsyncClient) -> None:
    texts = ["When do we meet?", "we meet in May", "bread, butter and salt", ""]

    answer = await client.post("/api/embed", json={"model": "demo-embed", "input": texts})

    question, near, far, empty = answer.json()["embeddings"]
    assert math.isclose(math.hypot(*question), 1, rel_tol=1e-6) and not any(empty)
    assert sum(map(mul, question, near)) > sum(map(mul, question, far))
    assert near == demo.vector("MAY, meet in we")


async def test_a_taken_port_and_an_app_that_fails_to_start_are_errors(url: str) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.raises(OSError, match="in use"):
        async with demo.serve(demo.create_app(), port=int(url.rpartition(":")[2])):
            raise AssertionError("served on a port that is taken")
    port = free_port()
    with pytest.raises(RuntimeError, match="failed to start"):
        async with demo.serve(broken, port=port):
            raise AssertionError("served an app that did not start")
    async with demo.serve(demo.create_app(), port=port) as freed:
        assert freed == f"http://127.0.0.1:{port}"


async def test_a_frame_leaves_before_the_next_is_made_and_an_open_stream_stops_nobody() -> None:
    body = {"model": "demo", "prompt": "hi"}
    async with httpx.AsyncClient(trust_env=False) as client:
        with anyio.fail_after(5):
            async with demo.serve(demo.create_app(pace=3600)) as url:
                request = client.build_request("POST", f"{url}/api/generate", json=body)
                answer = await client.send(request, stream=True)
                chunks = answer.aiter_bytes()
                assert json.loads(await anext(chunks))["response"] == "I"

            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
