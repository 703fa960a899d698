"""The answer on its way back: what agents change in a stream, and what nobody may change."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import (
    DONE,
    FakeOllama,
    done,
    dumped,
    event,
    line,
    running,
    said,
    turn,
    write_agent,
)

NDJSON, SSE = "application/x-ndjson", "text/event-stream"

HOLDS = """
class Holds(BaseAgent):
    async def on_response(self, response):
        return f"<{response}>"
"""
FLOWS = """
class Flows(BaseAgent):
    '''Doubles every x, and keeps back an x at the end of a piece until it knows more.'''
    held = ""

    async def on_chunk(self, text):
        text = self.held + text
        self.held = "x" if text.endswith("x") else ""
        return text.removesuffix(self.held).replace("x", "xx")

    async def on_end(self):
        return self.held.replace("x", "xx") + "."
"""
LISTS = """
class Lists(BaseAgent):
    async def on_end(self):
        return "\\nSources: a"
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    write_agent(plugins, "holds", HOLDS)
    write_agent(plugins, "flows", FLOWS)
    write_agent(plugins, "lists", LISTS)
    return plugins


async def stream(
    client: httpx.AsyncClient, text: str, path: str = "/api/chat", **more: Any
) -> bytes:
    answer = await client.post(path, json=turn(text, stream=True, **more))
    assert answer.status_code == 200
    return answer.content


def frames(body: bytes) -> list[Any]:
    return [json.loads(part) for part in body.decode().split("\n") if part]


async def test_held_text_leaves_before_the_end_in_a_copy_of_the_last_text_frame(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    last = line(" b", message={"thinking": "hm"}, logprobs=[1], other=2)
    ollama.answers(line("a"), last, done())

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/holds x")

    assert body == b"".join(
        [
            line(""),
            line("", message={"thinking": "hm"}, logprobs=[1], other=2),
            line("<a b>", other=2),
            done(),
        ]
    )


async def test_the_same_for_openai_whose_role_is_said_once(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    usage = b'data: {"model":"m","choices":[],"usage":{"total_tokens":3}}\n\n'
    ending = event(None, "stop")
    ollama.answers(event("a", role="assistant"), event(" b"), ending, usage, DONE, kind=SSE)

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/holds x", "/v1/chat/completions")

    expected = [event("", role="assistant"), event(""), event("<a b>"), ending, usage, DONE]
    assert body == b"".join(expected)


async def test_text_flows_through_on_chunk_and_what_was_kept_back_comes_at_the_end(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("ax"), line("xb"), line("x"), done())

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/flows q")

    assert body == b"".join([line("a"), line("xxxxb"), line(""), line("xx."), done()])


@pytest.mark.parametrize("typed", ["/flows", "/holds", "/flows /holds", "/holds /flows /lists"])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_the_joined_text_never_depends_on_how_it_was_split(
    ollama: FakeOllama, ollama_url: str, agents: Path, typed: str, path: str
) -> None:
    text = "xax\U0001f600 öx\u2028\u0085 x"
    encode = line if path == "/api/chat" else event
    ends = [done()] if path == "/api/chat" else [event(None, "stop"), DONE]
    results = set()

    async with running(ollama_url, agents) as client:
        for size in (1, 3, len(text)):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            kind = NDJSON if path == "/api/chat" else SSE
            ollama.answers(*map(encode, pieces), *ends, kind=kind)
            results.add(said(await stream(client, f"{typed} q", path)))
        whole = {"message": {"content": text}, "done": True}
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        body = whole if path == "/api/chat" else {"model": "m", "choices": [choice]}
        ollama.answers(dumped(body), kind="application/json")
        results.add(said((await client.post(path, json=turn(f"{typed} q"))).content))

    assert len(results) == 1 and results != {text}


async def test_frames_are_split_on_bytes_wherever_the_network_cut_them(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    body = line("aé\u2028") + line("x\U0001f600", other={"k": [1.5, 2**60]}) + done("", eval=12)
    results = set()

    async with running(ollama_url, agents) as client:
        for at in range(0, len(body), 7):
            ollama.answers(body[:at], body[at:])
            results.add(await stream(client, "/flows q"))

    assert [said(result) for result in results] == ["aé\u2028xx\U0001f600."]


async def test_frames_that_came_together_leave_together_and_none_is_empty(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("a") + line("b") + done())

    async with running(ollama_url, agents) as client:
        raw = await raw_answer(client, turn("/flows q"))

    assert [chunk.endswith(b"\n") for chunk in raw] == [True]
    assert len(raw[0].splitlines()) == 4


async def test_a_frame_does_not_wait_for_the_agent_that_works_on_the_next_one(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    code = """
    class Ponders(BaseAgent):
        async def on_chunk(self, text):
            await asyncio.sleep(30 if text == "b" else 0)  # the agent's, and never waited for
            return text.upper()
    """
    write_agent(plugins, "ponders", code)
    ollama.answers(line("a") + line("b"))

    async with running(ollama_url, plugins) as client:
        async with client.stream("POST", "/api/chat", json=turn("/ponders q")) as answer:
            first = await anext(answer.aiter_raw())

    assert said(first) == "A"


async def raw_answer(client: httpx.AsyncClient, body: Any) -> list[bytes]:
    """Return the chunks of a chunked answer as they stood on the wire."""
    host, port = client.base_url.host, client.base_url.port
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await reader.readuntil(b"\r\n\r\n")
    chunks = []
    while size := int(await reader.readline(), 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    writer.close()
    return chunks


async def test_thinking_and_unknown_frames_pass_at_once_and_unchanged(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    thinking = line("", message={"thinking": "let me see"})
    odd = b'{"model":"m", "strange":true}\n'
    ollama.answers(thinking, odd, b"no json\n", line("a"), done())

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/holds x")

    assert body.startswith(thinking + odd + b"no json\n" + line("") + line("<a>"))


@pytest.mark.parametrize("where", ["before done", "in done"])
async def test_tool_calls_survive_and_end_the_text(
    ollama: FakeOllama, ollama_url: str, agents: Path, where: str
) -> None:
    calls = {"tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": "x"}}}]}
    ends = [line("", message=calls), done()]
    if where == "in done":
        ends = [done(message=calls)]
    ollama.answers(line("a"), *ends)

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/holds x", tools=[{"type": "function"}])

    assert body == line("") + line("<a>") + b"".join(ends)


async def test_a_last_frame_with_text_keeps_its_numbers(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("all of it", total_duration=2**53 + 1))

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/holds /lists x")

    assert body == done("<all of it>\nSources: a", total_duration=2**53 + 1)


async def test_where_there_is_no_text_nothing_is_added(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done())

    async with running(ollama_url, agents) as client:
        assert await stream(client, "/holds /lists x") == done()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_an_error_in_a_stream_is_the_end_of_all_editing(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    hidden = b'data: {"model":"","choices":[{"index":0,"delta":{"content":""}}]}\n\n'
    error = b'{"error":"out of memory"}\n' if path == "/api/chat" else hidden
    first = line("a") if path == "/api/chat" else event("a")
    emptied = line("") if path == "/api/chat" else event("")
    ollama.answers(first, error, kind=NDJSON if path == "/api/chat" else SSE)

    async with running(ollama_url, agents) as client:
        assert await stream(client, "/holds /lists x", path) == emptied + error


async def test_a_stream_that_ends_without_done_has_ended(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("a"), line("b").rstrip())

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/holds x")

    assert body == line("") + line("").rstrip() + line("<ab>")


async def test_a_stream_that_breaks_stays_broken(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("a"), ollama.breaks)
    got = b""

    async with running(ollama_url, agents) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", "/api/chat", json=turn("/holds x")) as answer:
                async for chunk in answer.aiter_raw():
                    got += chunk

    assert got == line("")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"format": {"type": "object"}}, "/api/chat"),
        ({"logprobs": True}, "/api/chat"),
        ({"response_format": {"type": "json_object"}}, "/v1/chat/completions"),
    ],
)
async def test_where_an_edit_would_lie_response_hooks_step_aside(
    ollama: FakeOllama, ollama_url: str, agents: Path, fields: dict[str, Any], path: str
) -> None:
    frame = line("{}") if path == "/api/chat" else event("{}")
    ollama.answers(frame, kind=NDJSON if path == "/api/chat" else SSE)

    async with running(ollama_url, agents) as client:
        assert await stream(client, "/holds x", path, **fields) == frame


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"format": ""}, "/api/chat"),
        ({"format": None}, "/api/chat"),
        ({"response_format": {"type": "text"}}, "/v1/chat/completions"),
    ],
)
async def test_no_format_is_no_structured_output(
    ollama: FakeOllama, ollama_url: str, agents: Path, fields: dict[str, Any], path: str
) -> None:
    frame = line("a") if path == "/api/chat" else event("a")
    ollama.answers(frame, kind=NDJSON if path == "/api/chat" else SSE)

    async with running(ollama_url, agents) as client:
        assert said(await stream(client, "/holds x", path, **fields)) == "<a>"


async def test_an_agent_that_speaks_json_may_edit_it(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_agent(plugins, "holds", HOLDS, structured=True)
    ollama.answers(line("{}"), done())

    async with running(ollama_url, plugins) as client:
        assert said(await stream(client, "/holds x", format="json")) == "<{}>"


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "application/json", "headers": [("content-encoding", "gzip")]},
        {"kind": "text/plain"},
        {"kind": "application/json", "status": 206},
    ],
)
async def test_an_answer_that_cannot_be_read_passes_unedited(
    ollama: FakeOllama, ollama_url: str, agents: Path, head: dict[str, Any]
) -> None:
    ollama.answers(b"\x1f\x8b anything", **head)

    async with running(ollama_url, agents) as client:
        async with client.stream("POST", "/api/chat", json=turn("/holds x")) as answer:
            body = b"".join([chunk async for chunk in answer.aiter_raw()])

    assert body == b"\x1f\x8b anything"
    assert ("accept-encoding", "identity") in ollama.asked[0].headers


async def test_only_the_first_choice_is_edited(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    choices = [{"index": n, "message": {"content": "a"}, "finish_reason": "stop"} for n in (1, 0)]
    ollama.answers(dumped({"model": "m", "choices": choices}), kind="application/json")

    async with running(ollama_url, agents) as client:
        answer = await client.post("/v1/chat/completions", json=turn("/holds x"))

    assert [c["message"]["content"] for c in answer.json()["choices"]] == ["a", "<a>"]


async def test_an_edited_frame_stays_one_line_for_every_client(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("a\u0085b\u2028c\u2029xSb").replace(b"S", b"\\ud800"), done())

    async with running(ollama_url, agents) as client:
        body = await stream(client, "/flows x")

    assert len(body.decode().splitlines()) == len(body.split(b"\n")) - 1
    assert frames(body)[0]["message"]["content"] == "a\u0085b\u2028c\u2029xx\ud800b"
