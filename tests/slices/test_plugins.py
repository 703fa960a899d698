"""GET /plugins: every agent, loaded or not, and where it broke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

import demo
import osp
from kernel.config import Config, Key, PluginsConfig, ServerConfig, UpstreamConfig
from kernel.server import SETTINGS
from tests.support import running, turn, write_agent

NOTE = """
class Note(BaseAgent):
    '''Adds a note.

    And more that nobody needs to know.
    '''

    async def on_request(self, payload):
        return add_system(payload, self.arguments["text"])

    async def on_end(self):
        return ""
"""


async def listed(upstream: str, plugins: Path, *asked: str) -> dict[str, dict[str, Any]]:
    """Return what is said of each plugin, after these prompts."""
    async with running(upstream, plugins) as client:
        for text in asked:
            await client.post("/api/chat", json=turn(text))
        answer = await client.get("/plugins")
    assert answer.status_code == 200
    return {about["name"]: about for about in answer.json()["plugins"]}


async def test_an_agent_that_is_loaded_is_described(demo_url: str, plugins: Path) -> None:
    config = {"arguments": {"text": "", "n": 2}, "models": ["llama*"], "settings": {"k": "sesame"}}
    exempt = ["/api/embed"]
    folder = write_agent(plugins, "note", NOTE, always=True, priority=1, exempt=exempt, **config)

    about = (await listed(demo_url, plugins))["note"]

    assert about == {
        "name": "note",
        "status": "loaded",
        "description": "Adds a note.",
        "folder": str(folder),
        "arguments": {"text": "", "n": 2},
        "hooks": ["on_request", "on_end"],
        "tools": [],
        "always": True,
        "priority": 1,
        "models": ["llama*"],
        "on_error": "skip",
        "exempt": exempt,
        "progress": "",
        "counts": {"activated": 0, "failures": 0},
    }


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        ("'2 of 3 files'", "2 of 3 files"),
        ("__import__('pathlib').Path('x')", "x"),
        ("'\\ud800'", "\ud800"),
        ("type('T', (str,), {'__str__': lambda self: 1 / 0})('x')", ""),
    ],
)
async def test_the_progress_of_setup_is_shown_whatever_it_is(
    demo_url: str, plugins: Path, progress: str, shown: str
) -> None:
    code = f"class It(BaseAgent):\n    def setup(self): self.progress = {progress}"
    write_agent(plugins, "index", code)

    assert (await listed(demo_url, plugins))["index"]["progress"] == shown


FAILS = "class It(BaseAgent):\n    def setup(self):\n        raise ValueError('sesame')"
ASKS = """
class Asks(BaseAgent):
    async def on_request(self, payload):
        await self.context.chat([{"role": "user", "content": "inner"}])
"""
GUARD = """
class Guard(BaseAgent):
    async def on_request(self, payload):
        return {"x": 1 / 0} if prompt(payload) == "inner" else payload
"""
WRONG = "class A(BaseAgent):\n    def on_request(self, payload): 1 / 0"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "192.0.2.7", ""])
@pytest.mark.parametrize("user", ["", "someone"])
async def test_the_text_of_an_error_is_for_who_has_a_key_or_is_on_this_machine(
    demo_url: str, plugins: Path, address: str, user: str
) -> None:
    folder = write_agent(plugins, "bad", FAILS)
    keys = {user: Key("key")} if user else {}
    headers = {"authorization": "Bearer key"} if user else {}
    config = Config(
        server=ServerConfig(data=plugins.parent / "data"),
        upstream=UpstreamConfig(url=demo_url),
        plugins=PluginsConfig(dirs=(plugins,)),
        keys=keys,
    )
    app = osp.create_app(config)

    async def seen_from(scope: Any, receive: Any, send: Any) -> None:
        scope = {**scope, "client": (address, 1) if address else None}
        await app(scope, receive, send)

    async with demo.serve(seen_from, **SETTINGS) as url, httpx.AsyncClient() as client:
        (about,) = (await client.get(f"{url}/plugins", headers=headers)).json()["plugins"]

    error = {"type": "ValueError", "where": f"{folder}/agent.py:6"}
    operator = user or address.endswith("1")
    assert about["error"] == (error | {"text": "sesame"} if operator else error)


async def test_disabled_and_second_agents_are_listed_with_what_config_says(
    demo_url: str, plugins: Path
) -> None:
    write_agent(plugins, "note", "1 / 0", enabled=False, description="Adds \ud800 notes")
    (plugins / "bad_agent").mkdir()
    (plugins / "bad_agent" / "config.json").write_text("[1]")
    second = write_agent(plugins, "x", NOTE).rename(plugins / "note")

    agents = await listed(demo_url, plugins)

    shown = {name: (about["status"], about["description"]) for name, about in agents.items()}
    assert shown == {
        "bad": ("failed", ""),
        "note": ("loaded", "Adds a note."),
        f"note ({plugins / 'note_agent'})": ("failed", ""),
    }
    assert agents["note"]["folder"] == str(second)


async def test_what_an_agent_did_is_counted(demo_url: str, plugins: Path) -> None:
    write_agent(plugins, "note", NOTE, arguments={"text": ""})
    write_agent(plugins, "wrong", WRONG)

    agents = await listed(demo_url, plugins, "/note x", "/note /wrong x", "x")

    assert agents["note"]["counts"] == {"activated": 2, "failures": 0}
    assert agents["wrong"]["counts"] == {"activated": 1, "failures": 1}


async def test_what_a_guard_does_with_the_questions_of_agents_is_counted_too(
    demo_url: str, plugins: Path
) -> None:
    write_agent(plugins, "asks", ASKS)
    write_agent(plugins, "guard", GUARD, always=True, on_error="abort")

    agents = await listed(demo_url, plugins, "/asks x")

    assert agents["guard"]["counts"] == {"activated": 2, "failures": 1}
    assert agents["asks"]["counts"] == {"activated": 1, "failures": 1}
