"""Guards: what an agent that nothing may pass without cannot see, is refused and says who wants it.

The table of what it cannot see is asked three times: with a guard, with one that is not loaded,
and without any, where all of it must pass.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import demo
import osp
from kernel.config import Config, PluginsConfig, ServerConfig, UpstreamConfig
from kernel.server import SETTINGS
from tests.support import DONE, FakeOllama, done, event, line, running, said, turn, write_agent

CHATS = ["/api/chat", "/v1/chat/completions"]
UNSEEN = ["/api/generate", "/v1/completions", "/v1/messages", "/v1/responses"]
PLAIN = json.dumps(turn("x")).encode()
UNREADABLE = [
    b"\xef\xbb\xbf" + PLAIN,
    PLAIN[:-1] + b',"seed":NaN}',
    PLAIN[:-1] + b',"seed":1e999}',
    PLAIN.replace(b'"demo"', b"7"),
    PLAIN.replace(b'"model"', b'"Model"'),
    PLAIN[:-1] + b',"MODEL":"other"}',
    PLAIN.replace(b'"x"', b'"\xff"'),
    PLAIN.decode().encode("utf-16"),
    PLAIN + PLAIN,
    b'{"messages":[{"role":"user","content":"x"}]}',
    b"null",
    gzip.compress(PLAIN),
    PLAIN.replace(b'"x"', b'"' + b"x" * 4096 + b'"'),
]
DOUBTFUL = [
    *UNREADABLE,
    PLAIN.replace(b'"messages"', b'"Messages"'),
    PLAIN.replace(b'"messages"', b'"me\\u017fsages"'),  # Go folds a long s, too
    PLAIN.replace(b'"content"', b'"CONTENT"'),
]
LIMIT = {"max_body": 4096}
# What `ollama run` and `ollama stop` send: every field, and most of them empty
CLI = {"model": "demo", "prompt": "", "suffix": "", "system": "", "template": "", "options": None}
LOADS: list[tuple[str, dict[str, Any]]] = [
    ("/api/generate", CLI),
    ("/api/generate", CLI | {"keep_alive": "0s"}),
    ("/api/generate", {"model": "demo"}),
    ("/api/generate", {"model": "demo", "keep_alive": 0, "stream": False}),
    ("/api/generate", {"model": "demo", "prompt": "", "images": [], "raw": False, "context": []}),
    ("/api/chat", {"model": "demo"}),
    ("/api/chat", {"model": "demo", "messages": None, "options": None, "keep_alive": "0s"}),
    ("/api/chat", {"model": "demo", "messages": [], "keep_alive": 0, "stream": True}),
]

ASKS = """
class Privacy(BaseAgent):
    async def on_request(self, payload):
        return add_system(payload, "seen")
"""
RESPONDS = """
class Privacy(BaseAgent):
    async def on_response(self, response):
        return response.upper()
"""


ANSWERS = {
    "/api/chat": b'{"message":{"role":"assistant","content":"a"},"done":true}',
    "/v1/chat/completions": b'{"choices":[{"index":0,"message":{"content":"a"}}]}',
}


def write_guard(folder: Path, code: str = ASKS, **config: Any) -> Path:
    return write_agent(folder, "privacy", code, **{"always": True, "on_error": "abort"} | config)


def refusal(path: str, why: str = "cannot see this request") -> tuple[int, Any]:
    text = f"the agent privacy {why}, and nothing may pass without it"
    if path.startswith("/api"):
        return 403, {"error": text}
    if path == "/v1/messages":
        error = {"type": "permission_error", "message": text}
        return 403, {"type": "error", "error": error}
    return 403, {"error": {"message": text, "type": "api_error", "param": None, "code": None}}


def got(answer: httpx.Response) -> tuple[int, Any]:
    return answer.status_code, answer.json()


@asynccontextmanager
async def passing(
    ollama: FakeOllama, url: str, folder: Path, **sections: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a proxy, and see that every request that is sent in the block reaches Ollama."""
    ollama.answers(b"{}", kind="application/json")
    statuses: list[int] = []

    async def note(answer: httpx.Response) -> None:
        statuses.append(answer.status_code)

    async with running(url, folder, **sections) as client:
        client.event_hooks["response"].append(note)
        yield client
    assert statuses == [200] * len(ollama.asked) and statuses


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", CHATS)
async def test_a_guard_sees_a_chat_and_its_answer(
    demo_url: str, plugins: Path, path: str, stream: bool
) -> None:
    write_guard(plugins, ASKS + RESPONDS.split("\n", 2)[2])

    async with running(demo_url, plugins) as client:
        answer = await client.post(path, json=turn("hi", stream=stream))

    assert said(answer.content) == "I AM THE DEMO MODEL. I WAS SENT:\n[SYSTEM] SEEN\n[USER] HI"


@pytest.mark.parametrize("path", UNSEEN)
async def test_what_is_no_chat_is_refused_in_its_dialect(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_guard(plugins)
    bodies = [json.dumps({"model": "demo", "prompt": "x"}).encode(), *DOUBTFUL, b""]
    spelt = [path, path.replace("a", "%61"), path.replace("e", "%65"), f"{path}?beta=true"]

    async with running(ollama_url, plugins, server=LIMIT) as client:
        for target in spelt:
            for body in bodies:
                assert got(await client.post(target, content=body)) == refusal(path), body
        hello = {"origin": "http://evil.example"}
        assert got(await client.post(path, content=PLAIN, headers=hello)) == refusal(path)

    assert ollama.asked == []


@pytest.mark.parametrize("path", CHATS)
async def test_a_chat_that_no_agent_can_read_is_refused(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_guard(plugins)

    async with running(ollama_url, plugins, server=LIMIT) as client:
        for body in DOUBTFUL:
            for target in (path, path.replace("chat", "ch%61t")):
                assert got(await client.post(target, content=body)) == refusal(path), body
        for origin in ("http://evil.example", "null"):
            foreign = await client.post(path, content=PLAIN, headers={"origin": origin})
            assert got(foreign) == refusal(path)

    assert ollama.asked == []


@pytest.mark.parametrize("guard", ["none", "skips", "asked", "off", "table"])
async def test_without_a_guard_all_of_that_passes(
    ollama: FakeOllama, ollama_url: str, plugins: Path, guard: str
) -> None:
    """An agent that may fail is no guard, nor one that is not always on, or that is disabled."""
    config: dict[str, Any] = {"skips": {"on_error": "skip"}, "asked": {"always": False}}
    if guard != "none":
        write_guard(plugins, **config.get(guard, {"enabled": guard != "off"}))
    tables = {"privacy": {"enabled": False}} if guard == "table" else {}
    origin = {"origin": "http://evil.example"}

    async with passing(ollama, ollama_url, plugins, server=LIMIT, agents=tables) as client:
        for path in [*UNSEEN, *CHATS]:
            for body in DOUBTFUL:
                await client.post(path, content=body)
            await client.post(path, content=PLAIN, headers=origin)
            assert ollama.asked[-1].body == PLAIN
        await client.post("/api/chat", json=turn("x", logprobs=True, format="json"))

    sent = [asked.body for asked in ollama.asked if asked.target == "/api/chat"]
    assert sent[:-2] == DOUBTFUL


@pytest.mark.parametrize("code", [ASKS, "raise RuntimeError"])
async def test_a_guard_that_is_left_out_is_none(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str
) -> None:
    write_guard(plugins, code)
    config = Config(
        server=ServerConfig(data=plugins.parent / "data"),
        upstream=UpstreamConfig(url=ollama_url),
        plugins=PluginsConfig(dirs=(plugins,), only=("other",)),
    )
    ollama.answers(b"{}", kind="application/json")

    async with demo.serve(osp.create_app(config), **SETTINGS) as url, httpx.AsyncClient() as client:
        for path in [*UNSEEN, *CHATS]:
            await client.post(url + path, content=PLAIN)

    assert [asked.body for asked in ollama.asked] == [PLAIN] * 6


FALSE: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"logprobs": True}),
    ("/api/chat", {"logprobs": True, "top_logprobs": 2, "stream": False}),
    ("/api/chat", {"format": "json"}),
    ("/api/chat", {"format": {"type": "object"}, "stream": False}),
    ("/v1/chat/completions", {"logprobs": True, "stream": True}),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", {"response_format": {"type": "json_schema"}, "stream": True}),
]


async def test_an_answer_that_a_guard_may_not_edit_is_refused(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, RESPONDS)

    async with running(ollama_url, plugins) as client:
        for path, fields in FALSE:
            assert got(await client.post(path, json=turn("x", **fields))) == refusal(path), fields

    assert ollama.asked == []


async def test_a_guard_of_requests_has_no_say_in_answers(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, ASKS)

    async with passing(ollama, ollama_url, plugins) as client:
        for path, fields in FALSE:
            await client.post(path, json=turn("x", **fields))

    assert {asked.json["messages"][0]["content"] for asked in ollama.asked} == {"seen"}


async def test_a_guard_that_keeps_json_valid_sees_structured_answers_but_no_logprobs(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, RESPONDS, structured=True)

    async with running(ollama_url, plugins) as client:
        for path, fields in FALSE:
            ollama.answers(ANSWERS[path], kind="application/json")
            answer = await client.post(path, json=turn("x", **fields))
            if "logprobs" in fields:
                assert got(answer) == refusal(path)
            else:
                assert answer.status_code == 200 and said(answer.content) == "A"


async def test_what_asks_for_no_structure_is_seen(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, RESPONDS)
    plain: list[tuple[str, dict[str, Any]]] = [
        ("/api/chat", {"format": ""}),
        ("/api/chat", {"format": None, "logprobs": False}),
        ("/v1/chat/completions", {"response_format": {"type": "text"}, "logprobs": None}),
        ("/v1/chat/completions", {"response_format": None}),
    ]

    async with running(ollama_url, plugins) as client:
        for path, fields in plain:
            ollama.answers(ANSWERS[path], kind="application/json")
            answer = await client.post(path, json=turn("x", **fields))
            assert said(answer.content) == "A", fields


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_cannot_be_read_is_refused_for_a_guard_that_responds(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str, stream: bool
) -> None:
    write_guard(plugins, RESPONDS)
    streams = {CHATS[0]: "application/x-ndjson", CHATS[1]: "text/event-stream"}
    kind = streams[path] if stream else "application/json"
    secret = gzip.compress(done("secret") + event("secret") + DONE)

    async with running(ollama_url, plugins) as client:
        for headers, as_kind in (([("content-encoding", "gzip")], kind), ([], "text/plain")):
            ollama.answers(secret, kind=as_kind, headers=headers)
            assert got(await client.post(path, json=turn("x", stream=stream))) == refusal(path)


@pytest.mark.parametrize("path", CHATS)
async def test_an_error_of_ollama_and_an_answer_without_say_pass_a_guard(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    packed = gzip.compress(b'{"error":"busy"}')
    encoded = [("content-encoding", "gzip")]
    write_guard(plugins, RESPONDS)
    ollama.answers(packed, status=503, kind="application/json", headers=encoded)
    async with running(ollama_url, plugins) as client:
        error = await client.post(path, json=turn("x"))

    write_agent(plugins.parent / "asks", "privacy", ASKS, always=True, on_error="abort")
    ollama.answers(packed, kind="application/json", headers=encoded)
    async with running(ollama_url, plugins.parent / "asks") as client:
        answer = await client.post(path, json=turn("x"))

    assert (error.status_code, error.content) == (503, b'{"error":"busy"}')
    assert (answer.status_code, answer.content) == (200, b'{"error":"busy"}')


GUARDING = '"always": true, "on_error": "abort"'
NOT_LOADED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "code": ("raise RuntimeError", f"{{{GUARDING}}}", {}),
    "no class": ("", f"{{{GUARDING}}}", {}),
    "setup": (
        "class P(BaseAgent):\n    async def setup(self):\n        raise OSError",
        f"{{{GUARDING}}}",
        {},
    ),
    "comma": (ASKS, f"{{{GUARDING},}}", {}),
    "compact": (ASKS, '{"always":true,"on_error":"abort",}', {}),
    "spaces": (ASKS, '{"always" :  true,\n "on_error"\t: "abort",}', {}),
    "cut": (ASKS, f'{{{GUARDING}, "settings": {{', {}),
    "unknown key": (ASKS, f'{{{GUARDING}, "modells": ["m"]}}', {}),
    "wrong type": (ASKS, f'{{{GUARDING}, "timeout": "long"}}', {}),
    "command": (ASKS, f'{{{GUARDING}, "command": "a b"}}', {}),
    "variable": (ASKS, f'{{{GUARDING}, "settings": {{"key": "$NOPE"}}}}', {}),
    "table": (ASKS, f"{{{GUARDING}}}", {"timeout": "long"}),
    "table key": (ASKS, f"{{{GUARDING}}}", {"allways": True}),
    "table alone": (ASKS, "{}", {"always": True, "on_error": "abort", "k": 1}),
    "table always": (ASKS, f"{{{GUARDING}}}", {"always": "true"}),
    "table on_error": (ASKS, f"{{{GUARDING}}}", {"on_error": "Abort"}),
}


@pytest.mark.parametrize("how", NOT_LOADED)
async def test_while_a_guard_is_not_loaded_nothing_passes(
    ollama: FakeOllama, ollama_url: str, plugins: Path, how: str
) -> None:
    code, config, table = NOT_LOADED[how]
    (write_agent(plugins, "privacy", code) / "config.json").write_text(config, encoding="utf-8")
    ollama.answers(b"{}", kind="application/json")

    async with running(ollama_url, plugins, agents={"privacy": table}) as client:
        for path in [*UNSEEN, *CHATS]:
            for body in (turn("x", prompt="x"), turn("/privacy x", stream=False)):
                assert got(await client.post(path, json=body)) == refusal(path, "is not loaded")

    assert ollama.asked == []


async def test_a_table_that_is_none_neither_stops_the_start_nor_opens_the_door(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins)

    async with running(ollama_url, plugins, agents={"privacy": True}) as client:
        answer = await client.post("/api/chat", json=turn("x"))

    assert got(answer) == refusal("/api/chat", "is not loaded")


@pytest.mark.parametrize("where", ["config.json", "table"])
async def test_a_guard_that_is_disabled_is_none_even_where_its_settings_are_wrong(
    ollama: FakeOllama, ollama_url: str, plugins: Path, where: str
) -> None:
    folder = write_guard(plugins)
    off = ', "enabled": false' if where == "config.json" else ""
    (folder / "config.json").write_text(f'{{{GUARDING}{off}, "typo": 1}}', encoding="utf-8")
    tables = {"privacy": {"enabled": False}} if where == "table" else {}

    async with passing(ollama, ollama_url, plugins, agents=tables) as client:
        for path in [*UNSEEN, *CHATS]:
            await client.post(path, json=turn("x", prompt="x"))


@pytest.mark.parametrize("code", [ASKS, RESPONDS, "raise RuntimeError"])
async def test_loading_and_unloading_a_model_passes_a_guard(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str
) -> None:
    write_guard(plugins, code)

    async with passing(ollama, ollama_url, plugins) as client:
        for path, body in LOADS:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, (path, body)

    assert [(asked.target, asked.json) for asked in ollama.asked] == LOADS


NO_LOADS = [
    b'{"model":"demo","prompt":"secret","prompt":null}',  # to Go, null changes no string
    b'{"model":"demo","prompt":"","Prompt":"secret"}',
    b'{"model":"demo","prompt":"","images":["AAAA"]}',
    b'{"model":"demo","input":"secret"}',
    b'{"model":"demo","prompt":[1]}',
    b'{"model":"demo","system":"secret","system":null}',
]


@pytest.mark.parametrize("path", UNSEEN)
async def test_what_only_looks_like_loading_is_refused(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_guard(plugins)
    ollama.answers(b"{}", kind="application/json")

    async with running(ollama_url, plugins) as client:
        for body in NO_LOADS:
            assert got(await client.post(path, content=body)) == refusal(path), body

    assert ollama.asked == []


async def test_what_asks_no_model_for_text_passes_a_guard(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, "raise RuntimeError")
    requests = [
        ("POST", "/api/embed", b'{ "model":"demo","input":"x"}'),
        ("POST", "/api/embeddings", b"\xff"),
        ("POST", "/v1/embeddings", b'{"model":"demo","input":"x"} '),
        ("POST", "/api/show", b'{"Model":"demo"}'),
        ("POST", "/api/copy", b'{"source":"demo"}'),
        ("DELETE", "/api/delete", b'{"model":"demo"}'),
        ("POST", "/v1/messages/count_tokens", b'{"model":"demo"}'),
        ("GET", "/api/tags", b""),
        ("GET", "/v1/models", b""),
        ("GET", "/v1/models/demo", b""),
        ("GET", "/api/generate", b""),  # Ollama says 405, and how
        ("OPTIONS", "/api/chat", b""),
    ]

    async with passing(ollama, ollama_url, plugins) as client:
        for method, path, body in requests:
            await client.request(method, path, content=body)

    assert [(asked.method, asked.target, asked.body) for asked in ollama.asked] == requests


SPELLINGS = [
    "demo",
    "DEMO",
    "demo:latest",
    "library/demo",
    "registry.ollama.ai/library/demo:Latest",
    "http://registry.ollama.ai/library/demo",
    "a-b://registry.ollama.ai/library/demo",  # Ollama throws any scheme away
    "://registry.ollama.ai/library/demo",
    "demo:local",  # and newer ones the source of a model
    " demo ",
]


@pytest.mark.parametrize("name", SPELLINGS)
async def test_a_guard_of_some_models_is_asked_for_those_however_they_are_spelt(
    ollama: FakeOllama, ollama_url: str, plugins: Path, name: str
) -> None:
    write_guard(plugins, models=["Demo"])
    ollama.answers(b"{}", kind="application/json")

    async with running(ollama_url, plugins) as client:
        for path in UNSEEN:
            refused = await client.post(path, json={"model": name, "prompt": "x"})
            assert got(refused) == refusal(path)
        await client.post("/api/chat", json=turn("x") | {"model": name})

    assert [asked.json["messages"][0]["content"] for asked in ollama.asked] == ["seen"]


@pytest.mark.parametrize("code", [ASKS, "raise RuntimeError"])
async def test_other_models_pass_it_and_what_cannot_be_read_does_not(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str
) -> None:
    write_guard(plugins, code, models=["demo", "private-*"])
    why = "cannot see this request" if code == ASKS else "is not loaded"

    async with passing(ollama, ollama_url, plugins) as client:
        for path in [*UNSEEN, *CHATS]:
            for name in ("other", "demo:1b", "me/demo", "demonstration"):
                await client.post(path, json=turn("x", prompt="x") | {"model": name})
                assert ollama.asked[-1].json["model"] == name
    async with running(ollama_url, plugins, server=LIMIT) as client:
        for path in [*UNSEEN, *CHATS]:
            for body in DOUBTFUL if path in CHATS else UNREADABLE:
                body = body.replace(b'"demo"', b'"other"')
                assert got(await client.post(path, content=body)) == refusal(path, why), body
            for name in ("demo", "private-1"):
                if path in UNSEEN or code != ASKS:
                    bound = await client.post(path, json=turn("x") | {"model": name})
                    assert got(bound) == refusal(path, why)


async def test_a_guard_is_asked_for_the_model_that_a_preset_stands_for(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, models=["demo"])
    presets = {"fast": {"model": "demo"}, "demo": {"model": "other"}}
    ollama.answers(line("a"), done())

    async with running(ollama_url, plugins, presets=presets) as client:
        for path in UNSEEN:
            refused = await client.post(path, json={"model": "fast", "prompt": "x"})
            assert got(refused) == refusal(path)
            await client.post(path, json={"model": "demo", "prompt": "x"})
            assert ollama.asked[-1].json == {"model": "other", "prompt": "x"}
        for name in ("fast", "fast+privacy", "demo"):
            await client.post("/api/chat", json=turn("x") | {"model": name})

    first = [asked.json["messages"][0]["content"] for asked in ollama.asked[len(UNSEEN) :]]
    assert first == ["seen", "seen", "x"]


@pytest.mark.parametrize("path", CHATS)
async def test_an_agent_that_changes_the_model_does_not_lead_around_its_guard(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_guard(plugins, models=["demo"])
    code = """
    class Route(BaseAgent):
        async def on_request(self, payload):
            return payload | {"model": "demo"}
    """
    write_agent(plugins, "route", code)
    ollama.answers(line("a"), done())

    async with running(ollama_url, plugins) as client:
        answer = await client.post(path, json=turn("/route x") | {"model": "other"})

    assert got(answer) == refusal(path)
    assert ollama.asked == []
