"""The chain: agents one after the other, each of which may fail alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests import support
from tests.support import ANSWER, NOTICE, PATHS, TAG, House, outcomes, said, write_agent

CHAT, COMPLETIONS, MESSAGES, RESPONSES = PATHS

# Hooks that do what their names say; each is one agent
FAILURES = {
    "raises": "raise ValueError('secret')",
    "hangs": "await asyncio.Event().wait()",
    "nothing": "return None",
    "cancels": "raise asyncio.CancelledError",
    "empties": "payload['messages'].clear(); return payload",
    "nobody": "return {'model': 'm', 'messages': [7]}",
    "sets": "payload['x'] = {1, 2}; return payload",
    "clears": "payload['messages'].clear(); self.context.runner.clear(); 1 / 0",
    "nameless": "del payload['model']",
}
BAD = "class Bad(BaseAgent):\n    async def {}(self{}):\n        {}\n"


@pytest.mark.parametrize(
    ("typed", "request_order", "response_order"),
    [
        ("/a /b x", "x <on1 <on2 <a <b", "on2> on1> last>"),
        ("/b /a x", "x <on1 <on2 <b <a", "on2> on1> last>"),
        ("/one /two x", "x <on1 <on2", "one> two> on2> on1> last>"),
        ("/mask /one x", "x <on1 <on2 <mask", "one> mask> on2> on1> last>"),
        ("/mask /veil x", "x <on1 <on2 <mask <veil", "veil> mask> on2> on1> last>"),
        ("/on2 x", "x <on1 <on2", "on2> on1> last>"),
        ("/last /one x", "x <on1 <on2", "one> on2> on1> last>"),
        ("/inner /mask /one x", "x <on1 <on2 <mask <inner", "inner> one> mask> on2> on1> last>"),
        ("/one /inner&/a x", "x <on1 <on2 <a <inner", "inner> one> on2> on1> last>"),
        ("/inner /end /a x", "x <on1 <on2 <a <end <inner", "inner> on2> on1> last> end>"),
    ],
)
async def test_agents_pipe_wrap_and_the_always_on_have_the_last_word(
    house: House, typed: str, request_order: str, response_order: str
) -> None:
    house.add("a b", TAG)
    house.add("one two", response=ANSWER)
    house.add("mask veil inner end", TAG, ANSWER)
    for name, trait in (("inner", "innermost"), ("end", "last")):
        code = house.plugins / f"{name}_agent" / "agent.py"
        code.write_text(code.read_text() + f"\n    {trait} = True\n")
    house.add("on2", TAG, ANSWER, always=True, priority=2)
    house.add("on1", TAG, ANSWER, always=True, priority=-1.5)
    house.add("last", response=ANSWER, always=True, priority=-9)
    house.add("elsewhere", response=ANSWER, always=True, models=["other*"])

    answer = await house.ask(CHAT, typed)

    assert house.sent == [[request_order]]
    assert said(answer.content) == f"y {response_order}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_whatever_fails_is_skipped_and_said_under_the_answer(
    house: House, path: str, stream: bool
) -> None:
    for name, code in FAILURES.items():
        house.add(name, code, timeout=0.1)
    for hook, arguments in (("on_response", ", x"), ("on_chunk", ", x"), ("on_end", "")):
        write_agent(house.plugins, hook[3:], BAD.format(hook, arguments, "return 5"))
    house.add("good", TAG, ANSWER)
    house.add("always", "1 / 0", always=True)
    house.ollama.says(path, "y", "y", stream=stream)
    names = [*FAILURES, "response", "chunk", "end"]

    answer = await house.ask(path, f"/{' /'.join(names)} /good x", stream=stream)

    assert house.sent == [["x <good"]]
    assert said(answer.content) == "yy good>" + NOTICE.format(", ".join(names))
    if not stream:
        ends = ["timeout" if name == "hangs" else "error" for name in names]
        listed = ", ".join(f"{name};{end}" for name, end in zip(names, ends, strict=True))
        assert outcomes(answer) == f"always;error, {listed}, good;ok"


@pytest.mark.parametrize("path", PATHS)
async def test_on_error_abort_ends_the_request_in_the_dialect(house: House, path: str) -> None:
    asks = "await self.context.chat([{'role': 'user', 'content': 'x'}])"
    house.add("bad", "1 / 0", on_error="abort")
    house.add("asks", asks, on_error="abort")
    house.add("late", "pass", "1 / 0", on_error="abort")
    house.ollama.answers(b"no", status=503)

    before = [await house.ask(path, f"/{name} /late x") for name in ("bad", "asks")]
    house.ollama.says(path, "y")
    stream = await house.ask(path, "/late x", stream=True)
    house.ollama.says(path, "y", stream=False)
    after = await house.ask(path, "/late x", stream=False)

    assert [each.status_code for each in (*before, after)] == [500, 502, 500]
    for each, name in zip((*before, after), ("bad", "asks", "late"), strict=True):
        text = f"the agent {name} failed, and its operator wants it or nothing"
        error = each.json()["error"]
        assert error == text if path == CHAT else error["message"] == text
        assert each.headers["x-should-retry"] == "false" and outcomes(each) == f"{name};error"
    last = stream.text.strip().splitlines()[-1].removeprefix("data: ")
    assert json.loads(last)["error"] == after.json()["error"] and said(stream.content) == ""


@pytest.mark.parametrize("path", PATHS)
async def test_an_abort_refuses_with_the_agents_own_words(house: House, path: str) -> None:
    refuses = "raise Abort(451, 'not here', headers={'Retry-After': '5', 'X-Why': 'so'})"
    house.add("policy", refuses, always=True)
    house.add("later", TAG)

    answer = await house.ask(path, "/later x")

    assert answer.status_code == 451 and "not here" in str(answer.json()["error"])
    assert (answer.headers["retry-after"], answer.headers["x-why"]) == ("5", "so")
    assert outcomes(answer) == "policy;abort" and house.sent == []
    assert "x-should-retry" not in answer.headers


SPEAKS = """
class Speaks(BaseAgent):
    async def on_request(self, payload):
        async def pieces():
            yield "a"
            yield prompt(payload)
            END
        raise Reply(pieces())
"""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_reply_answers_without_the_model_and_response_agents_still_see_it(
    house: House, path: str, stream: bool
) -> None:
    house.add("knows", "raise Reply('a' + prompt(payload))")
    write_agent(house.plugins, "speaks", SPEAKS.replace("END", "yield ''"))
    write_agent(house.plugins, "breaks", SPEAKS.replace("END", "1 / 0"))
    house.add("shout", response=ANSWER)
    house.add("before after", TAG, ANSWER)

    async with house.open() as client:
        for name in ("knows", "speaks"):
            typed = f"/before /{name} /after /shout x"
            answer = await house.post(client, path, typed, stream=stream)
            assert said(answer.content) == "ax <before shout> before>"
            assert outcomes(answer) == f"before;ok, {name};reply, shout;ok"
        broken = await house.post(client, path, "/breaks /shout x", stream=stream)

    assert "the agent breaks failed in its answer" in broken.text and house.sent == []
    assert (broken.status_code, said(broken.content)) == (200 if stream else 500, "")


@pytest.mark.parametrize("path", PATHS)
async def test_a_reply_of_pieces_streams(house: House, path: str) -> None:
    code = SPEAKS.replace("yield prompt(payload)", "await asyncio.sleep(30)")
    write_agent(house.plugins, "speaks", code)
    got, request = b"", support.chat(path, "/speaks x", stream=True)

    async with house.open() as client:
        async with client.stream("POST", path, json=request) as answer:
            chunks = answer.aiter_raw()
            while said(got) != "a":
                got += await anext(chunks)


SEES = """c = self.context
seen = [c.model, c.dialect, bool(c.stream), c.asked, c.continuation, c.user, c.prompt]
raise Reply(repr([*seen, c.explaining, c.state]))"""


@pytest.mark.parametrize(
    ("path", "dialect"), [*zip(PATHS, ["ollama", "openai", "anthropic", "responses"], strict=True)]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_agent_sees_the_request_as_values(
    house: House, path: str, dialect: str, stream: bool
) -> None:
    """Under /explain it is told so, and nothing that it changes of them reaches anybody else."""
    house.add("first", "self.context.state['word'] = 'w'; self.context.model = 'other'")
    house.add("sees", SEES)

    for typed, explaining in (("", False), ("/explain ", True)):
        answer = await house.ask(path, f"{typed}/first /sees  what?", stream=stream)
        values = ["demo", dialect, stream, True, False, "", "what?", explaining, {"word": "w"}]
        assert said(answer.content).rpartition("been:\n")[2] == repr(values)


async def test_what_an_agent_keeps_of_a_request_is_no_part_of_it(house: House) -> None:
    house.add("keeps", "self.context.state['kept'] = payload")
    house.add("spoils", "self.context.state['kept'].clear(); payload.clear(); 1 / 0")
    house.add("asks", "pass", "str(self.context.state.get('kept'))")

    answer = await house.ask(CHAT, "/keeps /spoils /asks x", options={"seed": 1})

    assert house.ollama.asked[0].json == support.chat(CHAT, "x", options={"seed": 1})
    assert said(answer.content) == "{}" + NOTICE.format("spoils")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": False}])
async def test_an_agent_may_change_the_model_but_not_the_stream(
    house: House, path: str, fields: dict[str, Any]
) -> None:
    house.add("changes", "payload |= {'model': 'other', 'stream': 'nonsense'}")

    await house.ask(path, "/changes x", **fields)

    assert house.ollama.asked[0].json == support.chat(path, "x", **fields) | {"model": "other"}


ASKS = """
class Asks(BaseAgent):
    async def on_request(self, payload):
        messages, c = [{"role": "user", "content": "q"}], self.context
        said = await c.chat(messages, temperature=0) + (await c.message(messages))["content"]
        said += "".join([piece async for piece in c.stream(messages, num_ctx=9)])
        return add_context(payload, said)
"""


@pytest.mark.parametrize("path", PATHS)
async def test_what_an_agent_asks_goes_through_the_guards_and_keeps_the_runner(
    house: House, path: str
) -> None:
    """But no other agent has a part in it: not the one that asks, nor one that is always on."""
    guard = "add_system(payload, 'seen')"
    house.add("guard", guard, "response.upper()", always=True, on_error="abort")
    house.add("on", TAG, ANSWER, always=True, priority=-1)
    write_agent(house.plugins, "asks", ASKS, timeout=0.05)
    house.ollama.answers(support.line("hi", done=True), before=house.ollama.pause)
    more = {"options": {"num_ctx": 8192, "seed": 1}, "keep_alive": -1, "shift": False}

    async with house.open() as client:
        asking = asyncio.create_task(client.post(path, json=support.chat(path, "/asks x", **more)))
        await house.ollama.arrived.wait()
        asyncio.get_running_loop().call_later(0.2, house.ollama.go.set)  # longer than its clock
        await asking

    first, second, third, own = house.ollama.asked
    sent = {"model": "demo", "keep_alive": -1, "shift": False, "think": False, "stream": False}
    sent["messages"] = [{"role": r, "content": c} for r, c in (("system", "seen"), ("user", "q"))]
    assert first.json == sent | {"options": {"num_ctx": 8192, "temperature": 0}}
    assert second.json == sent | {"options": {"num_ctx": 8192}}
    assert third.json == sent | {"options": {"num_ctx": 9}, "stream": True}
    assert own.json["options"] == more["options"] and house.sent[-1][-1] == "HIHIHI\n\nx <on"


@pytest.mark.parametrize("ask", ["chat(q)", "embed(['q'], 'e')", "stream(q).__anext__()"])
async def test_a_guard_that_refuses_what_an_agent_asks_makes_the_agent_fail(
    house: House, ask: str
) -> None:
    refuses = "if texts(payload) == ['q']:\n    raise Abort(403, 'no')"
    house.add("guard", refuses, always=True, on_error="abort")
    house.add("asks", f"q = [{{'role': 'user', 'content': 'q'}}]\nawait self.context.{ask}")

    answer = await house.ask(CHAT, "/asks x")

    assert said(answer.content) == "y" + NOTICE.format("asks") and house.sent == [["x"]]


async def test_embeddings_are_asked_of_what_the_guards_left(house: House) -> None:
    changes = "payload = map_texts(payload, str.upper)"
    house.add("guard", changes, always=True, on_error="abort", models=["e"])
    house.add("embeds", "add_context(payload, str(await self.context.embed(['a', 'b'], 'e')))")
    house.ollama.answers(support.dumped({"embeddings": [[1], [2]]}))

    await house.ask(CHAT, "/embeds x")

    asked, chat = house.ollama.asked
    assert (asked.target, asked.json) == ("/api/embed", {"model": "e", "input": ["A", "B"]})
    assert support.prompts(chat) == ["[[1], [2]]\n\nx"]


async def test_there_is_no_notice_where_the_operator_wants_none(house: House) -> None:
    house.add("bad", "1 / 0")

    async with house.open(chain={"notice": False}) as client:
        answer = await house.post(client, MESSAGES, "/bad x", stream=True)

    assert answer.content == b"".join(support.frames(MESSAGES, "y"))
