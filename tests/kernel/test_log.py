"""The log: one line for each request, that says much and gives nothing away."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import pytest

from kernel.log import Formatter, configure, json_line, text_line
from tests.support import CHAT, COMPLETIONS, House, done, line, running, turn, write_agent

ECHO = """
class Echo(BaseAgent):
    async def on_request(self, payload):
        self.context.log.info("asked")
        return payload

    async def on_response(self, response):
        return response
"""


TEXT, JSON = Formatter(text_line), Formatter(json_line)


def requests(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the fields of the lines that requests left; complete once the proxy has ended."""
    records = [record for record in caplog.records if record.getMessage() == "request"]
    return [vars(record)["fields"] for record in records]


def formatted(caplog: pytest.LogCaptureFixture, *but: str) -> list[str]:
    """Return all lines in both forms, but those of some loggers."""
    ours = [record for record in caplog.records if record.name.partition(".")[0] not in but]
    return [f.format(record) for f in (TEXT, JSON) for record in ours]


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


async def test_each_request_leaves_one_line(
    demo_url: str, plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_agent(plugins, "echo", ECHO)

    async with running(demo_url, plugins) as client:
        ids = [
            (await client.post("/api/chat", json=turn("/echo x"))).headers["x-request-id"],
            (await client.get("/api/tags")).headers["x-request-id"],
            (await client.get("/nope?x=1")).headers["x-request-id"],
        ]

    chat, tags, nope = requests(caplog)
    assert chat.pop("ms") > 0 and chat.pop("agents").startswith("echo;ok;")
    assert chat.pop("request_id") == ids[0]
    assert ("POST", "/api/chat", 200, "ok", "demo") == tuple(chat.values())
    assert list(tags) == ["request_id", "method", "path", "status", "ms", "outcome"]
    assert (nope["path"], nope["status"], nope["request_id"]) == ("/nope", 404, ids[2])
    assert len(set(ids)) == 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("text", ["{}", "/echo {}", "/echo:{} x"])
async def test_neither_prompt_nor_answer_nor_key_nor_query_is_logged(
    house: House, caplog: pytest.LogCaptureFixture, path: str, text: str
) -> None:
    write_agent(house.plugins, "echo", ECHO)
    house.ollama.answers(line("sesame"), done("sesame"), headers=[("x-theirs", "sesame")])
    target, body = f"{path}?key=sesame", turn(text.format("sesame"))

    async with house.open(keys={"me": {"key": "sesame"}, "you": {"key": "other"}}) as client:
        for key in ("sesame", "no sesame"):
            headers = {"Authorization": f"Bearer {key}", "Cookie": "sesame"}
            await client.post(target, json=body, headers=headers)

    assert [fields.get("user") for fields in requests(caplog)] == ["me", None]
    assert not [text for text in formatted(caplog, "httpcore", "httpx") if "sesame" in text]


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64])
async def test_a_harmless_request_id_is_kept(demo_url: str, plugins: Path, given: str) -> None:
    async with running(demo_url, plugins, access={"deny": ["/api/pull"]}) as client:
        for path in ("/health", "/api/pull", "/api/ps"):  # our own, a refusal, Ollama's
            answer = await client.get(path, headers={"X-Request-Id": given})
            assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a/b", 'a"b', "a;b", "a\tb", "ä", "a=b"])
async def test_any_other_request_id_is_replaced(
    demo_url: str, plugins: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    async with running(demo_url, plugins) as client:
        answer = await client.get("/api/version", headers={b"X-Request-Id": given.encode()})

    (made,) = answer.headers.get_list("x-request-id")
    assert made != given and made == requests(caplog)[0]["request_id"]
    assert made.replace("-", "").isalnum()


async def test_the_id_that_ollama_sends_stays_alone(house: House) -> None:
    house.ollama.answers(b"{}", headers=[("x-request-id", "theirs")])

    async with house.open() as client:
        for path in ("/api/tags", CHAT):
            answer = await client.post(path, json=turn("x"))
            assert answer.headers.get_list("x-request-id") == ["theirs"]


async def test_what_a_client_sends_cannot_forge_a_line(
    demo_url: str, plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "\n00:00:00 request status=200 \x1b[2J\u2028\u0085"

    async with running(demo_url, plugins) as client:
        await client.post(f"/a{quote(forged)}")
        await client.post("/api/chat", json=turn("x") | {"model": f"m{forged}"})

    assert requests(caplog)[0]["path"] == f"/a{forged}"
    assert requests(caplog)[1]["model"] == f"m{forged}"
    assert all(map(str.isprintable, formatted(caplog)))


async def test_a_client_that_leaves_before_the_answer_has_no_status(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.ollama.answers(before=house.ollama.pause)

    async with house.open() as client:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(client.get, "/api/tags")
                await house.ollama.arrived.wait()
                group.cancel_scope.cancel()
            await house.ollama.disconnected.wait()

    (fields,) = requests(caplog)
    assert (fields["status"], fields["outcome"]) == (0, "client_closed")


async def test_an_upstream_that_breaks_off_is_an_outcome(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.ollama.answers(line("Hel"), house.ollama.breaks)

    async with house.open() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(CHAT, json=turn("x"))

    (fields,) = requests(caplog)
    assert (fields["status"], fields["outcome"]) == (200, "upstream_broke")


def record(message: str, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    parts = {"msg": message, "levelno": level, "levelname": logging.getLevelName(level)}
    return logging.makeLogRecord({**parts, "created": 1.5, "fields": fields})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("abc", "abc"),
        (200, "200"),
        (1.5, "1.5"),
        ("http://[::1]:80/a", '"http://[::1]:80/a"'),
        ("rag;ok;1ms", "rag;ok;1ms"),
        ("two words", '"two words"'),
        ("", '""'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("a=b", '"a=b"'),
        ("a\nb\x1b\u2028é", '"a\\nb\\u001b\\u2028\\u00e9"'),
    ],
)
def test_for_a_person_a_value_is_one_word(value: object, shown: str) -> None:
    text = TEXT.format(record("event", a=value, b=1))

    assert text[8:] == f" event a={shown} b=1"


def test_for_a_person_the_level_is_named_where_it_matters() -> None:
    assert TEXT.format(record("event", logging.WARNING))[8:] == " warning: event"


def test_for_a_machine_a_line_is_a_json_object() -> None:
    text = JSON.format(record("event", logging.ERROR, a="\n", b=2, c=Path("x")))

    fields = {"time": 1.5, "level": "error", "event": "event", "a": "\n", "b": 2, "c": "x"}
    assert "\n" not in text and json.loads(text) == fields


def test_a_traceback_is_shown_to_both() -> None:
    failed = record("event")
    try:
        raise ValueError("why")
    except ValueError:
        failed.exc_info = sys.exc_info()

    assert TEXT.format(failed).endswith("\nValueError: why")
    assert json.loads(JSON.format(failed))["exception"].endswith("\nValueError: why")
    assert "\n" not in JSON.format(failed)


def test_records_of_others_have_no_fields_and_are_shown_too() -> None:
    other = logging.makeLogRecord({"msg": "hello %s", "args": ("you",), "levelname": "INFO"})

    assert TEXT.format(other).endswith(" hello you")
    assert json.loads(JSON.format(other))["event"] == "hello you"


async def test_a_line_does_not_grow_with_what_a_client_sends(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.ollama.answers(b"{}")

    async with house.open() as client:
        await client.post(CHAT, json=turn("x") | {"model": "m" * 9000})
        await client.get("/" + "p" * 9000)

    assert [len(str(fields)) < 1000 for fields in requests(caplog)] == [True, True]


PLAIN = '{"level": "info", "event": "request", "path": "/"}'


@pytest.fixture
def restored() -> Iterator[None]:
    """Put back how everything is logged."""
    root, names = logging.getLogger(), ("osp", "kernel", "slices", "plugins")
    loggers = [root, *map(logging.getLogger, names)]
    before, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    root.handlers[:] = before
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_line_of_a_request_looks_like_every_other(
    style: str, capfd: pytest.CaptureFixture[str], restored: None
) -> None:
    write = configure("info", style)
    fields = {"path": 'a"\n', "ms": 1.5, "status": 200}
    write(fields)
    logging.getLogger("kernel.log").info("request", extra={"fields": fields})

    lines = [re.sub(r"[\d:.]{8,}", "", line) for line in capfd.readouterr().err.splitlines()]
    assert len(lines) == 2 and lines[0] == lines[1] and "status" in lines[0]


@pytest.mark.parametrize("style", ["text", "json"])
def test_where_stderr_is_the_journal_each_line_begins_with_its_priority(
    style: str, capfd: pytest.CaptureFixture[str], restored: None
) -> None:
    stderr = os.fstat(2)
    write = configure("debug", style, journal=f"{stderr.st_dev}:{stderr.st_ino}")
    write({"path": "/"})
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.CRITICAL):
        logging.getLogger("kernel.log").log(level, "event")
    try:
        raise ValueError("why\nnot")
    except ValueError:
        logging.getLogger("kernel.log").exception("failed")

    lines = capfd.readouterr().err.splitlines()
    assert [line[:3] for line in lines[:5]] == ["<6>", "<7>", "<6>", "<4>", "<2>"]
    assert {line[:3] for line in lines[5:]} == {"<3>"}
    assert lines[0] == {"text": "<6>request path=/", "json": f"<6>{PLAIN}"}[style]
