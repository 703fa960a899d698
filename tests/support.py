"""What tests are made of: a scripted upstream, a proxy on a real socket, and plugins on disk."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

import demo
import osp
from kernel.agent import Schema, Store
from kernel.config import HOME, Config, build
from kernel.dialects import AnswerState, Dialect
from kernel.dialects.calls import ToolCall
from kernel.dialects.every import DIALECTS
from kernel.server import SETTINGS

OpenStore = Callable[[str, Schema], Store]  # of an agent
BY_PATH = {dialect.path: dialect for dialect in DIALECTS}
PATHS = list(BY_PATH)
CHAT, COMPLETIONS, MESSAGES, RESPONSES = PATHS
HEADS = {path: dialect.head({"model": "m"}) for path, dialect in BY_PATH.items()}
SENT = "I am the demo model. I was sent:\n"  # how the demo's answer begins
NOT_FOUND = {"type": "http.response.start", "status": 404, "headers": []}
NOTICE = "\n\n[without {}: it failed, the proxy's log says why]"
# What hooks of `House.add` do; NAME is the agent's
TAG = "set_prompt(payload, prompt(payload) + ' <NAME')"
ADDS = "add_context(payload, 'NAME')"
ANSWER = "response + ' NAME>'"


def turn(text: str, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat in which the user says `text`."""
    return {"model": "demo", "messages": [message("user", text)], **fields}


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def chat(path: str, *messages: Any, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat in a dialect: of messages, or of what the user says in one."""
    key = "input" if path == RESPONSES else "messages"
    listed = [m if isinstance(m, dict) else message("user", m) for m in messages]
    limit = {"max_tokens": 999} if path == MESSAGES else {}
    return {"model": "demo", key: listed, **limit, **fields}


def parts(path: str, *texts: Any) -> list[Any]:
    """Return the parts of a message in a dialect; what is no text stays as it is."""
    kind = "input_text" if path == RESPONSES else "text"
    return [{"type": kind, "text": text} if isinstance(text, str) else text for text in texts]


def prompts(asked: Asked) -> list[Any]:
    """Return the contents of the messages that the upstream got."""
    messages = asked.json.get("messages", asked.json.get("input"))
    return [each.get("content") for each in messages]


def frames(path: str, *texts: str) -> list[bytes]:
    """Return a stream that says `texts`, each in a frame, as the upstream sends it."""
    dialect, head = BY_PATH[path], HEADS[path]
    at = next(n for n, chunk in enumerate(dialect.speech(head, "x")) if dialect.places(chunk))
    chunks = [timeless(chunk) for chunk in dialect.speech(head, "".join(texts))]
    chunks[at : at + 1] = [dialect.piece(chunks[at], text) for text in texts]
    return [*encoded(dialect, chunks), *filter(None, [dialect.done()])]


def encoded(dialect: Dialect, chunks: list[Any]) -> list[bytes]:
    """Return the frames of a stream, numbered."""
    state = AnswerState({})
    for chunk in chunks:
        dialect.settle(chunk, state)
    return [*map(dialect.encode, chunks)]


def whole(path: str, text: str) -> bytes:
    """Return an answer in one piece."""
    return BY_PATH[path].encode_whole(timeless(BY_PATH[path].whole(HEADS[path], text)))


def calling(path: str, text: str, *calls: tuple[str, Any], stream: bool = True) -> bytes:
    """Return an answer that says `text` and calls tools: (name, arguments) each."""
    dialect = BY_PATH[path]
    made = [ToolCall(name, json.dumps(arguments)) for name, arguments in calls]
    if not stream:
        chunk = timeless(dialect.whole(HEADS[path], text))
        dialect.put(chunk, made)
        return dialect.encode_whole(chunk)
    chunks = [timeless(chunk) for chunk in dialect.speech(HEADS[path], text)]
    says = [chunk for chunk in chunks if dialect.places(chunk) or "index" in chunk]
    says += [chunk for chunk in chunks if path == RESPONSES and "response" not in chunk]
    at = next(n for n, chunk in enumerate(chunks) if dialect.ends(chunk))
    chunks[at:at] = dialect.call(chunks[0], made)
    kept = [chunk for chunk in chunks if text or chunk not in says]
    return b"".join([*encoded(dialect, kept), dialect.done()])


def timeless(chunk: dict[str, Any]) -> dict[str, Any]:
    """Return a chunk of an answer as if time stood still."""
    response = chunk.get("response", chunk)
    if response.get("completed_at"):
        response["completed_at"] = 7
    return chunk


def write_agent(folder: Path, name: str, code: str, **config: Any) -> Path:
    """Write a plugin: `code` is the body of agent.py, which has the whole contract imported."""
    plugin = folder / f"{name}_agent"
    plugin.mkdir(parents=True)
    head = "import asyncio\nfrom kernel.agent import *\n\n"
    (plugin / "agent.py").write_text(head + textwrap.dedent(code), encoding="utf-8")
    if config:
        (plugin / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return plugin


@asynccontextmanager
async def running(
    upstream: str,
    plugins: Path,
    /,
    data: Path | None = None,
    port: int = 0,
    **sections: Mapping[str, Any],
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a proxy before `upstream` with the agents in `plugins`, and yield a client of it.

    `port` 0 is any that is free; `sections` are tables as in osp.toml.
    """
    config = build(Config, sections, "test", plugins)
    server = replace(config.server, data=data or plugins.parent / "data")
    dirs = replace(config.plugins, dirs=(plugins,))
    ollama = replace(config.upstream, url=upstream)
    app = osp.create_app(replace(config, server=server, plugins=dirs, upstream=ollama))
    async with (
        demo.serve(app, port=port, **SETTINGS) as own,
        httpx.AsyncClient(base_url=own, timeout=10) as client,
    ):
        yield client


@dataclass
class Asked:
    """One request as the upstream got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FakeOllama:
    """An ASGI app that answers as it is told, and remembers what it was asked.

    A step is bytes to send, or a function to await first: `pause` waits for `go`, `breaks` breaks
    the connection off.
    """

    asked: list[Asked] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    head: dict[str, Any] = field(default_factory=lambda: {**NOT_FOUND})
    before: Callable[[], Any] | None = None
    steps: tuple[Any, ...] = ()
    script: list[tuple[Any, ...]] = field(default_factory=list)  # of requests that come in turn
    statuses: list[int] = field(default_factory=list)  # of their answers; then 200
    may_say: bool = True  # no test has said what it answers
    memory: dict[str, Any] = field(default_factory=lambda: {"models": []})  # of /api/ps
    looks: int = 0  # at it, by the proxy itself

    def answers(
        self,
        *steps: Any,
        status: int = 200,
        kind: str = "application/x-ndjson",
        headers: list[tuple[str, str]] | None = None,
        before: Callable[[], Any] | None = None,
    ) -> None:
        raw = [(k.encode(), v.encode()) for k, v in [("content-type", kind), *(headers or [])]]
        self.head = {"type": "http.response.start", "status": status, "headers": raw}
        self.steps, self.may_say = steps, False
        self.before = before

    def says(self, path: str, *texts: str, stream: bool = True) -> None:
        """Answer with a text, in frames or whole, in the dialect of `path`."""
        dialect = BY_PATH[path]
        kind = dialect.stream_type if stream else dialect.whole_type
        steps = frames(path, *texts) if stream else [whole(path, "".join(texts))]
        self.answers(*steps, kind=kind.decode())

    def says_in_turn(self, path: str, *rounds: bytes, stream: bool) -> None:
        """Answer each request with another body, the last one again and again."""
        dialect = BY_PATH[path]
        kind = dialect.stream_type if stream else dialect.whole_type
        self.answers(rounds[-1], kind=kind.decode())
        self.script = [(body,) for body in rounds]

    async def pause(self) -> None:
        await self.go.wait()

    async def breaks(self) -> None:
        raise ConnectionAbortedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        own = all(name != b"user-agent" for name, _ in scope["headers"])
        if own and scope["path"] in ("/api/version", "/api/tags"):  # the proxy asks at its start
            return await JSONResponse({"version": "0.0.0", "models": []})(scope, receive, send)
        if own and scope["path"] == "/api/ps":  # it wants to know the size of contexts
            self.looks += 1
            return await JSONResponse(self.memory)(scope, receive, send)
        await self.remember(scope, receive)
        answer = asyncio.create_task(self.answer(send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            self.disconnected.set()
            return
        leaving.cancel()
        answer.result()

    async def remember(self, scope: Scope, receive: Receive) -> None:
        body, more = b"", True
        query = scope["query_string"].decode()
        target = scope["raw_path"].decode() + (f"?{query}" if query else "")
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected.set()
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.asked.append(Asked(scope["method"], target, headers, body))
        self.arrived.set()

    async def answer(self, send: Send) -> None:
        if self.before:
            await self.before()
        status = self.statuses.pop(0) if self.statuses else self.head["status"]
        await send(self.head | {"status": status})
        for step in self.script.pop(0) if self.script else self.steps:
            if callable(step):
                await step()
            else:
                await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class House:
    """A proxy with the agents in `plugins`, and the scripted upstream behind it."""

    ollama: FakeOllama
    url: str
    plugins: Path

    def add(self, names: str, request: str = "", response: str = "", **config: Any) -> None:
        """Write agents: `request` are lines of code on `payload`, `response` is a new text."""
        code = "class It(BaseAgent):\n    'Is NAME.'\n"
        if request:
            lines = textwrap.indent(request, " " * 8)
            code += f"    async def on_request(self, payload):\n{lines}\n        return payload\n"
        if response:
            code += f"    async def on_response(self, response):\n        return {response}\n"
        for name in names.split():
            write_agent(self.plugins, name, code.replace("NAME", name), **config)

    def write(self, name: str, code: str, **config: Any) -> None:
        """Write an agent of which `code` is the class."""
        write_agent(self.plugins, name, code, **config)

    def link(self, *names: str) -> None:
        """Take agents that come with the project."""
        for name in names:
            (self.plugins / f"{name}_agent").symlink_to(HOME / f"plugins/{name}_agent")

    @property
    def sent(self) -> list[list[Any]]:
        """The contents of the messages in each request that `ollama` got."""
        return [prompts(asked) for asked in self.ollama.asked]

    def open(self, **sections: Any) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return running(self.url, self.plugins, **sections)

    async def ask(self, path: str, *messages: Any, **fields: Any) -> httpx.Response:
        """Send one chat; where `ollama` has nothing else to answer, it says "y"."""
        async with self.open() as client:
            return await self.post(client, path, *messages, **fields)

    async def post(
        self, client: httpx.AsyncClient, path: str, *messages: Any, **fields: Any
    ) -> httpx.Response:
        """Send one chat through a proxy that is open; `header` is its X-OSP-Agents."""
        header = fields.pop("header", None)
        body = chat(path, *messages, **fields)
        if self.ollama.may_say:
            self.ollama.says(path, "y", stream=BY_PATH[path].wants_stream(body))
            self.ollama.may_say = True
        headers = {} if header is None else {"x-osp-agents": header}
        return await client.post(path, json=body, headers=headers)


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def line(text: str, **more: Any) -> bytes:
    """Return one frame of /api/chat."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return dumped({"model": "m", "created_at": "t", "message": message, "done": False, **more})


def done(text: str = "", **more: Any) -> bytes:
    return line(text, **{"done": True, "done_reason": "stop", "eval_count": 7, **more})


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def event(text: str | None, finish: str | None = None, **delta: Any) -> bytes:
    """Return one frame of /v1/chat/completions."""
    content = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": {**delta, **content}, "finish_reason": finish}
    top = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
    return b"data: " + dumped(top) + b"\n"


DONE = b"data: [DONE]\n\n"


def said(body: bytes) -> str:
    """Return the joined text of an answer, streamed or whole, in any dialect."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n")]
    chunks = [json.loads(line) for line in lines if line.startswith("{")]
    places = [p for chunk in chunks for dialect in DIALECTS for p in dialect.places(chunk)]
    return "".join(holder[key] for holder, key in places)


def outcomes(answer: httpx.Response) -> str:
    """Return what X-OSP-Agents says, without the times: `rag;ok, translate;error`."""
    agents = answer.headers.get("x-osp-agents", "")
    return ", ".join(agent.rpartition(";")[0] for agent in agents.split(", "))
