"""Presets, guards, replies and /explain, as real clients and a real Ollama see them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import ollama
import openai
import pytest

from tests.integration.conftest import ROOT, free_port, running, stop, wait_for, wait_for_models
from tests.support import write_agent

AGENTS = {
    "note": """
        class Note(BaseAgent):
            async def on_request(self, payload):
                return add_system(payload, "note")
        """,
    "sign": """
        class Sign(BaseAgent):
            async def on_end(self):
                return " -- signed"
        """,
    "canned": """
        class Canned(BaseAgent):
            async def on_request(self, payload):
                raise Reply("From a can, as it were.")
        """,
    "watch": """
        class Watch(BaseAgent):
            async def on_request(self, payload):
                return payload
        """,
}
SETTINGS = """
[plugins]
dirs = ["plugins"]

[presets."tiny-signed"]
model = "tiny"
agents = "/note /sign"

[presets.canned]
model = "tiny"
agents = "/canned"

[agents.watch]
always = true
on_error = "abort"
models = ["tiny-tools"]
"""


@pytest.fixture(scope="module")
def configured(direct: str, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a proxy with presets, a guard, and agents of its own."""
    folder = tmp_path_factory.mktemp("configured")
    for name, code in AGENTS.items():
        write_agent(folder / "plugins", name, code)
    (folder / "osp.toml").write_text(SETTINGS, encoding="utf-8")
    port = str(free_port())
    flags = ["--config", str(folder / "osp.toml"), "--port", port, "--upstream", direct]
    command = [sys.executable, str(ROOT / "osp.py"), *flags]
    environ = {"OSP_SERVER_DATA": str(folder / "data")}
    with running(command, folder, environ, folder / "osp.log") as process:
        wait_for(f"http://127.0.0.1:{port}", process, folder / "osp.log")
        wait_for_models(direct, home, "tiny-signed:latest", "canned:latest")
        yield f"http://127.0.0.1:{port}"
        assert stop(process) == 0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes the clients of a test."""
    with ExitStack() as clients:
        yield clients


def run(binary: str, home: Path, url: str, *arguments: str) -> str:
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "OLLAMA_HOST": url}
    done = subprocess.run([binary, *arguments], env=environ, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout.decode())


def test_a_preset_is_a_model_to_ollamas_own_command(
    binary: str, home: Path, configured: str, direct: str
) -> None:
    listed = run(binary, home, configured, "list")
    shown = run(binary, home, configured, "show", "tiny-signed")
    said = run(binary, home, configured, "run", "tiny-signed", "hello")  # by /api/generate

    assert re.search(r"(?m)^tiny-signed:latest\s", listed) and re.search(
        r"(?m)^tiny:latest\s", listed
    )
    expected = run(binary, home, direct, "show", "tiny")
    assert sorted(shown.splitlines()) == sorted(expected.splitlines())  # parameters in any order
    assert said == run(binary, home, direct, "run", "tiny", "hello")


@pytest.mark.parametrize("stream", [False, True])
def test_a_preset_is_a_model_to_openais_client(
    configured: str, stack: ExitStack, stream: bool
) -> None:
    client = stack.enter_context(openai.OpenAI(base_url=f"{configured}/v1", api_key="x"))
    names = [model.id for model in client.models.list()]

    assert "tiny-signed:latest" in names
    assert client.models.retrieve("tiny-signed").id
    if stream:
        chunks = client.chat.completions.create(
            model="tiny-signed", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        whole = client.chat.completions.create(
            model="tiny-signed", messages=[{"role": "user", "content": "hello"}]
        )
        text = whole.choices[0].message.content or ""
    assert text.endswith("-- signed")


def test_generate_knows_presets(configured: str, direct: str, stack: ExitStack) -> None:
    options = {"temperature": 0, "seed": 7, "num_predict": 8}
    preset, model = (
        stack.enter_context(ollama.Client(url)).generate(name, "hello", options=options).response
        for url, name in ((configured, "tiny-signed"), (direct, "tiny"))
    )

    assert preset == model


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_an_answer_to_both_clients(
    configured: str, stack: ExitStack, stream: bool
) -> None:
    text = "From a can, as it were."
    mine = stack.enter_context(ollama.Client(configured))
    theirs = stack.enter_context(openai.OpenAI(base_url=f"{configured}/v1", api_key="x"))
    if stream:
        one = [
            part.message.content or ""
            for part in mine.chat("canned", [{"role": "user", "content": "x"}], stream=True)
        ]
        other = [
            chunk.choices[0].delta.content or ""
            for chunk in theirs.chat.completions.create(
                model="canned", messages=[{"role": "user", "content": "x"}], stream=True
            )
        ]
        assert "".join(one) == "".join(other) == text
        assert len(one) > 3  # word by word
    else:
        whole = theirs.chat.completions.create(
            model="canned", messages=[{"role": "user", "content": "x"}]
        )
        assert whole.choices[0].message.content == text
        assert mine.chat("canned", [{"role": "user", "content": "x"}]).message.content == text


def test_explain_asks_no_model(configured: str, stack: ExitStack) -> None:
    question = [{"role": "user", "content": "/explain /note&/watch /sign hello"}]

    client = stack.enter_context(ollama.Client(configured))
    answer = client.chat("tiny", question).message.content or ""

    assert "/note (ok" in answer and "+ [system] note" in answer
    sent = answer.partition("would have been sent:\n")[2]
    assert sent.startswith('[system] note\n[user] hello\nmodel: "tiny"\nstream: false')


def test_a_guard_refuses_what_it_cannot_see_for_its_models_alone(
    configured: str, http: httpx.Client, stack: ExitStack
) -> None:
    body = {"model": "tiny-tools", "prompt": "hello", "stream": False}

    refused = http.post(f"{configured}/api/generate", json=body)
    passed = http.post(f"{configured}/api/generate", json=body | {"model": "tiny"})
    loaded = http.post(f"{configured}/api/generate", json={"model": "tiny-tools"})

    assert (refused.status_code, passed.status_code, loaded.status_code) == (403, 200, 200)
    assert "watch" in refused.json()["error"]
    client = stack.enter_context(openai.OpenAI(base_url=f"{configured}/v1", api_key="x"))
    with pytest.raises(openai.PermissionDeniedError, match="watch"):
        client.completions.create(model="library/TINY-tools:latest", prompt="x")
