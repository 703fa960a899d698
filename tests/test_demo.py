"""The stand-in for Ollama, over a real socket: what it answers is what Ollama was seen to answer.

The tables hold recorded requests and answers, with the names of the models changed.
"""

from __future__ import annotations

import json
import math
import re
import socket
import struct
from base64 import b64decode
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import anyio
import httpx
import ollama
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

import demo

API, V1, TEXT = "application/json; charset=utf-8", "application/json", "text/plain"
SENT = "I am the demo model. I was sent:\n[user] hello there"
TURN = {"model": "demo", "messages": [{"role": "user", "content": "hello there"}]}
BRIEF = {"role": "system", "content": "You are brief."}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
USE_TOOL = {"role": "user", "content": "Use the tool, please"}
NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"


@pytest.fixture(scope="module")
async def url() -> AsyncIterator[str]:
    async with demo.serve(demo.create_app()) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    return (await client.post(path, json=body)).json()


def chunks(ndjson: str) -> list[Any]:
    return [json.loads(line) for line in ndjson.splitlines()]


def events(sse: str) -> list[Any]:
    assert sse.endswith("data: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in sse.split("\n\n")[:-2]]


def likeness(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def failed(message: str, kind: str) -> str:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return json.dumps({"error": error}, separators=(",", ":"))


# Server and routes


@pytest.mark.parametrize(
    ("method", "path", "status", "kind", "body"),
    [
        ("GET", "/", 200, "text/plain; charset=utf-8", "Ollama is running"),
        ("HEAD", "/", 200, "text/plain; charset=utf-8", ""),
        ("HEAD", "/api/version", 200, API, ""),
        ("HEAD", "/api/tags", 200, API, ""),
        ("GET", "/nope", 404, TEXT, "404 page not found"),
        ("POST", "/api/nope", 404, TEXT, "404 page not found"),
        ("GET", "/api/chat", 405, TEXT, "405 method not allowed"),
        ("PUT", "/api/chat", 405, TEXT, "405 method not allowed"),
        ("OPTIONS", "/api/chat", 405, TEXT, "405 method not allowed"),
        ("HEAD", "/api/ps", 405, TEXT, ""),
    ],
)
async def test_a_route_answers_as_recorded(
    client: httpx.AsyncClient, method: str, path: str, status: int, kind: str, body: str
) -> None:
    answer = await client.request(method, path)

    assert (answer.status_code, answer.headers["content-type"], answer.text) == (status, kind, body)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/api/chat", "POST"), ("HEAD", "/api/ps", "GET"), ("POST", "/", "HEAD, GET")],
)
async def test_a_wrong_method_is_told_the_right_ones(
    client: httpx.AsyncClient, method: str, path: str, allow: str
) -> None:
    answer = await client.request(method, path)

    assert answer.headers["allow"] == allow


async def test_a_trailing_slash_is_redirected_without_a_host(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/chat/", json=TURN)

    assert (answer.status_code, answer.headers["location"]) == (307, "/api/chat")


async def test_answers_have_one_date_and_no_server(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/version")

    assert len(answer.headers.get_list("date")) == 1
    assert "server" not in answer.headers


async def test_a_taken_port_is_an_os_error(url: str) -> None:
    with pytest.raises(OSError, match="in use"):
        async with demo.serve(demo.create_app(), port=int(url.rpartition(":")[2])):
            raise AssertionError("served on a port that is taken")


async def test_an_app_that_fails_to_start_is_an_error_and_frees_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.raises(RuntimeError, match="failed to start"):
        async with demo.serve(broken, port=port):
            raise AssertionError("served an app that did not start")
    async with demo.serve(demo.create_app(), port=port) as url:
        assert url == f"http://127.0.0.1:{port}"


async def test_the_server_is_gone_after_the_block() -> None:
    async with demo.serve(demo.create_app()) as url:
        pass

    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(url)


# Errors


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/chat", "", 400, "missing request body"),
        ("/api/chat", "  \n ", 400, "missing request body"),
        ("/api/chat", "null", 400, "model is required"),
        ("/api/chat", '{"messages":[]}', 400, "model is required"),
        ("/api/chat", '{"model":"demo",', 400, "unexpected EOF"),
        ("/api/chat", '{"model":"de', 400, "unexpected EOF"),
        (
            "/api/chat",
            "[]",
            400,
            "json: cannot unmarshal array into Go value of type api.ChatRequest",
        ),
        (
            "/api/chat",
            '"x"',
            400,
            "json: cannot unmarshal string into Go value of type api.ChatRequest",
        ),
        ("/api/chat", "\ufeff{}", 400, "invalid character 'ï' looking for beginning of value"),
        ("/api/chat", '{"a":NaN}', 400, "invalid character 'N' looking for beginning of value"),
        ("/api/chat", '{"a" 1}', 400, "invalid character '1' after object key"),
        ("/api/chat", '{"model":"a/b/c/d/e:::"}', 400, "invalid model name"),
        ("/api/chat", '{"model":"demo+rag"}', 400, "invalid model name"),
        (
            "/api/chat",
            '{"model":5}',
            400,
            "json: cannot unmarshal number into Go struct field ChatRequest.model of type string",
        ),
        (
            "/api/chat",
            '{"model":"demo","messages":[{"role":"user","content":[]}]}',
            400,
            "json: cannot unmarshal array into Go struct field "
            "ChatRequest.messages.content of type string",
        ),
        ("/api/chat", '{"model":"nope","messages":[]}', 404, "model 'nope' not found"),
        ("/api/chat", '{"model":"demo:7b","stream":true}', 404, "model 'demo:7b' not found"),
        ("/api/chat", '{"model":"demo-embed"}', 400, '"demo-embed" does not support chat'),
        (
            "/api/chat",
            '{"model":"demo","messages":[{}],"think":true}',
            400,
            '"demo" does not support thinking',
        ),
        (
            "/api/chat",
            '{"model":"demo","messages":[{}],"options":{"num_predict":"x"}}',
            500,
            'option "num_predict" must be of type integer',
        ),
        ("/api/generate", '{"model":"nope","prompt":"x"}', 404, "model 'nope' not found"),
        ("/api/generate", "{}", 404, "model '' not found"),
        ("/api/show", '{"model":"nope"}', 404, "model 'nope:latest' not found"),
        (
            "/api/embed",
            '{"model":"nope","input":"x"}',
            404,
            'model "nope" not found, try pulling it first',
        ),
        ("/api/embed", '{"model":"demo-embed","input":5}', 400, "invalid input type"),
        ("/api/embed", '{"model":"demo","input":"x"}', 501, NO_EMBEDDINGS),
        ("/api/embeddings", '{"model":"demo","prompt":"x"}', 500, NO_EMBEDDINGS),
    ],
)
async def test_a_wrong_native_request_gets_the_recorded_error(
    client: httpx.AsyncClient, path: str, body: str, status: int, error: str
) -> None:
    answer = await client.post(path, content=body.encode())

    assert (answer.status_code, answer.headers["content-type"]) == (status, API)
    assert answer.text == json.dumps({"error": error}, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "text"),
    [
        ("chat/completions", "", 400, API, failed("EOF", "invalid_request_error")),
        ("chat/completions", "{", 400, API, failed("unexpected EOF", "invalid_request_error")),
        (
            "chat/completions",
            '{"model":"demo"}',
            400,
            API,
            failed("[] is too short - 'messages'", "invalid_request_error"),
        ),
        (
            "chat/completions",
            '{"model":"demo","messages":[{"role":"user","content":null}]}',
            400,
            API,
            failed("invalid message content type: <nil>", "invalid_request_error")
            .replace("<", "\\u003c")
            .replace(">", "\\u003e"),
        ),
        (
            "chat/completions",
            '{"model":"nope","messages":[{"role":"user","content":"x"}],"stream":true}',
            404,
            V1,
            failed("model 'nope' not found", "not_found_error") + "\n",
        ),
        (
            "embeddings",
            '{"model":"demo","input":"hello there"}',
            501,
            V1,
            failed(NO_EMBEDDINGS, "api_error") + "\n",
        ),
    ],
)
async def test_a_wrong_v1_request_gets_the_recorded_error(
    client: httpx.AsyncClient, path: str, body: str, status: int, kind: str, text: str
) -> None:
    answer = await client.post(f"/v1/{path}", content=body)

    assert (answer.status_code, answer.headers["content-type"]) == (status, kind)
    assert answer.text == text


async def test_an_unknown_v1_model_is_reported_as_404(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models/nope")

    assert answer.status_code == 404
    assert answer.text == failed("model 'nope:latest' not found", "not_found_error") + "\n"


# Chat and generate


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, b"%s"),
        ({}, b"%s garbage"),
        ({}, b'{"MODEL": "demo", "Messages": [{"Role": "User", "Content": "hello there"}]}'),
    ],
)
async def test_a_request_is_read_as_leniently_as_go_does(
    client: httpx.AsyncClient, headers: dict[str, str], body: bytes
) -> None:
    content = body.replace(b"%s", json.dumps(TURN).encode())

    answer = await client.post("/api/chat", content=content, headers=headers)

    assert "".join(c["message"]["content"] for c in chunks(answer.text)) == SENT


async def test_a_chat_repeats_every_message_with_its_role(client: httpx.AsyncClient) -> None:
    said = [BRIEF, {"role": "user", "content": "why?"}, {"role": "assistant", "content": None}]

    answer = await post(client, "/api/chat", model="demo", messages=said, stream=False)

    text = "I am the demo model. I was sent:\n[system] You are brief.\n[user] why?\n[assistant] "
    assert answer["message"] == {"role": "assistant", "content": text}


async def test_images_and_tool_calls_are_counted(client: httpx.AsyncClient) -> None:
    call = {"function": {"name": "clock", "arguments": {}}}
    said = [
        {"role": "user", "content": "look", "images": ["eA==", "eA=="]},
        {"role": "assistant", "tool_calls": [call]},
    ]

    answer = await post(client, "/api/chat", model="demo", messages=said, stream=False)

    assert answer["message"]["content"].endswith(
        "[user] look (2 images)\n[assistant] (1 tool call)"
    )


async def test_a_whole_chat_has_the_recorded_shape(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/chat", json={**TURN, "model": "demo:latest", "stream": False})

    assert answer.headers["content-type"] == API
    assert not answer.text.endswith("\n")
    assert list(answer.json()) == (
        "model created_at message done done_reason total_duration load_duration prompt_eval_count "
        "prompt_eval_duration eval_count eval_duration"
    ).split(" ")
    assert answer.json() | {"created_at": None} == {
        "model": "demo:latest",
        "created_at": None,
        "message": {"role": "assistant", "content": SENT},
        "done": True,
        "done_reason": "stop",
        "total_duration": 14_000_000,
        "load_duration": 1_000_000,
        "prompt_eval_count": 2,
        "prompt_eval_duration": 2_000_000,
        "eval_count": 11,
        "eval_duration": 11_000_000,
    }


@pytest.mark.parametrize("stream", [{}, {"stream": True}, {"stream": None}])
async def test_a_chat_streams_unless_told_otherwise(
    client: httpx.AsyncClient, stream: dict[str, Any]
) -> None:
    answer = await client.post("/api/chat", json=TURN | stream)

    *words, last = chunks(answer.text)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert all(list(c) == ["model", "created_at", "message", "done"] for c in words)
    assert [c["message"]["content"] for c in words[:3]] == ["I", " am", " the"]
    assert "".join(c["message"]["content"] for c in words) == SENT
    assert last["message"] == {"role": "assistant", "content": ""}
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", len(words))


async def test_the_pieces_of_a_stream_join_to_the_exact_text(client: httpx.AsyncClient) -> None:
    odd = " \n two  spaces\tand\r\n\u2028 <b> & é 漢 🙂 \n"

    answer = await client.post(
        "/api/chat", json={"model": "demo", "messages": [{"role": "user", "content": odd}]}
    )

    text = "".join(json.loads(line)["message"]["content"] for line in answer.text.split("\n")[:-1])
    assert text == "I am the demo model. I was sent:\n[user] " + odd


async def test_text_is_utf8_but_for_what_go_escapes(client: httpx.AsyncClient) -> None:
    said = [{"role": "user", "content": "é🙂<&>\u2028"}]

    answer = await client.post("/v1/chat/completions", json=TURN | {"messages": said})

    assert "é🙂\\u003c\\u0026\\u003e\\u2028" in answer.text


async def test_bytes_that_are_no_text_are_replaced(client: httpx.AsyncClient) -> None:
    body = b'{"model": "demo", "stream": false, "prompt": "h\xffllo \\ud800"}'

    answer = await client.post("/api/generate", content=body)

    assert answer.json()["response"].endswith("[user] h\ufffdllo \ufffd")


async def test_a_frame_arrives_before_the_next_is_made() -> None:
    """The pace is an hour between two frames."""
    async with demo.serve(demo.create_app(pace=3600)) as url:
        async with httpx.AsyncClient(trust_env=False) as client:
            async with client.stream("POST", f"{url}/api/chat", json=TURN) as answer:
                lines = answer.aiter_lines()
                first = json.loads(await anext(lines))
                with pytest.raises(TimeoutError), anyio.fail_after(0.05):
                    await anext(lines)

    assert first["message"]["content"] == "I"


async def test_an_open_stream_does_not_keep_the_server_up() -> None:
    app = demo.create_app(pace=3600)

    async with httpx.AsyncClient(trust_env=False) as client:
        with anyio.fail_after(3):
            async with demo.serve(app) as url:
                request = client.build_request("POST", f"{url}/api/chat", json=TURN)
                answer = await client.send(request, stream=True)

        with pytest.raises(httpx.RemoteProtocolError):
            await answer.aread()


async def test_frames_go_out_one_by_one() -> None:
    sent: list[Message] = []
    app = demo.create_app()

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            sent.append(message)
            await send(message)

        await app(scope, receive, note)

    async with demo.serve(noting) as url, httpx.AsyncClient(trust_env=False) as client:
        await client.post(f"{url}/api/chat", json=TURN)

    bodies = [m["body"] for m in sent if m["type"] == "http.response.body"]
    assert [body.count(b"\n") for body in bodies] == [1] * 12 + [0]


async def test_a_stream_stops_when_its_client_leaves() -> None:
    app, ended = demo.create_app(pace=0.001), anyio.Event()
    endless = TURN | {"messages": [{"role": "user", "content": "word " * 100_000}]}

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        if scope["type"] == "http":
            ended.set()

    async with demo.serve(watched) as url, httpx.AsyncClient(trust_env=False) as client:
        async with client.stream("POST", f"{url}/api/chat", json=endless) as answer:
            await anext(answer.aiter_raw())
        with anyio.fail_after(1):
            await ended.wait()


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "load"),
        ({"messages": [], "prompt": "", "stream": True}, "load"),
        ({"messages": None, "prompt": None, "keep_alive": "5m"}, "load"),
        *(({"keep_alive": zero}, "unload") for zero in (0, "0", "0s", "0m")),
    ],
)
async def test_loading_and_unloading_is_one_plain_object(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], reason: str
) -> None:
    answer = await client.post(path, json={"model": "demo", **body})

    text = {"message": {"role": "assistant", "content": ""}}
    field = text if path == "/api/chat" else {"response": ""}
    frame = answer.json()
    assert (answer.headers["content-type"], answer.text[-1]) == (API, "}")
    assert datetime.fromisoformat(frame.pop("created_at")).tzinfo
    assert frame == {"model": "demo", **field, "done": True, "done_reason": reason}


async def test_an_embedding_model_can_be_unloaded(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/api/generate", model="demo-embed", keep_alive=0)

    assert answer["done_reason"] == "unload"


@pytest.mark.parametrize("stream", [True, False])
async def test_num_predict_limits_the_words(client: httpx.AsyncClient, stream: bool) -> None:
    body = TURN | {"options": {"num_predict": 3}, "stream": stream}

    answer = chunks((await client.post("/api/chat", json=body)).text)

    assert "".join(c["message"]["content"] for c in answer) == "I am the"
    assert (answer[-1]["done_reason"], answer[-1]["eval_count"]) == ("length", 3)


async def test_generate_repeats_system_and_prompt(client: httpx.AsyncClient) -> None:
    body = {"model": "demo", "system": "Be brief.", "prompt": "why?", "images": ["eA=="]}

    answer = await post(client, "/api/generate", **body, stream=False)

    text = "I am the demo model. I was sent:\n[system] Be brief.\n[user] why? (1 image)"
    assert answer["response"] == text
    assert list(answer)[:6] == "model created_at response done done_reason context".split()


async def test_generate_streams(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/generate", json={"model": "demo", "prompt": "hello there"})

    assert answer.headers["content-type"] == "application/x-ndjson"
    assert "".join(c["response"] for c in chunks(answer.text)) == SENT


async def test_a_format_gets_json(client: httpx.AsyncClient) -> None:
    native = await post(client, "/api/chat", **TURN, stream=False, format="json")
    v1 = await post(client, "/v1/chat/completions", **TURN, response_format={"type": "json_object"})

    assert json.loads(native["message"]["content"]) == {"answer": SENT}
    assert json.loads(v1["choices"][0]["message"]["content"]) == {"answer": SENT}


async def test_a_tool_is_called_in_a_frame_of_its_own(client: httpx.AsyncClient) -> None:
    body = {"model": "demo", "messages": [USE_TOOL], "tools": TOOLS}

    call, last = chunks((await client.post("/api/chat", json=body)).text)

    function = {"index": 0, "name": "clock", "arguments": {}}
    assert (call["message"]["content"], call["done"]) == ("", False)
    assert [c["function"] for c in call["message"]["tool_calls"]] == [function]
    assert (last["message"]["content"], last["done_reason"]) == ("", "stop")


async def test_a_tools_answer_is_not_answered_by_a_tool(client: httpx.AsyncClient) -> None:
    said = [USE_TOOL, {"role": "tool", "content": "noon", "tool_name": "clock"}]

    answer = await post(client, "/api/chat", model="demo", messages=said, tools=TOOLS, stream=False)

    assert answer["message"]["content"].endswith("[user] Use the tool, please\n[tool] noon")


async def test_tools_that_nobody_asks_for_are_left_alone(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/api/chat", **TURN, tools=TOOLS, stream=False)

    assert "tool_calls" not in answer["message"]


# OpenAI's dialect


async def test_a_v1_chat_is_whole_unless_told_otherwise(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=TURN)

    body = answer.json()
    assert (answer.headers["content-type"], answer.text[-2:]) == (V1, "}\n")
    assert re.fullmatch(r"chatcmpl-\d{1,3}", body.pop("id"))
    assert body.pop("created") > 0
    message = {"role": "assistant", "content": SENT}
    assert body == {
        "object": "chat.completion",
        "model": "demo",
        "system_fingerprint": "fp_ollama",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 11, "total_tokens": 13},
    }


async def test_a_v1_stream_has_the_recorded_frames(client: httpx.AsyncClient) -> None:
    body = TURN | {"stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}

    answer = await client.post("/v1/chat/completions", json=body)

    frames = events(answer.text)
    assert answer.headers["content-type"] == "text/event-stream"
    assert [choice for frame in frames for choice in frame["choices"]] == [
        {"index": 0, "delta": {"role": "assistant", "content": "I"}, "finish_reason": None},
        {"index": 0, "delta": {"content": " am"}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "length"},
    ]
    assert len({frame["id"] for frame in frames}) == 1
    assert [frame.get("usage") for frame in frames] == [
        *[None] * 3,
        {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    ]


async def test_without_include_usage_there_is_no_usage_frame(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=TURN | {"stream": True})

    assert all(frame["choices"] for frame in events(answer.text))
    assert "usage" not in answer.text


async def test_v1_parts_are_joined_and_images_counted(client: httpx.AsyncClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}
    parts = [{"type": "text", "text": "what"}, image, {"type": "text", "text": "is it?"}]

    answer = await post(
        client, "/v1/chat/completions", model="demo", messages=[{"role": "user", "content": parts}]
    )

    text = answer["choices"][0]["message"]["content"]
    assert text.endswith("[user] what is it? (1 image)")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_v1_tool_call_has_its_arguments_as_a_string(
    client: httpx.AsyncClient, stream: bool
) -> None:
    body = {"model": "demo", "messages": [USE_TOOL], "tools": TOOLS, "stream": stream}

    answer = await client.post("/v1/chat/completions", json=body)

    choices = [f["choices"][0] for f in (events(answer.text) if stream else [answer.json()])]
    message = choices[0]["delta" if stream else "message"]
    assert (message["role"], message["content"]) == ("assistant", "")
    assert message["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [True, False])
async def test_v1_completions_carry_text(client: httpx.AsyncClient, stream: bool) -> None:
    body = {"model": "demo", "prompt": "hello there", "stream": stream}

    answer = await client.post("/v1/completions", json=body)

    frames = events(answer.text) if stream else [answer.json()]
    assert "".join(frame["choices"][0]["text"] for frame in frames) == SENT
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"
    assert {frame["object"] for frame in frames} == {"text_completion"}


async def test_a_v1_completion_of_nothing_loads(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/completions", model="demo", prompt="")

    assert answer["choices"] == [{"text": "", "index": 0, "finish_reason": "load"}]


# Embeddings


async def test_texts_that_share_words_are_near_one_another(client: httpx.AsyncClient) -> None:
    texts = ["When do we meet?", "we meet in May", "bread, butter and salt"]

    answer = await post(client, "/api/embed", model="demo-embed", input=texts)

    question, near, far = answer["embeddings"]
    assert list(answer)[2:] == ["total_duration", "load_duration", "prompt_eval_count"]
    assert math.isclose(math.hypot(*question), 1, rel_tol=1e-6)
    assert likeness(question, near) > likeness(question, far)


async def test_all_three_embedding_routes_make_the_same_vector(client: httpx.AsyncClient) -> None:
    one = await post(client, "/api/embed", model="demo-embed", input="Sea water")
    two = await post(client, "/api/embeddings", model="demo-embed", prompt="sea, WATER!")
    three = await post(client, "/v1/embeddings", model="demo-embed", input=["water sea"])

    assert one["embeddings"] == [two["embedding"]] == [three["data"][0]["embedding"]]
    assert len(two["embedding"]) == demo.DIMENSIONS
    assert three["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


async def test_no_input_makes_no_vector_and_empty_text_makes_zeros(
    client: httpx.AsyncClient,
) -> None:
    nothing = await client.post("/api/embed", json={"model": "demo-embed", "input": []})
    empty = await post(client, "/api/embed", model="demo-embed", input=[""])

    assert nothing.text == '{"model":"demo-embed","embeddings":[]}'
    assert empty["embeddings"] == [[0.0] * demo.DIMENSIONS]


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    body = {"model": "demo-embed", "input": "sea water", "encoding_format": "base64"}

    answer = await post(client, "/v1/embeddings", **body)

    packed = b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<256f", packed) == pytest.approx(demo.vector("sea water"))


# Models, and the clients that people use


async def test_both_lists_name_both_models(client: httpx.AsyncClient) -> None:
    native, v1 = await client.get("/api/tags"), await client.get("/v1/models")

    names = ["demo:latest", "demo-embed:latest"]
    assert [model["name"] for model in native.json()["models"]] == names
    assert [model["id"] for model in v1.json()["data"]] == names
    assert (v1.headers["content-type"], v1.text[-1]) == (V1, "\n")


async def test_one_v1_model_keeps_the_name_it_was_asked_by(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models/demo")).json()

    assert list(answer) == ["id", "object", "created", "owned_by"]
    assert answer["id"] == "demo"


@pytest.fixture
async def ollama_client(url: str) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=url, trust_env=False)
    yield client
    await client.close()  # type: ignore[no-untyped-call]


async def test_the_ollama_client_can_talk_to_it(ollama_client: ollama.AsyncClient) -> None:
    said = [{"role": "user", "content": "hello there"}]

    stream = await ollama_client.chat("demo", said, stream=True)

    assert "".join([chunk.message.content or "" async for chunk in stream]) == SENT
    assert (await ollama_client.generate("demo", "hello there")).response == SENT
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found"):
        await ollama_client.chat("nope", said)


async def test_the_ollama_client_can_read_its_models(ollama_client: ollama.AsyncClient) -> None:
    listed, loaded = await ollama_client.list(), await ollama_client.ps()
    shown = await ollama_client.show("demo")
    embedded = await ollama_client.embed("demo-embed", "x")

    assert [model.model for model in listed.models] == list(demo.CAPABILITIES)
    assert [model.model for model in loaded.models] == list(demo.CAPABILITIES)
    assert (shown.capabilities, bool(shown.modelinfo)) == (["completion", "tools", "vision"], True)
    assert len(embedded.embeddings[0]) == demo.DIMENSIONS


async def test_the_openai_client_understands_it(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        whole = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hello there"}]
        )
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hello there"}], stream=True
        )
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        vectors = await client.embeddings.create(model="demo-embed", input=["x", "y"])
        names = [model.id async for model in client.models.list()]
        with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
            await client.completions.create(model="nope", prompt="x")

    assert whole.choices[0].message.content == "".join(texts) == SENT
    assert [len(item.embedding) for item in vectors.data] == [demo.DIMENSIONS] * 2
    assert names == list(demo.CAPABILITIES)
