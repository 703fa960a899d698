"""Chat over real sockets: what a client sends, what the model gets, what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.support import DONE, FakeOllama, done, event, line, running, said, turn, write_agent

PATHS = ["/api/chat", "/v1/chat/completions"]

SHOUT = """
class Shout(BaseAgent):
    '''Answers in capitals.'''

    async def on_response(self, response):
        return response.upper()
"""
NOTE = """
class Note(BaseAgent):
    '''Adds a note.'''

    async def on_request(self, payload):
        return add_system(payload, f"note {self.arguments['text']}")
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    write_agent(plugins, "shout", SHOUT)
    write_agent(plugins, "note", NOTE, arguments={"text": "nothing", "n": 1})
    return plugins


async def ask(client: httpx.AsyncClient, path: str, text: str, **fields: Any) -> str:
    answer = await client.post(path, json=turn(text, **fields))
    assert answer.status_code == 200, answer.text
    return said(answer.content)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_command_the_bytes_of_the_client_go_to_the_model(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    ollama.answers(done("hi"))
    body = b'{ "messages":[{"role":"user","content":"sk\xc3\xbd /note"}],"model":"m" , "x":1.0}'

    async with running(ollama_url, agents) as client:
        await client.post(path, content=body)

    assert ollama.asked[0].body == body


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_command_changes_request_and_answer(
    demo_url: str, agents: Path, path: str, stream: bool
) -> None:
    async with running(demo_url, agents) as client:
        text = await ask(client, path, "/note:hello /shout why?", stream=stream)

    assert text == "I AM THE DEMO MODEL. I WAS SENT:\n[SYSTEM] NOTE HELLO\n[USER] WHY?"


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/etc/passwd is a file", "/etc/passwd is a file"),
        ("/shrug", "/shrug"),
        ("/9j/4AAQ", "/9j/4AAQ"),
        ("what is /note", "what is /note"),
        ("//note is a command", "/note is a command"),
        ("  /NOTE x", "[system] note nothing\n[user] x"),
        ("/note /note:again x", "[system] note again\n[user] x"),
        ("/note:text=a,n=2\n x", "[system] note a\n[user] x"),
    ],
)
async def test_what_is_typed_is_a_command_or_text(
    demo_url: str, agents: Path, typed: str, sent: str
) -> None:
    async with running(demo_url, agents) as client:
        text = await ask(client, "/api/chat", typed)

    assert text.removeprefix("I am the demo model. I was sent:\n").removeprefix("[user] ") == sent


async def test_commands_leave_the_history_and_only_the_last_user_message_decides(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    messages = [
        {"role": "user", "content": "/shout first"},
        {"role": "assistant", "content": "FIRST"},
        {"role": "User", "content": "second"},
    ]
    ollama.answers(line("quiet"), done())

    async with running(ollama_url, agents) as client:
        answer = await client.post("/api/chat", json={"model": "m", "messages": messages})

    assert [m["content"] for m in ollama.asked[0].json["messages"]] == ["first", "FIRST", "second"]
    assert said(answer.content) == "quiet"


async def test_a_turn_that_goes_on_after_a_tool_keeps_its_agents(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    code = """
    class Tells(BaseAgent):
        async def on_request(self, payload):
            return add_system(payload, str(self.context.continuation))
    """
    write_agent(plugins, "tells", code)
    said_so_far = turn("/tells weather?")["messages"]
    tool = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "rain"}]
    ollama.answers(done("ok"))

    async with running(ollama_url, plugins) as client:
        for messages in (said_so_far, said_so_far + tool):
            await client.post("/api/chat", json={"model": "m", "messages": messages})

    assert [asked.json["messages"][0]["content"] for asked in ollama.asked] == ["False", "True"]


async def test_content_as_parts_keeps_its_images(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = [image, {"type": "text", "text": "/shout what is this?"}]
    ollama.answers(event("a cat"), event(None, "stop"), DONE, kind="text/event-stream")
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "stream": True}

    async with running(ollama_url, agents) as client:
        answer = await client.post("/v1/chat/completions", json=body)

    sent = ollama.asked[0].json["messages"][0]["content"]
    assert sent == [image, {"type": "text", "text": "what is this?"}]
    assert said(answer.content) == "A CAT"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"model":"m","messages":[{"role":"user","content":"/shout x"}]} trailing',
        b'\xef\xbb\xbf{"model":"m","messages":[{"role":"user","content":"/shout x"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"/shout \xff"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"/shout x"}],"seed":NaN}',
        b'{"model":"m","messages":[{"role":"user","content":"/shout x"}],"seed":1e999}',
        b'{"Model":"m","messages":[{"role":"user","content":"/shout x"}]}',
        b'{"model":"m","messages":[{"role":"user","Content":"/shout x"}]}',
        b'{"model":"m","messages":[{"role":"user","content":["/shout x"]}]}',
        b'{"model":"m","messages":"/shout x"}',
        b'{"model":5,"messages":[{"role":"user","content":"/shout x"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"/shout x"}],"options":' + b"[" * 99999,
    ],
)
async def test_a_doubtful_body_is_not_touched(
    ollama: FakeOllama, ollama_url: str, agents: Path, body: bytes
) -> None:
    ollama.answers(b'{"error":"so says Ollama"}', status=400, kind="application/json")

    async with running(ollama_url, agents) as client:
        answer = await client.post("/api/chat", content=body)

    assert ollama.asked[0].body == body
    assert (answer.status_code, answer.content) == (400, b'{"error":"so says Ollama"}')
    assert "x-osp-agents" not in answer.headers


@pytest.mark.parametrize("messages", [{}, {"messages": []}, {"messages": None}])
async def test_loading_and_unloading_is_nobodys_turn(
    ollama: FakeOllama, ollama_url: str, plugins: Path, messages: dict[str, Any]
) -> None:
    write_agent(plugins, "shout", SHOUT, always=True)
    loaded = done("", done_reason="load").strip()
    ollama.answers(loaded, kind="application/json; charset=utf-8")

    async with running(ollama_url, plugins) as client:
        answer = await client.post("/api/chat", json={"model": "m", "keep_alive": 0, **messages})

    assert ollama.asked[0].json == {"model": "m", "keep_alive": 0, **messages}
    assert answer.content == loaded


async def test_a_body_over_the_limit_streams_through_untouched(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    body = turn("/shout " + "x" * 5000)

    async with running(ollama_url, agents, server={"max_body": 4096}) as client:
        answer = await client.post("/api/chat", json=body)

    assert ollama.asked[0].json == body
    assert said(answer.content) == "ok"


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_answer_passes_unedited(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    error = b'{"error":"model \'m\' not found","message":{"content":"small"}}'
    ollama.answers(error, status=404, kind="application/json; charset=utf-8")

    async with running(ollama_url, agents) as client:
        answer = await client.post(path, json=turn("/shout x"))

    assert (answer.status_code, answer.content) == (404, error)


async def test_the_first_frame_arrives_before_the_last_is_made(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("Hel"), ollama.pause, line("lo"), done())

    async with running(ollama_url, agents) as client:
        for text, first in (("plain", line("Hel")), ("/shout held", line(""))):
            ollama.go.clear()
            async with client.stream("POST", "/api/chat", json=turn(text)) as answer:
                chunks = answer.aiter_raw()
                with anyio.fail_after(2):
                    assert await anext(chunks) == first
                ollama.go.set()
                rest = b"".join([chunk async for chunk in chunks])
            assert said(first + rest) == ("Hello" if text == "plain" else "HELLO")


@pytest.mark.parametrize("path", PATHS)
async def test_what_the_agents_did_is_in_a_header(demo_url: str, agents: Path, path: str) -> None:
    async with running(demo_url, agents) as client:
        answer = await client.post(path, json=turn("/note /shout x", stream=False))

    parts = [part.split(";")[:2] for part in answer.headers["x-osp-agents"].split(", ")]
    assert parts == [["note", "ok"], ["shout", "ok"]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_help_is_answered_without_the_model(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    async with running(ollama_url, agents) as client:
        everything = await ask(client, path, " /help", stream=stream)
        one = await ask(client, path, "/help /note", stream=stream)

    assert "/note: Adds a note." in everything and "/shout: Answers in capitals." in everything
    assert one.splitlines() == ["/note: Adds a note.", "    text='nothing'", "    n=1"]
    assert ollama.asked == []


async def test_help_before_anything_else_is_text(demo_url: str, agents: Path) -> None:
    async with running(demo_url, agents) as client:
        assert "[user] /help me" in await ask(client, "/api/chat", "/help me")
        assert "[user] /help note now" in await ask(client, "/api/chat", "/help note now")


@pytest.mark.parametrize("text", ["/note", "/note   ", "/note:hello \n"])
async def test_a_command_without_a_prompt_answers_its_help(
    ollama: FakeOllama, ollama_url: str, agents: Path, text: str
) -> None:
    async with running(ollama_url, agents) as client:
        assert (await ask(client, "/api/chat", text)).startswith("/note: Adds a note.")

    assert ollama.asked == []


async def test_a_wrong_argument_is_answered_with_what_is_right(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    async with running(ollama_url, agents) as client:
        wrong_type = await ask(client, "/api/chat", "/note:n=many x")
        wrong_name = await ask(client, "/api/chat", "/shout /note:colour=red x")

    assert wrong_type.startswith("note: n must be a whole number, not 'many'\n\n/note: Adds")
    assert wrong_name.startswith("note: 'colour=red' is no argument here; known are: text, n\n\n")
    assert ollama.asked == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/chat", {"format": "json"}),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}),
    ],
)
async def test_where_prose_is_no_answer_help_is_a_400(
    ollama_url: str, agents: Path, path: str, fields: dict[str, Any]
) -> None:
    async with running(ollama_url, agents) as client:
        answer = await client.post(path, json=turn("/help", **fields))

    assert answer.status_code == 400
    assert "/note: Adds a note." in answer.text


async def test_a_header_asks_like_a_command_and_goes_no_further(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("hi"), done())
    headers = {"X-OSP-Agents": "/note:a /shout"}

    async with running(ollama_url, agents) as client:
        answer = await client.post("/api/chat", json=turn("x"), headers=headers)

    assert ollama.asked[0].json["messages"][0]["content"] == "note a"
    assert not [name for name, _ in ollama.asked[0].headers if name == "x-osp-agents"]
    assert said(answer.content) == "HI"


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_agent_in_a_header_is_a_400_that_lists_the_known(
    ollama_url: str, agents: Path, path: str
) -> None:
    async with running(ollama_url, agents) as client:
        headers = {"X-OSP-Agents": "/shout /nope"}
        answer = await client.post(path, json=turn("x"), headers=headers)

    assert answer.status_code == 400
    assert "X-OSP-Agents: '/nope' is no known agent; known are: /note, /shout" in answer.text


async def test_a_suffix_of_the_model_asks_and_is_taken_off(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(line("hi"), done())

    async with running(ollama_url, agents) as client:
        body = turn("x") | {"model": "m:1b+note:a+shout"}
        answer = await client.post("/api/chat", json=body)
        await client.post("/api/chat", json={"model": "m+shout", "keep_alive": 0})

    assert ollama.asked[0].json["model"] == "m:1b"
    assert said(answer.content) == "HI"
    assert ollama.asked[1].json == {"model": "m", "keep_alive": 0}


async def test_another_prefix_or_none(demo_url: str, agents: Path) -> None:
    async with running(demo_url, agents, commands={"prefix": "!"}) as client:
        assert await ask(client, "/api/chat", "!shout a /note") == (
            "I AM THE DEMO MODEL. I WAS SENT:\n[USER] A /NOTE"
        )
    async with running(demo_url, agents, commands={"prefix": ""}) as client:
        assert (await ask(client, "/api/chat", "/shout a")).endswith("[user] /shout a")


async def test_the_rest_of_a_request_survives_a_rewrite(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    body = {
        "unknown": {"b": 1, "a": [2.5, None, True]},
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief", "extra": 1},
            {"role": "user", "content": "/shout hé\u2028\ud800 <b>", "images": ["AAAA"]},
        ],
        "options": {"num_ctx": 8192, "temperature": 0},
        "keep_alive": "10m",
    }
    ollama.answers(done("x"))

    async with running(ollama_url, agents) as client:
        content = json.dumps(body)  # ASCII: httpx could not encode the surrogate
        await client.post("/api/chat?ts=1", content=content, headers={"Authorization": "Bearer k"})

    sent = ollama.asked[0]
    messages = [body["messages"][0], {**body["messages"][1], "content": "hé\u2028\ud800 <b>"}]  # type: ignore[index]
    assert sent.json == {**body, "messages": messages}
    assert list(sent.json) == list(body)
    assert sent.target == "/api/chat?ts=1"
    assert ("authorization", "Bearer k") in sent.headers
