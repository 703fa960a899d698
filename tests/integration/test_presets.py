"""Presets, a guard, a reply and /explain, as real clients and a real Ollama see them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from tests.integration.conftest import ROOT, START, proxy, run_ollama, set_apart, stop, tokens_read
from tests.support import write_agent

AGENT = "class A(BaseAgent):\n    async def {}:\n        {}\n"
AGENTS = {
    "note": AGENT.format("on_request(self, payload)", "return add_system(payload, 'note')"),
    "sign": AGENT.format("on_end(self)", "return ' -- signed'"),
    "canned": AGENT.format("on_request(self, payload)", "raise Reply('From a can, as it were.')"),
    "watch": AGENT.format("on_request(self, payload)", "return payload"),
}
SETTINGS = """
plugins.dirs = ["plugins"]
agents.watch = { always = true, on_error = "abort", models = ["guarded"] }
presets.canned = { model = "tiny", agents = "/canned" }
presets.guarded = { model = "tiny" }
presets.gone = { model = "not-there" }

[presets.signed]
model = "tiny"
agents = "/note /sign"

[presets.briefed]
model = "tiny-tools"
system = "the quick brown fox jumps over the lazy dog and the dog does not mind at all"
options = { num_ctx = 512, num_predict = 4, temperature = 0, seed = 7 }

[presets.twin]
model = "tiny-tools"
options = { num_ctx = 512, num_predict = 4, temperature = 0, seed = 7 }

[presets.stays]
model = "tiny"
think = false
keep_alive = "2h"
options = { num_ctx = 256, num_predict = 4 }
"""
MOST = 2000  # bytes that a preset takes at Ollama
HELLO = [{"role": "user", "content": "hello"}]
ENDPOINTS: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"messages": HELLO}),
    ("/api/generate", {"prompt": "hello"}),
    ("/v1/chat/completions", {"messages": HELLO}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@pytest.fixture(scope="module")
def presets(direct: str, home: Path, folder: Path) -> Iterator[str]:
    """The URL of a proxy that has made its presets; with a guard and agents of its own."""
    for name, code in AGENTS.items():
        write_agent(folder / "plugins", name, code)
    with proxy(folder, direct, SETTINGS) as (url, _):
        names = "signed canned guarded briefed twin stays".split()
        set_apart(direct, home / "models", *(f"{name}:latest" for name in names))
        yield url


def run(binary: str, home: Path, url: str, *arguments: str) -> list[str]:
    """Return the lines that a command prints, in any order: parameters have none."""
    done = run_ollama(binary, home, url, *arguments)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_a_preset_is_a_model_to_ollamas_own_command(
    binary: str, home: Path, folder: Path, presets: str, direct: str
) -> None:
    listed = {line.split()[0] for line in run(binary, home, presets, "list")}

    assert {"signed:latest", "briefed:latest", "tiny:latest"} <= listed
    assert run(binary, home, presets, "show", "signed") == run(binary, home, direct, "show", "tiny")
    [answer] = filter(None, run(binary, home, presets, "run", "briefed", "hello"))
    assert len(answer.split()) == 4  # num_predict, by /api/generate
    assert "gone:latest" not in listed
    log = (folder / "osp.log").read_text(encoding="utf-8")
    assert log.count("Ollama has no not-there: type `ollama pull not-there`") == 1


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_the_system_text_holds_in_each_endpoint(
    presets: str, http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    asked = [{**body, "model": model, "stream": False} for model in ("briefed", "twin")]

    briefed, twin = [tokens_read(http.post(presets + path, json=each)) for each in asked]

    assert briefed > twin + 9 and twin


def test_presets_with_equal_options_share_one_runner_in_every_endpoint(
    presets: str, http: httpx.Client, home: Path
) -> None:
    """What `num_ctx` says holds under /v1, too: nothing starts a runner with another size."""
    for path, body in ENDPOINTS:
        for model in ("briefed", "twin", "briefed"):
            asked = {**body, "model": model, "stream": False}
            http.post(presets + path, json=asked).raise_for_status()

    assert (home / "ollama.log").read_text(encoding="utf-8").count("--ctx-size 512") == 1


@pytest.mark.parametrize(("preset", "base"), [("briefed", "tiny-tools"), ("signed", "tiny")])
def test_a_preset_takes_no_copy_of_the_weights(
    presets: str, home: Path, preset: str, base: str
) -> None:
    files = [next((home / "models").glob(f"manifests/**/{name}/latest")) for name in (preset, base)]
    own, kept = [json.loads(file.read_bytes()) for file in files]
    shared = [layer["digest"] for layer in kept["layers"]]
    new = [layer for layer in [own["config"], *own["layers"]] if layer["digest"] not in shared]

    assert sum(layer["size"] for layer in new) + files[0].stat().st_size < MOST
    assert max(layer["size"] for layer in own["layers"]) > 100 * MOST


def test_lists_and_details_have_a_preset_like_any_model(presets: str, http: httpx.Client) -> None:
    shown = http.post(f"{presets}/api/show", json={"model": "briefed"}).json()
    details = http.get(f"{presets}/v1/models/briefed").json()
    listed = [model["name"] for model in http.get(f"{presets}/api/tags").json()["models"]]

    assert shown["system"].startswith("the quick brown fox")
    assert "num_ctx 512" in " ".join(shown["parameters"].split())
    assert details["id"] == "briefed" and "briefed:latest" in listed


def test_a_model_stays_for_as_long_as_its_preset_says(presets: str, http: httpx.Client) -> None:
    """Once a load or a chat said it, Ollama keeps to it after what cannot say it."""
    asked = {"model": "stays", "messages": HELLO, "stream": False}
    path = f"{presets}/api/chat"
    for url, body in (
        (path, {"model": "stays"}),
        (f"{presets}/v1/chat/completions", asked),
        (f"{presets}/api/generate", {"model": "stays", "prompt": "hello", "stream": False}),
        (path, asked),
    ):
        http.post(url, json=body).raise_for_status()
        loaded = http.get(f"{presets}/api/ps").json()["models"]
        [until] = [m["expires_at"] for m in loaded if m["name"] == "stays:latest"]
        left = datetime.fromisoformat(until) - datetime.now(UTC)
        assert timedelta(hours=1, minutes=55) < left <= timedelta(hours=2)
    gone = http.post(path, json={"model": "stays", "keep_alive": 0}).json()
    assert gone["done_reason"] == "unload"


LIFE = """
[presets.life]
model = "life-base"
system = "Be brief."
options = {{ num_ctx = {num_ctx} }}
[presets.life-{number}]
model = "life-base"
"""


def made_anew(folder: Path, upstream: str, number: int, num_ctx: int) -> int:
    """Start the proxy, and return how many models it asked for; the last of them is a new one."""
    settings = LIFE.format(number=number, num_ctx=num_ctx)
    with proxy(folder, upstream, settings) as (_, process):
        end, made = time.monotonic() + START, ""
        while f'"life-{number}"' not in made:
            assert time.monotonic() < end, made
            time.sleep(0.02)  # between two looks; nothing tells us when a file changes
            made = (folder / "osp.log").read_text(encoding="utf-8")
        assert stop(process) == 0
    assert "preset not made" not in made
    return made.count("preset made")


def test_presets_last_and_follow_their_settings_and_their_model_until_they_are_removed(
    direct: str, home: Path, http: httpx.Client, tmp_path: Path
) -> None:
    asked, log = '"/api/create"', home / "ollama.log"
    before = log.read_text(encoding="utf-8").count(asked)
    body = {"model": "life-base", "from": "tiny", "stream": False}
    http.post(f"{direct}/api/create", json=body).raise_for_status()

    counts = [made_anew(tmp_path, direct, *start) for start in ((1, 512), (2, 512), (3, 256))]
    http.post(f"{direct}/api/create", json=body | {"system": "x"}).raise_for_status()
    counts += [made_anew(tmp_path, direct, 4, 256), made_anew(tmp_path, direct, 5, 256)]

    assert counts == [2, 1, 2, 2, 1]
    assert log.read_text(encoding="utf-8").count(asked) - before == sum(counts) + 2
    shown = http.post(f"{direct}/api/show", json={"model": "life"}).json()
    assert shown["parameters"].split("num_ctx")[1].split()[0] == "256"
    prune = [sys.executable, str(ROOT / "osp.py"), "--config", str(tmp_path / "osp.toml")]
    prune += ["--upstream", direct, "presets", "--prune", "--yes"]
    (tmp_path / "osp.toml").write_text("", encoding="utf-8")
    done = subprocess.run(prune, capture_output=True, timeout=30, check=True)
    assert done.stdout.count(b"no longer in the settings") == 6
    names = {m["name"] for m in http.get(f"{direct}/api/tags").json()["models"]}
    assert {name for name in names if name.startswith("life")} == {"life-base:latest"}


@pytest.mark.parametrize("stream", [False, True])
def test_both_clients_get_a_presets_agents(presets: str, stream: bool) -> None:
    texts: dict[str, list[str]] = {"signed": [], "canned": []}
    with (
        ollama.Client(presets) as native,
        openai.OpenAI(base_url=f"{presets}/v1", api_key="x") as other,
    ):
        for model, got in texts.items():
            answer: Any = native.chat(model, HELLO, stream=stream)
            parts = list(answer) if stream else [answer]
            got.append("".join(part.message.content for part in parts))
            create: Any = other.chat.completions.create
            answer = create(model=model, messages=HELLO, stream=stream)
            choices = [part.choices[0] for part in (answer if stream else [answer])]
            said = [choice.delta if stream else choice.message for choice in choices]
            got.append("".join(part.content or "" for part in said))
        assert "signed:latest" in [model.id for model in other.models.list()]
        assert other.models.retrieve("signed").id

    assert all(text.endswith(" -- signed") for text in texts["signed"])
    assert texts["canned"] == ["From a can, as it were."] * 2


def test_explain_asks_no_model(presets: str) -> None:
    question = [{"role": "user", "content": "/explain /note&/watch /sign hello"}]

    with ollama.Client(presets) as client:
        answer = client.chat("tiny", question).message.content or ""

    assert "/note (ok" in answer and "+ [system] note" in answer
    sent = answer.partition("would have been sent:\n")[2]
    assert sent.startswith('[system] note\n[user] hello\nmodel: "tiny"\nstream: false')


def test_a_guard_refuses_what_it_cannot_see_for_its_models_alone(
    presets: str, http: httpx.Client
) -> None:
    body = {"model": "guarded", "prompt": "hello", "stream": False}

    refused = http.post(f"{presets}/api/generate", json=body)
    passed = http.post(f"{presets}/api/generate", json=body | {"model": "tiny"})
    loaded = http.post(f"{presets}/api/generate", json={"model": "guarded"})

    assert (refused.status_code, passed.status_code, loaded.status_code) == (403, 200, 200)
    assert "watch" in refused.json()["error"]
    with openai.OpenAI(base_url=f"{presets}/v1", api_key="x") as client:
        with pytest.raises(openai.PermissionDeniedError, match="watch"):
            client.completions.create(model="library/GUARDED:latest", prompt="x")
