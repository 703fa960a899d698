"""The README tells the truth: its commands and snippets are run as they stand."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kernel.config import Config, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
INSTALL, UV, ASK, REAL, OLLAMA_RUN, TEST = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
(SAID,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
TABLES = re.findall(r"```toml\n(.*?)```", README + GUIDE, re.DOTALL)
(AGENT,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
URL = "http://127.0.0.1:11435"
KEYS = {"OSP_KEY_LAPTOP": "laptop-1", "OSP_KEY_KIDS": "kids-0001"}
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "data", "build")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "osp"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    return folder


@contextmanager
def shell(command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a line as a user pastes it, and stop all that it started."""
    with subprocess.Popen(["bash", "-c", command], cwd=folder, start_new_session=True) as process:
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def answers(path: str, process: subprocess.Popen[bytes]) -> str:
    """Wait until the proxy answers, or has failed to start."""
    deadline = time.monotonic() + 180  # it installs itself first
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(URL + path, timeout=5) as answer:
                return str(answer.read(), "utf-8")
        except urllib.error.HTTPError as exc:
            return str(exc.read(), "utf-8")
        except OSError:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
    raise AssertionError(f"nothing answers at {URL}{path}")


def run(command: str, folder: Path) -> str:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_the_first_commands_install_it_and_chat_with_an_agent(clone: Path) -> None:
    with shell(INSTALL, clone) as process:
        assert '"status":"ok"' in answers("/health", process)
        assert run(ASK, clone) == SAID


@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv")
def test_uv_runs_it_as_it_is(clone: Path) -> None:
    with shell(UV, clone) as process:
        assert '"status":"ok"' in answers("/health", process)


@pytest.mark.parametrize("toml", TABLES, ids=range(len(TABLES)))
def test_every_piece_of_osp_toml_is_one_that_counts(tmp_path: Path, toml: str) -> None:
    (tmp_path / "osp.toml").write_text(toml, encoding="utf-8")

    config = load(tmp_path / "osp.toml", KEYS, {})

    assert config.agents or config.presets or config.keys


def test_the_first_agent_is_ten_lines_that_work(clone: Path) -> None:
    folder = clone / "plugins" / "shout_agent"
    folder.mkdir(exist_ok=True)
    (folder / "agent.py").write_text(AGENT, encoding="utf-8")
    ask = ASK.replace("/rag:k=1 what did we decide in May?", "/shout hello")

    with shell(INSTALL, clone) as process:
        answers("/health", process)
        assert run(ask, clone) == '"content":"I AM THE DEMO MODEL. I WAS SENT:\\n[USER] HELLO\n'

    assert len(AGENT.strip().splitlines()) <= 10


def test_without_the_demo_it_serves_before_the_usual_port_of_ollama(clone: Path) -> None:
    with shell(REAL, clone) as process:
        assert '"url":"http://127.0.0.1:11434"' in answers("/health", process)

    # tests/integration/test_command_line.py types at it, a space before the slash
    assert OLLAMA_RUN == "OLLAMA_HOST=127.0.0.1:11435 ollama run llama3.2\n"


def test_the_command_that_tests_it_is_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    assert TEST.strip().endswith("-m pytest")
    assert "README.md" in ci


def test_every_setting_stands_in_the_table_with_its_default() -> None:
    table = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", README, re.MULTILINE))
    wrong = []
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        for spec in dataclasses.fields(values) if dataclasses.is_dataclass(values) else ():
            default = getattr(values, spec.name)
            said = table.get(f"{section.name}.{spec.name}", "missing").strip()
            if said.strip("`") not in spellings(default):
                wrong.append((section.name, spec.name, said))

    assert wrong == []


def spellings(default: object) -> list[str]:
    if isinstance(default, tuple):
        return ["none", "all"] if not default else [Path(default[0]).name]
    text = default.name if isinstance(default, Path) else str(default)
    return [text, text.lower()]
