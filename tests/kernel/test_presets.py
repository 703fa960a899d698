"""Presets, made in the stand-in for Ollama on a real socket; each outcome is a line of the log."""

from __future__ import annotations

import asyncio
import logging
import os
import pty
import re
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

import demo
from kernel.client import OllamaClient
from kernel.config import HOME, Preset, parse_upstream
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

        if scope.get("path") in ("/api/create", "/api/delete") and self.refused:
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


async def test_a_change_that_waits_for_its_model_is_said(lines: Lines) -> None:
    good = GOOD | {"model": "base"}
    await lines.ask("POST", "/api/create", model="base", **{"from": "demo"})
    await lines.before(good=good)
    await lines.ask("DELETE", "/api/delete", model="base")

    [(_, preset, error)] = await lines.before(good=good | {"system": "Be kind."}, last=DEMO)

    assert (preset, error) == ("good", "Ollama has no base: type `ollama pull base`")


async def test_a_preset_that_is_made_from_another_comes_after_it(lines: Lines) -> None:
    table = {"third": {"model": "second"}, "second": {"model": "good"}, "good": GOOD}

    async with lines.kept(**table):
        made = await lines.until(("preset made", "third", ""))

    assert made == [MADE, ("preset made", "second", "")]


async def test_a_cloud_model_stays_one_under_the_name_of_its_preset(unserved: Lines) -> None:
    cloud = {"remote_model": "gpt-oss:120b", "remote_host": "https://ollama.com:443"}
    models: list[dict[str, Any]] = [{"name": "gpt-oss:120b-cloud", "digest": "1"} | cloud]

    async def create(request: Request) -> JSONResponse:
        body = await request.json()
        models.append({"name": body["model"], "digest": "2"} | body)
        return JSONResponse({"status": "success"})

    good = GOOD | {"model": "gpt-oss:120b-cloud"}
    routes = [Route("/api/tags", lambda _: JSONResponse({"models": models}))]
    routes.append(Route("/api/create", create, methods=["POST"]))
    async with demo.serve(Starlette(routes=routes)) as unserved.url:
        assert not await unserved.before(good=good)
        assert not await unserved.before(good=good, last=good)  # and not made anew

    made = models[1]
    assert made["from"] == "gpt-oss:120b" and made["remote_host"] == "https://ollama.com:443"
    assert (made["system"], made["parameters"]) == ("Be brief.", {"num_ctx": 512})


async def test_what_is_not_ollama_is_said_to_be_something_else(unserved: Lines) -> None:
    app = Starlette(routes=[Route("/api/tags", lambda _: JSONResponse({"data": []}))])
    async with demo.serve(app) as unserved.url, unserved.kept(good=GOOD):
        with anyio.fail_after(5):
            _, _, error = await unserved.queue.get()

    assert error == f"what answers at {unserved.url} is not Ollama"


async def test_a_stop_in_the_middle_is_quick_and_the_preset_still_osps_own(
    upstream: Ollama, lines: Lines
) -> None:
    upstream.unanswered = 1

    with anyio.fail_after(2):
        async with lines.kept(good=GOOD):
            await upstream.made.wait()

    _, said = await Command(lines, "", "--prune", "--yes").run()
    assert said == "nothing to remove\n"  # its digest is not known
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


class Command:
    """`osp.py presets` as a process, its standard input a terminal or nothing at all."""

    def __init__(self, lines: Lines, toml: str, *flags: str) -> None:
        file = lines.data.parent / "osp.toml"
        file.write_text(toml, encoding="utf-8")
        start = [sys.executable, str(HOME / "osp.py"), "--config", str(file)]
        self.command = [*start, "--upstream", lines.url, "presets", *flags]

    async def run(self, answer: str | None = None, change: Any = None) -> tuple[int | None, str]:
        """Return the exit status and what was said; `change` is awaited before the answer."""
        ours, theirs = pty.openpty()
        stdin = DEVNULL if answer is None else theirs
        environ = {k: v for k, v in os.environ.items() if not k.startswith("OSP_")}
        process = await asyncio.create_subprocess_exec(
            *self.command, stdin=stdin, stdout=PIPE, stderr=STDOUT, env=environ
        )
        assert process.stdout
        said = b""
        with anyio.fail_after(20), os.fdopen(ours, "wb"), os.fdopen(theirs):
            if answer is not None:
                said = await process.stdout.readuntil(b"[y/N] ")
                if change:
                    await change
                os.write(ours, answer.encode())
            said += await process.stdout.read()
            return await process.wait(), said.decode()


SETTINGS = """
[presets]
good = { model = "demo", system = "Be brief.", options = { num_ctx = 512 }, think = false }
changed = { model = "demo", system = "Be kind." }
mine.model = "demo"
fresh.model = "nope"
"""
STATES = """\
good:latest: as the settings say
changed:latest: changed, it or its model: the next start makes it anew
mine:latest: Ollama has a model of this name that OSP did not make, and it stays as it is
fresh:latest: not made: the next start tries, and the log says what is in the way
old:latest: no longer in the settings: `presets --prune` removes it
stolen:latest: Ollama has a model of this name that OSP did not make, and it stays as it is
"""
OLD = "old:latest: no longer in the settings: `presets --prune` removes it\n"
QUESTION = f"{OLD}Remove 1 model from Ollama? [y/N] "


@pytest.fixture
async def left_over(lines: Lines) -> Lines:
    """Of the presets that OSP made, one is as in SETTINGS, and one is another's by now."""
    await lines.ask("POST", "/api/create", model="mine", **{"from": "demo"})
    await lines.before(good=GOOD, changed=DEMO, old=DEMO, gone=DEMO, stolen=DEMO)
    await lines.ask("POST", "/api/create", model="stolen", system="x", **{"from": "demo"})
    await lines.ask("DELETE", "/api/delete", model="gone")
    return lines


async def names(lines: Lines) -> set[str]:
    return {
        m["name"].removesuffix(":latest") for m in (await lines.ask("GET", "/api/tags"))["models"]
    }


async def test_a_command_lists_what_osp_made_and_what_became_of_it(left_over: Lines) -> None:
    assert await Command(left_over, SETTINGS).run() == (0, STATES)


async def test_without_presets_there_is_nothing_to_list_and_nothing_to_remove(lines: Lines) -> None:
    assert await Command(lines, "").run() == (0, "no presets\n")
    assert await Command(lines, SETTINGS, "--prune").run() == (0, "nothing to remove\n")


@pytest.mark.parametrize(
    ("flags", "answer", "status", "said"),
    [
        ([], "y\n", 0, f"{QUESTION}removed\n"),
        (["--yes"], None, 0, f"{OLD}removed\n"),
        ([], "\n", 0, QUESTION),
        ([], "\x04", 0, QUESTION),
        ([], None, 2, f"{OLD}osp.py: nothing was removed: there is no terminal to ask at; --yes "),
    ],
)
async def test_what_left_the_settings_is_removed_after_a_yes(
    left_over: Lines, flags: list[str], answer: str | None, status: int, said: str
) -> None:
    before = await names(left_over)

    result = await Command(left_over, SETTINGS, "--prune", *flags).run(answer)

    removed = {"old"} if "removed\n" in said else set()
    assert result[0] == status and result[1].startswith(said)
    assert before - await names(left_over) == removed
    again = await Command(left_over, SETTINGS, "--prune").run()
    assert again == (0, "nothing to remove\n") if removed else again[0] == 2


async def test_a_model_that_another_made_before_the_yes_stays(left_over: Lines) -> None:
    new = left_over.ask("POST", "/api/create", model="old", system="Mine.", **{"from": "demo"})

    await Command(left_over, SETTINGS, "--prune").run("y\n", change=new)

    assert (await left_over.ask("POST", "/api/show", model="old"))["system"] == "Mine."


async def test_a_command_says_what_keeps_it_from_its_work(
    upstream: Ollama, left_over: Lines
) -> None:
    prune = Command(left_over, SETTINGS, "--prune", "--yes")
    upstream.refused = 1
    status, said = await prune.run()
    assert status == 1 and "osp.py: /api/delete answered 403: " in said

    left_over.url = "127.0.0.1:1"
    status, said = await Command(left_over, SETTINGS).run()
    assert (status, said[:47]) == (1, "osp.py: nothing answers at http://127.0.0.1:1: ")
