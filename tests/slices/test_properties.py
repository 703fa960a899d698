"""Properties: however an answer is cut by the network or by the model, the result is the same."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.agent import BaseAgent, Context
from kernel.client import OllamaClient
from kernel.commands import Grammar
from kernel.config import PluginsConfig, parse_upstream
from kernel.dialects import OLLAMA, OPENAI, Dialect, FrameSplitter, dumps
from kernel.editor import Editor, Stage
from kernel.metrics import Metrics
from kernel.models import Presets
from kernel.plugin import Plugin
from kernel.registry import PluginRegistry
from kernel.run import Run
from slices.chat import TurnReader, split_model
from tests.support import DONE, done, event, line, said

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
DIALECTS = st.sampled_from([OLLAMA, OPENAI])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
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


@given(st.lists(st.binary(max_size=9)), st.lists(st.integers(0, 999)), DIALECTS)
def test_any_bytes_split_anywhere_give_the_same_frames(
    parts: list[bytes], places: list[int], dialect: Dialect
) -> None:
    data = b"\r\n".join(parts) + b"\n\n".join(parts)

    def frames(pieces: list[bytes]) -> list[bytes]:
        splitter = FrameSplitter(dialect.end)
        found = [frame for piece in pieces for frame in splitter.feed(piece)]
        return [*found, splitter.rest()]

    assert frames(cut(data, places)) == frames([data])
    assert b"".join(frames([data])) == data


@given(st.dictionaries(st.text(), JSON), DIALECTS)
def test_an_edit_keeps_every_key_and_its_order(chunk: dict[str, Any], dialect: Dialect) -> None:
    frame = dialect.encode({"first": 1})

    edited = dialect.edit(frame, chunk)

    assert dialect.parse(edited) == json.loads(json.dumps(chunk))
    assert list(dialect.parse(edited) or {}) == list(chunk)
    assert len(edited.decode().splitlines()) == len(frame.decode().splitlines())


@given(JSON)
def test_what_is_encoded_can_be_read_again(value: Any) -> None:
    assert json.loads(dumps(value)) == json.loads(json.dumps(value))


@given(st.binary(max_size=9) | TEXTS.map(str.encode), DIALECTS)
def test_a_frame_that_is_not_parsed_says_what_it_would_say_parsed(
    text: bytes, dialect: Dialect
) -> None:
    frame = (line("?") if dialect is OLLAMA else event("?")).replace(b"?", text)
    assert dialect.split(line("x") if dialect is OLLAMA else event("x"))

    if parts := dialect.split(frame):
        chunk = dialect.parse(frame)
        assert chunk and not dialect.is_error(chunk) and not dialect.ends_text(chunk)
        assert parts[1] == dialect.text(chunk) and b"".join((parts[0], text, parts[2])) == frame


@given(
    st.lists(st.sampled_from(["/x", "\\", "\u2003", "+x", " ", "hello", '"model"', "é"])),
    st.sampled_from(["m", "m+x"]),
    st.booleans(),
    st.booleans(),
)
def test_a_chat_that_passes_at_a_glance_asks_for_nothing(
    words: list[str], model: str, ascii_only: bool, hidden: bool
) -> None:
    messages = [{"role": "user", "content": "".join(words)}]
    body = json.dumps({"model": model, "messages": messages}, ensure_ascii=ascii_only).encode()
    if hidden:
        body = body.replace(b"/", rb"\u002f").replace(b"+", rb"\u002b")
    registry = PluginRegistry(PluginsConfig(dirs=()), {}, Path(), {})
    grammar = Grammar("/", lambda name: name == "x")
    client, presets = OllamaClient(parse_upstream("127.0.0.1:1"), 1), Presets({}, 0)
    reader = TurnReader(client, registry, Metrics(), OLLAMA, grammar, grammar, presets, 1)

    if passes := reader.passing(body, {"headers": []}):
        assert passes == model == split_model(model)[0]
        assert grammar.split(messages[0]["content"]) == ([], messages[0]["content"])
    assert reader.passing(b'{"model":"m","messages":[{"content":"why?"}]}', {"headers": []}) == "m"
    assert not reader.passing(body, {"headers": [(b"x-osp-agents", b"/x")]})
    assert not reader.passing(b'{"model":"m+x","options":{"model":"m"}}', {"headers": []})


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, min_size=1), st.lists(st.integers(0, 9999)), DIALECTS, st.booleans())
def test_the_edited_text_depends_on_the_text_alone(
    texts: list[str], places: list[int], dialect: Dialect, reverse: bool
) -> None:
    """Neither on the pieces of the model nor on the packets of the network."""
    agents: list[BaseAgent] = [Brackets(), *([Reverses()] if reverse else [])]
    text = "".join(texts)
    expected = text.replace("x", "[x]") + "!" if text else ""

    frames = asyncio.run(edited(dialect, agents, stream(dialect, texts), places))

    assert said(b"".join(frames)) == (expected[::-1] if reverse else expected)
    assert all(len(frame.decode().strip().splitlines()) == 1 for frame in frames)
    assert b"".join(frames).count(b'"done":true') == (1 if dialect is OLLAMA else 0)
    assert frames[-1] == (done() if dialect is OLLAMA else DONE)


def stream(dialect: Dialect, texts: list[str]) -> bytes:
    if dialect is OLLAMA:
        return b"".join(map(line, texts)) + done()
    return b"".join(map(event, texts)) + event(None, "stop") + DONE


async def edited(
    dialect: Dialect, agents: list[BaseAgent], data: bytes, places: list[int]
) -> list[bytes]:
    editor = Editor(dialect, [Stage(run_of(agent), whole=False) for agent in agents], [])
    splitter, frames = FrameSplitter(dialect.end), []
    for piece in cut(data, places):
        for frame in splitter.feed(piece):
            frames += await editor.edit(frame)
    return [*frames, *await editor.end()]


def run_of(agent: BaseAgent) -> Run:
    log = logging.LoggerAdapter(logging.getLogger("test"), {})
    client = OllamaClient(parse_upstream("127.0.0.1:1"), 1)
    agent.context = Context(
        request_id="r",
        dialect="ollama",
        stream=True,
        asked=True,
        user="",
        state={},
        log=log,
        payload={"model": "m"},
        client=client,
    )
    hooks = tuple(vars(type(agent)))
    return Run(Plugin("a", Path(), agent=agent, hooks=hooks), agent, 5, Metrics())
