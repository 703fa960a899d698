"""Clients that leave, in every phase of every path: who is told, and what no longer happens."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import pytest

from tests import support
from tests.support import DONE, done, event, line, turn
from tests.test_faults import (
    CHUNKED,
    STATUS,
    House,
    Reader,
    Writer,
    body_after,
    built,
    connection,
    stream_type,
    until,
)

Texts: TypeAlias = list[str]

WAITS = """
class Waits(BaseAgent):
    async def {hook}(self, *given):
        self.context.log.info("began")
        try:
            {waits}
        except asyncio.CancelledError:
            self.context.log.info("cancelled")
            raise
        return given[0] if given else ""
"""
LATER = """
class Later(BaseAgent):
    async def {hook}(self, *given):
        self.context.log.info("later")
        return given[0] if given else ""
"""
FOREVER = "await asyncio.Event().wait()"
ASKS = 'await self.context.chat([{"role": "user", "content": "x"}])'
EMBEDS = 'await self.context.embed(["x"])'
HOOKS = ["on_request", "on_response", "on_chunk", "on_end"]
AGENTS = {
    **{f"waits-{hook}": WAITS.format(hook=hook, waits=FOREVER) for hook in HOOKS},
    **{f"later-{hook}": LATER.format(hook=hook) for hook in HOOKS},
    **{f"asks-{hook}": WAITS.format(hook=hook, waits=ASKS) for hook in HOOKS[:2]},
    **{f"embeds-{hook}": WAITS.format(hook=hook, waits=EMBEDS) for hook in HOOKS[:2]},
    "waits-on_tool": WAITS.format(hook="on_tool", waits=FOREVER) + '    tools = [{"name": "w"}]',
    "passes": "class Passes(BaseAgent):\n    async def on_chunk(self, text):\n        return text",
}

BODY = b'{"model":"x"}'
CHATS = ["/api/chat", "/v1/chat/completions"]
KINDS: dict[str, tuple[str, str, bytes]] = {
    "pass-through": ("POST", "/api/pull", BODY),
    "tags": ("GET", "/api/tags", b""),
    "generate": ("POST", "/api/generate", BODY),
    "completions": ("POST", "/v1/completions", BODY),
    "embed": ("POST", "/api/embed", BODY),
    "embeddings": ("POST", "/v1/embeddings", BODY),
    **{path: ("POST", path, json.dumps(turn("x")).encode()) for path in CHATS},
    **{
        f"{path}, an agent": ("POST", path, json.dumps(turn("/passes x")).encode())
        for path in CHATS
    },
}


class Watched:
    """The log of the proxy and of its agents."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        """Path and outcome of each request that has ended."""
        records = [record for record in self.caplog.records if record.name == "kernel.log"]
        fields: list[dict[str, Any]] = [getattr(record, "fields") for record in records]  # noqa: B009
        return [(each["path"], each["outcome"]) for each in fields]

    @property
    def said(self) -> Texts:
        """What the agents have said."""
        records = self.caplog.records
        return [each.getMessage() for each in records if each.name.startswith("plugins.")]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Watched:
    caplog.set_level(logging.INFO)
    return Watched(caplog)


@pytest.fixture(scope="module")
async def one_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with built(tmp_path_factory.mktemp("hangups"), **AGENTS) as house:
        yield house


@pytest.fixture
async def house(one_house: House) -> House:
    """A house in which nobody speaks yet."""
    await one_house.hang_up()
    return one_house


class Holding:
    """An upstream that begins an answer and holds the connection, or has said all of it."""

    def __init__(self, begin: bytes = b"", *, complete: bool = False) -> None:
        self.begin = begin
        self.complete = complete
        self.arrived: Texts = []
        self.open: Texts = []

    async def __call__(self, reader: Reader, writer: Writer, head: bytes) -> None:
        path = head.split(b" ")[1].decode()
        self.arrived.append(path)
        self.open.append(path)
        try:
            await body_after(reader, head)
            writer.write(self.begin)
            while not self.complete and await reader.read(2**16):
                pass
        finally:
            self.open.remove(path)


def request(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if body:
        head += f"Content-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def streamed(path: str, *frames: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(frame), frame) for frame in frames)
    return STATUS + b"Content-Type: %s\r\n" % stream_type(path) + CHUNKED + chunks


def whole(path: str) -> bytes:
    data = support.whole(CHATS[1] if path.startswith("/v1/") else CHATS[0], "some text")
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
    return STATUS + head + data


async def is_left(house: House, log: Watched, upstream: Holding, path: str) -> None:
    """Within a second the upstream is closed, and the log says why the request has ended."""
    await until(lambda: log.outcomes and not upstream.open, 1)
    assert log.outcomes == [(path, "client_closed")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["headers", "a stream", "a whole answer"])
async def test_leaving_while_it_waits_for_an_answer_closes_the_upstream_and_is_logged(
    house: House, log: Watched, phase: str, kind: str
) -> None:
    method, path, body = KINDS[kind]
    if phase == "a stream" and "chat" in path:
        body = json.dumps(json.loads(body) | {"stream": True}).encode()
    first = event("Hel") if path.startswith("/v1/") else line("Hel")
    begin = {"headers": b"", "a stream": streamed(path, first), "a whole answer": whole(path)[:-3]}
    house.serve = upstream = Holding(begin[phase])

    async with connection(house.url) as (reader, writer):
        writer.write(request(method, path, body))
        await until(lambda: upstream.open)
        if phase == "a stream":
            await reader.readuntil(first)

    await is_left(house, log, upstream, path)


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tags"])
async def test_leaving_in_an_upload_closes_the_upstream_and_is_logged(
    house: House, log: Watched, kind: str, framing: str
) -> None:
    _, path, body = KINDS[kind]
    collected = path in CHATS
    house.serve = upstream = Holding()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    framed = b"Content-Length: 99\r\n\r\n" if framing == "length" else CHUNKED + b"63\r\n"

    async with connection(house.url) as (_, writer):
        writer.write(head + framed + body)
        if not collected:
            await until(lambda: upstream.open)

    await is_left(house, log, upstream, path)
    assert upstream.arrived == ([] if collected else [path])


BEFORE = {"waits": [], "asks": ["/api/chat"], "embeds": ["/api/embed"]}  # and where it asks
AFTER = [*(f"waits-{hook}" for hook in HOOKS[1:]), "asks-on_response"]


@pytest.mark.parametrize("agent", BEFORE)
@pytest.mark.parametrize("path", CHATS)
async def test_leaving_in_a_request_hook_cancels_it_closes_what_it_asks_and_starts_no_other(
    house: House, log: Watched, path: str, agent: str
) -> None:
    house.serve = upstream = Holding()
    body = json.dumps(turn(f"/{agent}-on_request /later-on_request x")).encode()

    async with connection(house.url) as (_, writer):
        writer.write(request("POST", path, body))
        await until(lambda: log.said and upstream.open == BEFORE[agent])

    await is_left(house, log, upstream, path)
    await until(lambda: len(log.said) > 1)  # it is told when the request has ended already
    assert log.said == ["began", "cancelled"]
    assert upstream.arrived == BEFORE[agent]


async def test_leaving_while_tools_run_cancels_all_of_them(house: House, log: Watched) -> None:
    call = {"function": {"name": "w", "arguments": {}}}
    begin = streamed(CHATS[0], line("a", message={"tool_calls": [call, call]}), done())
    house.serve = upstream = Holding(begin + b"0\r\n\r\n", complete=True)
    body = json.dumps(turn("/waits-on_tool x")).encode()

    async with connection(house.url) as (reader, writer):
        writer.write(request("POST", CHATS[0], body))
        await reader.readuntil(line("a"))
        await until(lambda: log.said == ["began", "began"])

    await is_left(house, log, upstream, CHATS[0])
    await until(lambda: log.said == ["began", "began", "cancelled", "cancelled"])
    assert upstream.arrived == [CHATS[0]]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("agent", AFTER)
@pytest.mark.parametrize("path", CHATS)
async def test_leaving_in_a_response_hook_cancels_it_closes_all_and_starts_no_other(
    house: House, log: Watched, path: str, agent: str, stream: bool
) -> None:
    frames = [event("a"), event("", "stop"), DONE] if path == CHATS[1] else [line("a"), done()]
    begin = streamed(path, *frames) if stream else whole(path)
    answered, asked = Holding(begin, complete=not stream), Holding()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        await (asked if answered.arrived else answered)(reader, writer, head)

    house.serve = serve
    later = "/later-" + agent.partition("-")[2]
    body = json.dumps(turn(f"/{agent} {later} x", stream=stream)).encode()
    async with connection(house.url) as (_, writer):
        writer.write(request("POST", path, body))
        await until(lambda: log.said and len(asked.open) == agent.startswith("asks"))

    await is_left(house, log, asked, path)
    await is_left(house, log, answered, path)
    await until(lambda: len(log.said) > 1)  # it is told when the request has ended already
    assert log.said == ["began", "cancelled"]
