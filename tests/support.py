"""What tests are made of: a scripted upstream, a proxy on a real socket, and plugins on disk."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

import demo
import osp
from kernel.config import Config, UpstreamConfig, build
from kernel.server import SETTINGS

TURN = {"model": "demo", "messages": [{"role": "user", "content": "why is the sky blue?"}]}


def turn(text: str, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat in which the user says `text`."""
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}


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
    upstream: str, plugins: Path, data: Path | None = None, **sections: Mapping[str, Any]
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a proxy before `upstream` with the agents in `plugins`, and yield a client of it.

    `sections` are tables as in osp.toml.
    """
    config = build(Config, sections, "test", plugins)
    server = replace(config.server, data=data or plugins.parent / "data")
    dirs = replace(config.plugins, dirs=(plugins,))
    ollama = UpstreamConfig(url=upstream)
    app = osp.create_app(replace(config, server=server, plugins=dirs, upstream=ollama))
    async with (
        demo.serve(app, **SETTINGS) as url,
        httpx.AsyncClient(base_url=url, timeout=10) as client,
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
    head: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], Any] | None = None
    steps: tuple[Any, ...] = ()

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
        self.steps = steps
        self.before = before

    async def pause(self) -> None:
        await self.go.wait()

    async def breaks(self) -> None:
        raise ConnectionAbortedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["path"] == "/api/version":  # the proxy asks at its start
            return await JSONResponse({"version": "0.0.0"})(scope, receive, send)
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
        await send(self.head)
        for step in self.steps:
            if callable(step):
                await step()
            else:
                await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
    """Return the joined text of an answer, streamed or whole, in either dialect."""
    text = ""
    for part in body.decode().split("\n"):
        part = part.removeprefix("data: ")
        if part.startswith("{"):
            chunk = json.loads(part)
            choice = (chunk.get("choices") or [{}])[0]
            message = chunk.get("message") or choice.get("delta") or choice.get("message") or {}
            text += message.get("content") or ""
    return text
