"""Frames and errors on the wire, in both dialects."""

from __future__ import annotations

import json

import pytest

from kernel.dialects import OLLAMA, OPENAI, FrameSplitter, dumps, error


@pytest.mark.parametrize(
    ("end", "stream"),
    [
        (OLLAMA.end, b'{"a":"\xc3\xb6"}\n\n{"b":2}\r\n{"c":3}'),
        (OPENAI.end, b"data: 1\n\n: hm\r\n\r\ndata: 2\ndata: 3\n\r\nrest"),
        (OPENAI.end, b"\n\n\n\n\r\n\r\n"),
    ],
)
def test_frames_do_not_depend_on_how_the_bytes_were_split(end: object, stream: bytes) -> None:
    def split(size: int) -> list[bytes]:
        splitter = FrameSplitter(end)  # type: ignore[arg-type]
        frames = [
            f for at in range(0, len(stream), size) for f in splitter.feed(stream[at : at + size])
        ]
        return [*frames, splitter.rest()]

    whole = split(len(stream))

    assert b"".join(whole) == stream and len(whole) > 2
    assert all(split(size) == whole for size in range(1, len(stream)))


def test_json_is_one_line_for_clients_that_split_on_more_than_newlines() -> None:
    value = {"z": "a\x0b\x0c\x1c\x85\u2028\u2029\ud800\n\x7f", "a": ["é\U0001f600", 2**60, 1.5]}

    encoded = dumps(value)

    assert len(encoded.decode().splitlines()) == 1
    assert json.loads(encoded) == value and list(json.loads(encoded)) == ["z", "a"]
    assert "é\U0001f600".encode() in encoded


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_what_is_no_json_is_never_sent(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        dumps({"x": value})


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
    assert OPENAI.parse(frame) == {"a": 1}
    assert OPENAI.edit(frame, {"b": 2}) == edited


@pytest.mark.parametrize(
    "frame",
    [
        b": hm\n\n",
        b"data: [DONE]\n\n",
        b"data: 1\ndata: 2\n\n",
        b'data: {"x":1e999}\n\n',
        b"[" * 9**5,
    ],
)
def test_a_frame_without_a_json_object_is_none(frame: bytes) -> None:
    assert OPENAI.parse(frame) is None and OLLAMA.parse(frame) is None


@pytest.mark.parametrize(
    ("path", "status", "kind", "body"),
    [
        ("/api/chat", 502, "application/json; charset=utf-8", b'{"error":"it \xc3\xb6"}'),
        ("/x", 403, "application/json; charset=utf-8", b'{"error":"it \xc3\xb6"}'),
        (
            "/v1/chat/completions",
            400,
            "application/json",
            b'{"error":{"message":"it \xc3\xb6","type":"invalid_request_error",'
            b'"param":null,"code":null}}\n',
        ),
        (
            "/v1/messages",
            401,
            "application/json",
            b'{"type":"error","error":{"type":"authentication_error","message":"it \xc3\xb6"}}\n',
        ),
    ],
)
def test_an_error_has_the_shape_of_its_path(path: str, status: int, kind: str, body: bytes) -> None:
    assert error(path, status, "it ö") == (kind.encode(), body)
