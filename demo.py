"""A stand-in for Ollama: for `python osp.py --demo`, and for the tests.

It answers as Ollama 0.33 does, in both dialects (`/api` and `/v1`): shapes, key order, content
types, status codes, error texts. There is no model behind it. `demo` repeats the messages it was
sent, so that you see what an agent did to them; `demo-embed` turns the words of a text into a
vector, so that texts that share words are near one another.

It imports nothing of ours, and only `osp.py` and tests import it. Read it downwards: the server,
the routes, what each endpoint answers, how an answer is composed, how a request is read, refused.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import random
import re
import socket
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

VERSION = "0.33.0-demo"  # numbers first: some clients compare it
CAPABILITIES = {
    "demo:latest": ["completion", "tools", "vision"],
    "demo-embed:latest": ["embedding"],
}
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "demo",
    "families": ["demo"],
    "parameter_size": "0B",
    "quantization_level": "unknown",
}
MADE = datetime(2026, 1, 1, tzinfo=UTC)
DIMENSIONS = 256
MILLISECOND = 1_000_000  # Ollama counts in nanoseconds

# JSON's types, the fields that have one, and wrong syntax, in the words of Go's decoder.
KINDS = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
FIELDS: dict[str, tuple[type, str]] = {
    "model": (str, "string"),
    "messages": (list, "[]api.Message"),
    "prompt": (str, "string"),
    "system": (str, "string"),
    "stream": (bool, "bool"),
    "options": (dict, "map[string]interface {}"),
    "max_tokens": (int, "int"),
    "tools": (list, "api.Tools"),
}
SYNTAX = {
    "Expecting value": "looking for beginning of value",
    "Expecting property name enclosed in double quotes": "looking for beginning of object key string",  # noqa: E501
    "Expecting ':' delimiter": "after object key",
    "Expecting ',' delimiter": "after object key:value pair",
}
# Go's encoder escapes what a browser could misread; its strings hold no lone surrogates.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
ESCAPES |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")

Json = dict[str, Any]
Said = list[tuple[str, str]]  # role and text of each message
Say = Callable[[str], Json]  # a piece of text to the field that carries it
Endpoint = Callable[[Request], Awaitable[Response]]


@asynccontextmanager
async def serve(
    app: ASGIApp, host: str = "127.0.0.1", port: int = 0, **options: Any
) -> AsyncIterator[str]:
    """Run `app` inside the running loop; yield its base URL once it accepts connections.

    Port 0 is any free one; `options` are uvicorn's. Raises OSError where the port is taken,
    RuntimeError where the app fails to start. On the way out, answers under way have one second.
    """
    ours: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
    ours |= {"server_header": False, "proxy_headers": False, "ws": "none"}
    ours |= {"timeout_keep_alive": 75, "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, **{**ours, **options})
    with socket.create_server((host, port)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it
        async with _running(uvicorn.Server(config), listener):
            yield f"http://{host}:{listener.getsockname()[1]}"


@asynccontextmanager
async def _running(server: uvicorn.Server, listener: socket.socket) -> AsyncIterator[None]:
    # The steps of Server.serve(), which would take the process's signals, and which leaves a failed
    # start-up with SystemExit: in a task of its own, that ends the whole loop.
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    try:
        await server.startup(sockets=[listener])
    except SystemExit as exc:
        raise RuntimeError("the app failed to start, its log says why") from exc
    clock = asyncio.create_task(server.main_loop())  # keeps the Date header
    try:
        yield
    finally:
        clock.cancel()
        await server.shutdown(sockets=[listener])


def create_app(pace: float = 0.0) -> Starlette:
    """Return the stand-in; it waits `pace` seconds between the frames of a stream."""
    app = Starlette(
        routes=[
            _route("/", root, "HEAD", "GET"),
            _route("/api/version", version, "HEAD", "GET"),
            _route("/api/tags", tags, "HEAD", "GET"),
            _route("/api/ps", ps, "GET"),
            _route("/api/show", show, "POST"),
            _route("/api/chat", partial(chat, pace), "POST"),
            _route("/api/generate", partial(generate, pace), "POST"),
            _route("/api/embed", embed, "POST"),
            _route("/api/embeddings", embeddings, "POST"),
            _route("/v1/models", v1_models, "GET"),
            _route("/v1/models/{name}", v1_model, "GET"),
            _route("/v1/chat/completions", partial(v1_chat, pace), "POST"),
            _route("/v1/completions", partial(v1_completions, pace), "POST"),
            _route("/v1/embeddings", v1_embeddings, "POST"),
        ],
        exception_handlers={Refused: refused, 404: not_found, 405: not_allowed},
    )
    app.router.redirect_slashes = False  # Starlette's Location is absolute, Ollama's is not
    return app


def _route(path: str, endpoint: Endpoint, *methods: str) -> Route:
    route = Route(path, endpoint, methods=methods, name=path)
    route.methods = set(methods)  # Starlette lets HEAD in with every GET, Ollama does not
    return route


async def root(request: Request) -> Response:
    return Response("Ollama is running", media_type="text/plain")


async def version(request: Request) -> Response:
    return _reply({"version": VERSION})


async def tags(request: Request) -> Response:
    return _reply({"models": [_card(name) for name in CAPABILITIES]})


async def ps(request: Request) -> Response:
    loaded = {"expires_at": _stamp(MADE.replace(year=2318)), "size_vram": 0, "context_length": 4096}
    return _reply({"models": [_card(name) | loaded for name in CAPABILITIES]})


async def show(request: Request) -> Response:
    body = await _bind(request, "api.ShowRequest")
    name = _full(_required(body.get("model") or body.get("name")))
    if name not in CAPABILITIES:
        raise Refused(404, f"model '{name}' not found")
    about = {"modelfile": f"FROM {name}\n", "template": "{{ .Prompt }}", "details": DETAILS}
    info = {"general.architecture": "demo", "demo.context_length": 4096}
    last = {"capabilities": CAPABILITIES[name], "modified_at": _stamp(MADE)}
    return _reply({**about, "model_info": info, **last})


def _card(name: str) -> Json:
    digest = hashlib.sha256(name.encode()).hexdigest()
    made = {"modified_at": _stamp(MADE), "size": 1, "digest": digest}
    details = {**DETAILS, "context_length": 4096, "embedding_length": DIMENSIONS}
    about = {"details": details, "capabilities": CAPABILITIES[name]}
    return {"name": name, "model": name, **made, **about}


async def v1_models(request: Request) -> Response:
    return _v1_reply({"object": "list", "data": [_v1_card(name) for name in CAPABILITIES]})


async def v1_model(request: Request) -> Response:
    name = request.path_params["name"]
    if _full(name) not in CAPABILITIES:
        raise Refused(404, f"model '{_full(name)}' not found")
    return _v1_reply(_v1_card(name))


def _v1_card(name: str) -> Json:
    created = int(MADE.timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "library"}


async def chat(pace: float, request: Request) -> Response:
    body = await _bind(request, "api.ChatRequest")
    if not re.fullmatch(r"([\w.:-]+/){0,2}[\w.-]+(:[\w.-]+)?", _required(body.get("model")), re.A):
        raise Refused(400, "invalid model name")
    said = [_turn(message) for message in body.get("messages") or []]
    return _native(pace, body, said, "chat", _as_message)


async def generate(pace: float, request: Request) -> Response:
    body = await _bind(request, "api.GenerateRequest")
    said = [("system", body["system"])] if body.get("system") else []
    said += [_turn({"role": "user", "content": body.get("prompt"), "images": body.get("images")})]
    return _native(pace, body, said if body.get("prompt") else [], "generate", _as_response)


def _as_message(text: str) -> Json:
    return {"message": {"role": "assistant", "content": text}}


def _as_response(text: str) -> Json:
    return {"response": text}


def _native(pace: float, body: Json, said: Said, verb: str, say: Say) -> Response:
    model = body.get("model") or ""
    unload = not said and body.get("keep_alive") in (0, "0", "0s", "0m")
    _admit(model, "" if unload else verb)
    if not said:  # a plain object, whatever `stream` says
        return _reply(_frame(model, say(""), done_reason="unload" if unload else "load"))
    if body.get("think"):
        raise Refused(400, f'"{model}" does not support thinking')
    answer = _compose(body, said, _num_predict(body), structured=bool(body.get("format")))
    if body.get("stream") is False:
        return _reply(_frame(model, _whole(answer, say), **_ending(answer, say)))
    return _stream(pace, "application/x-ndjson", _lines(model, answer, say))


def _num_predict(body: Json) -> int:
    limit = (body.get("options") or {}).get("num_predict") or 0
    if not isinstance(limit, int | float):
        raise Refused(500, 'option "num_predict" must be of type integer')
    return int(limit)


def _lines(model: str, answer: Answer, say: Say) -> Iterator[bytes]:
    for piece in [_whole(answer, say)] if answer.tool else map(say, answer.words):
        yield _encode(_frame(model, piece)) + b"\n"
    yield _encode(_frame(model, say(""), **_ending(answer, say))) + b"\n"


def _frame(model: str, piece: Json, **ending: Any) -> Json:
    head = {"model": model, "created_at": _stamp(datetime.now(UTC))}
    return {**head, **piece, "done": bool(ending), **ending}


def _whole(answer: Answer, say: Say) -> Json:
    piece = say("".join(answer.words))
    if answer.tool:
        function = {"index": 0, "name": answer.tool, "arguments": {}}
        piece["message"]["tool_calls"] = [{"id": _call_id(), "function": function}]
    return piece


def _ending(answer: Answer, say: Say) -> Json:
    # As if each word took a millisecond: the same request gets the same numbers.
    heard, spoken = answer.heard, len(answer.words)
    context = {"context": list(range(heard + spoken))} if say is _as_response else {}
    total = {"total_duration": (heard + spoken + 1) * MILLISECOND, "load_duration": MILLISECOND}
    read = {"prompt_eval_count": heard, "prompt_eval_duration": heard * MILLISECOND}
    wrote = {"eval_count": spoken, "eval_duration": spoken * MILLISECOND}
    return {"done_reason": answer.reason, **context, **total, **read, **wrote}


async def v1_chat(pace: float, request: Request) -> Response:
    body = await _bind(request, "openai.ChatCompletionRequest")
    if not body.get("messages"):
        raise Malformed(400, "[] is too short - 'messages'")
    if any(m.get("content") is None and not m.get("tool_calls") for m in body["messages"]):
        raise Malformed(400, "invalid message content type: <nil>")
    _admit(_required(body.get("model")), "chat")
    said = [_turn(message) for message in body["messages"]]
    structured = (body.get("response_format") or {}).get("type", "text") != "text"
    answer = _compose(body, said, body.get("max_tokens") or 0, structured=structured)
    if body.get("stream"):
        head = _v1_head(body, "chatcmpl", "chat.completion.chunk")
        return _stream(pace, "text/event-stream", _events(body, head, answer, _deltas(answer)))
    message = {"role": "assistant", "content": "".join(answer.words), **_v1_calls(answer)}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    head = _v1_head(body, "chatcmpl", "chat.completion")
    return _v1_reply({**head, "choices": [choice], "usage": _usage(answer)})


def _deltas(answer: Answer) -> Iterator[Json]:
    role = {"role": "assistant"}
    for word in answer.words or [""]:
        delta = {**role, "content": word, **_v1_calls(answer)}
        yield {"index": 0, "delta": delta, "finish_reason": None}
        role = {}
    yield {"index": 0, "delta": {}, "finish_reason": answer.finish_reason}


def _v1_calls(answer: Answer) -> Json:
    function = {"name": answer.tool, "arguments": "{}"}
    call = {"id": _call_id(), "index": 0, "type": "function", "function": function}
    return {"tool_calls": [call]} if answer.tool else {}


async def v1_completions(pace: float, request: Request) -> Response:
    body = await _bind(request, "openai.CompletionRequest")
    _admit(body.get("model") or "", "generate")
    said = [("user", body["prompt"])] if body.get("prompt") else []
    answer = _compose({}, said, body.get("max_tokens") or 0, structured=False)
    head = _v1_head(body, "cmpl", "text_completion")
    if body.get("stream"):
        return _stream(pace, "text/event-stream", _events(body, head, answer, _texts(answer)))
    choice = {"text": "".join(answer.words), "index": 0, "finish_reason": answer.reason}
    return _v1_reply({**head, "choices": [choice], "usage": _usage(answer)})


def _texts(answer: Answer) -> Iterator[Json]:
    for word in answer.words:
        yield {"text": word, "index": 0, "finish_reason": None}
    yield {"text": "", "index": 0, "finish_reason": answer.reason}


def _events(body: Json, head: Json, answer: Answer, choices: Iterator[Json]) -> Iterator[bytes]:
    chunks = [{**head, "choices": [choice]} for choice in choices]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": _usage(answer)})
    for chunk in chunks:
        yield b"data: " + _encode(chunk) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _v1_head(body: Json, prefix: str, kind: str) -> Json:
    name = {"id": f"{prefix}-{random.randrange(999)}", "object": kind, "created": int(time.time())}
    return {**name, "model": body["model"], "system_fingerprint": "fp_ollama"}


def _usage(answer: Answer) -> Json:
    heard, spoken = answer.heard, len(answer.words)
    counts = {"prompt_tokens": heard, "completion_tokens": spoken}
    return {**counts, "total_tokens": heard + spoken}


async def embed(request: Request) -> Response:
    body = await _bind(request, "api.EmbedRequest")
    texts = _inputs(body)
    _admit_embedder(body.get("model") or "", 501)
    reply = {"model": body["model"], "embeddings": [vector(text) for text in texts]}
    if texts:
        reply |= {"total_duration": 2 * MILLISECOND, "load_duration": MILLISECOND}
        reply |= {"prompt_eval_count": _count(texts)}
    return _reply(reply)


async def embeddings(request: Request) -> Response:
    body = await _bind(request, "api.EmbeddingRequest")
    _admit_embedder(body.get("model") or "", 500)
    return _reply({"embedding": vector(body.get("prompt") or "")})


async def v1_embeddings(request: Request) -> Response:
    body = await _bind(request, "openai.EmbedRequest")
    texts = _inputs(body)
    _admit_embedder(body.get("model") or "", 501)
    encode = _base64 if body.get("encoding_format") == "base64" else list
    data = [
        {"object": "embedding", "embedding": encode(vector(text)), "index": index}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": _count(texts), "total_tokens": _count(texts)}
    return _v1_reply({"object": "list", "data": data, "model": body["model"], "usage": usage})


def _base64(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def vector(text: str) -> list[float]:
    """Return `text` as a direction: each word is hashed into a dimension, in any case."""
    counts = [0.0] * DIMENSIONS
    for word in re.findall(r"[^\W_]+", text.casefold()):
        counts[zlib.crc32(word.encode(errors="replace")) % DIMENSIONS] += 1
    length = math.hypot(*counts) or 1.0
    return [round(count / length, 8) for count in counts]


def _inputs(body: Json) -> list[str]:
    given = body.get("input") or []
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "invalid input type")
    return texts


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, in any dialect: its words, joined, are the text.

    `heard` is how many words it was sent, `tool` the name of the one it calls.
    """

    words: tuple[str, ...] = ()
    heard: int = 0
    reason: str = "load"
    tool: str = ""

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.tool else self.reason


def _compose(body: Json, said: Said, limit: int, *, structured: bool) -> Answer:
    if not said:
        return Answer()
    heard = _count(text for _, text in said)
    if body.get("tools") and _asks_for_a_tool(said):
        return Answer((), heard, "stop", body["tools"][0]["function"]["name"])
    text = "I am the demo model. I was sent:" + "".join(f"\n[{role}] {text}" for role, text in said)
    if structured:
        text = json.dumps({"answer": text}, ensure_ascii=False)
    words = tuple(re.findall(r"\s*\S+|\s+", text))
    if 0 < limit < len(words):
        return Answer(words[:limit], heard, "length")
    return Answer(words, heard, "stop")


def _asks_for_a_tool(said: Said) -> bool:
    asked = [text for role, text in said if role == "user"][-1:]
    return said[-1][0] != "tool" and bool(re.search(r"\btool\b", "".join(asked), re.IGNORECASE))


def _turn(message: Json) -> tuple[str, str]:
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [part["text"] for part in parts if part["type"] == "text" and part["text"]]
    images = len(message.get("images") or []) + [part["type"] for part in parts].count("image_url")
    calls = len(message.get("tool_calls") or [])
    notes = _number(images, "image") + _number(calls, "tool call")
    return str(message.get("role") or "").lower(), " ".join(texts + notes)


def _number(count: int, thing: str) -> list[str]:
    return [f"({count} {thing}{'s' * (count > 1)})"] if count else []


def _count(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _call_id() -> str:
    return f"call_{random.randbytes(4).hex()}"


def _stamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _stream(pace: float, kind: str, frames: Iterator[bytes]) -> Response:
    async def paced() -> AsyncIterator[bytes]:
        wait = 0.0  # a sleep of 0 still lets each frame leave on its own
        for frame in frames:
            await asyncio.sleep(wait)
            yield frame
            wait = pace

    return StreamingResponse(paced(), headers={"content-type": kind})


def _reply(value: Json, status: int = 200) -> Response:
    return Response(_encode(value), status, {"content-type": "application/json; charset=utf-8"})


def _v1_reply(value: Json, status: int = 200) -> Response:
    return Response(_encode(value) + b"\n", status, {"content-type": "application/json"})


def _encode(value: Json) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(ESCAPES).encode()


async def _bind(request: Request, into: str) -> Json:
    # As Go reads it: any Content-Type, keys in any case, and what follows the value is ignored.
    text = (await request.body()).decode(errors="replace").lstrip(" \t\r\n")
    if not text:
        raise Malformed(400, "EOF" if into.startswith("openai.") else "missing request body")
    body = _decode(text)
    if body is None:
        return {}
    if not isinstance(body, dict):
        found = KINDS[type(body)]
        raise Malformed(400, f"json: cannot unmarshal {found} into Go value of type {into}")
    _check(body, into)
    return body


def _decode(text: str) -> Any:
    decoder = json.JSONDecoder(
        object_pairs_hook=lambda pairs: {key.lower(): value for key, value in pairs},
        parse_constant=_no_constant,
    )
    try:
        return decoder.raw_decode(text)[0]
    except json.JSONDecodeError as exc:
        raise Malformed(400, _syntax(exc)) from exc


def _no_constant(name: str) -> Any:
    raise Malformed(400, f"invalid character '{name[0]}' looking for beginning of value")


def _syntax(exc: json.JSONDecodeError) -> str:
    if exc.pos >= len(exc.doc) or exc.msg.startswith("Unterminated"):
        return "unexpected EOF"
    sign = chr(exc.doc[exc.pos].encode()[0])  # Go looks at bytes
    return f"invalid character '{sign}' {SYNTAX.get(exc.msg, 'in string literal')}"


def _check(body: Json, into: str) -> None:
    package, _, name = into.partition(".")
    for key, (kind, go_type) in FIELDS.items():
        _check_field(body.get(key), kind, f"{name}.{key} of type {go_type}")
    for message in body.get("messages") or []:
        _check_field(message, dict, f"{name}.messages of type api.Message")
        if package == "api":  # /v1 takes a list of parts as well
            where = f"{name}.messages.content of type string"
            _check_field(message.get("content"), str, where)


def _check_field(value: Any, kind: type, where: str) -> None:
    if value is not None and not isinstance(value, kind):
        found = KINDS[type(value)]
        raise Malformed(400, f"json: cannot unmarshal {found} into Go struct field {where}")


def _required(model: str | None) -> str:
    if not model:
        raise Refused(400, "model is required")
    return model


def _admit(model: str, verb: str) -> None:
    if _full(model) not in CAPABILITIES:
        raise Refused(404, f"model '{model}' not found")
    if verb and "completion" not in CAPABILITIES[_full(model)]:
        raise Refused(400, f'"{model}" does not support {verb}')


def _admit_embedder(model: str, status: int) -> None:
    if _full(model) not in CAPABILITIES:
        raise Refused(404, f'model "{model}" not found, try pulling it first')
    if "embedding" not in CAPABILITIES[_full(model)]:
        why = "This server does not support embeddings. Start it with `--embeddings`"
        raise Refused(status, why)


def _full(model: str) -> str:
    return model if ":" in model else f"{model}:latest"


class Refused(Exception):
    """A request that Ollama answers with `status` and an error of this text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Malformed(Refused):
    """Refused before it reached the model; on /v1 another writer says so, without a newline."""


async def refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refused)
    if not request.url.path.startswith("/v1/"):
        return _reply({"error": str(exc)}, exc.status)
    types = {400: "invalid_request_error", 404: "not_found_error"}
    error = {"message": str(exc), "type": types.get(exc.status, "api_error")}
    reply = _reply if isinstance(exc, Malformed) else _v1_reply
    return reply({"error": {**error, "param": None, "code": None}}, exc.status)


async def not_found(request: Request, exc: Exception) -> Response:
    path = request.url.path.removesuffix("/")
    if path in {route.path for route in request.app.routes}:
        return Response(status_code=307, headers={"location": path})
    return Response("404 page not found", 404, {"content-type": "text/plain"})


async def not_allowed(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException) and exc.headers
    allow = ", ".join(sorted(exc.headers["Allow"].split(", "), reverse=True))
    headers = {"allow": allow, "content-type": "text/plain"}
    return Response("405 method not allowed", 405, headers)
