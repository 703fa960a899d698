"""Presets on a real Ollama: models whose options and system text hold wherever they are asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import ROOT, free_port, running, wait_for, wait_for_models

PRESETS = """
[presets.briefed]
model = "tiny-tools"
system = "the quick brown fox jumps over the lazy dog and the dog does not mind at all"
options = { num_ctx = 512, num_predict = 4, temperature = 0, seed = 7 }

[presets.twin]
model = "tiny-tools"
options = { num_ctx = 512, num_predict = 4, temperature = 0, seed = 7 }

[presets.gone]
model = "not-there"
"""
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "stream": False}
ENDPOINTS = [
    ("/api/chat", HELLO, ["prompt_eval_count"]),
    ("/api/generate", {"prompt": "hello", "stream": False}, ["prompt_eval_count"]),
    ("/v1/chat/completions", HELLO, ["usage", "prompt_tokens"]),
]


@pytest.fixture(scope="module")
def proxy(direct: str, home: Path) -> Iterator[str]:
    """The URL of a proxy that has made its presets."""
    settings, port = home / "presets.toml", free_port()
    settings.write_text(PRESETS, encoding="utf-8")
    flags = ["--config", str(settings), "--port", str(port), "--upstream", direct]
    environ = {"OSP_SERVER_DATA": str(home / "presets")}
    command = [sys.executable, str(ROOT / "osp.py"), *flags]
    with running(command, home, environ, home / "presets.log") as process:
        wait_for(f"http://127.0.0.1:{port}", process, home / "presets.log")
        wait_for_models(direct, home, "briefed:latest", "twin:latest")
        yield f"http://127.0.0.1:{port}"


def test_a_preset_is_a_model_with_its_own_settings(
    proxy: str, http: httpx.Client, home: Path, binary: str
) -> None:
    shown = http.post(f"{proxy}/api/show", json={"model": "briefed"}).json()
    listed = [model["id"] for model in http.get(f"{proxy}/v1/models").json()["data"]]
    command = [binary, "run", "briefed", "hello"]
    environ = {"HOME": str(home), "OLLAMA_HOST": proxy}
    run = subprocess.run(command, env=environ, capture_output=True, timeout=30, check=True)

    assert shown["system"].startswith("the quick") and "num_ctx" in shown["parameters"]
    assert {"briefed:latest", "twin:latest"} <= {*listed} and "gone:latest" not in listed
    assert len(run.stdout.split()) == 4  # num_predict
    [complaint] = [
        line
        for line in (home / "presets.log").read_text(encoding="utf-8").splitlines()
        if "preset not made" in line
    ]
    assert json.loads(complaint)["error"] == "Ollama has no not-there: type `ollama pull not-there`"


@pytest.mark.parametrize(("path", "body", "keys"), ENDPOINTS)
def test_the_system_text_and_the_options_hold_in_each_endpoint(
    proxy: str, http: httpx.Client, path: str, body: dict[str, Any], keys: list[str]
) -> None:
    read = []
    for model in ("briefed", "twin"):
        count = http.post(proxy + path, json=body | {"model": model}).json()
        for key in keys:
            count = count[key]
        read.append(count)

    assert read[0] > read[1] + 9


def test_presets_with_equal_options_share_one_runner(
    proxy: str, http: httpx.Client, home: Path
) -> None:
    for model in ("briefed", "twin", "briefed"):
        http.post(f"{proxy}/api/chat", json=HELLO | {"model": model}).raise_for_status()

    log = (home / "ollama.log").read_text(encoding="utf-8")
    assert log.count("--ctx-size 512") == 1
