"""Who may come in: hosts, origins, keys and closed paths, over sockets that say odd things."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

import demo
import osp
from kernel.access import is_loopback
from kernel.config import AccessConfig, Config, PluginsConfig, ServerConfig, UpstreamConfig
from kernel.server import SETTINGS, listen
from tests.support import FakeOllama, done, running, turn, write_agent

OWN = ["/health", "/plugins", "/metrics"]
SHOUT = """
class Shout(BaseAgent):
    async def on_request(self, payload):
        return set_prompt(payload, prompt(payload).upper())
"""


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
def agents(plugins: Path) -> Path:
    write_agent(plugins, "shout", SHOUT)
    return plugins


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":80",
        "localhost",
        "LocalHost",
        "localhost:11435",
        "a.localhost",
        "pi.local",
        "x.internal:1",
    ]
    + [
        "127.0.0.1",
        "127.1.2.3:80",
        "[::1]:1",
        "[::1]:11435",
        "::1",
        "[::ffff:127.0.0.1]:1",
        "0.0.0.0",
    ]
    + ["10.1.2.3", "172.16.0.1", "192.168.1.2:80", "[fd00::1]:1", "pi.lan", "PI.lan:80"]
    + [socket.gethostname(), f"{socket.gethostname().upper()}:1"],
)
async def test_a_host_near_by_is_let_in(local: httpx.URL, host: str) -> None:
    assert (await ask(local, f"Host: {host}"))[0] == 200


@pytest.mark.parametrize("target", ["/api/version", "/nope", *OWN])
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:11435", "localhost.evil.example", "127.0.0.1.evil.example"]
    + ["local", "internal", "evillocalhost", "localhost.", "pi.lan.evil.example", "a,localhost"]
    + ["8.8.8.8", "172.32.0.1", "100.64.0.1", "169.254.1.1", "[2001:db8::1]:80", "[evil.example]"],
)
async def test_a_foreign_host_gets_a_403(local: httpx.URL, host: str, target: str) -> None:
    """As empty as Ollama's, but our own endpoints say how to allow it."""
    status, body = await ask(local, f"Host: {host}", target=target)

    assert status == 403 and (b"access.hosts = [" in body) is (target in OWN)
    assert target in OWN or body == b""


@pytest.mark.parametrize(
    ("host", "address", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.1", "127.0.0.1", True),
        ("LOCALHOST", "127.0.0.1", True),
        ("localhost", "127.0.0.1", True),
        (' "127.0.0.1" ', "127.0.0.1", True),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("0.0.0.0", "0.0.0.0", False),
        ("", "::", False),
        ("::", "::", False),
        ("[::]", "::", False),
    ],
)
def test_a_host_is_listened_on_as_ollama_does(host: str, address: str, loopback: bool) -> None:
    with listen(host, 0) as listener:
        assert listener.getsockname()[0] == address and is_loopback(listener) is loopback
        if address == "::":  # both families
            port = listener.getsockname()[1]
            socket.create_connection(("127.0.0.1", port)).close()
        with socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_http_1_1_needs_one_host_and_1_0_none(local: httpx.URL) -> None:
    twice = ("Host: localhost", "Host: localhost")

    assert (await ask(local))[0] == 400
    assert (await ask(local, *twice))[0] == 400
    assert (await ask(local, "Host: localhost", "Host: evil.example", version="1.0"))[0] == 400
    assert (await ask(local, version="1.0"))[0] == 200


@pytest.mark.parametrize("target", ["/%68ealth", "http://evil.example/health", "/health?x=1"])
async def test_another_spelling_of_an_own_endpoint_is_checked_too(
    demo_url: str, plugins: Path, target: str
) -> None:
    async with everywhere(demo_url, plugins) as url:
        assert (await ask(url, "Host: evil.example", target=target))[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "8.8.8.8:80", "pi.lan", "localhost"])
async def test_on_other_addresses_every_host_gets_to_ollama_and_few_to_our_own(
    demo_url: str, plugins: Path, host: str
) -> None:
    async with everywhere(demo_url, plugins) as url:
        for target in ("/api/version", *OWN):
            allowed = target.startswith("/api") or host in ("pi.lan", "localhost")
            assert (await ask(url, f"Host: {host}", target=target))[0] == (200 if allowed else 403)


@asynccontextmanager
async def everywhere(upstream: str, plugins: Path) -> AsyncIterator[httpx.URL]:
    """Run a proxy that is told to be bound to every address."""
    config = Config(
        server=ServerConfig(data=plugins.parent / "data"),
        upstream=UpstreamConfig(url=upstream),
        plugins=PluginsConfig(dirs=(plugins,)),
        access=AccessConfig(hosts=("pi.lan",)),
    )
    async with demo.serve(osp.create_app(config, loopback=False), **SETTINGS) as url:
        yield httpx.URL(url)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://localhost.evil.example", "null"]
)
async def test_a_foreign_page_gets_no_agent(
    ollama: FakeOllama, ollama_url: str, plugins: Path, origin: str
) -> None:
    write_agent(plugins, "shout", SHOUT, always=True)
    headers = {"Origin": origin, "X-OSP-Agents": "/shout"}
    ollama.answers(b"", status=403)

    async with running(ollama_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/shout x"), headers=headers)

    assert ollama.asked[0].json["messages"][0]["content"] == "/shout x"
    assert ("origin", origin) in ollama.asked[0].headers
    assert (answer.status_code, answer.content) == (403, b"")
    assert "x-osp-agents" not in answer.headers


@pytest.mark.parametrize("path", OWN)
async def test_a_foreign_page_gets_none_of_our_own_endpoints(local: httpx.URL, path: str) -> None:
    for origin in ("http://evil.example", "null", f"http://evil.example:{local.port}"):
        headers = (f"Host: localhost:{local.port}", f"Origin: {origin}")
        assert await ask(local, *headers, target=path) == (403, b"")


async def test_one_foreign_origin_of_two_is_foreign(local: httpx.URL) -> None:
    origins = ("Origin: http://localhost", "Origin: http://evil.example")

    assert await ask(local, "Host: localhost", *origins, target="/health") == (403, b"")


async def test_an_allowed_page_gets_agents_and_may_read_our_answers(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    near = ["http://localhost", "https://localhost:3000", "http://127.0.0.1:8080", "http://0.0.0.0"]
    apps = ["app://obsidian.md", "file://x", "tauri://localhost", "vscode-webview://x"]
    set_by_us = ["http://chat.example", "https://*.pages.example", "http://[::1]:3000"]

    async with running(ollama_url, agents, access={"origins": set_by_us}) as client:
        for origin in [*near, *apps, *set_by_us, "https://a.pages.example"]:
            headers = {"Origin": origin}
            await client.post("/api/chat", json=turn("/shout x"), headers=headers)
            assert ollama.asked[-1].json["messages"][0]["content"] == "X", origin
            for answer in [await client.get(path, headers=headers) for path in OWN]:
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == origin
                assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (turn("/help"), 200),
        (turn("/help", stream=False), 200),
        (turn("/shout:a=b x", stream=False), 200),
        (turn("/help", format="json"), 400),
        (turn("/broken x"), 418),
        (turn("/replies x"), 200),
    ],
)
async def test_an_allowed_page_may_read_whatever_we_answer_in_a_chat(
    ollama_url: str, agents: Path, body: dict[str, object], status: int
) -> None:
    for name, code in (("broken", "Abort(418, 'tea')"), ("replies", "Reply('now')")):
        hook = f"async def on_request(self, payload):\n        raise {code}"
        write_agent(agents, name, f"class A(BaseAgent):\n    {hook}")

    async with running(ollama_url, agents) as client:
        answer = await client.post("/api/chat", json=body, headers={"Origin": "http://localhost"})

    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "http://localhost"


async def test_who_is_no_page_gets_no_cors_headers(demo_url: str, agents: Path) -> None:
    async with running(demo_url, agents) as client:
        for answer in (
            await client.get("/health"),
            await client.post("/api/chat", json=turn("/help")),
        ):
            assert not {"access-control-allow-origin", "vary"} & set(answer.headers)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_page_of_ours_is_one_of_ollamas_own_to_ollama(
    ollama: FakeOllama, ollama_url: str, agents: Path, scheme: str
) -> None:
    ollama.answers(done("ok"))
    headers = {"Host": "pi.local:11435", "Origin": f"{scheme}://pi.local:11435"}

    async with running(ollama_url, agents) as client:
        await client.post("/api/chat", json=turn("/shout x"), headers=headers)
        await client.get("/api/tags", headers=headers)
        assert (await client.get("/health", headers=headers)).status_code == 200

    assert ollama.asked[0].json["messages"][0]["content"] == "X"
    for asked in ollama.asked:
        assert ("origin", ollama_url) in asked.headers
        assert ("host", ollama_url.removeprefix("http://")) in asked.headers


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://evil.example"])
async def test_a_preflight_is_ollamas_to_answer_and_needs_no_key(
    ollama: FakeOllama, ollama_url: str, plugins: Path, origin: str
) -> None:
    vary = [("vary", "Origin"), ("vary", "Access-Control-Request-Method")]
    ollama.answers(status=204, headers=[("access-control-allow-origin", origin), *vary])
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}

    async with running(ollama_url, plugins, access={"keys": ["sesame"]}) as client:
        answer = await client.options("/api/chat", headers=headers)
        plain = await client.options("/api/chat", headers={"Origin": origin})

    assert answer.status_code == 204 and plain.status_code == 401
    assert ollama.asked[0].method == "OPTIONS" and ("origin", origin) in ollama.asked[0].headers
    assert answer.headers.get_list("access-control-allow-origin") == [origin]
    assert answer.headers.get_list("vary") == ["Origin", "Access-Control-Request-Method"]


TEXT = "a key is needed here: Authorization: Bearer KEY, or x-api-key: KEY"
ERRORS = {
    "/api/chat": {"error": TEXT},
    "/": {"error": TEXT},
    "/health": {"error": TEXT},
    "/v1/models": {
        "error": {"message": TEXT, "type": "api_error", "param": None, "code": None},
    },
    "/v1/messages": {
        "type": "error",
        "error": {"type": "authentication_error", "message": TEXT},
    },
}


@pytest.mark.parametrize("path", ERRORS)
async def test_without_a_key_the_answer_is_a_401_in_the_dialect_of_the_path(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}]

    async with running(ollama_url, plugins, access={"keys": ["sesame", "other"]}) as client:
        for headers in [*wrong, {"x-api-key": "sesam"}, {"x-api-key": ""}]:
            answer = await client.post(path, headers=headers)
            assert (answer.status_code, answer.json()) == (401, ERRORS[path])

    assert ollama.asked == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("Authorization", "Bearer sesame"), ("X-Api-Key", "sesame"), ("x-api-key", "öther")],
)
async def test_a_key_opens_and_goes_no_further(
    ollama: FakeOllama, ollama_url: str, agents: Path, name: str, value: str
) -> None:
    ollama.answers(done("ok"))
    headers = [(name.encode(), value.encode()), (b"X-Mine", b"1")]

    async with running(ollama_url, agents, access={"keys": ["sesame", "öther"]}) as client:
        for path, text in (("/api/chat", "x"), ("/api/chat", "/shout x"), ("/api/nope", "x")):
            await client.post(path, json=turn(text), headers=headers)

    assert len(ollama.asked) == 3
    for asked in ollama.asked:
        names = [name for name, _ in asked.headers]
        assert "x-mine" in names and not {"authorization", "x-api-key"} & set(names)


async def test_without_keys_the_clients_own_credentials_reach_ollama(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    headers = {"authorization": "Bearer theirs", "x-api-key": "theirs"}

    async with running(ollama_url, agents) as client:
        await client.post("/api/chat", json=turn("/shout x"), headers=headers)

    assert set(headers.items()) <= set(ollama.asked[0].headers)


CLOSED = [
    *("/api/pull", "/api/pull?x=1", "/api/pull/", "/api/pull/x", "/api/%70ull", "/api%2Fpull"),
    *("//api/pull", "/api//pull", "/./api/pull", "/api/./pull", "/x/../api/pull", "/../api/pull"),
    *("/x/%2e%2e/api/pull", "/api/pull%2Fx", "/api/p%2575ll", "http://localhost/api/pull"),
    *("/api/blobs/sha256:1", "/metrics"),
]


async def test_a_closed_path_is_closed_in_every_spelling(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    ollama.answers()
    access = {"deny": ["/api/pull", "/api/blobs/", "/metrics"]}

    async with running(ollama_url, plugins, access=access) as client:
        for target in CLOSED:
            status, body = await ask(client.base_url, "Host: localhost", target=target)
            assert status == 403 and " is closed here" in json.loads(body)["error"], target

    assert ollama.asked == []


async def test_beside_a_closed_path_all_is_open(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    ollama.answers()
    targets = ["/api/pulls", "/api", "/api/pul", "/v1/api/pull", "/API/pull"]

    async with running(ollama_url, plugins, access={"deny": ["/api/pull"]}) as client:
        for target in targets:
            assert (await ask(client.base_url, "Host: localhost", target=target))[0] == 200

    assert [asked.target for asked in ollama.asked] == targets


async def test_an_endless_origin_is_a_foreign_one(local: httpx.URL) -> None:
    origin = "app://" + "x" * 9000

    assert await ask(local, "Host: localhost", f"Origin: {origin}", target="/health") == (403, b"")
