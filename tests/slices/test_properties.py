"""Properties: however an answer is cut by the network or by the model, the result is the same."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.agent import BaseAgent, map_texts, texts
from kernel.dialects import dumps
from kernel.editor import Editor, FrameSplitter, Stage
from kernel.hooks import Run
from kernel.log import RequestInfo
from kernel.metrics import Metrics
from kernel.plugin import Plugin
from tests.support import BY_PATH, PATHS, RESPONSES, frames, said

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
ANY_PATH = st.sampled_from(PATHS)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


class Brackets(BaseAgent):
    """Puts brackets around every x, and keeps back each last sign until the next one is known."""

    held = ""

    async def on_chunk(self, text: str) -> str:
        text = self.held + text
        self.held = text[-1:]
        return text[:-1].replace("x", "[x]")

    async def on_end(self) -> str:
        return self.held.replace("x", "[x]") + "!"


class Reverses(BaseAgent):
    """Needs the whole text."""

    async def on_response(self, response: str) -> str:
        return response[::-1]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in zip(marks, marks[1:], strict=False)]


@given(st.lists(st.binary(max_size=9)), st.lists(st.integers(0, 999)), ANY_PATH)
def test_any_bytes_split_anywhere_give_the_same_frames(
    pieces: list[bytes], places: list[int], path: str
) -> None:
    data = b"\r\n".join(pieces) + b"\n\n".join(pieces)

    def split(pieces: list[bytes]) -> list[bytes]:
        splitter = FrameSplitter(BY_PATH[path].end)
        return [*(frame for piece in pieces for frame in splitter.feed(piece)), splitter.rest()]

    assert split(cut(data, places)) == split([data]) and b"".join(split([data])) == data


@given(st.dictionaries(st.text(), JSON), ANY_PATH)
def test_an_edit_keeps_every_key_and_its_order(chunk: dict[str, Any], path: str) -> None:
    frame = BY_PATH[path].encode({"type": "first"})

    edited = BY_PATH[path].edit(frame, chunk)

    assert json.dumps(BY_PATH[path].parse(edited)) == json.dumps(chunk)
    assert len(edited.decode().splitlines()) == len(frame.decode().splitlines())


@given(JSON)
def test_what_is_encoded_or_mapped_to_itself_can_be_read_again(value: Any) -> None:
    assert json.loads(dumps(value)) == json.loads(json.dumps(value))
    assert map_texts({"x": value}, str) == {"x": value}
    assert len(texts({"x": value})) <= json.dumps(value).count('"')


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1), st.lists(st.integers(0, 9999)), ANY_PATH, st.booleans())
def test_the_edited_text_depends_on_the_text_alone(
    texts: list[str], places: list[int], path: str, reverse: bool
) -> None:
    """Neither on the pieces of the model nor on the packets of the network."""
    agents: list[BaseAgent] = [Brackets(), *([Reverses()] if reverse else [])]
    text = "".join(texts)
    expected = text.replace("x", "[x]") + "!" if text else ""

    body = asyncio.run(edited(path, agents, b"".join(frames(path, *texts)), places))

    assert said(body) == (expected[::-1] if reverse else expected)
    assert len(body.decode().splitlines()) == body.count(b"\n")
    assert body.endswith(frames(path)[-1]) or path == RESPONSES
    chunks = [json.loads(part[6:]) for part in body.decode().split("\n") if '"sequence_n' in part]
    assert [chunk["sequence_number"] for chunk in chunks] == [*range(len(chunks))]


async def edited(path: str, agents: list[BaseAgent], data: bytes, places: list[int]) -> bytes:
    stages = [Stage(run_of(agent), whole=False) for agent in agents]
    editor = Editor(BY_PATH[path], stages, {}, lambda _: "", whole=False)
    splitter, sent = FrameSplitter(BY_PATH[path].end), []
    for piece in cut(data, places):
        for frame in splitter.feed(piece):
            sent += await editor.edit(frame)
    return b"".join([*sent, *await editor.end()])


def run_of(agent: BaseAgent) -> Run:
    vars(agent)["context"] = SimpleNamespace(request_id="r", finish="")
    hooks = tuple(vars(type(agent)))
    return Run(Plugin("a", Path(), agent=agent, hooks=hooks), agent, 5, Metrics(), RequestInfo("x"))
