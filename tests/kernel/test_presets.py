"""Presets, made in the stand-in for Ollama on a real socket; each outcome is a line of the log."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

import demo
from kernel.client import OllamaClient
from kernel.config import Preset, parse_upstream
from kernel.presets import Presets

Line = tuple[str, str, str]  # event, preset, error
GOOD: dict[str, Any] = {"model": "demo", "system": "Be brief.", "options": {"num_ctx": 512}}
DEMO = {"model": "demo"}
MADE = ("preset made", "good", "")


class Ollama:
    """The stand-in, with a number of creations that are refused, or made and not answered."""

    def __init__(self) -> None:
        self.app = demo.create_app()
        self.refused = self.unanswered = 0
        self.made = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_never(message: Message) -> None:
            self.made.set()
            await asyncio.Event().wait()

        if scope.get("path") == "/api/create" and self.refused:
            self.refused -= 1
            return await JSONResponse({"error": "closed"}, 403)(scope, receive, send)
        if scope.get("path") == "/api/create" and self.unanswered:
            self.unanswered -= 1
            send = send_never
        await self.app(scope, receive, send)


class Lines(logging.Handler):
    """What the log says while presets are kept before `url`."""

    def __init__(self, data: Path) -> None:
        super().__init__()
        self.data = data
        self.url = ""
        self.queue: asyncio.Queue[Line] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, str] = record.__dict__["fields"]
        line = record.getMessage(), fields.get("preset", ""), fields.get("error", "")
        self.queue.put_nowait(line)

    @asynccontextmanager
    async def kept(self, **table: dict[str, Any]) -> AsyncIterator[None]:
        described = {name: Preset(**fields) for name, fields in table.items()}
        presets = Presets(described, self.data, pause=0.01)
        async with OllamaClient(parse_upstream(self.url), 1) as client, presets.kept(client):
            yield

    async def before(self, **table: dict[str, Any]) -> list[Line]:
        """Keep presets until the last one is made, and return the lines before that."""
        *_, last = table
        async with self.kept(**table):
            return await self.until(("preset made", last, ""))

    async def until(self, last: Line) -> list[Line]:
        found = []
        with anyio.fail_after(5):
            while (line := await self.queue.get()) != last:
                found.append(line)
        return found

    async def ask(self, method: str, path: str, **body: Any) -> Any:
        async with httpx.AsyncClient(base_url=self.url) as client:
            answer = await client.request(method, path, json=body | {"stream": False})
            return answer.json() if answer.content else None


@pytest.fixture
def upstream() -> Ollama:
    return Ollama()


@pytest.fixture
def unserved(tmp_path: Path) -> Iterator[Lines]:
    lines, logger = Lines(tmp_path / "data"), logging.getLogger("kernel.presets")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
async def lines(upstream: Ollama, unserved: Lines) -> AsyncIterator[Lines]:
    async with demo.serve(upstream) as unserved.url:
        yield unserved


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ("nope", {}, "Ollama has no nope: type `ollama pull nope`"),
        ("gpt-oss:20b-cloud", {}, "Ollama has no gpt-oss:20b-cloud: type `ollama pull gpt-oss:20"),
        ("demo", {"when": {1}}, "TypeError"),
    ],
)
async def test_one_line_says_what_to_do_about_a_preset_and_the_others_are_made(
    lines: Lines, model: str, options: dict[str, Any], complaint: str
) -> None:
    bad = {"model": model, "options": options}
    [(event, preset, error)] = await lines.before(bad=bad, good=GOOD)

    assert (event, preset) == ("preset not made", "bad") and re.match(complaint, error)


async def test_a_preset_is_made_as_it_is_described_and_noted(lines: Lines) -> None:
    assert not await lines.before(good=GOOD)

    shown = await lines.ask("POST", "/api/show", model="good")
    assert shown["system"] == "Be brief." and shown["details"]["parent_model"] == "demo:latest"
    assert shown["parameters"].split() == ["num_ctx", "512"]
    assert [file.name for file in lines.data.iterdir()] == ["presets.json"]


@pytest.mark.parametrize("refused", [True, False])
async def test_a_model_that_osp_did_not_make_stays_as_it_is(
    upstream: Ollama, lines: Lines, refused: bool
) -> None:
    """Made by somebody else when OSP was refused, or in the place of what OSP had made."""
    upstream.refused = int(refused)
    async with lines.kept(good=GOOD):
        with anyio.fail_after(5):
            line = await lines.queue.get()
    refusal = r"/api/create answered 403: .*closed.*: mend \[presets.good\], allow "
    assert re.match(refusal, line[2]) if refused else line == MADE
    await lines.ask("POST", "/api/create", model="GOOD", system="Mine.", **{"from": "demo"})

    [(_, _, error)] = await lines.before(good=GOOD, last=DEMO)

    assert "OSP did not make" in error and error.endswith("or type `ollama rm good`")
    assert (await lines.ask("POST", "/api/show", model="good"))["system"] == "Mine."


async def test_presets_are_made_when_ollama_comes(unserved: Lines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    unserved.url = f"http://127.0.0.1:{port}"

    async with unserved.kept(good=GOOD):
        with anyio.fail_after(5):
            absent = await unserved.queue.get()
        async with demo.serve(demo.create_app(), port=port):
            assert not await unserved.until(MADE)  # what went wrong was said once

    assert absent[:2] == ("preset not made", "good") and str(port) in absent[2]


@pytest.mark.parametrize(
    ("fields", "again"),
    [
        ({}, False),
        ({"agents": "/time"}, False),
        ({"system": "Be kind."}, True),
        ({"options": {"num_ctx": 99}}, True),
        ({"model": "demo-embed"}, True),
    ],
)
async def test_a_start_makes_only_what_has_changed(
    lines: Lines, fields: dict[str, Any], again: bool
) -> None:
    await lines.before(good=GOOD)

    made = await lines.before(good=GOOD | fields, last=DEMO)

    assert made == [MADE] * again


async def test_a_preset_follows_a_new_version_of_its_model_and_outlives_it(lines: Lines) -> None:
    table = {"good": GOOD | {"model": "base"}, "last": DEMO}
    for parent, made in (("demo", 2), ("demo-embed", 1), ("", 0)):
        if parent:
            await lines.ask("POST", "/api/create", model="base", **{"from": parent})
        else:
            await lines.ask("DELETE", "/api/delete", model="base")
        assert len(await lines.before(**table, **{f"end{made}": DEMO})) == made


async def test_a_stop_in_the_middle_is_quick_and_the_preset_still_osps_own(
    upstream: Ollama, lines: Lines
) -> None:
    upstream.unanswered = 1

    with anyio.fail_after(2):
        async with lines.kept(good=GOOD):
            await upstream.made.wait()

    assert not await lines.before(good=GOOD)


@pytest.mark.parametrize("note", [b"{", b"\xff", b"7"])
async def test_a_note_that_cannot_be_read_is_said_and_waited_for(lines: Lines, note: bytes) -> None:
    lines.data.mkdir()
    (lines.data / "presets.json").write_bytes(note)

    async with lines.kept(good=GOOD):
        with anyio.fail_after(5):
            _, _, error = await lines.queue.get()
        (lines.data / "presets.json").unlink()
        assert not await lines.until(MADE)

    assert re.match(r"/.*presets.json cannot be read \(.*\): mend or delete it", error)


def test_a_preset_is_found_as_ollama_finds_a_model() -> None:
    table = {"Notes": Preset("demo"), "deep:x": Preset("notes:latest"), "round": Preset("Round")}
    presets = Presets(table)

    for name in ("notes", "NOTES:latest", "library/notes"):
        assert presets.find(name) is table["Notes"]
    for other in ("notes:1b", ""):
        assert presets.find(other) is None
    assert presets.names("demo") == ["demo"]
    assert presets.names("notes") == ["notes", "demo"]
    assert presets.names("deep:x") == ["deep:x", "notes:latest", "demo"]
    assert presets.names("round") == ["round", "Round"]
