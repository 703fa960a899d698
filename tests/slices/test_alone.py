"""Each slice alone: its routes, a client that sends nothing and a registry that reads no disk.

No socket, no file, no app. What needs those (how bytes stream, who leaves early, how agents are
loaded) is tested over sockets, in the files beside this one.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from starlette.routing import Router
from starlette.types import ASGIApp

from kernel import log
from kernel.agent import BaseAgent, Payload, prompt, set_prompt
from kernel.client import OllamaClient
from kernel.config import HOME, ChainConfig, CommandsConfig, PageConfig, PluginsConfig, Upstream
from kernel.connection import Answer, Body, Headers
from kernel.errors import PluginLoadError
from kernel.guards import Guards
from kernel.log import RequestInfo
from kernel.metrics import Metrics
from kernel.plugin import AgentConfig, Plugin
from kernel.registry import PluginRegistry
from kernel.tools import Consent
from kernel.traces import Traces
from slices import (
    chat,
    embeddings,
    generate,
    health,
    metrics,
    page,
    passthrough,
    plugins,
    tags,
    traces,
)
from tests.support import CHAT, Asked, prompts, said, turn, whole

NOWHERE = Path("nowhere")
GUARD = Plugin("redact", NOWHERE, AgentConfig(always=True, on_error="abort"))
ADVICE = "make the slice's routes(...) with a Client and a Registry of this file, and ask(...) them"


class Client(OllamaClient):
    """Answers what a test says, and remembers what it was asked.

    `version`, `ask` and `stream` are the real ones: all that they send goes through `forward`.
    """

    def __init__(self, body: bytes = b"{}", status: int = 200) -> None:
        super().__init__(Upstream("http", "ollama.invalid", 11434), connect_timeout=1)
        self.body, self.status = body, status
        self.asked: list[Asked] = []

    async def forward(
        self,
        method: str,
        target: bytes,
        headers: Headers,
        body: Body = None,
        known: RequestInfo | None = None,
    ) -> Answer:
        if not isinstance(body, bytes):
            body = b"".join([piece async for piece in body]) if body else b""
        sent = [(name.decode(), value.decode()) for name, value in headers]
        self.asked.append(Asked(method, target.decode(), sent, body))
        return Said(self.body, self.status)


class Said(Answer):
    """An answer that has come, whole."""

    def __init__(self, body: bytes, status: int) -> None:
        self.status, self.headers = status, [(b"content-type", b"application/json")]
        self.complete, self._pieces = True, [body]
        self._connection = None


class Registry(PluginRegistry):
    """Has the plugins that a test made."""

    def __init__(self, *given: Plugin) -> None:
        super().__init__(PluginsConfig(dirs=()), {}, NOWHERE, {})
        self.plugins = {plugin.name: plugin for plugin in given}
        self.always_on = [plugin for plugin in given if plugin.config.always]


async def ask(app: ASGIApp, method: str, path: str, body: object = None) -> httpx.Response:
    """Send one request to a slice, with the log around it, which tells slices who asks."""
    transport = httpx.ASGITransport(log.AccessLog(app, [], log.record))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, json=body)


class Polite(BaseAgent):
    async def on_request(self, payload: Payload) -> Payload:
        set_prompt(payload, f"{prompt(payload)}, please")
        return payload


async def test_chat_sends_what_an_agent_made_of_the_request() -> None:
    client = Client(whole(CHAT, "Here it is."))
    polite = Plugin("polite", NOWHERE, agent=Polite(), hooks=("on_request",))
    settings = ChainConfig(), CommandsConfig(), Consent(NOWHERE, "/")

    routes = chat.routes(client, Registry(polite), *settings)
    answer = await ask(Router(routes), "POST", CHAT, turn("/polite tea", stream=False))

    assert [prompts(asked) for asked in client.asked] == [["tea, please"]]
    assert (answer.status_code, said(answer.content)) == (200, "Here it is.")


async def test_embeddings_are_refused_where_a_guard_would_not_see_them() -> None:
    client = Client()

    routes = embeddings.routes(client, Guards(Registry(GUARD), max_body=100))
    answer = await ask(Router(routes), "POST", "/api/embed", {"model": "m", "input": "secret"})

    assert (answer.status_code, client.asked) == (403, [])
    assert "the agent redact is not loaded" in answer.json()["error"]


async def test_generate_forwards_a_prompt_and_brings_the_answer_back() -> None:
    client = Client(b'{"response": "Hello."}')

    routes = generate.routes(client, Guards(Registry(), max_body=100))
    answer = await ask(Router(routes), "POST", "/api/generate", {"prompt": "/polite hi"})

    assert [asked.json for asked in client.asked] == [{"prompt": "/polite hi"}]
    assert answer.content == b'{"response": "Hello."}'


async def test_health_says_whether_ollama_answers() -> None:
    polite = Plugin("polite", NOWHERE, agent=Polite())
    well, ill = Client(b'{"version": "1.0"}'), Client(b"no", status=500)

    routes = [health.routes(each, Registry(polite), keys=False) for each in (well, ill)]
    good, bad = [await ask(Router(each), "GET", "/health") for each in routes]

    assert (good.status_code, good.json()["upstream"]["version"]) == (200, "1.0")
    assert (bad.status_code, bad.json()["upstream"]["error"][-3:]) == (503, " no")
    assert good.json()["agents"] == bad.json()["agents"] == ["polite"]


async def test_metrics_shows_a_request_that_was_counted() -> None:
    collector = Metrics()
    collector.request("/api/chat", 200, 0.5, 0.1, "")

    answer = await ask(Router(metrics.routes(collector)), "GET", "/metrics")

    assert 'osp_requests_total{route="/api/chat",status="200",user=""} 1' in answer.text


def noted(model: str) -> Traces:
    """Return the traces of one request, which has ended."""
    kept, known = Traces(PageConfig(), Client()), RequestInfo("r-1")
    known.model = model
    kept.latest.append(known)
    return kept


async def test_page_shows_a_request_that_was_noted_as_text() -> None:
    routes = page.routes(noted("<b>tiny</b>"), "/", keys=False)

    answer = await ask(Router(routes), "GET", "/osp")

    assert "&lt;b&gt;tiny&lt;/b&gt;" in answer.text and "<b>" not in answer.text


async def test_passthrough_forwards_any_path_and_any_body() -> None:
    client = Client(b"no such thing", status=404)

    endpoint = passthrough.endpoint(client, Guards(Registry(GUARD), max_body=100))
    answer = await ask(endpoint, "DELETE", "/not/known?a=%2F", {"b": 1})

    asked = [(each.method, each.target, each.json) for each in client.asked]
    assert asked == [("DELETE", "/not/known?a=%2F", {"b": 1})]
    assert (answer.status_code, answer.content) == (404, b"no such thing")


async def test_plugins_lists_one_that_failed_with_its_reason() -> None:
    failed = Plugin("rag", NOWHERE, error=PluginLoadError("no module", "ImportError", "agent.py:3"))

    answer = await ask(Router(plugins.routes(Registry(failed))), "GET", "/plugins")

    (shown,) = answer.json()["plugins"]
    assert (shown["name"], shown["status"]) == ("rag", "failed")
    assert shown["error"] == {"type": "ImportError", "where": "agent.py:3", "text": "no module"}


async def test_tags_forwards_the_list_of_models() -> None:
    client = Client(b'{"models": []}')

    routes = tags.routes(client, Guards(Registry(GUARD), max_body=100))
    answer = await ask(Router(routes), "GET", "/api/tags")

    assert [(asked.method, asked.target) for asked in client.asked] == [("GET", "/api/tags")]
    assert answer.content == b'{"models": []}'


async def test_traces_tells_of_a_request_that_was_noted() -> None:
    answer = await ask(Router(traces.routes(noted("tiny"))), "GET", "/traces/r-1")

    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")


def test_every_slice_is_tested_alone() -> None:
    slices = {file.stem for file in (HOME / "slices").iterdir() if not file.stem.startswith("__")}

    untested = [s for s in slices if not any(name.startswith(f"test_{s}_") for name in globals())]

    assert not untested, f"write test_{min(untested)}_... here: {ADVICE}"
