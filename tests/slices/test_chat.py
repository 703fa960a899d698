"""Chat over real sockets: what a client sends, what the model gets, what comes back."""

from __future__ import annotations

import gc
import json
from typing import Any

import anyio
import pytest

from tests.support import PATHS, House, chat, done, frames, message, outcomes, parts, said

CHAT, COMPLETIONS, MESSAGES, RESPONSES = PATHS
NOTE = "add_system(payload, 'note ' + self.arguments['text'])"
TELLS = "add_context(payload, f'{self.context.continuation} {self.context.prompt!r}')"


@pytest.fixture
def agents(house: House) -> House:
    house.add("shout", response="response.upper()")
    house.add("note", NOTE, arguments={"text": "nothing", "n": 1})
    house.add("tells", TELLS)
    return house


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_command_bytes_pass_and_with_one_request_and_answer_change(
    agents: House, path: str, stream: bool
) -> None:
    body = json.dumps(chat(path, "see /note", stream=stream), indent=1).encode()
    agents.ollama.says(path, "I see", stream=stream)

    async with agents.open() as client:
        plain = await client.post(path, content=body)
        answer = await agents.post(client, path, "/note:hello /shout why?", stream=stream)

    first, second = agents.ollama.asked
    assert first.body == body and said(plain.content) == "I see"
    system = {MESSAGES: "system", RESPONSES: "instructions"}.get(path)
    assert agents.sent[1] == ([] if system else ["note hello"]) + ["why?"]
    assert second.json.get(system) == ("note hello" if system else None)
    assert said(answer.content) == "I SEE" and "x-osp-agents" not in plain.headers


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
REMINDER = "<system-reminder>\n/shout x\n</system-reminder>"


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES, RESPONSES])
@pytest.mark.parametrize(
    ("typed", "sent", "prompt"),
    [
        (["/tells", "question"], ["C\n\nquestion"], "question"),
        (["/tells", IMAGE, " \n"], [IMAGE, "C\n\n \n"], " \n"),
        (["context", "/tells question"], ["context", "C\n\nquestion"], "question"),
        (["/tells Hello.", "question"], ["Hello.", "C\n\nquestion"], "Hello.\n\nquestion"),
        ([REMINDER, REMINDER, " /tells q"], [REMINDER, REMINDER, "C\n\nq"], "q"),
        ([IMAGE, "/tells what?"], [IMAGE, "C\n\nwhat?"], "what?"),
        (["a", "/tells b", "/shout c"], ["a", "b", "C\n\nc"], "b\n\nc"),
    ],
)
async def test_of_several_parts_any_may_begin_with_the_command(
    agents: House, path: str, typed: list[Any], sent: list[Any], prompt: str
) -> None:
    before = message("user", parts(path, "old", "/shout older"))

    answer = await agents.ask(path, before, message("user", parts(path, *typed)))

    found = f"False {prompt!r}"
    expected = [part if part is IMAGE else part.replace("C", found) for part in sent]
    assert agents.sent[0] == [parts(path, "old", "older"), parts(path, *expected)]
    assert outcomes(answer) == "tells;ok"


RESULTS = [{"type": "tool_result", "tool_use_id": "t"}, *parts(MESSAGES, REMINDER)]
CALLS: dict[str, list[Any]] = {
    CHAT: [message("assistant", "", tool_calls=[]), message("tool", "rain")],
    COMPLETIONS: [message("assistant", None, tool_calls=[]), message("tool", "rain")],
    MESSAGES: [message("assistant", None), message("user", RESULTS), message("system", "s")],
    RESPONSES: [{"type": "function_call"}, {"type": "function_call_output", "output": "rain"}],
}


@pytest.mark.parametrize("path", PATHS)
async def test_the_last_user_message_decides_also_after_a_tool_and_the_history_loses_commands(
    agents: House, path: str
) -> None:
    """Claude Code sends a system message last, Codex a developer's first."""
    history = [message("developer", "/note d"), "/shout&/note one", message("assistant", "/note")]
    system = message("system", "/note s")

    async with agents.open() as client:
        for messages in (["/tells two", system], ["/tells two", *CALLS[path]], ["two"]):
            await agents.post(client, path, *history, *messages)

    before = ["/note d", "one", "/note"]
    calls = [each.get("content") for each in CALLS[path]]
    new, goes_on, without = agents.sent
    assert new == [*before, "False 'two'\n\ntwo", "/note s"]
    assert goes_on == [*before, "True 'two'\n\ntwo", *calls]
    assert without == [*before, "two"]


SHOUT = b'{"model":"m","messages":[{"role":"user","content":"/shout x"}]}'
SPELT = {
    b"]}": [b"]", b"]} x", b'],"seed":NaN}', b'],"seed":1e999}', b'],"Stream":true}'],
    b"}]}": [b'}],"model":"m"}', b'}],"options":7}', b'}],"options":' + b"[" * 99999],
    b"x": [b"\xff", b"x" * 2**17],
    b'"model"': [b'"Model"'],
    b'"m"': [b"5"],
    b'"role"': [b'"role":"user","role"', b'"Content":"","role"'],
    b'"/shout x"': [b'["/shout x"]', b'[{"type":"text","Text":"/shout x"}]'],
    b'[{"role":"user","content":"/shout x"}]': [b'"/shout x"'],
}
DOUBTFUL = [SHOUT.replace(old, new) for old, spelt in SPELT.items() for new in spelt]


@pytest.mark.parametrize("path", PATHS[:3])
async def test_a_body_that_is_doubtful_or_too_large_is_not_touched(
    agents: House, path: str
) -> None:
    agents.ollama.answers(b'{"error":"so says Ollama"}', status=400, kind="application/json")

    async with agents.open(server={"max_body": 2**17}) as client:
        for body in [b"", b"null", b"[]", b"\xef\xbb\xbf" + SHOUT, *DOUBTFUL]:
            answer = await client.post(path, content=body)

            assert agents.ollama.asked[-1].body == body and "x-osp-agents" not in answer.headers
            assert (answer.status_code, answer.content) == (400, b'{"error":"so says Ollama"}')


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_answer_passes_unedited(agents: House, path: str) -> None:
    error = b'{"error":"model \'m\' not found","message":{"content":"small"}}'
    agents.ollama.answers(error, status=404, kind="application/json; charset=utf-8")

    answer = await agents.ask(path, "/shout x")

    assert (answer.status_code, answer.content) == (404, error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("typed", "text"), [("plain", "Hello"), ("/shout held", "HELLO")])
async def test_the_first_frame_arrives_before_the_last_is_made(
    agents: House, path: str, typed: str, text: str
) -> None:
    sent, edited = frames(path, "Hel", "lo"), frames(path, "", "", "HELLO")
    agents.ollama.answers(*sent[:3], agents.ollama.pause, *sent[3:])

    async with agents.open() as client:
        request = chat(path, typed, stream=True)
        async with client.stream("POST", path, json=request) as answer:
            chunks = answer.aiter_raw()
            first = b""
            with anyio.fail_after(2):
                while len(first) < len(b"".join((edited if typed != "plain" else sent)[:3])):
                    first += await anext(chunks)
            agents.ollama.go.set()
            rest = b"".join([chunk async for chunk in chunks])

    assert said(first + rest) == text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_help_is_the_proxys_own_and_no_agent_changes_it(
    agents: House, path: str, stream: bool
) -> None:
    agents.add("on", "1 / 0", "response + '!'", always=True)
    typed = [" /help", "/help /note", "/note", "/note:n=many x", "/shout /note:c=1 x"]
    fields: dict[str, Any] = {"stream": stream, "tools": [{"type": "function"}]}

    async with agents.open() as client:
        got = [await agents.post(client, path, each, **fields) for each in typed]
    answers = {text: said(answer.content) for text, answer in zip(typed, got, strict=True)}
    types = {CHAT: ("application/json; charset=utf-8", "application/x-ndjson")}
    kind = types.get(path, ("application/json", "text/event-stream"))[stream]
    assert {answer.headers["content-type"] for answer in got} == {kind}

    note = "/note: Is note.\n    text='nothing'\n    n=1"
    assert answers[" /help"] == f"{note}\n/on: Is on.\n/shout: Is shout.\n/tells: Is tells."
    assert answers["/help /note"] == note
    wrong = "note: n must be a whole number, not 'many'"
    assert answers["/note:n=many x"] == f"{wrong}\n\n{note}"
    wrong = "note: 'c=1' is no argument here; known are: text, n"
    assert answers["/shout /note:c=1 x"] == f"{wrong}\n\n{note}"
    assert agents.ollama.asked == [] and answers["/note"] == note


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"format": "json"}),
        (COMPLETIONS, {"response_format": {"type": "json_object"}, "stream": True}),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema"}}, "stream": True}),
    ],
)
async def test_where_prose_is_no_answer_help_and_replies_are_a_400(
    agents: House, path: str, fields: dict[str, Any]
) -> None:
    agents.add("says", "raise Reply('mine')")
    expected = {"/help note": "/note: Is", "/says x": "mine", "/explain /note x": "/note (ok"}

    async with agents.open() as client:
        for typed, text in expected.items():
            answer = await agents.post(client, path, typed, **fields)
            assert answer.status_code == 400 and text in str(answer.json()["error"])


async def test_the_rest_of_a_request_survives_a_rewrite(agents: House) -> None:
    user = message("user", "/shout hé\u2028\ud800 <b>", images=["AAAA"])
    body: dict[str, Any] = {"unknown": {"b": 1, "a": [2.5, None, True]}, "model": "m"}
    body |= {"messages": [message("system", "s", extra=1), user], "options": {"seed": 0}}
    agents.ollama.answers(done("x"))

    async with agents.open() as client:
        content = json.dumps(body)  # ASCII: httpx could not encode the surrogate
        await client.post("/api/chat?ts=1", content=content, headers={"Authorization": "Bearer k"})

    user["content"] = "hé\u2028\ud800 <b>"
    (sent,) = agents.ollama.asked
    assert (json.dumps(sent.json), sent.target) == (json.dumps(body), "/api/chat?ts=1")
    assert ("authorization", "Bearer k") in sent.headers


HELPS = {"/first": "/first", " /first&/second\n": "/first", "/second\u200b /first": "/second"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("always", [True, False])
async def test_a_command_alone_is_answered_with_help_unless_something_fills_the_prompt(
    house: House, path: str, always: bool
) -> None:
    house.add("first second", "pass")
    house.add("fills", "set_prompt(payload, 'filled')", always=always)

    async with house.open() as client:
        for typed, text in HELPS.items():
            answer = await house.post(client, path, typed)
            assert said(answer.content).startswith("y" if always else f"{text}: Is")
        await house.post(client, path, "/second /fills")
        await house.post(client, CHAT, message("user", "/first", images=["AAAA"]))

    filled, shown = house.sent[-2:]
    assert filled == ["filled"] and shown == (["filled"] if always else [""])


@pytest.mark.parametrize("prompt", ["q", "/shout /tells q", "/help"])
async def test_a_request_leaves_nothing_that_only_the_garbage_collector_would_free(
    agents: House, prompt: str
) -> None:
    agents.ollama.says("/api/chat", "a", "b")
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        async with agents.open() as client:
            for _ in range(3):
                await client.post("/api/chat", json=chat("/api/chat", prompt, stream=True))
            gc.collect()
            left = {type(thing) for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()

    assert [kind for kind in left if kind.__module__.startswith(("kernel", "slices"))] == []
