"""Tools: the model calls what agents offer, and the client sees one answer.

The first round of most answers here is what a real Ollama answered, in each dialect.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.support import BY_PATH, CHAT, COMPLETIONS, MESSAGES, PATHS, RESPONSES, House, said
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


def history(house: House, path: str) -> list[Any]:
    """Return what the last request had behind the user's message."""
    body = house.ollama.asked[-1].json
    messages = body["input" if path == RESPONSES else "messages"]
    return messages[1:] if isinstance(messages, list) else []


def check(path: str, body: bytes, stream: bool) -> None:
    """Check what clients rely on: one beginning and one end, numbers without gaps, sums."""
    found = chunks(path, body)
    ends = [chunk for chunk in found if BY_PATH[path].ends(chunk)]
    kinds = [chunk.get("type") for chunk in found]
    usage = [count for chunk in ends for count in numbers(BY_PATH[path].counts(chunk))]
    assert not usage or usage == sums(path, stream)
    if not stream:
        assert len(found) == 1
    elif path == CHAT:
        assert found.index(ends[0]) == len(found) - 1
    elif path == COMPLETIONS:
        assert len({chunk["id"] for chunk in found}) == 1 and body.count(b"[DONE]") == 1
        assert [chunk["choices"][0]["finish_reason"] for chunk in found].count(None) == len(
            found
        ) - 1
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
    ends = [[c for c in chunks(path, body) if dialect.ends(c)][0] for body in rounds]
    first, second = (numbers(dialect.counts(end)) for end in ends)
    return [a + b for a, b in zip(first, second, strict=True)]


CALLED: dict[str, Any] = {
    CHAT: [
        {
            "role": "assistant",
            "content": "Let me look. ",
            "tool_calls": [{"id": "ID", "function": {"name": "w", "arguments": {"z": "1"}}}],
        },
        {"role": "tool", "content": "rain at 1", "tool_name": "w", "tool_call_id": "ID"},
    ],
    COMPLETIONS: [
        {
            "role": "assistant",
            "content": "Let me look. ",
            "tool_calls": [
                {
                    "id": "ID",
                    "index": 0,
                    "type": "function",
                    "function": {"name": "w", "arguments": '{"z":"1"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "ID", "content": "rain at 1"},
    ],
    MESSAGES: [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me look. "},
                {"type": "tool_use", "id": "ID", "name": "w", "input": {"z": "1"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "ID", "content": "rain at 1"}],
        },
    ],
    RESPONSES: [
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me look. "}],
        },
        {"type": "function_call", "call_id": "ID", "name": "w", "arguments": '{"z":"1"}'},
        {"type": "function_call_output", "call_id": "ID", "output": "rain at 1"},
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
    made = json.dumps(history(house, path))
    [name] = {*re.findall(r"call_\w{8}", made)}
    expected = CALLED[path][1:] if dropped else CALLED[path]
    assert json.loads(made.replace(name, "ID")) == expected
