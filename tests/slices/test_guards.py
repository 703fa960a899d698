"""Guards: what an agent that nothing may pass without cannot see, is refused and says who wants it.

The table of what it cannot see is asked three times: with a guard, with one that is not loaded,
and without any, where all of it must pass.
"""

from __future__ import annotations

import gzip
import json
import re
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
ASKS = [  # where `model` says which model is asked
    "/api/generate", "/v1/completions", "/api/embed", "/api/embeddings", "/v1/embeddings",
    "/v1/images/generations",
]  # fmt: skip
OTHERS = [
    "/api/create", "/api/copy", "/api/blobs/sha256:00", "/api/experimental/web_search",
    "/v1/audio/transcriptions", "/v1/messages/count_tokens", "/api/later", "/", "/api/chat/",
    "//api/chat", "/api/x/%2e%2e/chat", "/API/CHAT",
]  # fmt: skip
UNSEEN = [*ASKS, *OTHERS]
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
TWICE = [PLAIN[:-1] + b',"model":"demo"}', PLAIN[:-1] + b',"input":"secret","input":[]}']
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

ASKS_CODE = """
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


def write_guard(folder: Path, code: str = ASKS_CODE, **config: Any) -> Path:
    return write_agent(folder, "privacy", code, **{"always": True, "on_error": "abort"} | config)


def refusal(path: str, why: str = "cannot see this request") -> tuple[int, Any]:
    text = f"the agent privacy {why}, and nothing may pass without it"
    if not path.startswith("/v1/"):
        return 403, {"error": text}
    if path.startswith("/v1/messages"):
        error = {"type": "permission_error", "message": text}
        return 403, {"type": "error", "error": error}
    return 403, {"error": {"message": text, "type": "api_error", "param": None, "code": None}}


def got(answer: httpx.Response) -> tuple[int, Any]:
    """Return status and body of an error, without the cure that its text ends with."""
    return answer.status_code, json.loads(re.sub(r'; (\\.|[^"])*"', '"', answer.text))


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
    write_guard(plugins, ASKS_CODE + RESPONDS.split("\n", 2)[2])

    async with running(demo_url, plugins) as client:
        answer = await client.post(path, json=turn("hi", stream=stream))

    assert said(answer.content) == "I AM THE DEMO MODEL. I WAS SENT:\n[SYSTEM] SEEN\n[USER] HI"


@pytest.mark.parametrize("path", UNSEEN)
async def test_what_is_no_chat_is_refused_in_its_dialect(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_guard(plugins)
    bodies = [json.dumps({"model": "demo", "prompt": "x"}).encode(), *DOUBTFUL, *TWICE, b""]
    spelt = [path, path.replace("a", "%61"), path.replace("e", "%65"), f"{path}?beta=true"]
    spelt = spelt[:1] if path == "//api/chat" else spelt  # what httpx takes for a host

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


@pytest.mark.parametrize("code", [ASKS_CODE, "raise RuntimeError"])
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

    assert [asked.body for asked in ollama.asked] == [PLAIN] * len([*UNSEEN, *CHATS])


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
    write_guard(plugins, ASKS_CODE)

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

    write_agent(plugins.parent / "asks", "privacy", ASKS_CODE, always=True, on_error="abort")
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
    "comma": (ASKS_CODE, f"{{{GUARDING},}}", {}),
    "compact": (ASKS_CODE, '{"always":true,"on_error":"abort",}', {}),
    "spaces": (ASKS_CODE, '{"always" :  true,\n "on_error"\t: "abort",}', {}),
    "cut": (ASKS_CODE, f'{{{GUARDING}, "settings": {{', {}),
    "unknown key": (ASKS_CODE, f'{{{GUARDING}, "modells": ["m"]}}', {}),
    "wrong type": (ASKS_CODE, f'{{{GUARDING}, "timeout": "long"}}', {}),
    "command": (ASKS_CODE, f'{{{GUARDING}, "command": "a b"}}', {}),
    "variable": (ASKS_CODE, f'{{{GUARDING}, "settings": {{"key": "$NOPE"}}}}', {}),
    "table": (ASKS_CODE, f"{{{GUARDING}}}", {"timeout": "long"}),
    "table key": (ASKS_CODE, f"{{{GUARDING}}}", {"allways": True}),
    "table alone": (ASKS_CODE, "{}", {"always": True, "on_error": "abort", "k": 1}),
    "table always": (ASKS_CODE, f"{{{GUARDING}}}", {"always": "true"}),
    "UTF-16": (ASKS_CODE, f"{{{GUARDING}}}", {}),
    "a folder": (ASKS_CODE, "", {}),
    "table on_error": (ASKS_CODE, f"{{{GUARDING}}}", {"on_error": "Abort"}),
}


@pytest.mark.parametrize("how", NOT_LOADED)
async def test_while_a_guard_is_not_loaded_nothing_passes(
    ollama: FakeOllama, ollama_url: str, plugins: Path, how: str
) -> None:
    code, config, table = NOT_LOADED[how]
    file = write_agent(plugins, "privacy", code) / "config.json"
    if how == "a folder":
        file.mkdir()
    else:
        file.write_text(config, encoding="utf-16" if how == "UTF-16" else "utf-8")
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


@pytest.mark.parametrize("code", [ASKS_CODE, RESPONDS, "raise RuntimeError"])
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
        for body in NO_LOADS if path == "/api/generate" else [*NO_LOADS, b'{"model":"demo"}']:
            assert got(await client.post(path, content=body)) == refusal(path), body

    assert ollama.asked == []


async def test_what_asks_no_model_for_text_passes_a_guard(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, "raise RuntimeError")
    requests = [
        ("POST", "/api/show", b'{"Model":"demo"}'),
        ("POST", "/api/pull", b'{ "model":"demo"}'),
        ("POST", "/api/push", b"\xff"),
        ("POST", "/api/me", b""),
        ("POST", "/api/signout", b""),
        ("DELETE", "/api/delete", b'{"model":"demo"}'),
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
        for path in ASKS:
            refused = await client.post(path, json={"model": name, "prompt": "x"})
            assert got(refused) == refusal(path)
        await client.post("/api/chat", json=turn("x") | {"model": name})

    assert [asked.json["messages"][0]["content"] for asked in ollama.asked] == ["seen"]


@pytest.mark.parametrize("code", [ASKS_CODE, "raise RuntimeError"])
async def test_other_models_pass_it_and_what_cannot_be_read_does_not(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str
) -> None:
    write_guard(plugins, code, models=["demo", "private-*"])
    why = "cannot see this request" if code == ASKS_CODE else "is not loaded"

    async with passing(ollama, ollama_url, plugins) as client:
        for path in [*ASKS, *CHATS]:
            for name in ("other", "demo:1b", "me/demo", "demonstration"):
                await client.post(path, json=turn("x", prompt="x") | {"model": name})
                assert ollama.asked[-1].json["model"] == name
    async with running(ollama_url, plugins, server=LIMIT) as client:
        for path in [*ASKS, *CHATS]:
            for body in DOUBTFUL if path in CHATS else [*UNREADABLE, *TWICE]:
                body = body.replace(b'"demo"', b'"other"')
                assert got(await client.post(path, content=body)) == refusal(path, why), body
            for name in ("demo", "private-1"):
                if path in ASKS or code != ASKS_CODE:
                    bound = await client.post(path, json=turn("x") | {"model": name})
                    assert got(bound) == refusal(path, why)


async def test_a_guard_is_asked_for_a_preset_and_for_the_model_that_it_stands_for(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, models=["demo"])
    presets = {"fast": {"model": "demo"}, "demo": {"model": "other"}, "free": {"model": "other"}}
    ollama.answers(line("a"), done())

    async with running(ollama_url, plugins, presets=presets) as client:
        for path in ASKS:
            for name in ("fast", "demo"):
                refused = await client.post(path, json={"model": name, "prompt": "x"})
                assert got(refused) == refusal(path)
            await client.post(path, json={"model": "free", "prompt": "x"})
            assert ollama.asked.pop().json == {"model": "free", "prompt": "x"}
        for name in ("fast", "demo", "free"):
            await client.post("/api/chat", json=turn("x") | {"model": name})

    first = [asked.json["messages"][0]["content"] for asked in ollama.asked]
    assert first == ["seen", "seen", "x"]


async def test_what_is_judged_is_what_is_sent(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_guard(plugins, models=["demo"])
    body = b' { "model" : "m\\u0061x", "prompt" : "\xc3\xa4", "n": 1e2 } '

    async with passing(ollama, ollama_url, plugins) as client:
        for path in ASKS:
            await client.post(path, content=body)
        await client.post("/api/generate", content=b'{ "model": "demo" }')

    *asked, loaded = [asked.body for asked in ollama.asked]
    assert set(asked) == {'{"model":"max","prompt":"ä","n":100.0}'.encode()}
    assert loaded == b'{"model":"demo"}'


@pytest.mark.parametrize("path", OTHERS)
async def test_where_the_model_is_not_the_one_that_is_asked_every_guard_is(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_guard(plugins, models=["demo"])

    async with running(ollama_url, plugins) as client:
        answer = await client.post(path, json={"model": "new", "from": "demo", "system": "x"})

    assert got(answer) == refusal(path) and ollama.asked == []


EXEMPT = ["/api/embed", "/api/blobs/"]
OPEN = ["/api/embed", "/api/embed?x=y", "/api/%65mbed", "/api/blobs/sha256:00"]
CLOSED = ["/api/embeddings", "/api/embed/", "/api/embed/%2e%2e/create", "//api/embed",
          "/api/generate", "/api/blobs/%2e%2e/create", "/api/blobs%2F..%2Fcreate", "/API/embed",
          "/v1/embeddings"]  # fmt: skip


@pytest.mark.parametrize("code", [ASKS_CODE, "raise RuntimeError"])
async def test_a_guard_may_exempt_paths_whose_bodies_then_pass_as_they_are(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str
) -> None:
    write_guard(plugins, code, exempt=EXEMPT)
    body = b'{"input":"x","input":[],"Model":NaN}'

    async with passing(ollama, ollama_url, plugins) as client:
        for path in OPEN:
            await client.post(path, content=body)
    assert [asked.body for asked in ollama.asked] == [body] * len(OPEN)
    async with running(ollama_url, plugins) as client:
        for path in CLOSED:
            assert (await client.post(path, content=body)).status_code == 403, path

    write_agent(plugins, "second", ASKS_CODE, always=True, on_error="abort")
    async with running(ollama_url, plugins) as client:
        for path in OPEN:
            assert (await client.post(path, content=body)).status_code == 403, path
    assert len(ollama.asked) == len(OPEN)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "PROPFIND", "TRACE"])
async def test_no_other_method_passes_a_guard(
    ollama: FakeOllama, ollama_url: str, plugins: Path, method: str
) -> None:
    write_guard(plugins)

    async with running(ollama_url, plugins) as client:
        answer = await client.request(method, "/api/later", content=PLAIN)

    assert got(answer) == refusal("/api/later") and ollama.asked == []


async def test_a_refusal_names_the_cure(ollama_url: str, plugins: Path) -> None:
    write_guard(plugins)

    async with running(ollama_url, plugins) as client:
        embed = await client.post("/api/embed", json={"model": "demo", "input": "x"})
        chat = await client.post("/api/chat", content=b"\xff")

    cure = 'exempt = ["/api/embed"] under [agents.privacy] in osp.toml'
    assert embed.json()["error"].endswith(f"use a chat endpoint, or allow this path: {cure}")
    assert chat.json()["error"].endswith("send a chat in plain JSON, without logprobs or a format")


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
