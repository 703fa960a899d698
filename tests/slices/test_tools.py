"""Tools: the model calls what agents offer, and the client sees one answer.

The first round of most answers here is what a real Ollama answered, in each dialect.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from kernel.dialects import Dialect, table
from kernel.dialects.calls import ToolCall
from kernel.tools import LOST
from tests.support import (
    BY_PATH,
    CHAT,
    COMPLETIONS,
    DONE,
    MESSAGES,
    NOTICE,
    PATHS,
    RESPONSES,
    House,
    calling,
    chat,
    done,
    event,
    line,
    message,
    outcomes,
    parts,
    said,
)
from tests.test_recordings import RECORDINGS, raw

NAMES = dict(zip(PATHS, ("chat", "v1chat", "messages", "responses"), strict=True))
WAYS = [(path, stream) for path in PATHS for stream in (True, False)]
SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}}, "required": ["z"]}
WEATHER = f"""
class It(BaseAgent):
    tools = [{{"name": "w", "description": "the weather", "parameters": {SCHEMA}}}]
    async def on_tool(self, name, arguments):
        return f"rain at {{arguments['z']}}"
"""


def recorded(path: str, what: str, stream: bool) -> bytes:
    """Return what Ollama answered: `tagcall` is a text and a call, `tagcalls` two calls."""
    name = f"rc_{NAMES[path]}_{what}_{'stream' if stream else 'whole'}"
    return raw(RECORDINGS[name]["answer"]["body"])


def call(path: str, what: str, stream: bool) -> bytes:
    return recorded(path, f"tools_tag_{what}", stream)


def chunks(path: str, body: bytes) -> list[dict[str, Any]]:
    dialect = BY_PATH[path]
    return [chunk for frame in dialect.end.split(body) if (chunk := dialect.parse(frame))]


def is_end(path: str, chunk: dict[str, Any]) -> bool:
    rest = json.loads(json.dumps(chunk))
    return BY_PATH[path].take(rest, {}) != {} and BY_PATH[path].ends(rest)


def history(house: House, path: str) -> list[Any]:
    """Return what the last request had behind the user's message."""
    body = house.ollama.asked[-1].json
    messages = body["input" if path == RESPONSES else "messages"]
    return messages[1:] if isinstance(messages, list) else []


def check(path: str, body: bytes, stream: bool, *, counted: bool = True) -> None:
    """Check what clients rely on: one beginning and one end, numbers without gaps, sums."""
    found = chunks(path, body)
    ends = [chunk for chunk in found if is_end(path, chunk)]
    kinds = [chunk.get("type") for chunk in found]
    usage = [count for chunk in ends for count in numbers(BY_PATH[path].counts(chunk))]
    assert not counted or not usage or usage == sums(path, stream)
    if not stream:
        assert len(found) == 1
    elif path == CHAT:
        assert found.index(ends[0]) == len(found) - 1
        assert ["eval_count" in chunk for chunk in found[:-1]].count(True) == 0
    elif path == COMPLETIONS:
        assert len({chunk["id"] for chunk in found}) == 1 and body.count(b"[DONE]") == 1
        roles = [chunk["choices"][0]["delta"].get("role") for chunk in found]
        assert roles == ["assistant", *[None] * (len(found) - 1)]
        finishes = [chunk["choices"][0]["finish_reason"] for chunk in found]
        assert finishes.count(None) == len(found) - 1
    elif path == MESSAGES:
        blocks = [chunk["index"] for chunk in found if chunk["type"] == "content_block_start"]
        stops = [chunk["index"] for chunk in found if chunk["type"] == "content_block_stop"]
        assert blocks == stops == [*range(len(blocks))]
        assert kinds.count("message_start") == 1 and kinds[-2:] == ["message_delta", "message_stop"]
    else:
        assert [chunk["sequence_number"] for chunk in found] == [*range(len(found))]
        assert kinds.count("response.created") == kinds.count("response.completed") == 1
        begun = [chunk for chunk in found if chunk["type"] == "response.output_item.added"]
        items = found[-1]["response"]["output"]
        assert [chunk["output_index"] for chunk in begun] == [*range(len(begun))]
        assert sorted(chunk["item"]["id"] for chunk in begun) == sorted(i["id"] for i in items)
        texts = [part["text"] for item in items for part in item.get("content", ())]
        assert "".join(texts) == said(body)


def numbers(value: Any) -> list[int]:
    """Return the counts in a value, those of Ollama's own dialect without times."""
    if isinstance(value, dict):
        return [n for key, item in value.items() if "duration" not in key for n in numbers(item)]
    return [value] if type(value) is int else []


def sums(path: str, stream: bool) -> list[int]:
    rounds = [call(path, "tagcall", stream), recorded(path, "plain", stream)]
    dialect = BY_PATH[path]
    ends = [[c for c in chunks(path, body) if is_end(path, c)][0] for body in rounds]
    first, second = (numbers(dialect.counts(end)) for end in ends)
    return [a + b for a, b in zip(first, second, strict=True)]


LOOK, RAIN = "Let me look. ", "rain at 1"
NATIVE = {"index": 0, "name": "w", "arguments": {"z": "1"}}
TEXTUAL = {"name": "w", "arguments": '{"z":"1"}'}
CALL = {"id": "ID", "index": 0, "type": "function", "function": TEXTUAL}
USE = {"type": "tool_use", "id": "ID", "name": "w", "input": {"z": "1"}}
CALLED: dict[str, Any] = {
    CHAT: [
        message("assistant", LOOK, tool_calls=[{"id": "ID", "function": NATIVE}]),
        message("tool", RAIN, tool_name="w", tool_call_id="ID"),
    ],
    COMPLETIONS: [
        message("assistant", LOOK, tool_calls=[CALL]),
        message("tool", RAIN, tool_call_id="ID"),
    ],
    MESSAGES: [
        message("assistant", parts(MESSAGES, LOOK, USE)),
        message("user", [{"type": "tool_result", "tool_use_id": "ID", "content": RAIN}]),
    ],
    RESPONSES: [
        message("assistant", [{"type": "output_text", "text": LOOK}], type="message"),
        {"type": "function_call", "id": "FC", "status": "completed", "call_id": "ID", **TEXTUAL},
        {"type": "function_call_output", "call_id": "ID", "output": RAIN},
    ],
}


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_a_call_is_made_and_the_answer_goes_on(house: House, path: str, stream: bool) -> None:
    house.write("weather", WEATHER)
    first, second = call(path, "tagcall", stream), recorded(path, "plain", stream)
    house.ollama.says_in_turn(path, first, second, stream=stream)

    answer = await house.ask(path, "/weather how is it?", stream=stream)

    dropped = path == RESPONSES and not stream  # Ollama leaves out a text beside a call there
    assert answer.status_code == 200
    assert said(answer.content) == ("" if dropped else "Let me look. ") + said(second)
    assert b'"w"' not in answer.content and b"function_call" not in answer.content
    check(path, answer.content, stream)
    made = re.sub(r'"fc_\w+"', '"FC"', json.dumps(history(house, path)))
    [name] = {*re.findall(r"call_\w{8}", made)}
    expected = CALLED[path][1:] if dropped else CALLED[path]
    assert json.loads(made.replace(name, "ID")) == expected


# One turn with several rounds. `calling` makes what the model says.

TOOLS = """
class It(BaseAgent):
    tools = [{"name": name} for name in "add fail hang abort gone both".split()]
    async def setup(self):
        self.met = asyncio.Barrier(2)
    async def on_tool(self, name, arguments):
        if name == "add":
            return str(arguments["a"] + arguments["b"])
        if name == "both":
            await self.met.wait()
            return arguments["of"]
        if name == "hang":
            await asyncio.Event().wait()
        if name == "abort":
            raise Abort(418, "no tea")
        raise LookupError("no such city: Atlantis")
"""
ASKS = """
class It(BaseAgent):
    tools = [{"name": "write", "consent": True}, {"name": "read"}]
    async def on_tool(self, name, arguments):
        return f"{name}: {arguments}"
    async def on_response(self, response):
        return response.upper()
"""


@pytest.fixture
def agents(house: House) -> House:
    house.write("all", TOOLS)
    house.write("asks", ASKS)
    return house


def results(house: House, path: str = CHAT) -> list[str]:
    """Return what the model was told in the last request."""
    body = house.ollama.asked[-1].json
    items = body["input" if path == RESPONSES else "messages"]
    blocks = [block for item in items for block in item.get("content") or [] if path == MESSAGES]
    told = [block["content"] for block in blocks if table(block).get("type") == "tool_result"]
    told += [item["output"] for item in items if item.get("type") == "function_call_output"]
    return told + [item["content"] for item in items if item.get("role") == "tool"]


async def say(
    house: House,
    path: str,
    typed: str,
    *rounds: bytes,
    stream: bool = True,
    history: Sequence[Any] = (),
    **more: Any,
) -> httpx.Response:
    """Type something, and what came after it; the model says one round for each request."""
    house.ollama.says_in_turn(path, *rounds, stream=stream)
    return await house.ask(path, typed, *history, stream=stream, **more)


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_rounds_with_calls_side_by_side_are_one_answer(
    agents: House, path: str, stream: bool
) -> None:
    rounds = [
        calling(path, "One. ", ("both", {"of": "x"}), ("both", {"of": "y"}), stream=stream),
        calling(path, "", ("add", {"a": 2, "b": 3}), stream=stream),
        calling(path, "Two.", stream=stream),
    ]

    answer = await say(agents, path, "/all go", *rounds, stream=stream)

    assert said(answer.content) == "One. Two." and results(agents, path) == ["x", "y", "5"]
    assert outcomes(answer) == "all;ok" and len(agents.ollama.asked) == 3
    assert not called(path, answer.content)


FAILURES = {
    "fail": "failed: LookupError: no such city: Atlantis",
    "hang": "failed: TimeoutError: took longer than 0.2 seconds",
    "add": "failed: KeyError: 'a'",
}


async def test_the_model_is_told_what_a_tool_could_not_do(house: House) -> None:
    house.write("all", TOOLS, timeout=0.2)
    calls: list[tuple[str, Any]] = [(name, {}) for name in FAILURES]

    answer = await say(house, CHAT, "/all go", calling(CHAT, "", *calls), calling(CHAT, "Sorry."))

    assert results(house) == [*FAILURES.values()]
    assert said(answer.content) == "Sorry." and outcomes(answer) == "all;ok"


@pytest.mark.parametrize("arguments", ["7", "[]", '{"a":', '"x"'])
async def test_arguments_that_are_no_object_are_told_too(agents: House, arguments: str) -> None:
    broken = calling(COMPLETIONS, "", ("add", {})).replace(b'"{}"', json.dumps(arguments).encode())

    await say(agents, COMPLETIONS, "/all go", broken, calling(COMPLETIONS, "Sorry."))

    assert results(agents, COMPLETIONS) == ["failed: the arguments are no JSON object"]
    [made] = history(agents, COMPLETIONS)[0]["tool_calls"]
    assert made["function"]["arguments"] == "{}"  # Ollama refuses others


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_may_abort_the_request(agents: House, stream: bool) -> None:
    first = calling(CHAT, "Text", ("abort", {}), ("hang", {}), stream=stream)

    answer = await say(agents, CHAT, "/all go", first, stream=stream)

    assert answer.status_code == (200 if stream else 418) and b"no tea" in answer.content
    assert b'"done":true' not in answer.content


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_after_the_last_round_the_model_has_our_tools_no_more(
    agents: House, path: str, stream: bool
) -> None:
    agents.ollama.says_in_turn(path, calling(path, "", ("add", {}), stream=stream), stream=stream)

    async with agents.open(chain={"rounds": 2}) as client:
        answer = await agents.post(client, path, "/all go", stream=stream)

    assert ["tools" in asked.json for asked in agents.ollama.asked] == [True, True, False]
    assert said(answer.content) == "" and not re.search(rb'"tool_(use|calls)"', answer.content)


async def test_calls_that_come_in_pieces_are_put_together(agents: House) -> None:
    pieces = [
        [{"index": 0, "id": "call_a", "function": {"name": "add", "arguments": '{"a":'}}],
        [{"index": 1, "id": "call_b", "function": {"name": "add", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '1,"b":1}'}}],
        [{"index": 1, "function": {"arguments": '{"a":2,"b":2}'}}],
    ]
    first = b"".join(event(None, tool_calls=piece) for piece in pieces)
    first += event(None, "tool_calls") + DONE

    await say(agents, COMPLETIONS, "/all go", first, calling(COMPLETIONS, ""))

    assert results(agents, COMPLETIONS) == ["2", "4"]


# The client's own tools


MIXED = [("add", {"a": 1, "b": 1}), ("theirs", {"q": [1, "ü"]}), ("add", {"a": 2, "b": 2})]


def offered(path: str, *names: str) -> list[Any]:
    """Return tools of the client's own."""
    return BY_PATH[path].offer([{"name": name, "description": "d"} for name in names])


def called(path: str, body: bytes) -> list[ToolCall]:
    """Return the calls that the client got."""
    calls: dict[Any, ToolCall] = {}
    for chunk in chunks(path, body):
        BY_PATH[path].take(chunk, calls)
    return [*calls.values()]


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_the_client_gets_its_own_calls_and_ours_are_made_when_it_comes_back(
    agents: House, path: str, stream: bool
) -> None:
    dialect, tools = BY_PATH[path], offered(path, "theirs")
    first = calling(path, "Wait. ", *MIXED, stream=stream)

    answer = await say(agents, path, "/all go", first, stream=stream, tools=tools)
    [call] = called(path, answer.content)

    check(path, answer.content, stream, counted=False)
    assert said(answer.content) == "Wait. " and call.name == "theirs"
    assert json.loads(call.arguments) == MIXED[1][1] and len(agents.ollama.asked) == 1
    came_back = dialect.spoken("Wait. ", "", [call]) + dialect.results([(call, "found")])
    agents.ollama.says_in_turn(path, calling(path, "Done.", stream=stream), stream=stream)
    history = wired(path, came_back)
    answer = await agents.ask(path, "/all go", *history, stream=stream, tools=tools)
    assert said(answer.content) == "Done." and results(agents, path) == ["found", "2", "4"]
    assert "_osp_" not in json.dumps(agents.ollama.asked[-1].json)


def wired(path: str, messages: list[Any]) -> list[Any]:
    """Return messages of a payload as the client sends them."""
    body = BY_PATH[path].write({"messages": messages}, {})
    sent: list[Any] = body["input" if path == RESPONSES else "messages"]
    return sent


async def test_calls_that_came_back_are_made_once_and_old_ones_never(agents: House) -> None:
    answer = await say(agents, CHAT, "/all go", calling(CHAT, "", *MIXED))
    [call] = called(CHAT, answer.content)
    step = [*Dialect().spoken("", "", [call]), *Dialect().results([(call, "found")])]
    again = ToolCall("theirs", "{}")
    later = [*Dialect().spoken("", "", [again]), *Dialect().results([(again, "more")])]

    for more, told in ((later, ["found", "more"]), ([message("user", "so?")], ["found"])):
        await say(agents, CHAT, "/all go", calling(CHAT, "Done."), history=[*step, *more])
        assert results(agents) == told


def packed(value: Any) -> str:
    return urlsafe_b64encode(zlib.compress(json.dumps(value).encode())).decode().rstrip("=")


STRANGE = [7, [7], [["add"]], [["\ud800", "\ud800", None]], {"a": 1}]
PACKED = ["", "x", "eJw", "A" * 99, "eJyLjgUAARUAuQ", *map(packed, STRANGE)]


@pytest.mark.parametrize("data", PACKED)
async def test_what_an_id_carries_may_be_anything(agents: House, data: str) -> None:
    call = ToolCall("theirs", "{}", f"call_1_osp_{data}")
    step = [*Dialect().spoken("", "", [call]), *Dialect().results([(call, "found")])]

    answer = await say(agents, CHAT, "/all go", calling(CHAT, "Done."), history=step)

    assert said(answer.content) == "Done." and results(agents)[0] == "found"


@pytest.mark.parametrize("path", PATHS)
async def test_a_name_of_the_clients_stays_and_ours_gets_the_agents_before_it(
    agents: House, path: str
) -> None:
    agents.write("other", TOOLS)
    calls = [("all_add", {"a": 1, "b": 1}), ("other_add", {"a": 2, "b": 2})]
    rounds = calling(path, "", *calls), calling(path, "Done.")

    await say(agents, path, "/all /other go", *rounds, tools=offered(path, "add"))

    tools = agents.ollama.asked[0].json["tools"]
    names = [tool.get("function", tool)["name"] for tool in tools]
    assert names[0] == "add" and len({*names}) == len(names) == 13
    assert {"all_add", "fail", "other_fail", "other_add"} < {*names}
    assert results(agents, path) == ["2", "4"]


async def test_tools_that_are_no_list_are_for_ollama_to_judge(agents: House) -> None:
    await say(agents, CHAT, "/all go", calling(CHAT, ""), tools="none")

    assert agents.ollama.asked[0].json["tools"] == "none"


# Consent

WRITES = ("write", {"path": "a`b\u202e.txt", "n": 5})
CHANGES = [("a`b", "a`c"), ('"n":5', '"n":6'), ("asks write", "asks read"), ("(osp:", "(osp:0")]


def spoken(path: str, text: str) -> list[Any]:
    """Return what the model said as the client's history has it."""
    told = [{"type": "output_text", "text": text}]
    return [message("assistant", told if path == RESPONSES else text)]


@pytest.mark.parametrize(("path", "stream"), WAYS)
@pytest.mark.parametrize("text", ["", "I will. "])
async def test_a_call_that_needs_consent_is_shown_and_made_after_yes(
    agents: House, path: str, stream: bool, text: str
) -> None:
    rounds = calling(path, text, ("read", {}), WRITES, stream=stream)
    answer = await say(agents, path, "/asks go", rounds, stream=stream)
    question = said(answer.content)

    shown = '````\nasks read {}\nasks write {"path":"a`b\\u202e.txt","n":5}\n````'
    assert question.startswith(f"{text.upper()}\n\nThis would be called:" if text else "This would")
    assert shown.replace("````", "```") in question.replace("````", "```")
    assert not called(path, answer.content) and len(agents.ollama.asked) == 1
    assert not re.search(rb'"tool_(use|calls)"', answer.content)

    history = [*spoken(path, question), message("user", " /YES ")]
    done = calling(path, "Done.", stream=stream)
    answer = await say(agents, path, "/asks go", done, stream=stream, history=history)

    assert said(answer.content) == "DONE."
    assert results(agents, path) == ["read: {}", f"write: {WRITES[1]}"]
    sent = json.dumps(agents.ollama.asked[-1].json)
    assert "yes" not in sent.lower() and "osp:" not in sent and '"go"' in sent


@pytest.mark.parametrize("path", PATHS)
async def test_a_turn_may_ask_more_than_once_and_the_model_reads_no_question(
    agents: House, path: str
) -> None:
    history: list[Any] = []

    for number in range(3):
        first = calling(path, f"Step {number}.", ("write", {"n": number}))
        answer = await say(agents, path, "/asks go", first, history=history)
        history += [*spoken(path, f"{said(answer.content)}\n(thoughts)"), message("user", "/yes")]
    answer = await say(agents, path, "/asks go", calling(path, "Done."), history=history)

    assert said(answer.content) == "DONE."
    assert results(agents, path) == [LOST, LOST, "write: {'n': 2}"]
    sent = json.dumps(agents.ollama.asked[-1].json)
    assert "osp:" not in sent and "/yes" not in sent and sent.count("(thoughts)") == 3
    assert "STEP 0." in sent


async def test_what_is_made_is_what_the_user_saw(agents: House) -> None:
    agents.write("judge", f"import json\n{LAST}", always=True, on_error="abort")
    answer = await say(agents, CHAT, "/asks go", calling(CHAT, "", ("write", {"a": "secret"})))
    question = said(answer.content)
    agents.plugins.joinpath("judge_agent/agent.py").write_text(
        f"import json\nfrom kernel.agent import *\n{LAST}".replace('"hidden", "secret"', '"s", "x"')
    )

    history = [*spoken(CHAT, question), message("user", "/yes")]
    await say(agents, CHAT, "/asks go", calling(CHAT, "Done."), history=history)

    assert results(agents) == ["write: {'a': 'hidden'}"]


@pytest.mark.parametrize(("old", "new"), CHANGES)
async def test_a_call_that_was_altered_is_not_made(agents: House, old: str, new: str) -> None:
    answer = await say(agents, CHAT, "/asks go", calling(CHAT, "", WRITES))
    question = said(answer.content)
    assert old in question
    history = [*spoken(CHAT, question.replace(old, new)), message("user", "/yes")]

    answer = await agents.ask(CHAT, "/asks go", *history)

    assert said(answer.content) == "this is not what you were asked, so nothing was done"
    assert len(agents.ollama.asked) == 1


async def test_yes_is_a_word_like_others_where_nothing_was_asked(agents: House) -> None:
    history = [*spoken(CHAT, "Is what?"), message("user", "/yes")]
    body = {"model": "m", "messages": [message("user", "Is it?"), *history]}
    agents.ollama.answers(line("y"), done())

    async with agents.open() as client:
        await client.post(CHAT, json=body)
        await say(agents, CHAT, "/asks go", calling(CHAT, ""), history=history)

    assert agents.ollama.asked[0].json == body
    assert agents.ollama.asked[1].json["messages"][-1]["content"] == "/yes"


async def test_yes_counts_for_the_one_who_was_asked_and_for_agents_that_are_here(
    agents: House,
) -> None:
    keys = {"keys": {"a": {"key": "ada"}, "b": {"key": "bob"}}}
    agents.ollama.says_in_turn(CHAT, calling(CHAT, "", WRITES), calling(CHAT, "Done."), stream=True)

    async def ask(key: str, *history: Any) -> str:
        body = chat(CHAT, "/asks go", *history)
        async with agents.open(**keys) as client:
            return said((await client.post(CHAT, json=body, headers={"x-api-key": key})).content)

    asked = spoken(CHAT, await ask("ada"))
    assert "nothing was done" in await ask("bob", *asked, message("user", "/yes"))
    assert await ask("ada", *asked, message("user", "/yes")) == "DONE."
    await agents.ask(CHAT, "go", *asked, message("user", "/yes"), header="/asks")
    assert results(agents) == [f"write: {WRITES[1]}"]


async def test_an_operator_asks_for_consent_with_a_setting(house: House) -> None:
    house.write("all", TOOLS, settings={"ask": ["add"]})

    answer = await say(house, CHAT, "/all go", calling(CHAT, "", ("add", {"a": 1, "b": 1})))

    assert '\nall add {"a":1,"b":1}\n' in said(answer.content)


async def test_a_call_that_an_id_carries_needs_consent_too(agents: House) -> None:
    answer = await say(agents, CHAT, "/asks go", calling(CHAT, "", WRITES, ("theirs", {})))
    [call] = called(CHAT, answer.content)
    step = [*Dialect().spoken("", "", [call]), *Dialect().results([(call, "found")])]

    answer = await say(agents, CHAT, "/asks go", calling(CHAT, "Done."), history=step)

    assert said(answer.content).startswith("This would be called:\n")
    assert len(agents.ollama.asked) == 1


# Guards, and who else judges

GUARD = """
class It(BaseAgent):
    last = LAST
    async def on_request(self, payload):
        seen = " ".join(texts(payload))
        if "Atlantis" in seen and self.context.continuation:
            raise Abort(451, "no word of Atlantis")
        payload["seen"] = payload.get("seen", 0) + 1
        return map_texts(payload, lambda text: text.replace("secret", "hidden"))
    async def on_calls(self, calls):
        for call in calls:
            text = json.dumps(call["arguments"]).replace("hidden", "secret")
            call["arguments"] = json.loads(text)
        return [call for call in calls if call["name"] != "fail"]
    async def on_response(self, response):
        return response.replace("hidden", "secret")
"""
LAST = GUARD.replace("LAST", "True")
TELLS = """
class It(BaseAgent):
    tools = [{"name": name, "description": "a secret"} for name in ("tell", "fail", "sink")]
    async def on_tool(self, name, arguments):
        return f"{arguments['of']}, a secret" if name == "tell" else "Atlantis"
"""


@pytest.mark.parametrize(("path", "stream"), WAYS)
@pytest.mark.parametrize("config", [{"always": True, "on_error": "abort"}, {"always": True}])
async def test_what_tools_bring_in_is_seen_before_the_model_sees_it(
    house: House, path: str, stream: bool, config: dict[str, Any]
) -> None:
    house.write("tells", TELLS)
    house.write(
        "judge", f"import json\n{GUARD.replace('LAST', str('on_error' not in config))}", **config
    )
    first = calling(path, "", ("tell", {"of": "my hidden"}), ("fail", {"of": 1}), stream=stream)
    second = calling(path, "Your hidden.", stream=stream)

    answer = await say(house, path, "/tells my secret", first, second, stream=stream)

    assert said(answer.content) == "Your secret."
    assert results(house, path) == ["my hidden, a hidden", "refused: this call is not allowed"]
    bodies = [asked.body for asked in house.ollama.asked]
    assert [json.loads(body)["seen"] for body in bodies] == [1, 2]
    last = "on_error" not in config  # what agents offer is seen at once by those that are last
    assert [b"secret" in body for body in bodies] == [not last, False]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_guard_may_refuse_what_a_tool_returned(house: House, stream: bool) -> None:
    house.write("tells", TELLS)
    house.write("judge", f"import json\n{LAST}", always=True, on_error="abort")

    answer = await say(
        house, CHAT, "/tells x", calling(CHAT, "Hm.", ("sink", {}), stream=stream), stream=stream
    )

    assert b"no word of Atlantis" in answer.content and b'"done":true' not in answer.content
    assert answer.status_code == (200 if stream else 451) and len(house.ollama.asked) == 1


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_the_clients_calls_are_judged_as_well(house: House, path: str, stream: bool) -> None:
    house.write("judge", f"import json\n{LAST}", always=True, on_error="abort")
    calls = [("theirs", {"a": "my hidden", "b": 1}), ("fail", {}), ("theirs", {"of": "x"})]

    first = calling(path, "So.", *calls, stream=stream)
    answer = await say(
        house, path, "my secret", first, stream=stream, tools=offered(path, "theirs", "fail")
    )

    got = [(call.name, json.loads(call.arguments)) for call in called(path, answer.content)]
    assert got == [("theirs", {"a": "my secret", "b": 1}), ("theirs", {"of": "x"})]
    assert said(answer.content) == "So." and len(house.ollama.asked) == 1


async def test_a_refused_call_of_the_client_is_told_to_the_model(house: House) -> None:
    house.write("judge", f"import json\n{LAST}", always=True)

    rounds = [calling(CHAT, "", ("fail", {})), calling(CHAT, "Well.")]
    answer = await say(house, CHAT, "x", *rounds, tools=offered(CHAT, "fail"))

    assert said(answer.content) == "Well." and not called(CHAT, answer.content)
    assert results(house) == ["refused: this call is not allowed"]


JUDGES = {
    "nothing": "return None",
    "none": "return [7]",
    "strange": "return [{'id': '9', 'name': 'add', 'arguments': {}}]",
    "set": "calls[0]['arguments'] = {'a': {1}}; return calls",
    "text": "calls[0]['arguments'] = '{}'; return calls",
    "raises": "calls.clear(); raise ValueError('secret')",
    "replies": "raise Reply('x')",
}


@pytest.mark.parametrize("name", JUDGES)
async def test_a_judge_that_fails_judges_nothing_and_a_guard_lets_nothing_pass(
    agents: House, name: str
) -> None:
    code = f"class It(BaseAgent):\n    async def on_calls(self, calls):\n        {JUDGES[name]}\n"
    agents.write("judge", code)
    agents.write("guard", code, always=True, on_error="abort", models=["guarded"])
    rounds = [calling(CHAT, "", ("add", {"a": 1, "b": 1})), calling(CHAT, "Done.")]

    skipped = await say(agents, CHAT, "/all /judge go", *rounds)
    assert results(agents) == ["2"]
    assert said(skipped.content) == "Done." + NOTICE.format("judge")

    first = calling(CHAT, "", ("add", {}), stream=False)
    refused = await say(agents, CHAT, "/all go", first, model="guarded", stream=False)
    assert refused.status_code == 500 and len(agents.ollama.asked) == 3


async def test_a_guard_judges_the_calls_in_what_agents_ask(house: House) -> None:
    asks = """
    class It(BaseAgent):
        async def on_request(self, payload):
            found = await self.context.message(payload["messages"], tools=[{"name": "w"}])
            raise Reply(repr(found["tool_calls"]))
    """
    house.write("asks", asks)
    house.write("judge", f"import json\n{LAST}", always=True, on_error="abort")
    first = calling(CHAT, "", ("w", {"of": "hidden"}), ("fail", {}), stream=False)

    answer = await say(house, CHAT, "/asks x", first, stream=False)

    assert "secret" in said(answer.content) and "fail" not in said(answer.content)


# What can go wrong on the way


async def test_an_upstream_that_refuses_a_later_round_is_an_error(agents: House) -> None:
    first = calling(CHAT, "One.", ("add", {}))
    agents.ollama.says_in_turn(CHAT, first, b'{"error":"out of memory"}', stream=True)
    agents.ollama.statuses = [200, 500]

    answer = await agents.ask(CHAT, "/all go")

    assert said(answer.content) == "One." and b"out of memory" in answer.content
    assert b'"done":true' not in answer.content


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("round_that_breaks", [0, 1])
async def test_an_answer_that_breaks_off_is_never_ended(
    agents: House, path: str, round_that_breaks: int
) -> None:
    rounds = [calling(path, "One.", ("add", {})), calling(path, "Two.")]
    agents.ollama.says_in_turn(path, *rounds, stream=True)
    cut = rounds[round_that_breaks][: -len(rounds[round_that_breaks]) // 3]
    agents.ollama.script[round_that_breaks] = (cut, agents.ollama.breaks)

    with pytest.raises(httpx.RemoteProtocolError):
        await agents.ask(path, "/all go", stream=True)

    assert len(agents.ollama.asked) == 1 + round_that_breaks


async def test_a_round_without_an_end_runs_nothing(agents: House) -> None:
    cut = calling(CHAT, "One.", ("add", {})).splitlines(keepends=True)[:-1]

    answer = await say(agents, CHAT, "/all go", b"".join(cut))

    assert said(answer.content) == "One." and len(agents.ollama.asked) == 1


# What the response hooks see, and what is shown

HOLDS = """
class It(BaseAgent):
    async def on_response(self, response):
        return f"<{response}>"
"""
FLOWS = """
class It(BaseAgent):
    async def on_chunk(self, text):
        return text.upper()
    async def on_end(self):
        return "!"
"""


@pytest.mark.parametrize(("path", "stream"), WAYS)
@pytest.mark.parametrize("texts", [("One.", "Two."), ("One.", ""), ("", "Two."), ("", "")])
async def test_response_hooks_end_once_at_the_end_of_all_rounds(
    agents: House, path: str, stream: bool, texts: tuple[str, str]
) -> None:
    agents.write("holds", HOLDS)
    agents.write("flows", FLOWS)
    rounds = [calling(path, texts[0], ("add", {}), stream=stream)]
    rounds.append(calling(path, texts[1], stream=stream))

    answer = await say(agents, path, "/all /flows /holds go", *rounds, stream=stream)

    text = "".join(texts)
    assert said(answer.content) == (f"<{text.upper()}!>" if text else "")


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_text_between_thoughts_is_one_text_for_agents(agents: House, path: str) -> None:
    agents.write("holds", HOLDS)
    thinking = recorded(path, "think_think", stream=True)
    rounds = [calling(path, "One. ", ("add", {})), thinking]

    answer = await say(agents, path, "/all /holds go", *rounds)

    assert said(answer.content) == f"<One. {said(thinking)}>"
    check(path, answer.content, stream=True, counted=False)


async def test_explain_lists_the_tools_and_what_they_cost(house: House) -> None:
    house.write("weather", WEATHER)

    answer = await house.ask(CHAT, "/explain /weather how is it?")

    cost = len(json.dumps(Dialect().offer([{"name": "w", "description": "the weather"}]))) // 4
    shown = re.search(
        r"offered these tools, about (\d+) tokens:\nw \(/weather\)", said(answer.content)
    )
    assert shown and cost / 2 < int(shown[1]) < cost * 3 and not house.ollama.asked


async def test_calls_are_counted_logged_and_listed(
    agents: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rounds = [calling(CHAT, "", ("add", {"a": 1, "b": 1}), ("fail", {})), calling(CHAT, "")]
    agents.ollama.says_in_turn(CHAT, *rounds, stream=True)

    async with agents.open() as client:
        await agents.post(client, CHAT, "/all go")
        counts = (await client.get("/metrics")).text
        plugin = (await client.get("/plugins")).json()["plugins"][0]

    assert 'osp_tool_calls_total{agent="all",tool="add",outcome="ok"} 1' in counts
    assert 'osp_tool_calls_total{agent="all",tool="fail",outcome="error"} 1' in counts
    assert 'osp_tool_seconds_count{agent="all"} 2' in counts
    assert plugin["tools"] == "add fail hang abort gone both".split()
    lines = [vars(r)["fields"] for r in caplog.records if r.getMessage() == "tool called"]
    assert [(line["tool"], line["outcome"]) for line in lines] == [("add", "ok"), ("fail", "error")]
    assert "Atlantis" not in repr(lines) and "agent.py:" in lines[1]["where"]


WRONG = {
    "7": "self.tools must be a list of tools",
    "[7]": "self.tools: a tool needs a name without spaces: None",
    "[{'name': 'a b'}]": "self.tools: a tool needs a name without spaces: 'a b'",
    "[{'name': 'a', 'parameters': 7}]": "self.tools: a needs a text as its description, and a JSON",
    "[{'name': 'a', 'parameters': {'x': {1}}}]": "self.tools: cannot be sent: ",
}


@pytest.mark.parametrize("offered", WRONG)
async def test_wrong_tools_are_a_failure_of_their_agent(house: House, offered: str) -> None:
    house.write("early", f"class It(BaseAgent):\n    tools = {offered}\n")
    code = "async def on_tool(self, *args): pass\n    "
    code += f"async def on_request(self, payload):\n        self.tools = {offered}; return payload"
    house.write("late", f"class It(BaseAgent):\n    {code}\n")

    async with house.open() as client:
        listed = (await client.get("/plugins")).json()["plugins"]
        answer = await house.post(client, CHAT, "/late go", stream=True)

    [early] = [plugin for plugin in listed if plugin["name"] == "early"]
    assert WRONG[offered] in early["error"]["text"]
    assert said(answer.content).startswith("y") and outcomes(answer) == "late;error"
    assert "tools" not in house.ollama.asked[0].json


@pytest.mark.parametrize("path", PATHS)
async def test_what_our_tools_said_is_not_lost_while_the_client_makes_its_calls(
    agents: House, path: str
) -> None:
    dialect, tools = BY_PATH[path], offered(path, "theirs")
    theirs: tuple[str, Any] = ("theirs", {})
    rounds = [
        *(calling(path, "", ("add", {"a": 1, "b": 1})), calling(path, "", theirs)),
        *(calling(path, "", ("add", {"a": 2, "b": 2}), theirs), calling(path, "", theirs)),
        calling(path, "Done."),
    ]
    agents.ollama.says_in_turn(path, *rounds, stream=True)
    history: list[Any] = []

    for step in range(3):
        answer = await agents.ask(path, "/all go", *history, stream=True, tools=tools)
        [call] = called(path, answer.content)
        step_back = dialect.spoken("", "", [call]) + dialect.results([(call, f"found {step}")])
        history += wired(path, step_back)
    answer = await agents.ask(path, "/all go", *history, stream=True, tools=tools)

    assert said(answer.content) == "Done."
    assert results(agents, path) == ["2", "found 0", "found 1", "4", "found 2"]


SHOWS = """
class It(BaseAgent):
    tools = [{"name": "show"}]
    async def on_tool(self, name, arguments):
        return [
            {"type": "text", "text": "a"},
            {"type": "image", "data": "aGk=", "mimeType": "image/png"},
            {"type": "text", "text": "b"},
        ]
"""
TEXT, URL = "a\n\nb", "data:image/png;base64,aGk="
SOURCE = {"type": "base64", "media_type": "image/png", "data": "aGk="}
IMAGES: dict[str, Any] = {
    CHAT: {"images": ["aGk="], "content": TEXT},
    COMPLETIONS: {
        "content": parts(COMPLETIONS, TEXT, {"type": "image_url", "image_url": {"url": URL}})
    },
    MESSAGES: {"content": parts(MESSAGES, TEXT, {"type": "image", "source": SOURCE})},
    RESPONSES: {"output": parts(RESPONSES, TEXT, {"type": "input_image", "image_url": URL})},
}


@pytest.mark.parametrize("path", PATHS)
async def test_images_of_a_result_are_told_as_the_dialect_has_them(house: House, path: str) -> None:
    house.write("shows", SHOWS)

    await say(house, path, "/shows it", calling(path, "", ("show", {})), calling(path, "Nice."))

    told = history(house, path)[-1]
    told = told["content"][0] if path == MESSAGES else told
    assert {key: told[key] for key in IMAGES[path]} == IMAGES[path]


@pytest.mark.parametrize("result", ["7", "None", "[7]", "[{'type': 'audio', 'data': ''}]"])
async def test_a_result_of_another_kind_is_told_as_a_failure(house: House, result: str) -> None:
    tool = f"async def on_tool(self, *args):\n        return {result}"
    house.write("odd", f"class It(BaseAgent):\n    tools = [{{'name': 'x'}}]\n    {tool}\n")

    await say(house, CHAT, "/odd it", calling(CHAT, "", ("x", {})), calling(CHAT, ""))

    [told] = results(house)
    assert told.startswith("failed: returned ") and "on_tool must return text" in told


UNREADABLE = [
    b'{"message":{"role":"assistant","tool_calls":[{"function":7}]},"done":false}\n',
    b'{"message":{"role":"assistant","tool_calls":[7]},"done":false}\n',
    b'{"message" what is this\n',
]


@pytest.mark.parametrize("frame", UNREADABLE)
async def test_calls_that_cannot_be_read_pass_no_guard(agents: House, frame: bytes) -> None:
    code = "class It(BaseAgent):\n    async def on_calls(self, calls):\n        return calls\n"
    agents.write("guard", code, always=True, on_error="abort", models=["guarded"])

    free = await say(agents, CHAT, "/all go", frame + done())
    guarded = await say(agents, CHAT, "/all go", frame + done(), model="guarded")

    assert free.content == frame + done()
    assert frame not in guarded.content and b"cannot see this request" in guarded.content


async def test_a_text_beside_the_end_comes_before_the_next_round(agents: House) -> None:
    first = calling(CHAT, "", ("add", {"a": 1, "b": 1})).splitlines(keepends=True)[:-1]
    rounds = [b"".join([*first, done("Hm.")]), line("So.") + done(eval_count=1)]

    answer = await say(agents, CHAT, "/all go", *rounds)

    assert said(answer.content) == "Hm.So." and results(agents) == ["2"]
    assert [chunk.get("eval_count") for chunk in chunks(CHAT, answer.content)] == [*[None] * 3, 8]


async def test_an_error_in_a_round_is_the_end(agents: House) -> None:
    first = calling(CHAT, "One.", ("theirs", {}), ("add", {})).splitlines(keepends=True)[:-1]

    answer = await say(agents, CHAT, "/all go", *[b"".join([*first, b'{"error":"no room"}\n'])])

    assert answer.content.endswith(b'{"error":"no room"}\n') and len(agents.ollama.asked) == 1
    assert said(answer.content) == "One." and not called(CHAT, answer.content)
