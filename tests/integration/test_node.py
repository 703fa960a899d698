"""The Node packages `ollama` and `openai`, pointed at Ollama and at the proxy.

`node/client.mjs` runs all scenarios at one URL and prints what came of each: a value, or an error
with its class, name, status and message.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import HERE, shared

SCENARIOS = re.findall(r'^  "(.*?)":', (HERE / "node" / "client.mjs").read_text("utf-8"), re.M)
ABORTED = {"ollama": "AbortError", "openai": "ended quietly"}

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def seen(packages: Path, direct: str, proxied: str) -> tuple[Seen, Seen]:
    """What came of the scenarios: directly, and through the proxy."""
    return run(packages, direct), run(packages, proxied)


def run(folder: Path, url: str) -> Seen:
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder)}  # nobody's HTTP_PROXY
    command = ["node", "client.mjs", url]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: shared(value) for name, value in json.loads(done.stdout).items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_node_client_gets_or_raises_the_same(seen: tuple[Seen, Seen], scenario: str) -> None:
    direct, proxied = seen

    fails = "missing" in scenario or "refused" in scenario
    assert direct[scenario].get("status", 0) // 100 == 4 if fails else direct[scenario]["value"]
    assert proxied[scenario] == direct[scenario]


@pytest.mark.parametrize("package", ["ollama", "openai"])
def test_aborting_a_stream_frees_the_model(seen: tuple[Seen, Seen], package: str) -> None:
    for side in seen:
        aborted, after = side[f"{package} abort"]["value"]

        assert aborted.get("name", "ended quietly") == ABORTED[package]
        assert after == side[f"{package} chat"]["value"]
