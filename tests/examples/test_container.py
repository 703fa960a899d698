"""examples/container: the Containerfile, built by a builder and by hand, line by line."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from kernel.config import HOME, ServerConfig
from tests.support import said, turn
from tests.test_osp import Proxy, free_port, spawning

FOLDER = HOME / "examples" / "container"
FILE = FOLDER / "Containerfile"
TEXT = re.sub(r"\\\n *|^#.*\n", "", FILE.read_text(), flags=re.MULTILINE)
STEPS: list[tuple[str, str]] = re.findall(r"^([A-Z]+) (.*)", TEXT, re.MULTILINE)
FIRST = STEPS[1 : [word for word, _ in STEPS].index("FROM", 1)]  # the stage that builds
IGNORED = (FOLDER / "Containerfile.dockerignore").read_text().splitlines()
# One that the container's user can read, too: root's own lie in /root
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
IMAGE = "osp-test"


def value(word: str) -> str:
    """Return what the last such line says."""
    return [text for name, text in STEPS if name == word][-1]


USER = int(value("USER"))


def run(*command: object, **options: Any) -> str:
    words = [str(word) for word in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, capture_output=True, encoding="utf-8", timeout=250, **options
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A folder in which the first stage made `venv` and `osp`; `data` is the user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # its user must get in
        path = f"{folder}/pip/bin:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PIP_TARGET": f"{folder}/pip", "UV_PYTHON": PYTHON}
        here = folder
        for word, text in FIRST:
            *sources, target = moved(text, folder).split()
            if word == "WORKDIR":
                here = Path(target)
                here.mkdir()
            elif word == "COPY":
                for source in sources:
                    copy(HOME / source, here / target)
            else:
                assert word == "RUN"
                run("sh", "-c", moved(text, folder), cwd=here, env=env)
        (folder / "data").mkdir()
        if os.getuid() == 0:
            os.chown(folder / "data", USER, USER)
        yield folder


def moved(text: str, folder: Path) -> str:
    return re.sub(r"(?<![\w.])/(?=venv|osp|data)", f"{folder}/", text)


def copy(source: Path, target: Path) -> None:
    """Copy a file into a folder, or the contents of a folder, without what is ignored."""
    assert f"!{source.name}" in IGNORED
    if source.is_dir():
        left_out = [line.rpartition("/")[2] for line in IGNORED if "/" in line]
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left_out))
    else:
        shutil.copy(source, target)


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[tuple[Proxy, dict[str, Any]]]:
    """Start it as the second stage says; yield it, and how a process of the container starts."""
    env = dict(pair.split("=", 1) for pair in shlex.split(moved(value("ENV"), root)))
    env |= {"OSP_SERVER_PORT": str(free_port()), "PATH": env["PATH"].replace("$PATH", "/usr/bin")}
    user = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
    options: dict[str, Any] = {"cwd": root / "osp", "env": env, **user}
    start = [*json.loads(value("ENTRYPOINT")), "--demo", "0"]
    async with spawning(*start, **options) as proxy:
        yield proxy, options


async def test_it_serves_as_a_user_who_can_write_only_the_data(root: Path) -> None:
    before = listed(root / "osp")

    async with serving(root) as (proxy, options), proxy.client() as client:
        answer = await client.post("/api/chat", json=turn("hello"))
        plugins = (await client.get("/plugins")).json()["plugins"]
        check = json.loads(value("HEALTHCHECK").partition("CMD ")[2])
        healthy = await to_thread.run_sync(partial(run, *check, **options))
        status = await proxy.stop()

    assert said(answer.content) == "I am the demo model. I was sent:\n[user] hello"
    assert {each["name"]: each["error"] for each in plugins if "error" in each} == {}
    assert (healthy, status) == ('{"status": "ok"}\n', 0)
    assert listed(root / "osp") == before and "rag" in listed(root / "data")
    assert {name.split(".")[0] for name in before if "pyc" in name} >= {"osp", "chat", "relay"}


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_it_says_which_port_it_has_and_is_not_root() -> None:
    port = value("EXPOSE")

    assert port == str(ServerConfig().port)
    assert f" -p 127.0.0.1:{port}:{port} -v " in (FOLDER / "README.md").read_text()
    assert USER > 0 and f"OSP_SERVER_DATA={value('VOLUME')} " in value("ENV")


def builder() -> str:
    """Return a program that builds and has the base image; skip the test where there is none."""
    base = STEPS[0][1].split()[0]
    for program in filter(shutil.which, ("docker", "podman")):
        for command in (["image", "inspect", base], ["pull", base]):
            if subprocess.run([program, *command], capture_output=True).returncode == 0:
                return program
    pytest.skip(f"needs docker or podman, and {base}")


def test_a_builder_builds_it_and_it_runs() -> None:
    program = builder()
    faulthandler.cancel_dump_traceback_later()  # the limit of pytest: it may take minutes
    port = f"127.0.0.1:{free_port()}"
    run(program, "build", "-t", IMAGE, "-f", FILE, HOME)
    try:
        run(program, "run", "-d", "--name", IMAGE, "-p", f"{port}:11435", IMAGE, "--demo")
        retry = "curl -s --retry 9 --retry-connrefused --retry-all-errors"
        assert '"status":"ok"' in run(*retry.split(), f"http://{port}/health")
        assert "ok" in run(
            program, "exec", IMAGE, *json.loads(value("HEALTHCHECK").split("CMD")[1])
        )
        run(program, "stop", IMAGE)
        state = run(program, "inspect", "-f", "{{.State.ExitCode}} {{.Config.User}}", IMAGE)
        assert state.split() == ["0", value("USER")]
    finally:
        subprocess.run([program, "rm", "-f", IMAGE], capture_output=True)
        subprocess.run([program, "rmi", "-f", IMAGE], capture_output=True)
