"""The Node packages `ollama` and `openai`, pointed at Ollama and at the proxy.

`node/client.mjs` runs all scenarios at one URL and prints what came of each: a value, or an error
with its class, name, status and message.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0  # seconds
OWN = {"created", "created_at", "modified_at", "expires_at", "id"}  # beside durations
VALUES = ["chat", "chat streamed", "generate", "generate streamed", "embed", "embeddings", "list"]
VALUES += ["show", "tools", "tools streamed", "abort"]
SCENARIOS = [f"ollama {name}" for name in VALUES]
SCENARIOS += [
    f"openai {name}" for name in ("chat", "chat streamed", "models", "embeddings", "abort")
]
ERRORS = {
    "ollama missing": ("ResponseError", 404),
    "ollama missing streamed": ("ResponseError", 404),
    "ollama missing embed": ("ResponseError", 404),
    "ollama tools refused": ("ResponseError", 400),
    "openai missing": ("NotFoundError", 404),
    "openai missing streamed": ("NotFoundError", 404),
    "openai missing model": ("NotFoundError", 404),
}

ABORTED = {"ollama": "AbortError", "openai": "ended quietly"}

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script in a folder of its own, its packages beside it; skips where that cannot be."""
    if not (shutil.which("node") and (npm := shutil.which("npm"))):
        pytest.skip("no node and npm on the PATH")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(Path(__file__).parent / "node", folder, dirs_exist_ok=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install has not ended after {PATIENCE:.0f} s")
    if done.returncode:
        pytest.skip(f"npm install failed: {done.stderr.strip() or done.returncode}")
    return folder / "client.mjs"


@pytest.fixture(scope="session")
def seen(client: Path, direct: str, proxied: str) -> tuple[Seen, Seen]:
    """What came of the scenarios: directly, and through the proxy."""
    return run(client, direct), run(client, proxied)


def run(client: Path, url: str) -> Seen:
    # Nobody's HTTP_PROXY, and no NODE_OPTIONS.
    environ = {"PATH": os.environ["PATH"], "HOME": str(client.parent)}
    done = subprocess.run(
        ["node", client.name, url],
        cwd=client.parent,
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return {name: shared(value) for name, value in json.loads(done.stdout).items()}


def shared(value: Any) -> Any:
    """Return a value without what no two answers share."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in OWN and not k.endswith("_duration")}
        return {k: shared(v) for k, v in kept.items()}
    return [shared(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_node_client_gets_the_same(seen: tuple[Seen, Seen], scenario: str) -> None:
    direct, proxied = seen

    assert direct[scenario]["value"]
    assert proxied[scenario] == direct[scenario]


@pytest.mark.parametrize("scenario", ERRORS)
def test_a_node_client_raises_the_same(seen: tuple[Seen, Seen], scenario: str) -> None:
    direct, proxied = seen

    assert (direct[scenario]["class"], direct[scenario]["status"]) == ERRORS[scenario]
    assert proxied[scenario] == direct[scenario]


@pytest.mark.parametrize("package", ["ollama", "openai"])
def test_aborting_a_stream_frees_the_model(seen: tuple[Seen, Seen], package: str) -> None:
    for side in seen:
        aborted, after = side[f"{package} abort"]["value"]

        assert aborted.get("name", "ended quietly") == ABORTED[package]
        assert after == side[f"{package} chat"]["value"]
