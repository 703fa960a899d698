"""Dialects: frames on the wire, and what a request means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kernel.agent import add_context, add_system, last_user, set_prompt
from kernel.dialects import dumps
from tests.support import BY_PATH, CHAT, COMPLETIONS, MESSAGES, PATHS, RESPONSES, message

OLLAMA, SSE = BY_PATH[CHAT], BY_PATH[COMPLETIONS]


def test_json_is_one_line_for_clients_that_split_on_more_than_newlines() -> None:
    value = {"z": "a\x0b\x0c\x1c\x85\u2028\u2029\ud800\n\x7f", "a": ["é\U0001f600", 2**60, 1.5]}

    encoded = dumps(value)

    assert len(encoded.decode().splitlines()) == 1
    assert json.loads(encoded) == value and list(json.loads(encoded)) == ["z", "a"]
    assert "é\U0001f600".encode() in encoded
    for wrong in (float("nan"), float("inf"), {1, 2}, b"x"):
        with pytest.raises((ValueError, TypeError)):
            dumps({"x": wrong})


@pytest.mark.parametrize(
    ("frame", "edited"),
    [
        (b'data: {"a": 1}\n\n', b'data: {"b":2}\n\n'),
        (b'data:{"a": 1}\r\n\r\n', b'data:{"b":2}\r\n\r\n'),
        (b'event: x\ndata: {"a": 1}\nid: 3\n\n', b'event: x\ndata: {"b":2}\nid: 3\n\n'),
        (b' {"a": 1}\n', b'{"b":2}\n'),
    ],
)
def test_an_edit_replaces_the_json_of_a_frame_and_nothing_else(frame: bytes, edited: bytes) -> None:
    assert SSE.parse(frame) == {"a": 1} and SSE.edit(frame, {"b": 2}) == edited


BARE = [b": hm\n\n", b"data: [DONE]\n\n", b"\n\n"]
BROKEN = [
    b"data: 1\ndata: 2\n\n",
    b'data: {"x":1e999}\n\n',
    b"data: [1]\n\n",
    b"data:" + b"[" * 9**5,
]


@pytest.mark.parametrize("frame", [*BARE, *BROKEN])
def test_a_frame_without_a_json_object_is_none(frame: bytes) -> None:
    assert SSE.parse(frame) is None and OLLAMA.parse(frame) is None
    assert bool(SSE.bare.fullmatch(frame)) == (frame in BARE)


BLOCKS = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]
BLANK = {"type": "text", "text": "A\n\n"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "rain"}
REFERENCE = {"type": "item_reference", "id": "c"}
ASKED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {}, {"messages": [message("system", "A"), message("user", "C\n\nq")]}),
        (MESSAGES, {}, {"system": "A", "messages": [message("user", "C\n\nq")]}),
        (MESSAGES, {"system": "s"}, {"system": "A\n\ns"}),
        (MESSAGES, {"system": BLOCKS}, {"system": [BLANK, *BLOCKS]}),
        (MESSAGES, {"messages": [message("system", "m"), message("user", "q")]},
         {"system": "A", "messages": [message("system", "m"), message("user", "C\n\nq")]}),
        (RESPONSES, {"input": "q"}, {"instructions": "A", "input": "C\n\nq"}),
        (RESPONSES, {"input": "q", "instructions": "s"}, {"instructions": "A\n\ns"}),
        (RESPONSES, {"input": [message("developer", "d"), ASKED, OUTPUT]},
         {"instructions": "A", "input": [message("developer", "d"), ASKED | {"content": [
             {"type": "input_text", "text": "C\n\nq"}]}, OUTPUT]}),
    ],
)  # fmt: skip
def test_what_agents_add_is_said_where_each_dialect_says_it(
    path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    key = "input" if path == RESPONSES else "messages"
    request = {"model": "m", key: [message("user", "q")], "x": 1, **body}
    dialect = BY_PATH[path]

    payload = json.loads(json.dumps(dialect.read(request)))
    sent = dialect.write(add_context(add_system(payload, "A"), "C"), request)

    assert sent == request | {key: sent[key]} | expected


def test_parts_have_one_type_in_hooks_and_the_dialects_own_on_the_wire() -> None:
    said = message("assistant", [{"type": "output_text", "text": "a"}])
    request, dialect = {"model": "m", "input": [ASKED, said, OUTPUT]}, BY_PATH[RESPONSES]

    payload = dialect.read(request)
    payload["messages"].append(message("user", [{"type": "text", "text": "new"}]))
    sent = dialect.write(set_prompt(payload, "newer"), request)["input"]

    assert last_user(payload) == message("user", [{"type": "text", "text": "newer"}])
    assert [m.get("content", [{}])[0].get("type") for m in payload["messages"]] == [
        *("text", "text", None, "text")
    ]
    newer = message("user", [{"type": "input_text", "text": "newer"}])
    assert sent == [ASKED, said, OUTPUT, newer]


@pytest.mark.parametrize("path", PATHS)
def test_what_a_dialect_cannot_say_is_an_error(path: str) -> None:
    dialect, key = BY_PATH[path], "input" if path == RESPONSES else "messages"
    request = {"model": "m", key: [message("user", "q")]}
    wrong: list[Any] = ["x", {"role": "user", "content": 5}, {"role": "user", "content": ["x"]}]
    wrong.append({"role": "user", "content": [{"type": "text", "text": 5}]})
    wrong += [message("user", [{"type": "text", "text": "x"}])] if path == CHAT else []
    wrong += [REFERENCE] if path == RESPONSES else []

    for each in wrong:
        with pytest.raises(ValueError, match="must be|cannot be added"):
            dialect.write(dialect.read(request) | {"messages": [each]}, request)
        if each is not REFERENCE:
            with pytest.raises(ValueError, match="must be"):
                dialect.check(dialect.read(request | {key: [each]}))
