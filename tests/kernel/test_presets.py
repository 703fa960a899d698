"""Presets, made in the stand-in for Ollama on a real socket; each outcome is a line of the log."""

from __future__ import annotations

import asyncio
import json
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
from kernel.address import parse_upstream
from kernel.client import OllamaClient
from kernel.config import Preset
from kernel.presets import Presets

Line = tuple[str, str, str]  # event, preset, error
GOOD = {"model": "demo", "system": "Be brief.", "options": {"num_ctx": 512, "stop": ["x"]}}
MADE = ("preset made", "good", "")


class Lines(logging.Handler):
    """The lines of the log, as a queue to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: asyncio.Queue[Line] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, str] = record.__dict__["fields"]
        line = record.getMessage(), fields.get("preset", ""), fields.get("error", "")
        self.queue.put_nowait(line)

    async def until(self, last: Line) -> list[Line]:
        """Return the lines before `last`."""
        found = []
        with anyio.fail_after(5):
            while (line := await self.queue.get()) != last:
                found.append(line)
        return found


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("kernel.presets")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


class Ollama:
    """The stand-in, with a number of creations that are refused, or made and not answered."""

    def __init__(self) -> None:
        self.app = demo.create_app()
        self.refused = self.unanswered = 0
        self.made = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_later(message: Message) -> None:
            self.made.set()
            await asyncio.Event().wait()

        if scope.get("path") == "/api/create" and self.refused:
            self.refused -= 1
            return await JSONResponse({"error": "closed"}, 403)(scope, receive, send)
        if scope.get("path") == "/api/create" and self.unanswered:
            self.unanswered -= 1
            send = send_later
        await self.app(scope, receive, send)


@pytest.fixture
def upstream() -> Ollama:
    return Ollama()


@pytest.fixture
async def url(upstream: Ollama) -> AsyncIterator[str]:
    async with demo.serve(upstream) as url:
        yield url


@asynccontextmanager
async def kept(url: str, data: Path, **table: dict[str, Any]) -> AsyncIterator[None]:
    presets = Presets({name: Preset(**fields) for name, fields in table.items()}, data, pause=0.01)
    async with OllamaClient(parse_upstream(url), 1) as client, presets.kept(client):
        yield


async def ask(url: str, method: str, path: str, **body: Any) -> Any:
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.request(method, path, json=body | {"stream": False})
        return answer.json() if answer.content else None


WRONG = [
    ("nope", {}, "Ollama has no nope: type `ollama pull nope`"),
    ("gpt-oss:20b-cloud", {}, "Ollama has no gpt-oss:20b-cloud: type `ollama pull gpt-oss:20b-"),
    ("demo", {"when": {1}}, "TypeError"),
    *(
        ("demo", {key: value}, rf"\[presets.bad\]: the option {key} must be {right}, not {value!r}")
        for key, value, right in [
            ("num_ctx", "abc", "int or float"),
            ("seed", True, "int or float"),
            ("use_mmap", 1, "bool"),
            ("stop", "x", "list"),
        ]
    ),
]


@pytest.mark.parametrize(("model", "options", "complaint"), WRONG)
async def test_one_line_says_what_to_do_about_a_preset_and_the_others_are_made(
    url: str, tmp_path: Path, lines: Lines, model: str, options: dict[str, Any], complaint: str
) -> None:
    async with kept(url, tmp_path, bad={"model": model, "options": options}, good=GOOD):
        [(event, preset, error)] = await lines.until(MADE)

    assert (event, preset) == ("preset not made", "bad") and re.match(complaint, error)


async def test_a_preset_is_made_as_it_is_described_and_noted(
    url: str, tmp_path: Path, lines: Lines
) -> None:
    async with kept(url, tmp_path / "data", good=GOOD):
        assert not await lines.until(MADE)

    shown = await ask(url, "POST", "/api/show", model="good")
    assert shown["system"] == "Be brief." and shown["details"]["parent_model"] == "demo:latest"
    assert [line.split() for line in shown["parameters"].splitlines()] == [
        ["num_ctx", "512"],
        ["stop", '["x"]'],
    ]
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["presets.json"]


async def test_a_refusal_is_said_once_and_the_preset_made_when_it_ends(
    upstream: Ollama, url: str, tmp_path: Path, lines: Lines
) -> None:
    upstream.refused = 3

    async with kept(url, tmp_path, good=GOOD):
        [(event, preset, error)] = await lines.until(MADE)

    assert (event, preset) == ("preset not made", "good")
    assert re.match(r"/api/create answered 403: .*closed.*: mend \[presets.good\], allow ", error)


async def test_a_model_that_was_refused_and_that_somebody_made_stays_as_it_is(
    upstream: Ollama, url: str, tmp_path: Path, lines: Lines
) -> None:
    upstream.refused = 1

    async with kept(url, tmp_path, good=GOOD, bad={"model": "nope"}):
        await lines.until(("preset not made", "bad", WRONG[0][2]))
    await ask(url, "POST", "/api/create", model="good", **{"from": "demo-embed"})
    async with kept(url, tmp_path, good=GOOD, last={"model": "demo"}):
        [(_, _, error)] = await lines.until(("preset made", "last", ""))

    assert "OSP did not make" in error and error.endswith("or type `ollama rm good`")
    shown = await ask(url, "POST", "/api/show", model="good")
    assert shown["details"]["parent_model"] == "demo-embed:latest"


async def test_presets_are_made_when_ollama_comes(tmp_path: Path, lines: Lines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async with kept(f"http://127.0.0.1:{port}", tmp_path, good=GOOD):
        with anyio.fail_after(5):
            absent = await lines.queue.get()
        async with demo.serve(demo.create_app(), port=port):
            assert not await lines.until(MADE)

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
    url: str, tmp_path: Path, lines: Lines, fields: dict[str, Any], again: bool
) -> None:
    async with kept(url, tmp_path, good=GOOD):
        await lines.until(MADE)

    async with kept(url, tmp_path, good=GOOD | fields, last={"model": "demo"}):
        made = await lines.until(("preset made", "last", ""))

    assert made == [MADE] * again


async def test_a_preset_follows_a_new_version_of_its_model_and_outlives_it(
    url: str, tmp_path: Path, lines: Lines
) -> None:
    table: dict[str, Any] = {"good": GOOD | {"model": "base"}, "last": {"model": "demo"}}
    for parent, made in (("demo", 2), ("demo-embed", 1), ("", 0)):
        if parent:
            await ask(url, "POST", "/api/create", model="base", **{"from": parent})
        else:
            await ask(url, "DELETE", "/api/delete", model="base")
        async with kept(url, tmp_path, **table, **{f"end{made}": {"model": "demo"}}):
            assert len(await lines.until(("preset made", f"end{made}", ""))) == made


async def test_a_model_that_took_the_place_of_a_preset_stays_as_it_is(
    url: str, tmp_path: Path, lines: Lines
) -> None:
    async with kept(url, tmp_path, good=GOOD):
        await lines.until(MADE)
    await ask(url, "POST", "/api/create", model="GOOD", **{"from": "demo", "system": "Mine."})

    async with kept(url, tmp_path, good=GOOD, last={"model": "demo"}):
        [(_, _, error)] = await lines.until(("preset made", "last", ""))

    assert "OSP did not make" in error
    assert (await ask(url, "POST", "/api/show", model="good"))["system"] == "Mine."


async def test_a_stop_in_the_middle_is_quick_and_the_preset_still_osps_own(
    upstream: Ollama, url: str, tmp_path: Path, lines: Lines
) -> None:
    upstream.unanswered = 1

    with anyio.fail_after(2):
        async with kept(url, tmp_path, good=GOOD):
            await upstream.made.wait()
    async with kept(url, tmp_path, good=GOOD):
        assert not await lines.until(MADE)


@pytest.mark.parametrize("note", [b"{", b"\xff", b"[]", b'{"good":1}', b'{"good":[]}', None])
async def test_a_note_that_cannot_be_read_is_a_warning(
    url: str, tmp_path: Path, lines: Lines, note: bytes | None
) -> None:
    if note is None:
        (tmp_path / "presets.json").mkdir()
    else:
        (tmp_path / "presets.json").write_bytes(note)

    async with kept(url, tmp_path, good=GOOD):
        with anyio.fail_after(5):
            first, second = await lines.queue.get(), await lines.queue.get()

    assert first[0] == "note of presets unreadable" and first[2]
    assert second == MADE or note is None
    assert note is None or json.loads((tmp_path / "presets.json").read_bytes())


def test_a_preset_is_found_as_ollama_finds_a_model() -> None:
    table = {"Notes": Preset("demo"), "deep:x": Preset("notes:latest"), "round": Preset("Round")}
    presets = Presets(table)

    for name in ("notes", "NOTES:latest", "library/notes"):
        assert presets.find(name) is table["Notes"]
    for other in ("notes:1b", "", None, 7, ["notes"]):
        assert presets.find(other) is None
    assert presets.names("demo") == ["demo"]
    assert presets.names("notes") == ["notes", "demo"]
    assert presets.names("deep:x") == ["deep:x", "notes:latest", "demo"]
    assert presets.names("round") == ["round", "Round"]
