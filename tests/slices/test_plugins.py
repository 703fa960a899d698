"""GET /plugins: every agent, loaded or not, and where it broke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
    assert answer.status_code == 200 and "sesame" not in answer.text
    return {about["name"]: about for about in answer.json()["plugins"]}


async def test_an_agent_that_is_loaded_is_described(demo_url: str, plugins: Path) -> None:
    config = {"arguments": {"text": "", "n": 2}, "models": ["llama*"], "settings": {"k": "sesame"}}
    folder = write_agent(plugins, "note", NOTE, always=True, priority=1, **config)

    about = (await listed(demo_url, plugins))["note"]

    assert about == {
        "name": "note",
        "status": "loaded",
        "description": "Adds a note.",
        "folder": str(folder),
        "arguments": {"text": "", "n": 2},
        "hooks": ["on_request", "on_end"],
        "always": True,
        "priority": 1,
        "models": ["llama*"],
        "on_error": "skip",
        "progress": "",
        "counts": {"activated": 0, "failures": 0},
    }


async def test_what_setup_began_is_followed(demo_url: str, plugins: Path) -> None:
    code = "class It(BaseAgent):\n    def setup(self): self.progress = '2 of 3 files'"
    write_agent(plugins, "index", code)

    about = (await listed(demo_url, plugins))["index"]

    assert about["progress"] == "2 of 3 files"


async def test_a_disabled_agent_is_listed(demo_url: str, plugins: Path) -> None:
    write_agent(plugins, "note", "1 / 0", enabled=False, description="Adds notes")

    about = (await listed(demo_url, plugins))["note"]

    assert (about["status"], about["description"]) == ("disabled", "Adds notes")
    assert "error" not in about


@pytest.mark.parametrize(
    ("code", "kind", "where"),
    [
        ("raise RuntimeError('sesame')", "RuntimeError", "agent.py:4"),
        ("class A(BaseAgent)  # sesame", "SyntaxError", "agent.py:4"),
        ("import sesame", "ModuleNotFoundError", "agent.py:4"),
        ("raise SystemExit('sesame')", "SystemExit", "agent.py:4"),
        ("sesame = 1", "PluginLoadError", "agent.py"),
        (
            "class A(BaseAgent):\n    def setup(self):\n        {}['sesame']",
            "KeyError",
            "agent.py:6",
        ),
        (
            "class A(BaseAgent):\n    async def setup(self):\n        raise Reply('sesame')",
            "Reply",
            "6",
        ),
        ("from .helper import x", "ZeroDivisionError", "helper.py:2"),
    ],
)
async def test_a_failed_agent_says_type_file_and_line_and_not_the_text(
    demo_url: str, plugins: Path, code: str, kind: str, where: str
) -> None:
    folder = write_agent(plugins, "wrong", code)
    (folder / "helper.py").write_text("sesame = 0\nx = 1 / sesame\n")
    write_agent(plugins, "note", NOTE)

    agents = await listed(demo_url, plugins)

    assert agents["note"]["status"] == "loaded"
    assert agents["wrong"]["status"] == "failed"
    assert set(agents["wrong"]["error"]) == {"type", "where"}
    assert agents["wrong"]["error"]["type"] == kind
    assert agents["wrong"]["error"]["where"].endswith(where)


@pytest.mark.parametrize("text", ['{"sesame": 1}', '{"timeout": "sesame"}', '{"sesame"', "[1]"])
async def test_a_wrong_config_is_where_the_error_is(
    demo_url: str, plugins: Path, text: str
) -> None:
    folder = write_agent(plugins, "note", NOTE)
    (folder / "config.json").write_text(text)

    about = (await listed(demo_url, plugins))["note"]

    assert about["status"] == "failed"
    assert about["error"]["where"].startswith(str(folder / "config.json"))


async def test_a_second_agent_of_one_command_is_listed_as_failed(
    demo_url: str, plugins: Path
) -> None:
    write_agent(plugins, "note", NOTE)
    second = write_agent(plugins, "other", NOTE, command="note")

    agents = await listed(demo_url, plugins)

    assert [about["status"] for about in agents.values()] == ["loaded", "failed"]
    assert list(agents) == ["note", f"note ({second})"]


async def test_what_an_agent_did_is_counted(demo_url: str, plugins: Path) -> None:
    write_agent(plugins, "note", NOTE, arguments={"text": ""})
    write_agent(plugins, "wrong", "class A(BaseAgent):\n    def on_request(self, payload): 1 / 0")

    agents = await listed(demo_url, plugins, "/note x", "/note /wrong x", "x")

    assert agents["note"]["counts"] == {"activated": 2, "failures": 0}
    assert agents["wrong"]["counts"] == {"activated": 1, "failures": 1}
