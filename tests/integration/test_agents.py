"""Agents of this project before real models, in two dialects; and a client that hangs up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kernel.dialects.calls import ToolCall
from kernel.tools import carry
from tests.integration.conftest import CHATS, body, proxy, tokens_read
from tests.support import BY_PATH, NOTICE, outcomes, said

ENDLESS = 100_000  # tokens: minutes
NOTES = {
    "water.md": "# Water\n\nThe river comes down from the hill and goes to the sea.",
    "night.txt": "Last night the old dog was at the door of the house.",
}
SECRETS = "Write to bob@example.org or call +49 30 1234567, bob@example.org is better."
MASKED = "Write to [EMAIL_1] or call [PHONE_1], [EMAIL_1] is better."
STOPS = [f" {word}" for word in "new old red dog house water day night work home".split()]
FORM = {"type": "object", "properties": {"to": {"enum": ["bob@example.org"]}}, "required": ["to"]}


@pytest.fixture(scope="module")
def searching(direct: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a proxy whose agent rag has a folder of its own and an embedding model."""
    home = tmp_path_factory.mktemp("rag")
    (home / "notes").mkdir()
    for name, text in NOTES.items():
        (home / "notes" / name).write_text(text, encoding="utf-8")
    settings = {"folder": str(home / "notes"), "embed_model": "tiny-embed", "wait": 20.0}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    with proxy(home, direct, "\n".join(["[agents.rag.settings]", *lines])) as (url, _):
        yield url


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize(
    ("typed", "plain", "ends", "under"),
    [
        ("/rag:k=1 ", "where does the river go?", "rag;ok", "\n\nSources:\n- water.md, Water"),
        ("/rag:k=1 ", "quokka", "rag;ok", "\n\nSources:\n- "),  # no word is the same
        ("/time ", "hello", "time;ok", ""),
        ("/time&/rag:k=1 ", "who was at the door?", "time;ok, rag;ok", "\n\nSources:\n- night.txt"),
        # The model's own num_predict cuts off whatever it is asked, a translation too.
        ("/translate:de ", "hello", "translate;error", NOTICE.format("translate")),
    ],
)
def test_the_model_reads_more_and_the_answer_says_more(
    http: httpx.Client, direct: str, searching: str,
    path: str, typed: str, plain: str, ends: str, under: str,
) -> None:  # fmt: skip
    more = under.startswith("\n\nSources") or "/time" in typed
    streamed, whole = (
        http.post(searching + path, json=body(typed + plain, stream=stream)).raise_for_status()
        for stream in (True, False)
    )
    read = tokens_read(http.post(direct + path, json=body(plain, stream=False)))

    assert outcomes(whole) == ends and outcomes(streamed).startswith(ends.partition(";")[0])
    for answer in (streamed, whole):
        text, mark, _ = said(answer.content).partition(under or "\0")
        assert text.strip() and bool(mark) is bool(under)
    assert tokens_read(whole) > read + 10 if more else tokens_read(whole) == read


def test_every_passage_gets_a_vector(http: httpx.Client, searching: str) -> None:
    listed = http.get(f"{searching}/plugins").json()["plugins"]

    [progress] = [plugin["progress"] for plugin in listed if plugin["name"] == "rag"]
    assert progress.endswith(": 2 files, 2 passages; 2 of 2 passages have vectors")


@pytest.mark.parametrize("path", CHATS)
def test_a_note_is_kept_and_read_by_the_model_later(
    http: httpx.Client, proxied: str, path: str
) -> None:
    def ask(text: str) -> httpx.Response:
        return http.post(proxied + path, json=body(text, stream=False)).raise_for_status()

    noted = ask("/remember that my bike is red and stands behind the old house of the baker")
    plain, fitting = ask("what about my bike?"), ask("/remember what about my bike?")
    number = said(noted.content).removeprefix("Noted as ").partition(":")[0]
    forgotten = ask(f"/remember:forget={number}")

    assert tokens_read(noted) == tokens_read(forgotten) == 0
    assert tokens_read(fitting) > tokens_read(plain) + 15
    assert said(forgotten.content).startswith("Forgotten: my bike is red")


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_same_question_is_answered_from_the_cache(
    http: httpx.Client, proxied: str, path: str, stream: bool
) -> None:
    def ask(text: str) -> tuple[str, str]:
        asked = body(text, tokens=400, stream=stream, temperature=1, stop=STOPS)
        asked["options"] |= {"temperature": 1, "stop": STOPS}  # an answer cut off is not kept
        answer = http.post(proxied + path, json=asked).raise_for_status()
        return said(answer.content), answer.headers["x-osp-agents"].split(";")[1]

    first, again = [ask(f"/cache tell me about {path} {stream}") for _ in range(2)]

    assert first[0].strip() and first[1] == "ok" and again == (first[0], "reply")


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_model_answers_as_if_it_had_been_asked_with_placeholders(
    http: httpx.Client, direct: str, proxied: str, path: str, stream: bool
) -> None:
    expected = http.post(direct + path, json=body(MASKED, stream=stream))
    answer = http.post(proxied + path, json=body(f"/redact {SECRETS}", stream=stream))

    assert answer.headers["x-osp-agents"].startswith("redact;ok")
    assert said(answer.content) == said(expected.content) != ""
    assert stream or tokens_read(answer) == tokens_read(expected)


def test_structured_output_has_the_values(http: httpx.Client, proxied: str) -> None:
    """The schema is redacted, too, and so its one possible answer is the placeholder."""
    asked = body(f"/redact {SECRETS}", tokens=60, stream=False, format=FORM)

    answer = http.post(f"{proxied}/api/chat", json=asked)

    assert "".join(said(answer.content).split()).startswith('{"to":"bob@example.org"')


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("typed", ["", "/rag ", "/translate:de "])
@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_stops_the_model(
    http: httpx.Client, direct: str, proxied: str, path: str, typed: str, stream: bool
) -> None:
    asked: dict[str, Any] = body(f"{typed}tell me a story", tokens=ENDLESS, stream=stream)

    if stream:
        with http.stream("POST", proxied + path, json=asked, timeout=5) as answer:
            frames = answer.iter_raw()  # held, for letting go of it is hanging up
            assert next(frames)
            assert not is_idle(http, direct, 0.3)
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post(proxied + path, json=asked, timeout=0.5)

    assert is_idle(http, direct, 2)


def is_idle(http: httpx.Client, direct: str, timeout: float) -> bool:
    """Tell whether the model, which does one thing at a time, answers the next request soon."""
    try:
        asked = body("next", tokens=1)
        http.post(f"{direct}/api/chat", json=asked, timeout=timeout).raise_for_status()
    except httpx.ReadTimeout:
        return False
    return True


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
def test_ollama_takes_what_the_proxy_writes_after_a_call(
    http: httpx.Client, proxied: str, path: str, stream: bool
) -> None:
    """No tiny model calls tools: a call waits in the id of the client's own."""
    dialect, call = BY_PATH[path], ToolCall("theirs", "{}")
    carry(call, [], [ToolCall("calculate", '{"expression":"6*7"}')])
    step = dialect.spoken("Wait.", "", [call]) + dialect.results([(call, "found")])
    chat = body("/calc hello", stream=stream) | {"model": "tiny-tools"}
    chat["messages"] += step

    answer = http.post(proxied + path, json=chat)

    assert answer.status_code == 200, answer.text
    assert outcomes(answer) == "calc;ok" and said(answer.content)


def test_a_prompt_that_fills_the_models_context_is_marked(http: httpx.Client, proxied: str) -> None:
    chat = body("the old dog was at the door " * 60, stream=False)
    chat["options"] = {"num_ctx": 64, "num_predict": 2}
    trace: dict[str, Any] = {}
    end = time.monotonic() + 10
    while not trace.get("full"):  # how large a context is, is looked up once a second
        assert time.monotonic() < end, trace
        http.post(f"{proxied}/api/chat", json=chat).raise_for_status()
        trace = http.get(f"{proxied}/traces").json()["finished"][0]

    assert trace["prompt_tokens"] == 64 and "num_ctx" in trace["hints"][0]
