"""Guards: what an agent that nothing may pass without cannot see, is refused and says who wants it.

The table of what it cannot see is asked three times: with a guard, with one that is not loaded,
and without any, where all of it must pass.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from tests.support import DONE, Asked, House, done, event, said, turn, write_agent

CHATS = ["/api/chat", "/v1/chat/completions"]
ASKS = (  # where `model` says which model is asked
    "/api/generate /v1/completions /api/embed /api/embeddings /v1/embeddings /v1/images/generations"
).split()
OTHERS = (
    "/api/create /api/copy /api/blobs/sha256:00 /api/experimental/web_search"
    " /v1/audio/transcriptions /v1/messages/count_tokens /api/later / /api/chat/ //api/chat"
    " /api/x/%2e%2e/chat /API/CHAT"
).split()
UNSEEN = [*ASKS, *OTHERS]
PLAIN = json.dumps(turn("x")).encode()
UNREADABLE = [
    b"",
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
    ("/api/generate", {"model": "demo"}),
    ("/api/generate", {"model": "demo", "keep_alive": 0, "stream": False}),
    ("/api/generate", {"model": "demo", "prompt": "", "images": [], "raw": False, "context": []}),
    ("/api/chat", {"model": "demo"}),
    ("/api/chat", {"model": "demo", "messages": None, "options": None, "keep_alive": "0s"}),
    ("/api/chat", {"model": "demo", "messages": [], "keep_alive": 0, "stream": True}),
]
FAILS = "raise RuntimeError"
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

Call = tuple[str, Any]  # a target, and a body: bytes, or what JSON is made of


def write_guard(house: House, code: str = ASKS_CODE, **config: Any) -> None:
    config = {"always": True, "on_error": "abort"} | config
    write_agent(house.plugins, "privacy", code, **config)


def refusal(target: str, why: str = "cannot see this request") -> tuple[int, Any]:
    path, text = unquote(target), f"the agent privacy {why}, and nothing may pass without it"
    if not path.startswith("/v1/"):
        return 403, {"error": text}
    if path.startswith("/v1/messages"):
        return 403, {"type": "error", "error": {"type": "permission_error", "message": text}}
    return 403, {"error": {"message": text, "type": "api_error", "param": None, "code": None}}


def got(answer: httpx.Response) -> tuple[int, Any]:
    """Return status and body of an error, without the cure that its text ends with."""
    return answer.status_code, json.loads(re.sub(r'; (\\.|[^"])*"', '"', answer.text))


async def answers(house: House, calls: Sequence[Call], **sections: Any) -> list[httpx.Response]:
    """Post to a proxy that is open while it is asked; `headers` go with each request."""
    headers = sections.pop("headers", {})
    async with house.open(**sections) as client:
        base = str(client.base_url).rstrip("/")  # else httpx would take //x for a host
        sent = [(t, b if isinstance(b, bytes) else json.dumps(b)) for t, b in calls]
        return [await client.post(base + t, content=b, headers=headers) for t, b in sent]


async def refuses(
    house: House, calls: Sequence[Call], why: str = "cannot see this request", **sections: Any
) -> None:
    """See that each of these requests is refused in its dialect and reaches nobody."""
    before = len(house.ollama.asked)
    for call, answer in zip(calls, await answers(house, calls, **sections), strict=True):
        assert got(answer) == refusal(call[0], why), call
    assert len(house.ollama.asked) == before


async def passes(house: House, calls: Sequence[Call], **sections: Any) -> list[Asked]:
    """See that each of these requests reaches Ollama, and return what Ollama was asked."""
    house.ollama.answers(b"{}", kind="application/json")
    for call, answer in zip(calls, await answers(house, calls, **sections), strict=True):
        assert answer.content == b"{}", call
    asked = house.ollama.asked[-len(calls) :]
    assert [each.target for each in asked] == [target for target, _ in calls]
    return asked


def chats(**fields: Any) -> list[Call]:
    return [(path, turn("x", **fields)) for path in CHATS]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", CHATS)
async def test_a_guard_sees_a_chat_and_its_answer(house: House, path: str, stream: bool) -> None:
    write_guard(house, ASKS_CODE + RESPONDS.split("\n", 2)[2])

    answer = await house.ask(path, "hi", stream=stream)

    assert house.sent == [["seen", "hi"]] and said(answer.content) == "Y"


@pytest.mark.parametrize("path", UNSEEN)
async def test_what_is_no_chat_is_refused_in_its_dialect(house: House, path: str) -> None:
    """A guard of one model is asked where `model` is not the one that is asked, too."""
    write_guard(house, models=["demo"])
    bodies = [b'{"model":"demo","prompt":"x"}', *DOUBTFUL, *TWICE]
    bodies += [b'{"model":"new","from":"demo","system":"x"}'] if path in OTHERS else []
    spelt = [path, path.replace("a", "%61"), path.replace("e", "%65"), f"{path}?beta=true"]

    await refuses(house, [(s, body) for s in spelt for body in bodies], server=LIMIT)
    await refuses(house, [(path, PLAIN)], headers={"origin": "http://evil.example"})


@pytest.mark.parametrize("path", CHATS)
async def test_a_chat_that_no_agent_can_read_is_refused(house: House, path: str) -> None:
    write_guard(house)
    spelt = (path, path.replace("chat", "ch%61t"))

    await refuses(house, [(s, body) for s in spelt for body in DOUBTFUL], server=LIMIT)
    for origin in ("http://evil.example", "null"):
        await refuses(house, [(path, PLAIN)], headers={"origin": origin})


ONLY_OTHERS = {"plugins": {"only": ["other"]}}
OFF = {"agents": {"privacy": {"enabled": False}}}
NO_GUARDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "may fail": (ASKS_CODE, {"on_error": "skip"}, {}),
    "not always on": (ASKS_CODE, {"always": False}, {}),
    "disabled": (ASKS_CODE, {"enabled": False}, {}),
    "disabled in the table": (ASKS_CODE, {}, OFF),
    "disabled, with a typo": (ASKS_CODE, {"enabled": False, "typo": 1}, {}),
    "disabled in the table, with a typo": (ASKS_CODE, {"typo": 1}, OFF),
    "left out": (ASKS_CODE, {}, ONLY_OTHERS),
    "left out, fails": (FAILS, {}, ONLY_OTHERS),
}


@pytest.mark.parametrize("kind", NO_GUARDS)
async def test_without_a_guard_all_of_that_passes_as_it_is(house: House, kind: str) -> None:
    code, config, sections = NO_GUARDS[kind]
    write_guard(house, code, **config)
    calls = [(path, body) for path in [*UNSEEN, *CHATS] for body in DOUBTFUL]

    asked = await passes(house, calls, server=LIMIT, **sections)
    await passes(house, chats(logprobs=True, format="json"), **sections)

    assert [each.body for each in asked] == [body for _, body in calls]


FALSE: list[Call] = [
    ("/api/chat", turn("x", logprobs=True)),
    ("/api/chat", turn("x", logprobs=True, top_logprobs=2, stream=False)),
    ("/v1/chat/completions", turn("x", logprobs=True, stream=True)),
]
STRUCTURED: list[Call] = [
    ("/api/chat", turn("x", format="json")),
    ("/api/chat", turn("x", format={"type": "object"}, stream=False)),
    ("/v1/chat/completions", turn("x", response_format={"type": "json_object"})),
    ("/v1/chat/completions", turn("x", response_format={"type": "json_schema"}, stream=True)),
]
TRUE: list[Call] = [
    ("/api/chat", turn("x", format="")),
    ("/api/chat", turn("x", format=None, logprobs=False)),
    ("/v1/chat/completions", turn("x", response_format={"type": "text"}, logprobs=None)),
    ("/v1/chat/completions", turn("x", response_format=None)),
]


@pytest.mark.parametrize("structured", [False, True])
async def test_a_guard_edits_an_answer_or_it_is_refused(house: House, structured: bool) -> None:
    write_guard(house, RESPONDS, structured=structured)

    await refuses(house, FALSE if structured else [*FALSE, *STRUCTURED])
    async with house.open() as client:
        for path, fields in [*TRUE, *STRUCTURED] if structured else TRUE:
            answer = await house.post(client, path, **fields)
            assert said(answer.content) == "Y", fields


async def test_a_guard_of_requests_has_no_say_in_answers(house: House) -> None:
    write_guard(house)

    asked = await passes(house, [*FALSE, *STRUCTURED])

    assert {each.json["messages"][0]["content"] for each in asked} == {"seen"}


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_cannot_be_read_is_refused_for_a_guard_that_responds(
    house: House, path: str, stream: bool
) -> None:
    write_guard(house, RESPONDS)
    streams = {CHATS[0]: "application/x-ndjson", CHATS[1]: "text/event-stream"}
    kind = streams[path] if stream else "application/json"
    secret = gzip.compress(done("secret") + event("secret") + DONE)

    for headers, as_kind in (([("content-encoding", "gzip")], kind), ([], "text/plain")):
        house.ollama.answers(secret, kind=as_kind, headers=headers)
        [answer] = await answers(house, [(path, turn("x", stream=stream))])
        assert got(answer) == refusal(path)


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize(("code", "status"), [(RESPONDS, 503), (ASKS_CODE, 200)])
async def test_an_error_of_ollama_and_an_answer_without_say_pass_a_guard(
    house: House, path: str, code: str, status: int
) -> None:
    write_guard(house, code)
    packed = gzip.compress(b'{"error":"busy"}')
    encoded = [("content-encoding", "gzip")]
    house.ollama.answers(packed, status=status, kind="application/json", headers=encoded)

    [answer] = await answers(house, [(path, turn("x"))])

    assert (answer.status_code, answer.content) == (status, b'{"error":"busy"}')


GUARDING = '"always": true, "on_error": "abort"'
SETUP_FAILS = "class P(BaseAgent):\n    async def setup(self):\n        raise OSError"
NOT_LOADED: dict[str, tuple[str, str, Any]] = {
    "code": (FAILS, f"{{{GUARDING}}}", {}),
    "no class": ("", f"{{{GUARDING}}}", {}),
    "setup": (SETUP_FAILS, f"{{{GUARDING}}}", {}),
    "spaces": (ASKS_CODE, '{"always" :  true,\n "on_error"\t:"abort",}', {}),
    "cut": (ASKS_CODE, f'{{{GUARDING}, "settings": {{', {}),
    "unknown key": (ASKS_CODE, f'{{{GUARDING}, "modells": ["m"]}}', {}),
    "wrong type": (ASKS_CODE, f'{{{GUARDING}, "timeout": "long"}}', {}),
    "variable": (ASKS_CODE, f'{{{GUARDING}, "settings": {{"key": "$NOPE"}}}}', {}),
    "table": (ASKS_CODE, f"{{{GUARDING}}}", {"timeout": "long"}),
    "table key": (ASKS_CODE, f"{{{GUARDING}}}", {"allways": True}),
    "table alone": (ASKS_CODE, "{}", {"always": True, "on_error": "abort", "k": 1}),
    "table always": (ASKS_CODE, f"{{{GUARDING}}}", {"always": "true"}),
    "table on_error": (ASKS_CODE, f"{{{GUARDING}}}", {"on_error": "Abort"}),
    "no table": (ASKS_CODE, f"{{{GUARDING}}}", True),
    "UTF-16": (ASKS_CODE, f"{{{GUARDING}}}", {}),
    "a folder": (ASKS_CODE, "", {}),
}


@pytest.mark.parametrize("how", NOT_LOADED)
async def test_while_a_guard_is_not_loaded_nothing_passes(house: House, how: str) -> None:
    code, config, table = NOT_LOADED[how]
    file = write_agent(house.plugins, "privacy", code) / "config.json"
    if how == "a folder":
        file.mkdir()
    else:
        file.write_text(config, encoding="utf-16" if how == "UTF-16" else "utf-8")
    bodies = (turn("x", prompt="x"), turn("/privacy x", stream=False))
    calls = [(path, body) for path in [*UNSEEN, *CHATS] for body in bodies]

    await refuses(house, calls, "is not loaded", agents={"privacy": table} if table else {})


@pytest.mark.parametrize("code", [ASKS_CODE, RESPONDS, FAILS])
async def test_loading_and_unloading_a_model_passes_a_guard(house: House, code: str) -> None:
    write_guard(house, code)

    asked = await passes(house, LOADS)

    assert [each.json for each in asked] == [body for _, body in LOADS]


NO_LOADS = [
    b'{"model":"demo","prompt":"secret","prompt":null}',  # to Go, null changes no string
    b'{"model":"demo","prompt":"","Prompt":"secret"}',
    b'{"model":"demo","prompt":"","images":["AAAA"]}',
    b'{"model":"demo","input":"secret"}',
    b'{"model":"demo","prompt":[1]}',
    b'{"model":"demo","system":"secret","system":null}',
]


async def test_what_only_looks_like_loading_is_refused(house: House) -> None:
    write_guard(house)

    await refuses(house, [(path, body) for path in UNSEEN for body in NO_LOADS])
    await refuses(house, [(path, b'{"model":"demo"}') for path in UNSEEN[1:]])


async def test_what_asks_no_model_for_text_passes_a_guard_and_no_other_method(house: House) -> None:
    write_guard(house, FAILS)
    house.ollama.answers(b"{}", kind="application/json")
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

    async with house.open() as client:
        for method, path, body in requests:
            assert (await client.request(method, path, content=body)).status_code == 200
        for method in ("PUT", "PATCH", "PROPFIND", "TRACE"):
            answer = await client.request(method, "/api/later", content=PLAIN)
            assert got(answer) == refusal("/api/later", "is not loaded")

    asked = [(each.method, each.target, each.body) for each in house.ollama.asked]
    assert asked == requests


# Ollama throws any scheme away, and newer ones the source of a model
SPELLINGS = (
    "demo DEMO demo:latest library/demo registry.ollama.ai/library/demo:Latest demo:local"
    " http://registry.ollama.ai/library/demo a-b://registry.ollama.ai/library/demo"
    " ://registry.ollama.ai/library/demo"
).split()


async def test_a_guard_of_some_models_is_asked_for_those_however_they_are_spelt(
    house: House,
) -> None:
    write_guard(house, models=["Demo"])
    bodies = [turn("x", prompt="x") | {"model": name} for name in [*SPELLINGS, " demo "]]

    await refuses(house, [(path, body) for path in ASKS for body in bodies])
    await passes(house, [("/api/chat", body) for body in bodies])

    assert house.sent == [["seen", "x"]] * len(bodies)


@pytest.mark.parametrize("code", [ASKS_CODE, FAILS])
async def test_other_models_pass_it_and_what_cannot_be_read_does_not(
    house: House, code: str
) -> None:
    write_guard(house, code, models=["demo", "private-*"])
    why = "cannot see this request" if code == ASKS_CODE else "is not loaded"
    models = ("other", "demo:1b", "me/demo", "demonstration")
    free = [turn("x", model=name) for name in models]
    bound = [turn("x", model=name) for name in ("demo", "private-1")]
    other = [body.replace(b'"demo"', b'"other"') for body in [*UNREADABLE, *TWICE, *DOUBTFUL]]
    readable = len(UNREADABLE) + len(TWICE)

    asked = await passes(house, [(path, body) for path in [*ASKS, *CHATS] for body in free])
    assert [each.json for each in asked] == free * len([*ASKS, *CHATS])
    await refuses(house, [(p, body) for p in ASKS for body in other[:readable]], why, server=LIMIT)
    await refuses(house, [(p, body) for p in CHATS for body in other[readable:]], why, server=LIMIT)
    paths = ASKS if code == ASKS_CODE else [*ASKS, *CHATS]
    await refuses(house, [(path, body) for path in paths for body in bound], why)


async def test_a_guard_is_asked_for_a_preset_and_for_the_model_that_it_stands_for(
    house: House,
) -> None:
    write_guard(house, models=["demo"])
    presets = {"fast": {"model": "demo"}, "demo": {"model": "other"}, "free": {"model": "other"}}
    fast, demo, free = ({"model": name, "prompt": "x"} for name in presets)
    models = [turn("x") | {"model": name} for name in presets]

    await refuses(house, [(p, body) for p in ASKS for body in (fast, demo)], presets=presets)
    asked = await passes(house, [(path, free) for path in ASKS], presets=presets)
    assert all(each.json == free for each in asked)
    asked = await passes(house, [("/api/chat", body) for body in models], presets=presets)

    assert [each.json["messages"][0]["content"] for each in asked] == ["seen", "seen", "x"]


async def test_what_is_judged_is_what_is_sent(house: House) -> None:
    write_guard(house, models=["demo"])
    body = b' { "model" : "m\\u0061x", "prompt" : "\xc3\xa4", "n": 1e2 } '

    asked = await passes(house, [(path, body) for path in ASKS])
    [loaded] = await passes(house, [("/api/generate", b'{ "model": "demo" }')])

    assert {each.body for each in asked} == {'{"model":"max","prompt":"ä","n":100.0}'.encode()}
    assert loaded.body == b'{"model":"demo"}'


EXEMPT = ["/api/embed", "/api/blobs/"]
OPEN = ["/api/embed", "/api/embed?x=y", "/api/%65mbed", "/api/blobs/sha256:00"]
CLOSED = (
    "/api/embeddings /api/embed/ /api/embed/%2e%2e/create //api/embed /api/generate /API/embed"
    " /api/blobs/%2e%2e/create /api/blobs%2F..%2Fcreate /v1/embeddings"
).split()


@pytest.mark.parametrize("code", [ASKS_CODE, FAILS])
async def test_a_guard_may_exempt_paths_whose_bodies_then_pass_as_they_are(
    house: House, code: str
) -> None:
    write_guard(house, code, exempt=EXEMPT)
    body = b'{"input":"x","input":[],"Model":NaN}'
    opened = [(path, body) for path in OPEN]

    assert [each.body for each in await passes(house, opened)] == [body] * len(OPEN)
    closed = await answers(house, [(path, body) for path in CLOSED])
    write_agent(house.plugins, "second", ASKS_CODE, always=True, on_error="abort")
    closed += await answers(house, opened)

    assert {answer.status_code for answer in closed} == {403}
    assert len(house.ollama.asked) == len(OPEN)


async def test_a_refusal_names_the_cure(house: House) -> None:
    write_guard(house)
    calls = [("/api/embed", {"model": "demo", "input": "x"}), ("/api/chat", b"\xff")]

    embed, chat = [answer.json()["error"] for answer in await answers(house, calls)]

    cure = 'exempt = ["/api/embed"] under [agents.privacy] in osp.toml'
    assert embed.endswith(f"use a chat endpoint, or allow this path: {cure}")
    assert chat.endswith("send a chat in plain JSON, without logprobs or a format")


async def test_an_agent_that_changes_the_model_does_not_lead_around_its_guard(house: House) -> None:
    write_guard(house, models=["demo"])
    house.add("route", "payload = payload | {'model': 'demo'}")

    calls = [(path, turn("/route x") | {"model": "other"}) for path in CHATS]
    await refuses(house, calls)
