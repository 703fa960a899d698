"""Who may come in: hosts, origins, keys and closed paths, over sockets that say odd things."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import demo
import osp
from kernel.access import is_loopback
from kernel.config import Config, build
from kernel.server import SETTINGS, listen
from tests.support import CHAT, PATHS, TAG, FakeOllama, House, chat, prompts, running, said, turn

OWN = ["/health", "/plugins", "/metrics", "/osp"]
NEAR = ["", ":80", *"localhost LocalHost localhost:11435 a.localhost pi.local x.internal:1".split()]
NEAR += "127.0.0.1 127.1.2.3:80 [::1]:1 ::1 [::ffff:127.0.0.1]:1 0.0.0.0 [::]:1 10.1.2.3".split()
NEAR += "172.16.0.1 192.168.1.2:80 [fd00::1]:1 pi.lan PI.lan:80".split()
NEAR += [socket.gethostname(), f"{socket.gethostname().upper()}:1"]
FAR = "evil.example evil.example:11435 localhost.evil.example 127.0.0.1.evil.example local internal"
FAR += " evillocalhost localhost. pi.lan.evil.example a,localhost 8.8.8.8 172.32.0.1 100.64.0.1"
FAR += " 169.254.1.1 [2001:db8::1]:80 [::ffff:8.8.8.8]:80 [evil.example] 127.1 [::1]"
LISTENS = {  # what is bound, and by which settings
    "127.0.0.1": ["127.0.0.1", "127.1", "LOCALHOST", "localhost", ' "127.0.0.1" '],
    "::1": ["::1", "[::1]"],
    "0.0.0.0": ["0.0.0.0"],
    "::": ["", "::", "[::]"],
}


async def ask(
    url: httpx.URL, *headers: str, target: str = "/api/version", version: str = "1.1"
) -> tuple[int, bytes]:
    """Send a GET with these headers and no others; return status and body."""
    with anyio.fail_after(5):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        lines = [f"GET {target} HTTP/{version}", *headers, "Connection: close", "", ""]
        writer.write("\r\n".join(lines).encode("latin-1"))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    return int(head.split()[1]), body


@pytest.fixture(scope="module")
async def local(
    demo_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.URL]:
    """A proxy that is bound to loopback, as by default."""
    plugins = tmp_path_factory.mktemp("plugins")
    async with running(demo_url, plugins, access={"hosts": ["Pi.Lan"]}) as client:
        yield client.base_url


@pytest.fixture
async def everywhere(demo_url: str, plugins: Path) -> AsyncIterator[httpx.URL]:
    """A proxy that is told to be bound to every address."""
    config = build(Config, {"access": {"hosts": ["pi.lan"]}}, "test", plugins)
    ours = replace(config.plugins, dirs=(plugins,))
    config = replace(config, plugins=ours, upstream=replace(config.upstream, url=demo_url))
    async with demo.serve(osp.create_app(config, loopback=False), **SETTINGS) as url:
        yield httpx.URL(url)


@pytest.fixture
def shouting(house: House) -> House:
    house.add("shout", "set_prompt(payload, prompt(payload).upper())")
    return house


@pytest.mark.parametrize("host", NEAR)
async def test_a_host_near_by_is_let_in(local: httpx.URL, host: str) -> None:
    assert (await ask(local, f"Host: {host}"))[0] == 200


@pytest.mark.parametrize("host", FAR.split())
async def test_a_foreign_host_gets_a_403(local: httpx.URL, host: str) -> None:
    """As empty as Ollama's, but our own endpoints say how to allow it."""
    for target in ("/api/version", "/nope", *OWN):
        status, body = await ask(local, f"Host: {host}", target=target)

        assert status == 403 and (b"access.hosts = [" in body) is (target in OWN)
        assert target in OWN or body == b""


@pytest.mark.parametrize("address", LISTENS)
def test_a_host_is_listened_on_as_ollama_does(address: str) -> None:
    for host in LISTENS[address]:
        with listen(host, 0) as listener:
            assert listener.getsockname()[0] == address
            assert is_loopback(listener) is (address in ("127.0.0.1", "::1"))
            if address == "::":  # both families
                port = listener.getsockname()[1]
                socket.create_connection(("127.0.0.1", port)).close()
            socket.create_connection(listener.getsockname()[:2]).close()


async def test_http_1_1_needs_one_host_and_1_0_none(local: httpx.URL) -> None:
    here = "Host: localhost"

    assert (await ask(local))[0] == (await ask(local, here, here))[0] == 400
    assert (await ask(local, here, "Host: evil.example", version="1.0"))[0] == 400
    assert (await ask(local, version="1.0"))[0] == 200


async def test_on_other_addresses_every_host_gets_to_ollama_and_few_to_our_own(
    everywhere: httpx.URL,
) -> None:
    spelled = ["/%68ealth", "http://evil.example/health", "/health?x=1"]
    for host in ("evil.example", "8.8.8.8:80", "pi.lan", "localhost"):
        for target in ("/api/version", *OWN, *spelled):
            near = host in ("pi.lan", "localhost") and "evil" not in target
            status, _ = await ask(everywhere, f"Host: {host}", target=target)
            assert status == (200 if near or "/api" in target else 403), (host, target)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://localhost.evil.example", "null"]
)
async def test_a_foreign_page_gets_no_agent(shouting: House, origin: str) -> None:
    headers = {"Origin": origin, "X-OSP-Agents": "/shout"}
    shouting.ollama.answers(b"", status=403)

    async with shouting.open(agents={"shout": {"always": True}}) as client:
        answer = await client.post(CHAT, json=turn("/shout x"), headers=headers)

    assert shouting.sent == [["/shout x"]]
    assert ("origin", origin) in shouting.ollama.asked[0].headers
    assert (answer.status_code, answer.content) == (403, b"")
    assert "x-osp-agents" not in answer.headers


@pytest.mark.parametrize("path", OWN)
async def test_a_foreign_page_gets_none_of_our_own_endpoints(local: httpx.URL, path: str) -> None:
    evil = "http://evil.example"
    two, endless = f"http://localhost\r\nOrigin: {evil}", "app://" + "x" * 9000
    for origin in (evil, "null", f"{evil}:{local.port}", two, endless):
        headers = (f"Host: localhost:{local.port}", f"Origin: {origin}")
        assert await ask(local, *headers, target=path) == (403, b"")


async def test_an_allowed_page_gets_agents_and_may_read_our_answers(shouting: House) -> None:
    near = ["http://localhost", "https://localhost:3000", "http://127.0.0.1:8080", "http://0.0.0.0"]
    apps = ["app://obsidian.md", "file://x", "tauri://localhost", "vscode-webview://x"]
    set_by_us = ["http://chat.example", "https://*.pages.example", "http://[::1]:3000"]
    shouting.ollama.says(CHAT, "ok")

    async with shouting.open(access={"origins": set_by_us}) as client:
        for origin in [*near, *apps, *set_by_us, "https://a.pages.example"]:
            headers = {"Origin": origin}
            await client.post(CHAT, json=turn("/shout x"), headers=headers)
            assert shouting.sent[-1] == ["X"], origin
            for answer in [await client.get(path, headers=headers) for path in OWN]:
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == origin
                assert answer.headers["vary"] == "Origin"


ANSWERED = [  # by the proxy itself
    (turn("/help"), 200),
    (turn("/help", stream=False), 200),
    (turn("/shout:a=b x", stream=False), 200),
    (turn("/help", format="json"), 400),
    (turn("/broken x"), 418),
    (turn("/replies x"), 200),
]


@pytest.mark.parametrize(("body", "status"), ANSWERED)
async def test_an_allowed_page_and_no_other_client_gets_cors_headers_of_ours(
    shouting: House, body: dict[str, Any], status: int
) -> None:
    shouting.add("broken", "raise Abort(418, 'tea')")
    shouting.add("replies", "raise Reply('now')")

    async with shouting.open() as client:
        answer = await client.post(CHAT, json=body, headers={"Origin": "http://localhost"})
        plain = await client.post(CHAT, json=body)

    assert answer.status_code == plain.status_code == status
    assert answer.headers["access-control-allow-origin"] == "http://localhost"
    assert not {"access-control-allow-origin", "vary"} & set(plain.headers)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_page_of_ours_is_one_of_ollamas_own_to_ollama(shouting: House, scheme: str) -> None:
    shouting.ollama.says(CHAT, "ok")
    headers = {"Host": "pi.local:11435", "Origin": f"{scheme}://pi.local:11435"}

    async with shouting.open() as client:
        await client.post(CHAT, json=turn("/shout x"), headers=headers)
        await client.get("/api/tags", headers=headers)
        assert (await client.get("/health", headers=headers)).status_code == 200

    chat, tags = shouting.ollama.asked
    assert prompts(chat) == ["X"]
    for asked in (chat, tags):
        assert ("origin", shouting.url) in asked.headers
        assert ("host", shouting.url.removeprefix("http://")) in asked.headers


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://evil.example"])
async def test_a_preflight_is_ollamas_to_answer_and_needs_no_key(house: House, origin: str) -> None:
    vary = [("vary", "Origin"), ("vary", "Access-Control-Request-Method")]
    house.ollama.answers(status=204, headers=[("access-control-allow-origin", origin), *vary])
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}

    async with house.open(keys=keys("sesame")) as client:
        answer = await client.options(CHAT, headers=headers)
        plain = await client.options(CHAT, headers={"Origin": origin})

    (asked,) = house.ollama.asked
    assert answer.status_code == 204 and plain.status_code == 401
    assert asked.method == "OPTIONS" and ("origin", origin) in asked.headers
    assert answer.headers.get_list("access-control-allow-origin") == [origin]
    assert answer.headers.get_list("vary") == ["Origin", "Access-Control-Request-Method"]


FORMS = "send Authorization: Bearer KEY, x-api-key: KEY, or KEY as the password of Basic"
TEXT = f"a key is needed here; {FORMS}"
V1 = {"message": TEXT, "type": "api_error", "param": None, "code": None}
ERRORS = {
    **dict.fromkeys([CHAT, "/", "/plugins"], {"error": TEXT}),
    "/v1/models": {"error": V1},
    "/v1/messages": {"type": "error", "error": {"type": "authentication_error", "message": TEXT}},
}
WRONG = {
    "Authorization": ["Bearer wrong", "Basic sesame", "Basic c2VzYW1lOg==", "Basic !", "Bearer"],
    "x-api-key": ["sesam", "sesame1", ""],
}
RIGHT = [
    ("Authorization", "Bearer sesame"),
    ("authorization", "bearer  sesame"),
    ("Authorization", "sesame"),
    ("Authorization", f"Basic {b64encode(b'me:sesame').decode()}"),
    ("Authorization", f"basic {b64encode(b':sesame').decode()}"),
    ("X-Api-Key", "sesame"),
    ("x-api-key", "o:t:h:e:r"),
    ("Authorization", f"Basic {b64encode(b'other:o:t:h:e:r').decode()}"),
]


def keys(*secrets: str, **limits: Any) -> dict[str, Any]:
    """Return a table of keys; each is called by its letters, and has these limits."""
    return {re.sub("[^a-z]", "", key): {"key": key, **limits} for key in secrets}


async def test_without_a_key_the_answer_is_a_401_in_the_dialect_of_the_path(house: House) -> None:
    async with house.open(keys=keys("sesame", "o:t:h:e:r")) as client:
        for path, error in ERRORS.items():
            answer = await client.post(path)
            assert (answer.status_code, answer.json()) == (401, error), path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-should-retry"] == "false"
        for name, values in WRONG.items():
            for value in values:
                answer = await client.post("/", headers={name: value})
                text = f"the key that was sent is none of those in [keys]; {FORMS}"
                assert (answer.status_code, answer.json()) == (401, {"error": text}), value

    assert house.ollama.asked == []


@pytest.mark.parametrize(("name", "value"), RIGHT)
async def test_a_key_opens_and_goes_no_further(shouting: House, name: str, value: str) -> None:
    shouting.ollama.says(CHAT, "ok")
    headers = [(name.encode(), value.encode()), (b"X-Mine", b"1")]

    async with shouting.open(keys=keys("sesame", "o:t:h:e:r")) as client:
        for path, text in ((CHAT, "x"), (CHAT, "/shout x"), ("/api/nope", "x")):
            await client.post(path, json=turn(text), headers=headers)
        traces = (await client.get("/traces", headers=headers)).json()["finished"]
        metrics = (await client.get("/metrics", headers=headers)).text

    user = "other" if "o:t" in value or "b3RoZX" in value else "sesame"
    assert [trace["user"] for trace in traces] == [user] * 3
    assert f'osp_requests_total{{route="/api/chat",status="200",user="{user}"}} 2' in metrics
    assert len(shouting.ollama.asked) == 3
    for asked in shouting.ollama.asked:
        names = {name for name, _ in asked.headers}
        assert "x-mine" in names and not {"authorization", "x-api-key"} & names


async def test_of_two_keys_in_one_request_one_that_is_known_opens(house: House) -> None:
    """Clients send a key of their own as Bearer, and take another header for the proxy's."""
    house.ollama.answers()
    headers = {"authorization": "Bearer ollama", "x-api-key": "sesame"}

    async with house.open(keys=keys("sesame")) as client:
        assert (await client.get("/api/tags", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", PATHS)
async def test_a_key_may_ask_the_models_that_it_names(house: House, path: str) -> None:
    house.ollama.says(path, "ok")
    asked = {"x-api-key": "sesame"}

    async with house.open(keys=keys("sesame", models=["small", "qwen*"])) as client:
        for model in ("small", "Small:latest", "qwen3:4b"):
            answer = await client.post(path, json=chat(path, "hi", model=model), headers=asked)
            assert answer.status_code == 200
        for model in ("small2", "smal", "small:8b", ""):
            refused = await client.post(path, json=chat(path, "hi", model=model), headers=asked)
            assert refused.status_code == 403
            assert "the key sesame may ask small, qwen*, and not " in refused.text
        for odd in (b'{"model": "small", "model": "big"}', b'{"MODEL": "big"}', b"", b"[]"):
            refused = await client.post(path, content=odd, headers=asked)
            assert (refused.status_code, "cannot be seen here" in refused.text) == (403, True)

    assert len(house.ollama.asked) == 3


ASKS = ["/api/generate", "/api/embed", "/v1/embeddings", "/v1/completions", "/api/show"]
CLOSED_TO_SOME = ["/api/pull", "/api/create", "/api/copy", "/api/push", "/api/blobs/x", "/v1/new"]


async def test_a_key_with_models_sends_nothing_else_that_may_ask_one(house: House) -> None:
    house.ollama.answers()
    asked = {"x-api-key": "sesame"}

    async with house.open(keys=keys("sesame", models=["small"])) as client:
        for path in ASKS:
            body = {"model": "small", "prompt": "hi", "name": "big"}
            assert (await client.post(path, json=body, headers=asked)).status_code == 200
            for wrong in ({"model": "big"}, {"name": "small"}, {"Model": "big", "model": "small"}):
                refused = await client.post(path, json=wrong, headers=asked)
                assert refused.status_code == 403, (path, wrong)
        for path in CLOSED_TO_SOME:
            refused = await client.post(path, json={"model": "small"}, headers=asked)
            assert refused.status_code == 403, path
        assert (await client.get("/api/tags", headers=asked)).status_code == 200
        gone = await client.request("DELETE", "/api/delete", json={"model": "small"}, headers=asked)
        assert gone.status_code == 403

    assert len(house.ollama.asked) == len(ASKS) + 1


async def test_a_key_may_ask_for_the_agents_that_it_names(shouting: House) -> None:
    shouting.ollama.says(CHAT, "ok")
    shouting.add("note", TAG)
    shouting.add("notary", TAG)
    presets = {"loud": {"model": "demo", "agents": "/shout"}}

    async with shouting.open(keys=keys("sesame", agents=["Note*"]), presets=presets) as client:
        client.headers["x-api-key"] = "sesame"
        for refused in (
            await client.post(CHAT, json=turn("/shout x")),
            await client.post(CHAT, json=turn("/explain /note /shout x")),
            await client.post(CHAT, json=turn("x"), headers={"x-osp-agents": "/shout"}),
        ):
            text = "the key sesame may not use /shout"
            assert (refused.status_code, refused.json()) == (403, {"error": text})
        await client.post(CHAT, json=turn("/note x"))
        helped = said((await client.post(CHAT, json=turn("/help"))).content)
        await client.post(CHAT, json=turn("x", model="loud"))

    assert shouting.sent == [["x <note"], ["X"]]
    assert "/note" in helped and "/shout" not in helped


async def test_a_path_may_be_closed_to_one_key_alone(house: House) -> None:
    house.ollama.answers()
    table = keys("sesame", deny=["/api/pull"]) | keys("other")

    async with house.open(keys=table) as client:
        for target in ("/api/pull", "/api/./pull/x"):
            refused = await client.get(target, headers={"x-api-key": "sesame"})
            assert refused.status_code == 403
            assert refused.json() == {"error": "/api/pull is closed here to the key sesame"}
            assert (await client.get(target, headers={"x-api-key": "other"})).status_code == 200


async def test_without_keys_the_clients_own_credentials_reach_ollama(shouting: House) -> None:
    shouting.ollama.says(CHAT, "ok")
    headers = {"authorization": "Bearer theirs", "x-api-key": "theirs"}

    async with shouting.open() as client:
        await client.post(CHAT, json=turn("/shout x"), headers=headers)

    assert set(headers.items()) <= set(shouting.ollama.asked[0].headers)


async def test_credentials_of_the_proxy_go_to_ollama_in_the_place_of_the_clients(
    shouting: House,
) -> None:
    shouting.ollama.says(CHAT, "ok")
    headers = {"authorization": "Bearer theirs"}

    async with shouting.open(upstream={"authorization": "Bearer ours"}) as client:
        for text in ("x", "/shout x"):
            await client.post(CHAT, json=turn(text), headers=headers)
        await client.get("/health")

    for asked in shouting.ollama.asked:
        assert [v for k, v in asked.headers if k == "authorization"] == ["Bearer ours"]
    assert len(shouting.ollama.asked) >= 2


CLOSED = [
    *("/api/pull", "/api/pull?x=1", "/api/pull/", "/api/pull/x", "/api/%70ull", "/api%2Fpull"),
    *("//api/pull", "/api//pull", "/./api/pull", "/api/./pull", "/x/../api/pull", "/../api/pull"),
    *("/x/%2e%2e/api/pull", "/api/pull%2Fx", "/api/p%2575ll", "http://localhost/api/pull"),
    *("/api/blobs/sha256:1", "/metrics"),
]
OPEN = ["/api/pulls", "/api", "/api/pul", "/v1/api/pull", "/API/pull"]


async def test_a_closed_path_is_closed_in_every_spelling_and_what_is_beside_it_is_open(
    ollama: FakeOllama, house: House
) -> None:
    ollama.answers()

    async with house.open(access={"deny": ["/api/pull", "/api/blobs/", "/metrics"]}) as client:
        for target in CLOSED:
            status, body = await ask(client.base_url, "Host: localhost", target=target)
            assert status == 403 and " is closed here" in json.loads(body)["error"], target
        for target in OPEN:
            assert (await ask(client.base_url, "Host: localhost", target=target))[0] == 200

    assert [asked.target for asked in ollama.asked] == OPEN
