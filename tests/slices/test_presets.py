"""Presets: the operator's own names for models, wherever a client may find one or say one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from kernel.config import load
from kernel.errors import ConfigError
from tests.support import DONE, FakeOllama, done, event, line, running, said, turn, write_agent

CHATS = ["/api/chat", "/v1/chat/completions"]
LISTS = {"/api/tags": ("models", ("name", "model")), "/v1/models": ("data", ("id",))}
PRESETS = {
    "helper": {"model": "demo", "agents": "/note:p"},
    "team/Plain": {"model": "Demo:latest"},
    "ghost": {"model": "not-there"},
}
NOTE = """
class Note(BaseAgent):
    async def on_request(self, payload):
        return add_system(payload, f"note {self.arguments['text']}")
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    write_agent(plugins, "note", NOTE, arguments={"text": "nothing", "n": 1})
    return plugins


@pytest.mark.parametrize("path", LISTS)
async def test_presets_stand_in_the_lists_behind_the_models(
    demo_url: str, agents: Path, path: str
) -> None:
    key, names = LISTS[path]
    async with httpx.AsyncClient() as direct:
        models = (await direct.get(demo_url + path)).json()

    async with running(demo_url, agents, presets=PRESETS) as client:
        answer = await client.get(path)

    copies = [models[key][0] | dict.fromkeys(names, name) for name in ("helper", "team/Plain")]
    expected = models | {key: [*models[key], *copies]}
    assert json.dumps(answer.json()) == json.dumps(expected)  # the keys in their order, too
    assert answer.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("path", LISTS)
async def test_a_preset_that_has_the_name_of_a_model_is_not_listed_twice(
    demo_url: str, agents: Path, path: str
) -> None:
    key, names = LISTS[path]
    taken = ("demo", "demo:latest", "DEMO", "library/demo")
    presets = {name: {"model": "demo-embed", "agents": "/note"} for name in taken}

    async with running(demo_url, agents, presets=presets) as client:
        listed = (await client.get(path)).json()[key]

    assert [entry[names[0]] for entry in listed] == ["demo:latest", "demo-embed:latest"]


@pytest.mark.parametrize("path", LISTS)
async def test_without_presets_a_list_is_byte_for_byte_ollamas(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    body = b'{ "models":[{"name":"demo"}], "data" : [{"id":"demo","x":1.0}]}\n'
    ollama.answers(body, kind="application/json")

    async with running(ollama_url, agents) as client:
        answer = await client.get(f"{path}?a=%20b", headers={"accept-encoding": "br"})

    assert answer.content == body
    assert ollama.asked[0].target == f"{path}?a=%20b"
    assert ("accept-encoding", "br") in ollama.asked[0].headers


@pytest.mark.parametrize(
    "body",
    [
        b'{"object":"list" , "models":null, "data":null}',  # Ollama without a model
        b"Ollama is\xff not here",
        b'["models"]',
        b'{"models":{"name":"demo"},"data":"demo"}',
        b'{"models":[{"name":null}],"data":[{"id":7}]}',
        b'{"models":[{"size":NaN}],"data":[NaN]}',
        b'{"models":' + b"[" * 9999,
        b"",
    ],
)
async def test_what_is_no_list_that_we_know_passes(
    ollama: FakeOllama, ollama_url: str, agents: Path, body: bytes
) -> None:
    ollama.answers(body, kind="application/json")

    async with running(ollama_url, agents, presets=PRESETS) as client:
        answers = [await client.get(path) for path in LISTS]

    assert [(answer.status_code, answer.content) for answer in answers] == [(200, body)] * 2


@pytest.mark.parametrize("path", LISTS)
async def test_an_error_in_the_place_of_a_list_passes(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    ollama.answers(b'{"models":[]}', status=500, kind="application/json", headers=[("x-a", "b")])

    async with running(ollama_url, agents, presets=PRESETS) as client:
        answer = await client.get(path)

    assert (answer.status_code, answer.content) == (500, b'{"models":[]}')
    assert answer.headers["x-a"] == "b"


@pytest.mark.parametrize(("path", "shape"), [("/api/tags", str), ("/v1/models", dict)])
async def test_a_list_that_breaks_off_or_never_begins_is_a_502(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, shape: type
) -> None:
    ollama.answers(b'{"models":[', ollama.breaks, kind="application/json")

    async with running(ollama_url, agents, presets=PRESETS) as client:
        broken = await client.get(path)
    async with running("http://127.0.0.1:9", agents, presets=PRESETS) as client:
        absent = await client.get(path)

    for answer in (broken, absent):
        assert answer.status_code == 502 and isinstance(answer.json()["error"], shape)


@pytest.mark.parametrize("path", LISTS)
async def test_an_encoded_list_passes_and_none_is_asked_for(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    body = b'{"models":[{"name":"demo","model":"demo"}], "data":[{"id":"demo"}]}'

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for encoded in (gzip.compress(body), body):  # who knows what the bytes of the second mean
            coding = "gzip" if encoded != body else "dcb"
            headers = [("content-encoding", coding)]
            ollama.answers(encoded, kind="application/json", headers=headers)
            async with client.stream("GET", path) as answer:
                raw = b"".join([chunk async for chunk in answer.aiter_raw()])

            assert raw == encoded and answer.headers["content-encoding"] == coding
    sent = [name for asked in ollama.asked for name, _ in asked.headers]
    assert "accept-encoding" not in sent


@pytest.mark.parametrize("path", LISTS)
async def test_a_head_of_a_list_is_ollamas(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    ollama.answers(kind="application/json", headers=[("x-a", "b")])

    async with running(ollama_url, agents, presets=PRESETS) as client:
        answer = await client.head(path)

    assert ollama.asked[0].method == "HEAD"
    assert (answer.status_code, answer.content, answer.headers["x-a"]) == (200, b"", "b")


async def test_a_list_that_is_asked_for_with_a_body_spoils_no_other_request(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    """A length that is announced and not sent would swallow what comes next on the connection."""
    ollama.answers(b'{"models":[]}', kind="application/json", headers=[("content-length", "13")])

    async with running(ollama_url, agents, presets=PRESETS) as client:
        with anyio.fail_after(3):
            for _ in range(2):
                answer = await client.request("GET", "/api/tags", content=b"{}")
                assert answer.json() == {"models": []}
                assert (await client.get("/api/ps")).status_code == 200

    assert [asked.target for asked in ollama.asked] == ["/api/tags", "/api/ps"] * 2


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/api/show", {"verbose": True}),
    ("/api/generate", {"prompt": "/note x", "stream": False}),
    ("/api/generate", {"prompt": "x", "options": {"num_ctx": 9, "a": 1.5}}),
    ("/api/embed", {"input": ["a", "b"]}),
    ("/api/embeddings", {"prompt": "x"}),
    ("/v1/completions", {"prompt": "x", "stream": True}),
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "/note x"}]}),
    ("/v1/responses", {"input": "é\u2028", "stream": True}),
]


@pytest.mark.parametrize("name", ["helper", "HELPER:latest"])
async def test_a_preset_is_replaced_by_its_model_in_a_body(
    ollama: FakeOllama, ollama_url: str, agents: Path, name: str
) -> None:
    ollama.answers(b"as it is", kind="text/odd", status=201)

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for path, rest in BODIES:
            answer = await client.post(f"{path}?beta=true", json={"a": 1, "model": name} | rest)
            assert (answer.status_code, answer.content) == (201, b"as it is"), path
            assert "x-osp-agents" not in answer.headers

    sent = [(f"{path}?beta=true", {"a": 1, "model": "demo"} | rest) for path, rest in BODIES]
    assert [(asked.target, asked.json) for asked in ollama.asked] == sent
    assert all(list(asked.json)[:2] == ["a", "model"] for asked in ollama.asked)


async def test_show_knows_a_preset_by_model_and_by_name(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(b"{}", kind="application/json")
    meant = [
        ({"name": "helper"}, {"name": "demo"}),
        ({"model": "", "name": "helper:latest"}, {"model": "", "name": "demo"}),  # so asks the CLI
        ({"model": "helper", "name": "team/plain"}, {"model": "demo", "name": "Demo:latest"}),
        ({"model": "other", "name": "helper"}, {"model": "other", "name": "demo"}),
    ]

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for asked, _ in meant:
            await client.post("/api/show", json=asked)

    assert [asked.json for asked in ollama.asked] == [sent for _, sent in meant]


async def test_one_entry_of_the_models_is_asked_for_by_its_model(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(b'{"id":"demo"}\n', kind="application/json")
    meant = {
        "helper": "demo",
        "helper:latest?a=%2F": "demo?a=%2F",
        "HELPER": "demo",
        "hel%70er": "demo",
        "team/plain": "Demo:latest",
        "far": "hf.co/me/m:Q4",
        "demo": "demo",
        "hel%20per%2Fx": "hel%20per%2Fx",
    }
    presets = {**PRESETS, "far": {"model": "hf.co/me/m:Q4"}}

    async with running(ollama_url, agents, presets=presets) as client:
        for name in meant:
            answer = await client.get(f"/v1/models/{name}")
            assert answer.content == b'{"id":"demo"}\n'

    assert [a.target.removeprefix("/v1/models/") for a in ollama.asked] == [*meant.values()]


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_with_a_preset_has_its_model_and_its_agents(
    demo_url: str, agents: Path, path: str, stream: bool
) -> None:
    async with running(demo_url, agents, presets=PRESETS) as client:
        for name in ("helper", "Helper:latest"):
            answer = await client.post(path, json=turn("hi", stream=stream) | {"model": name})

            assert said(answer.content).endswith("sent:\n[system] note p\n[user] hi")
            assert answer.headers["x-osp-agents"].startswith("note;ok;")


@pytest.mark.parametrize("path", CHATS)
async def test_a_preset_without_agents_is_another_name_and_no_more(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    frames = [line("a"), done()] if path == CHATS[0] else [event("a"), event(None, "stop"), DONE]
    kind = "application/x-ndjson" if path == CHATS[0] else "text/event-stream"
    ollama.answers(*frames, kind=kind)
    body = turn("hi", stream=True, seed=1)

    async with running(ollama_url, agents, presets=PRESETS) as client:
        answer = await client.post(path, json=body | {"model": "team/plain:latest"})

    assert ollama.asked[0].json == body | {"model": "Demo:latest"}
    assert answer.content == b"".join(frames)
    assert "x-osp-agents" not in answer.headers


async def test_a_preset_loads_and_unloads_its_model(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    loaded = done("", done_reason="load").strip()
    ollama.answers(loaded, kind="application/json; charset=utf-8")
    rests: list[dict[str, Any]] = [{}, {"messages": []}, {"messages": None, "stream": True}]

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for rest in rests:
            answer = await client.post(
                "/api/chat", json={"model": "helper", "keep_alive": 0} | rest
            )
            assert (answer.content, "x-osp-agents" in answer.headers) == (loaded, False)

    sent = [{"model": "demo", "keep_alive": 0} | rest for rest in rests]
    assert [asked.json for asked in ollama.asked] == sent


async def test_what_changes_a_model_means_no_preset(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(b"", status=404)
    requests = [
        ("DELETE", "/api/delete", b'{"model": "helper"}'),
        ("POST", "/api/copy", b'{"source": "helper", "destination": "x", "model": "helper"}'),
        ("POST", "/api/push", b'{"model": "helper"}'),
        ("POST", "/api/pull", b'{"name": "helper"}'),
        ("POST", "/api/create", b'{"model": "helper", "from": "helper"}'),
    ]

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for method, path, body in requests:
            answer = await client.request(method, path, content=body)
            assert answer.status_code == 404

    assert [(asked.method, asked.target, asked.body) for asked in ollama.asked] == requests


DOUBTFUL = [
    b'{ "model":"helpers" ,"prompt":"x" }',
    b'{"Model":"helper"}',
    b'\xef\xbb\xbf{"model":"helper"}',
    b'{"model":"helper"} and more',
    b'{"model":"helper","seed":NaN}',
    b'{"model":["helper"]}',
    b'"helper"',
    b"",
    b'{"model":"helper","prompt":"' + b"x" * 4096 + b'"}',
]


@pytest.mark.parametrize("path", ["/api/generate", "/api/show", "/api/embed", "/v1/messages"])
async def test_a_body_that_names_no_preset_or_is_in_doubt_stays_as_it_is(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    ollama.answers(b"{}", kind="application/json")

    async with running(ollama_url, agents, presets=PRESETS, server={"max_body": 4096}) as client:
        for body in DOUBTFUL:
            await client.post(path, content=body)

    assert [asked.body for asked in ollama.asked] == DOUBTFUL


@pytest.mark.parametrize(
    ("preset", "complaint"),
    [
        ('[presets.fast]\nagents = "/rag"', "presets.fast: it must name a `model`"),
        ('[presets."a+b"]\nmodel = "demo"', "presets.a+b: .* no + in its name"),
        ('[presets.fast]\nmodels = "demo"', "presets.fast: unknown key 'models'; known are model,"),
        ("[presets.fast]\nmodel = 7", "presets.fast: model: 7 is wrong here"),
        ('[presets.fast]\nmodel = "m"\nagents = ["/rag"]', "presets.fast: agents: "),
        ('[presets]\nfast = "demo"', "presets.fast: 'demo' is wrong here, it must be a table"),
    ],
)
def test_a_wrong_preset_stops_the_start_and_is_named(
    tmp_path: Path, preset: str, complaint: str
) -> None:
    (tmp_path / "osp.toml").write_text(preset, encoding="utf-8")

    with pytest.raises(ConfigError, match=complaint.replace("+", r"\+")):
        load(tmp_path / "osp.toml", {}, {})
