"""A stand-in for Ollama: for `python osp.py --demo`, and for the tests.

It answers as Ollama 0.33 does, in all its dialects and on the endpoints for models. There is no
model behind it. `demo` repeats the messages it was sent, so that you see what an agent did to them;
`demo-embed` turns the words of a text into a vector, so that texts that share words are near one
another.

`demo.json` holds the answers as a real Ollama was seen to give them, with holes: a text like
"$text" is filled in, and a key that begins with ... adds all the keys of its object. This file
imports nothing of ours. Read it downwards: the server, the endpoints, one chat, how a request is
read.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

SHAPES = Path(__file__).with_suffix(".json")
VERSION = "0.33.0-demo"  # numbers first: some clients compare it
DIMENSIONS = 256
# Go's encoder escapes what a browser could misread; its strings hold no lone surrogates.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
ESCAPES |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
DECODER = json.JSONDecoder(parse_constant=int)  # int("NaN") raises ValueError, as it must

Json = dict[str, Any]
Said = list[tuple[str, str]]  # role and text of each message


@asynccontextmanager
async def serve(
    app: ASGIApp, host: str = "127.0.0.1", port: int = 0, **options: Any
) -> AsyncIterator[str]:
    """Run `app` inside the running loop; yield its base URL once it accepts connections.

    Port 0 is any free one; `options` are uvicorn's. Raises OSError where the port is taken,
    RuntimeError where the app fails to start. On the way out, open answers have one second.
    """
    quiet: Json = {"log_config": None, "log_level": "warning", "access_log": False}
    quiet |= {"server_header": False, "proxy_headers": False, "ws": "none"}
    quiet |= {"timeout_keep_alive": 75, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, **quiet | options))
    with socket.create_server((host, port)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it
        async with _running(server, listener):
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
        await _stop(server)


async def _stop(server: uvicorn.Server) -> None:
    # As Server.shutdown() does it, which sleeps for 0.1 seconds or more: a test stops two of these.
    state = server.server_state
    end = time.monotonic() + (server.config.timeout_graceful_shutdown or 0)
    for listener in server.servers:
        listener.close()
    for connection in list(state.connections):
        connection.shutdown()
    while (state.connections or state.tasks) and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for task in state.tasks:
        task.cancel()
    await server.lifespan.shutdown()


def create_app(pace: float = 0.0) -> Starlette:
    """Return a stand-in with models of its own; `pace` is the seconds between two frames."""
    ollama = Ollama(pace)
    routes = [
        _route("HEAD GET", "/", lambda _: Response("Ollama is running", media_type="text/plain")),
        _route("HEAD GET", "/api/version", lambda _: native({"version": VERSION})),
        _route("HEAD GET", "/api/tags", lambda _: native({"models": ollama.all("$card")})),
        _route("GET", "/api/ps", lambda _: native({"models": ollama.all("$loaded")})),
        _route("POST", "/api/show", ollama.show),
        _route("POST", "/api/create", ollama.create),
        _route("DELETE", "/api/delete", ollama.delete),
        _route("GET", "/v1/models", ollama.v1_models),
        _route("GET", "/v1/models/{model}", ollama.v1_model),
    ]
    routes += [_route("POST", path, partial(ollama.embed, path)) for path in EMBEDDERS]
    routes += [_route("POST", path, partial(ollama.chat, path)) for path in CHATS]
    app = Starlette(routes=routes, exception_handlers={Refused: _refused, 404: _plain, 405: _plain})
    app.router.redirect_slashes = False
    return app


def _route(methods: str, path: str, answer: Callable[[Json], Response]) -> Route:
    async def endpoint(request: Request) -> Response:
        sent = request.method in ("POST", "DELETE")
        try:
            return answer(await _read(request) if sent else request.path_params)
        except (TypeError, ValueError, LookupError, AttributeError) as exc:
            raise Refused(400, f"json: {exc}", early=True) from exc

    route = Route(path, endpoint, methods=methods.split(), name=path)
    route.methods = set(methods.split())  # Starlette lets HEAD in with every GET, Ollama does not
    return route


class Ollama:
    """The endpoints: each takes the body of a request and returns the answer.

    `models` has the values that fill the holes of demo.json, by the model's name in small letters.
    """

    def __init__(self, pace: float) -> None:
        self.pace, self.shapes = pace, json.loads(SHAPES.read_text(encoding="utf-8"))
        self.models: dict[str, Json] = {}
        empty = {"$system": "", "$template": "{{ .Prompt }}", "$parameters": {}}
        self.keep("demo:latest", "", empty, ["completion", "tools", "vision"])
        self.keep("demo-embed:latest", "", empty, ["embedding"])

    def keep(self, name: str, parent: str, settings: Json, capabilities: list[str]) -> None:
        """Add a model; `settings` has the $system, $template and $parameters that it was given."""
        made, content = datetime.now(UTC), json.dumps([parent or name, settings]).encode()
        model = {**settings, "$name": name, "$parent": parent, "$capabilities": capabilities}
        model |= {"$digest": f"{zlib.crc32(content):064x}", "$modified": stamp(made)}
        model |= {"$created": int(made.timestamp()), "$modelfile": f"FROM {parent or name}\n"}
        model["$num_ctx"] = settings["$parameters"].get("num_ctx", 4096)
        self.models[name.lower()] = model

    def find(self, name: str, error: str = "model '{}' not found") -> Json:
        if model := self.models.get(full(name).lower()):
            return model
        raise Refused(404, error.format(name))

    def fill(self, shape: Any, values: Json) -> Any:
        """Return a shape of demo.json with its holes filled."""
        if isinstance(shape, str) and shape.startswith("$"):
            return values[shape] if shape in values else self.fill(self.shapes[shape], values)
        if isinstance(shape, list):
            return [self.fill(part, values) for part in shape]
        if not isinstance(shape, dict):
            return shape
        filled: Json = {}
        for key, part in shape.items():
            value = self.fill(part, values)
            filled |= value if key.startswith("...") else {key: value}
        return filled

    def all(self, shape: str) -> list[Json]:
        return [self.fill(shape, model) for model in self.models.values()]

    def show(self, body: Json) -> Response:
        model = self.find(full(named(body)))
        lines = "\n".join(f"{k:<30} {json.dumps(v)}" for k, v in model["$parameters"].items())
        shown = self.fill("$show", model | {"$lines": lines})
        return native({key: value for key, value in shown.items() if value})

    def create(self, body: Json) -> Response:
        name, parent = full(named(body)), full(body.get("from") or "")
        if not (base := self.models.get(parent.lower())):  # Ollama would try to pull it
            raise Refused(500, "pull model manifest: file does not exist")
        settings = {f"${key}": body.get(key) or base[f"${key}"] for key in ("system", "template")}
        settings["$parameters"] = base["$parameters"] | (body.get("parameters") or {})
        self.keep(name, parent, settings, base["$capabilities"])
        if body.get("stream") is False:
            return v1({"status": "success"})
        layer = f"using existing layer sha256:{base['$digest']}"
        return self.stream({"status": step} for step in (layer, "writing manifest", "success"))

    def delete(self, body: Json) -> Response:
        if not self.find(named(body))["$parent"]:
            raise Refused(403, "the demo's own models stay")
        del self.models[full(named(body)).lower()]
        return Response()

    def v1_models(self, body: Json) -> Response:
        return v1({"object": "list", "data": self.all("$v1_card")})

    def v1_model(self, body: Json) -> Response:
        return v1(self.fill("$v1_card", self.find(full(body["model"])) | {"$name": body["model"]}))

    def embed(self, path: str, body: Json) -> Response:
        """Answer on any of the paths of EMBEDDERS."""
        given = body.get("input") or body.get("prompt") or []
        texts = [given] if isinstance(given, str) else given
        self.find(named(body), 'model "{}" not found, try pulling it first')
        vectors = [vector(text) for text in texts]
        data = [{"object": "embedding", "embedding": v, "index": i} for i, v in enumerate(vectors)]
        values = {"$model": body["model"], "$heard": count(texts), "$data": data}
        values |= {"$embeddings": vectors, "$vector": (vectors or [vector("")])[0]}
        reply = self.fill(self.shapes[path], values)
        return v1(reply) if path == "/v1/embeddings" else native(reply)

    def chat(self, path: str, body: Json) -> Response:
        """Answer on any of the paths of CHATS, streamed or whole."""
        said, own = read(path, body), path.startswith("/api/")
        unload = own and not said and body.get("keep_alive") in (0, "0", "0s", "0m")
        model = self.find(named(body))
        if not unload and "completion" not in model["$capabilities"]:
            raise Refused(400, f'"{body["model"]}" does not support chat')
        if said and model["$system"] and said[0][0] != "system":
            said = [("system", model["$system"]), *said]
        words, tool, reason = compose(body, said, model["$parameters"])
        values = values_of(body, said, words, tool) | {"$reason": "unload" if unload else reason}
        spent = 2_000_000 + int(len(words) * self.pace * 1e9)  # nanoseconds
        values |= {"$lasted": spent, "$took": spent + 2_000_000}
        values["$stop_reason"] = self.shapes["stop_reasons"].get(reason, "stop_sequence")
        shapes = self.shapes[path]
        shape = shapes["tool" if tool else "text" if words else "none"]
        if (body.get("stream") is False or not said) if own else not body.get("stream"):
            whole = self.fill(shape["whole"], values | {"$stamp": stamp(datetime.now(UTC))})
            return native(whole) if own else v1(whole)
        usage = [shapes["usage"]] if (body.get("stream_options") or {}).get("include_usage") else []
        repeated = words[1:] if path == "/v1/chat/completions" else words
        return self.stream(self.frames(shape["stream"] + usage, values, repeated), path)

    def frames(self, shapes: list[Any], values: Json, words: list[str]) -> Iterator[Json]:
        pairs = [(s, w) for s in shapes for w in (words if '"$word"' in json.dumps(s) else [""])]
        for number, (shape, word) in enumerate(pairs):
            fresh = {"$word": word, "$number": number, "$stamp": stamp(datetime.now(UTC))}
            yield self.fill(shape, values | fresh)

    def stream(self, frames: Iterable[Json], path: str = "/api/create") -> Response:
        async def paced() -> AsyncIterator[bytes]:
            for frame in frames:
                yield framed(frame, path)
                await asyncio.sleep(self.pace)  # also 0 lets each frame leave on its own
            if path in ("/v1/chat/completions", "/v1/completions"):
                yield b"data: [DONE]\n\n"

        if path.startswith("/api/"):
            return StreamingResponse(paced(), headers={"content-type": "application/x-ndjson"})
        cache = {"cache-control": "no-cache"} if path in BLOCKS else {}
        return StreamingResponse(paced(), headers={**cache, "content-type": "text/event-stream"})


def framed(frame: Json, path: str) -> bytes:
    if path.startswith("/api/"):
        return encode(frame) + b"\n"
    event = f"event: {frame['type']}\n" if "type" in frame else ""
    # Ollama makes the events of /v1/responses of maps: their keys are sorted.
    return event.encode() + b"data: " + encode(frame, path == "/v1/responses") + b"\n\n"


def compose(body: Json, said: Said, parameters: Json) -> tuple[list[str], str, str]:
    """Return the words of an answer, the name of the tool that it calls, and why it ends."""
    if not said:
        return [], "", "load"
    asked = "".join([text for role, text in said if role == "user"][-1:])
    if body.get("tools") and said[-1][0] != "tool" and re.search(r"(?i)\btool\b", asked):
        tool = body["tools"][0]
        return [], tool.get("function", tool)["name"], "stop"
    text = "I am the demo model. I was sent:" + "".join(f"\n[{role}] {text}" for role, text in said)
    wanted = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    if body.get("format") or wanted.get("type", "text") != "text":
        text = json.dumps({"answer": text}, ensure_ascii=False)
    words = re.findall(r"\s*\S+|\s+", text)
    options = parameters | (body.get("options") or {})
    limits = body.get("max_tokens"), body.get("max_output_tokens"), options.get("num_predict")
    limit = next(filter(None, limits), 0)
    return (words[:limit], "", "length") if 0 < limit < len(words) else (words, "", "stop")


def values_of(body: Json, said: Said, words: list[str], tool: str) -> Json:
    heard, spoken, n = count(text for _, text in said), len(words), random.randrange(10**9)
    keys = ("type", "name", "description", "strict", "parameters")
    echoed = ("instructions", "text", "top_p", "temperature", "reasoning", "max_output_tokens")
    values: Json = {"model": body["model"], "text": "".join(words), "tool": tool}
    values |= {"first": "".join(words[:1]), "now": int(datetime.now(UTC).timestamp())}
    values |= {"heard": heard, "spoken": spoken, "total": heard + spoken}
    values |= {"context": list(range(heard + spoken)), "call": f"call_{n}", "msg_id": f"msg_{n}"}
    values |= {"chat_id": f"chatcmpl-{n}", "completion_id": f"cmpl-{n}", "response_id": f"resp_{n}"}
    values["item_id"] = f"fc_{n}" if tool else f"msg_{n}"
    values["tools"] = [{key: tool.get(key) for key in keys} for tool in body.get("tools") or []]
    values["echo"] = {key: body[key] for key in echoed if body.get(key) is not None}
    return {f"${key}": value for key, value in values.items()}


EMBEDDERS = ("/api/embed", "/api/embeddings", "/v1/embeddings")
BLOCKS = ("/v1/messages", "/v1/responses")  # parts of a message are joined without a space
CHATS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", *BLOCKS)
NEEDED = {
    "/v1/chat/completions": {"messages": "[] is too short - 'messages'"},
    "/v1/messages": {
        "model": "model is required",
        "max_tokens": "max_tokens is required and must be positive",
        "messages": "messages is required",
    },
}


def read(path: str, body: Json) -> Said:
    """Return role and text of each message, which dialects keep under several names."""
    for key, error in NEEDED.get(path, {}).items():
        if not body.get(key):
            raise Refused(400, error, early=True)
    items = body.get("messages") or body.get("input") or body.get("prompt") or []
    if isinstance(items, str):
        items = [{"role": "user", "content": items, "images": body.get("images")}]
    system = body.get("system") or body.get("instructions")
    if items and system:
        items = [{"role": "system", "content": system}, *items]
    glue = "" if path in BLOCKS else " "
    return [turn for item in items for turn in turns(lowered(item), glue) if turn[1] or glue]


def turns(message: Json, glue: str) -> Said:
    """Return what a message says: results of tools first, then its text, images and calls."""
    found = parts(message.get("output") or message.get("content"))
    results = [part for part in found if part["type"] == "tool_result"]
    said = [("tool", glue.join(texts(parts(part.get("content"))))) for part in results]
    images = len(message.get("images") or []) + sum("image" in part["type"] for part in found)
    calls = len(message.get("tool_calls") or []) + sum(p["type"] == "tool_use" for p in found)
    calls += message.get("type") == "function_call"
    words = [glue.join(texts(found)), number(images, "image"), number(calls, "tool call")]
    other = {"function_call": "assistant", "function_call_output": "tool"}
    role = message.get("role") or other.get(message.get("type", ""), "")
    return [*said, (role.lower(), " ".join(filter(None, words)))] if role else said


def texts(found: list[Json]) -> list[str]:
    return [part["text"] for part in found if part["type"].endswith("text") and part["text"]]


def parts(content: Any) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def number(count: int, thing: str) -> str:
    return f"({count} {thing}{'s' * (count > 1)})" if count else ""


def count(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)


def vector(text: str) -> list[float]:
    """Return `text` as a direction: each word is hashed into a dimension, in any case."""
    counts = [0.0] * DIMENSIONS
    for word in re.findall(r"[^\W_]+", text.casefold()):
        counts[zlib.crc32(word.encode(errors="replace")) % DIMENSIONS] += 1
    length = math.hypot(*counts) or 1.0
    return [round(count / length, 8) for count in counts]


def stamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def full(model: str) -> str:
    return model if ":" in model else f"{model}:latest"


def named(body: Json, early: bool = False) -> str:
    if name := body.get("model") or body.get("name"):
        return str(name)
    raise Refused(400, "model is required", early)


def native(value: Json, status: int = 200) -> Response:
    return Response(encode(value), status, {"content-type": "application/json; charset=utf-8"})


def v1(value: Json, status: int = 200) -> Response:
    return Response(encode(value) + b"\n", status, {"content-type": "application/json"})


def encode(value: Json, sort_keys: bool = False) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)
    return text.translate(ESCAPES).encode()


async def _read(request: Request) -> Json:
    # As Go reads it: any Content-Type, keys in any case, and what follows the value is ignored.
    text = (await request.body()).decode(errors="replace").lstrip(" \t\r\n")
    if not text:
        v1 = request.url.path.startswith("/v1/")
        raise Refused(400, "EOF" if v1 else "missing request body", early=True)
    return lowered(DECODER.raw_decode(text)[0] or {})


def lowered(value: Json) -> Json:
    return {key.lower(): field for key, field in value.items()}


class Refused(Exception):
    """A request that Ollama answers with `status` and an error of this text.

    `early`: before it reached the model; on /v1 another writer says so, without a newline.
    """

    def __init__(self, status: int, message: str, early: bool = False) -> None:
        super().__init__(message)
        self.status, self.early = status, early


async def _refused(request: Request, exc: Any) -> Response:
    path = request.url.path
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(exc.status, "api_error")
    body: Json = {"error": str(exc)}
    if path == "/v1/messages":
        error = {"type": kind, "message": str(exc)}
        body = {"type": "error", "error": error, "request_id": f"req_{random.randbytes(12).hex()}"}
    elif path.startswith("/v1/"):
        body = {"error": {"message": str(exc), "type": kind, "param": None, "code": None}}
    return v1(body, exc.status) if "v1" in path and not exc.early else native(body, exc.status)


async def _plain(request: Request, exc: Any) -> Response:
    """Answer 404 and 405 as Ollama's router does."""
    headers = {"content-type": "text/plain"}
    if exc.status_code == 404:
        return Response("404 page not found", 404, headers)
    allow = ", ".join(sorted(exc.headers["Allow"].split(", "), reverse=True))
    return Response("405 method not allowed", 405, {"allow": allow, **headers})
