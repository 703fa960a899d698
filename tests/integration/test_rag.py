"""The agent rag with a real embedding model: a proxy of its own, over a folder of its own."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import ROOT, free_port, running, wait_for
from tests.support import said

PATHS = ["/api/chat", "/v1/chat/completions"]
NOTES = {
    "water.md": "# Water\n\nThe river comes down from the hill and goes to the sea.",
    "night.txt": "Last night the old dog was at the door of the house.",
    "work.html": "<h1>Work</h1><p>We work five days and take our time at home.</p>",
}


@dataclass
class Searching:
    """A proxy with the agent, and what it keeps."""

    url: str
    process: subprocess.Popen[bytes]
    home: Path

    def ask(self, http: httpx.Client, text: str, path: str = "/api/chat", **fields: Any) -> str:
        options = {"temperature": 0, "seed": 7, "num_predict": 8, "num_ctx": 4096}
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
        answer = http.post(self.url + path, json={**body, "options": options, "max_tokens": 8})
        assert answer.status_code == 200 and "rag;ok" in answer.headers["x-osp-agents"]
        return said(answer.content)

    def progress(self, http: httpx.Client) -> str:
        listed = http.get(f"{self.url}/plugins").json()["plugins"]
        return str(next(plugin["progress"] for plugin in listed if plugin["name"] == "rag"))

    def rows(self, query: str) -> list[Any]:
        """Return the rows of every index there is, each belongs to one set of settings."""
        found: list[Any] = []
        for file in (self.home / "data/rag").glob("index-*.db"):
            with closing(sqlite3.connect(file)) as db:
                found += db.execute(query).fetchall()
        return found


@contextmanager
def searching(direct: str, home: Path, model: str) -> Iterator[Searching]:
    """Run a proxy whose operator named an embedding model, over the folder `notes` in `home`."""
    (home / "notes").mkdir(exist_ok=True)
    for name, text in NOTES.items():
        if not (home / "notes" / name).exists():  # or they would have changed
            (home / "notes" / name).write_text(text, encoding="utf-8")
    settings = {"folder": str(home / "notes"), "embed_model": model, "wait": 20.0}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (home / "osp.toml").write_text(f"[agents.rag.settings]\n{lines}", encoding="utf-8")
    port = str(free_port())
    flags = ["--config", str(home / "osp.toml"), "--port", port, "--upstream", direct]
    command = [sys.executable, str(ROOT / "osp.py"), *flags]
    with running(command, home, {"OSP_SERVER_DATA": str(home / "data")}, home / "log") as process:
        wait_for(f"http://127.0.0.1:{port}", process, home / "log")
        yield Searching(f"http://127.0.0.1:{port}", process, home)


@pytest.fixture(scope="module")
def proxy(direct: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searching]:
    with searching(direct, tmp_path_factory.mktemp("rag"), "tiny-embed") as found:
        yield found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_passage_is_found_with_vectors_of_a_real_model(
    http: httpx.Client, proxy: Searching, path: str, stream: bool
) -> None:
    text = proxy.ask(http, "/rag:k=1 where does the river go?", path, stream=stream)

    assert "\n\nSources:\n- water.md, Water <file://" in text
    assert proxy.progress(http) == "3 files, 3 passages; 3 of 3 passages have vectors"
    assert proxy.rows("SELECT length(vector), count(*) FROM vectors") == [(4 * 64, 3)]


def test_where_no_word_is_the_same_the_vectors_find_something(
    http: httpx.Client, proxy: Searching
) -> None:
    assert "Sources:" in proxy.ask(http, "/rag quokka", stream=False)


def test_in_a_chain_the_model_is_asked_for_vectors_and_for_the_translation(
    http: httpx.Client, proxy: Searching
) -> None:
    text = proxy.ask(http, "/rag:k=1 /translate:de who was at the door?", stream=False)

    assert "\n\nSources:\n- night.txt <file://" in text


def test_an_embedding_model_that_is_not_there_costs_nothing_but_meaning(
    http: httpx.Client, direct: str, tmp_path: Path
) -> None:
    with searching(direct, tmp_path, "no-such-model") as proxy:
        text = proxy.ask(http, "/rag where does the river go?", stream=False)

        assert "\n\nSources:\n- water.md, Water <file://" in text
        assert "passages get no vectors, the log says why" in proxy.progress(http)


def test_after_a_kill_another_model_has_an_index_of_its_own(
    http: httpx.Client, direct: str, tmp_path: Path
) -> None:
    with searching(direct, tmp_path, "tiny-embed") as proxy:
        proxy.ask(http, "/rag:k=1 where does the river go?", stream=False)
        proxy.process.kill()
    with searching(direct, tmp_path, "tiny-embed:latest") as proxy:
        text = proxy.ask(http, "/rag:k=1 who was at the door?", stream=False)

        assert "\n\nSources:\n- night.txt <file://" in text
        assert proxy.rows("SELECT count(*) FROM vectors") == [(3,), (3,)]
