"""The answer on its way back: what agents change in a stream, and what nobody may change."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests import support
from tests.support import PATHS, House, chat, done, event, frames, line, outcomes, said, turn, whole

CHAT, COMPLETIONS, MESSAGES, RESPONSES = PATHS
FLOWS = """
class Flows(BaseAgent):
    '''Doubles every x, and keeps back an x at the end of a piece until it knows more.'''
    held = ""

    async def on_chunk(self, text):
        text = self.held + text
        self.held = "x" if text.endswith("x") else ""
        return text.removesuffix(self.held).replace("x", "xx")

    async def on_end(self):
        return self.held.replace("x", "xx") + f".{self.context.finish}"
"""
LISTS = """
class Lists(BaseAgent):
    async def on_end(self):
        return "\\nSources: a"
"""
PONDERS = """
class Ponders(BaseAgent):
    async def on_chunk(self, text):
        await asyncio.sleep(30 if text == "b" else 0)  # the agent's, and never waited for
        return text.upper()
"""


@pytest.fixture
def agents(house: House) -> House:
    for name, code in (("flows", FLOWS), ("lists", LISTS), ("ponders", PONDERS)):
        support.write_agent(house.plugins, name, code)
    house.add("holds", response="f'<{response}>'")
    house.add("ends", response="f'{response} {self.context.finish}'")
    house.add("fails", response="1 / 0")
    house.add("idle", "pass")
    return house


async def stream(house: House, path: str, typed: str, **fields: Any) -> bytes:
    answer = await house.ask(path, typed, stream=True, **fields)
    assert answer.status_code == 200
    return answer.content


@pytest.mark.parametrize(
    ("typed", "before", "after"),
    [
        ("/holds q", ["a", " b"], ["", "", "<a b>"]),
        ("/flows q", ["ax", "xb", "x"], ["a", "xxxxb", "", "xx.stop"]),
        ("/lists q", ["a"], ["a", "\nSources: a"]),
        ("/holds /lists /flows q", ["x"], ["", "<xx>\nSources: a.stop"]),
        ("/holds /lists /fails q", [], []),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_held_and_added_text_leaves_before_the_end_in_a_frame_like_the_last(
    agents: House, path: str, typed: str, before: list[str], after: list[str]
) -> None:
    agents.ollama.says(path, *before)
    streamed = await stream(agents, path, typed)
    agents.ollama.says(path, *before, stream=False)
    answer = await agents.ask(path, typed, stream=False)

    assert streamed == b"".join(frames(path, *after))
    assert answer.content == whole(path, "".join(after))
    assert outcomes(answer) == ", ".join(f"{name[1:]};ok" for name in typed.split()[:-1])


async def test_what_stands_beside_the_text_stays_and_is_not_said_twice(agents: House) -> None:
    thinking, odd = line("", message={"thinking": "hm"}), b'{"model":"m", "strange":true}\n'
    last = {"message": {"thinking": "hm"}, "other": [1.5, 2**60]}
    usage = b'data: {"model":"m","choices":[],"usage":{"total_tokens":3}}\n\n'
    end, ends = done(total_duration=2**53 + 1), [event(None, "stop"), usage, support.DONE]

    agents.ollama.answers(thinking, odd, line("a"), line(" b", **last, logprobs=[1]), end)
    native = await stream(agents, CHAT, "/holds q")
    agents.ollama.answers(done("a", total_duration=2**53 + 1))
    alone = await stream(agents, CHAT, "/holds q")
    agents.ollama.answers(event("a", role="assistant"), *ends)
    completion = await stream(agents, COMPLETIONS, "/holds q")

    held = [line(""), line("", **last, logprobs=[1]), line("<a b>", other=last["other"])]
    assert native == b"".join([thinking, odd, *held, end])
    assert alone == done("<a>", total_duration=2**53 + 1)
    assert completion == b"".join([event("", role="assistant"), event("<a>"), *ends])


# How an answer ends: what stands in the frames of `frames`, and what stands there instead
CALL = {"message": {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}}
DELTA = event(None, tool_calls=[{"index": 0, "function": {"name": "f"}}])
BLOCK = b'data: {"type":"content_block_start","index":1,"content_block":{"type":"tool_use"}}\n\n'
ITEM = b'data: {"type":"response.output_item.added","item":{"type":"function_call"}}\n\n'
CUT = b'"max_output_tokens":9,"usage":{"input_tokens":0,"output_tokens":9'


@pytest.mark.parametrize(
    ("path", "finish", "old", "new"),
    [
        (CHAT, "length", b'"done_reason":"stop"', b'"done_reason":"length"'),
        (COMPLETIONS, "length", b'"finish_reason":"stop"', b'"finish_reason":"length"'),
        (MESSAGES, "length", b'"end_turn"', b'"max_tokens"'),
        (MESSAGES, "stop", b'"end_turn"', b'"stop_sequence"'),
        (RESPONSES, "length", b'"usage":{"input_tokens":0,"output_tokens":0', CUT),
        (CHAT, "tool_calls", frames(CHAT)[-1], support.dumped(CALL) + frames(CHAT)[-1]),
        (COMPLETIONS, "tool_calls", frames(COMPLETIONS)[-2], DELTA + frames(COMPLETIONS)[-2]),
        (MESSAGES, "tool_calls", b'"end_turn"', b'"tool_use"'),
        (MESSAGES, "tool_calls", frames(MESSAGES)[-2], BLOCK + frames(MESSAGES)[-2]),
        (RESPONSES, "tool_calls", b"event: response.output_text.done", ITEM),
    ],
)
async def test_agents_are_told_how_an_answer_finished(
    agents: House, path: str, finish: str, old: bytes, new: bytes
) -> None:
    sent = b"".join(frames(path, "a"))
    agents.ollama.answers(sent.replace(old, new))

    body = await stream(agents, path, "/ends /flows q")

    assert said(body) == f"a {finish}.{finish}" and old in sent


async def test_frames_that_came_together_leave_together_but_do_not_wait_for_agents(
    agents: House,
) -> None:
    async with agents.open() as client:
        agents.ollama.answers(line("a") + line("b") + done())
        async with client.stream("POST", CHAT, json=turn("/flows q")) as answer:
            raw = [chunk async for chunk in answer.aiter_raw()]
        agents.ollama.answers(line("a") + line("b"))
        async with client.stream("POST", CHAT, json=turn("/ponders q")) as answer:
            first = await anext(answer.aiter_raw())

    assert len(raw) == 1 and len(raw[0].splitlines()) == 4
    assert said(first) == "A"


EVENT = b'event: error\ndata: {"type":"error","error":{"message":"x"}}\n\n'
HIDDEN = b'data: {"model":"","choices":[{"index":0,"delta":{"content":""}}]}\n\n'
ERRORS = [(CHAT, b'{"error":"x"}\n'), (COMPLETIONS, HIDDEN), (MESSAGES, EVENT), (RESPONSES, EVENT)]


@pytest.mark.parametrize(("path", "error"), [*ERRORS, *((path, b"") for path in PATHS)])
async def test_where_ollama_breaks_off_or_hides_an_error_held_text_leaves_as_it_was(
    agents: House, path: str, error: bytes
) -> None:
    at = next(n for n, frame in enumerate(frames(path, "?")) if said(frame))
    rest = [error, done()] if error else [agents.ollama.breaks]
    agents.ollama.answers(*frames(path, "a", "x")[: at + 2], *rest)
    got, request = b"", chat(path, "/holds /lists /fails /flows q", stream=True)

    async with agents.open() as client:
        try:
            async with client.stream("POST", path, json=request) as answer:
                async for chunk in answer.aiter_raw():
                    got += chunk
        except httpx.RemoteProtocolError:
            assert not error

    expected = frames(path, "", "", "axx.")[: at + 3]
    assert got == b"".join([*expected, *([error, done()] if error else [])])


async def test_an_error_is_numbered_behind_the_text_that_was_held(agents: House) -> None:
    error = b'event: error\ndata: {"type":"error","sequence_number":%d}\n\n'
    agents.ollama.answers(*frames(RESPONSES, "a")[:5], error % 5)

    body = await stream(agents, RESPONSES, "/holds q")

    assert said(body) == "a" and body.endswith(error % 6)
    assert body.count(b'"sequence_number":5') == 1


JSON = {"type": "json_object"}


@pytest.mark.parametrize(
    ("path", "fields", "structured"),
    [
        (CHAT, {"format": {"type": "object"}}, True),
        (CHAT, {"logprobs": True}, True),
        (COMPLETIONS, {"response_format": JSON}, True),
        (COMPLETIONS, {"top_logprobs": 2}, True),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}, True),
        (RESPONSES, {"text": {"format": JSON}}, True),
        (CHAT, {"format": "", "logprobs": False}, False),
        (COMPLETIONS, {"response_format": {"type": "text"}}, False),
        (MESSAGES, {"output_config": {"effort": "low"}}, False),
        (RESPONSES, {"text": {"format": {"type": "text"}}}, False),
    ],
)
async def test_response_hooks_and_notices_step_aside_where_an_edit_would_lie(
    agents: House, path: str, fields: dict[str, Any], structured: bool
) -> None:
    agents.add("json", response="f'[{response}]'", structured=True)
    agents.add("bad", "1 / 0")

    answer = await agents.ask(path, "/bad /holds /json q", **fields)

    edited = "y" if "logprobs" in str(fields) else "[y]"
    free = "[<y>]" + support.NOTICE.format("bad")
    assert said(answer.content) == (edited if structured else free)


ZIPPED = [("content-encoding", "gzip")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [b"\x1f\x8b", b"{no json\n", b'data: {"\n\n'])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_cannot_be_read_passes_and_is_said_but_not_past_a_guard(
    agents: House, path: str, body: bytes, stream: bool
) -> None:
    headers = ZIPPED if body == b"\x1f\x8b" else []
    agents.ollama.answers(body, kind="text/plain", headers=headers)
    request = chat(path, "/holds /idle /flows q", stream=stream)

    async with agents.open() as client:
        async with client.stream("POST", path, json=request) as answer:
            got = b"".join([chunk async for chunk in answer.aiter_raw()])
    agents.add("guard", response="response", always=True, on_error="abort")
    refused = await agents.ask(path, "q", stream=stream)

    assert got == body and outcomes(answer) == "holds;unread, idle;ok, flows;unread"
    assert ("accept-encoding", "identity") in agents.ollama.asked[0].headers
    assert refused.status_code == 403 and "the agent guard cannot see" in refused.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-ndjson", ""])
async def test_whether_it_streams_is_decided_by_the_request_and_not_by_a_mislabelled_type(
    agents: House, path: str, kind: str
) -> None:
    agents.ollama.answers(*frames(path, "a", "b"), kind=kind)
    streamed = await agents.ask(path, "/holds q", stream=True)
    agents.ollama.answers(whole(path, "ab"), kind=kind)
    answer = await agents.ask(path, "/holds q", stream=False)

    assert streamed.content == b"".join(frames(path, "", "", "<ab>"))
    assert answer.content == whole(path, "<ab>")
    assert answer.headers["content-type"] == streamed.headers["content-type"] == kind


async def test_only_the_first_choice_is_edited(agents: House) -> None:
    choices = [{"index": n, "message": {"content": "a"}, "finish_reason": "stop"} for n in (1, 0)]
    agents.ollama.answers(support.dumped({"model": "m", "choices": choices}))

    answer = await agents.ask(COMPLETIONS, "/holds x")

    assert [c["message"]["content"] for c in answer.json()["choices"]] == ["a", "<a>"]


async def test_instructions_are_echoed_as_the_client_sent_them(agents: House) -> None:
    """Ollama repeats what it was sent, and that is what the agents made of it."""
    agents.add("note", "add_system(payload, 'note')")
    sent = b"".join(frames(RESPONSES, "a")).replace(b'"instructions":null', b'"instructions":"n"')
    agents.ollama.answers(sent)

    none = await stream(agents, RESPONSES, "/note q")
    some = await stream(agents, RESPONSES, "/note q", instructions="be brief")

    assert none.count(b'"instructions":null') == some.count(b'"instructions":"be brief"') == 3
    assert agents.ollama.asked[1].json["instructions"] == "note\n\nbe brief"
