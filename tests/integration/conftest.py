"""A real Ollama with two tiny models, and the proxy as a real process before it.

`direct` is the URL of the one, `proxied` that of the other: what is asked at both must come out
the same. Without an `ollama` binary the whole folder is skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from tests.test_osp import free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START = 60.0  # seconds that a process has until it answers
STOP = 10.0  # and until it has ended
INSTALL = 50.0  # seconds for packages: a test that takes a minute ends all

# Short answers, the same each time, also for clients that cannot ask for them.
PARAMETERS = {"temperature": 0, "seed": 7, "num_predict": 20}
TOOLS = (
    "{{ range .Tools }}{{ .Function.Name }} {{ end }}{{ range .Messages }}{{ .Content }} {{ end }}"
)
CODING = {  # clients that one types, by the packages that bring them
    "claude": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "cn": "@continuedev/cli",
}
OWN = {"created", "created_at", "expires_at"}  # beside durations and the number of an answer
CHATS = ["/api/chat", "/v1/chat/completions"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny.gguf", {"parameters": PARAMETERS}),
    "tiny-tools": ("tiny.gguf", {"template": TOOLS}),  # no parameters: show gives them at random
    "tiny-embed": ("tiny-embed.gguf", {}),
}


@pytest.fixture(scope="session")
def binary() -> str:
    """The `ollama` to run; skips the test where there is none."""
    places = [os.environ["PATH"], str(Path.home() / "go" / "bin")]
    if found := shutil.which("ollama", path=os.pathsep.join(places)):
        return found
    pytest.skip("no ollama on the PATH or in ~/go/bin")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of the server and of every command, so that nobody's own is touched."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def direct(binary: str, home: Path) -> Iterator[str]:
    """The URL of Ollama, which has the models and does one thing at a time."""
    address = f"127.0.0.1:{free_port()}"
    environ = {"OLLAMA_HOST": address, "OLLAMA_MODELS": str(home / "models")}
    environ["OLLAMA_NUM_PARALLEL"] = "1"
    with running([binary, "serve"], home, environ, home / "ollama.log") as process:
        wait_for(f"http://{address}", process, home / "ollama.log")
        create_models(f"http://{address}")
        set_apart(f"http://{address}", home / "models")
        yield f"http://{address}"


@pytest.fixture(scope="session")
def proxied(direct: str, home: Path) -> Iterator[str]:
    """The URL of the proxy as it comes, which must end cleanly on SIGTERM."""
    with proxy(home, direct) as (url, process):
        yield url
        assert stop(process) == 0, (home / "osp.log").read_text(encoding="utf-8")


@contextmanager
def proxy(
    home: Path, upstream: str, settings: str = "", **environ: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the proxy as one types it, with this osp.toml; give its URL and its process."""
    (home / "osp.toml").write_text(settings, encoding="utf-8")
    address, log = f"127.0.0.1:{free_port()}", home / "osp.log"
    flags = ["--config", str(home / "osp.toml"), "--port", address.rpartition(":")[2]]
    command = [sys.executable, str(ROOT / "osp.py"), *flags, "--upstream", upstream]
    environ |= {"OSP_SERVER_DATA": str(home / "data")}
    with running(command, home, environ, log) as process:
        wait_for(f"http://{address}", process, log)
        yield f"http://{address}", process


def environment(home: Path, url: str) -> dict[str, str]:
    """Return what the command `ollama` needs to talk to a server, and nothing of the user's."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "OLLAMA_HOST": url, "TERM": "xterm"}


def run_ollama(
    binary: str, home: Path, url: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run the command `ollama` in `home`, until it ends."""
    return subprocess.run(
        [binary, *arguments],
        cwd=home,
        env=environment(home, url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


@contextmanager
def running(
    command: Sequence[str], home: Path, environ: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends, whatever happens in it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], "HOME": str(home), **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        stop(process)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while process.poll() is None and time.monotonic() < end:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/api/version", trust_env=False).status_code < 500:
                return  # 401 where keys are set
        time.sleep(0.02)  # between two looks; nothing tells us when a port opens
    pytest.fail(f"{process.args!r} does not answer:\n{log.read_text(encoding='utf-8')}")


def set_apart(url: str, models: Path, *names: str) -> None:
    """Wait until Ollama lists `names`, and give each model a second of its own.

    Lists are sorted by that, and those of one second by chance.
    """
    end = time.monotonic() + START
    while not {*names} <= {m["name"] for m in httpx.get(f"{url}/api/tags").json()["models"]}:
        assert time.monotonic() < end, f"Ollama does not list {names}"
        time.sleep(0.02)  # between two looks; nothing tells us when a list changes
    manifests = [path for path in models.glob("manifests/**/*") if path.is_file()]
    for number, path in enumerate(sorted(manifests)):
        os.utime(path, (number * 60, number * 60))


def stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def create_models(url: str) -> None:
    with httpx.Client(base_url=url, timeout=START, trust_env=False) as client:
        for model, (file, fields) in MODELS.items():
            data = (HERE / file).read_bytes()
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            client.post(f"/api/blobs/{digest}", content=data).raise_for_status()
            body = {"model": model, "files": {file: digest}, "stream": False, **fields}
            client.post("/api/create", json=body).raise_for_status()


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """A client that follows nothing and takes no proxy from the environment."""
    with httpx.Client(timeout=30, trust_env=False) as client:
        yield client


def body(text: str, tokens: int = 12, **fields: Any) -> dict[str, Any]:
    """Return a chat that both dialects understand, with the same answer each time."""
    options = {"temperature": 0, "seed": 7, "num_predict": tokens, "num_ctx": 4096}
    v1 = {"temperature": 0, "seed": 7, "max_tokens": tokens}
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "options": options, **v1, **fields}


def shared(value: Any) -> Any:
    """Return what a client got without what no two answers share; a stream as a list."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in OWN and not k.endswith("_duration")}
        return {k: shared(v) for k, v in kept.items() if "cmpl-" not in str(v)[:9]}
    return [shared(v) for v in value] if isinstance(value, (list, Iterator)) else value


def tokens_read(answer: httpx.Response) -> int:
    """Return how many tokens the model has read for a whole answer; 0 where none was asked."""
    whole = answer.json()
    usage = whole.get("usage", {})
    return int(whole.get("prompt_eval_count", usage.get("prompt_tokens", 0)))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts for Node, and the packages that they import."""
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(HERE / "node", folder, dirs_exist_ok=True)
    npm_install(folder)
    return folder


@pytest.fixture(scope="session")
def coding(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the command of a coding client, by its name; it is installed once."""

    @cache
    def install(client: str) -> Path:
        folder = tmp_path_factory.mktemp(client)
        npm_install(folder, CODING[client])
        script = folder / "node_modules" / CODING[client] / "install.cjs"
        if script.exists() and subprocess.run(["node", str(script)], cwd=folder).returncode:
            pytest.skip(f"{client} cannot install itself")
        return folder / "node_modules" / ".bin" / client

    return install


def npm_install(folder: Path, *packages: str) -> None:
    """Install packages, or those of package.json; skip the test where that cannot be."""
    if not (shutil.which("node") and (npm := shutil.which("npm"))):
        pytest.skip("no node and npm on the PATH")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", *packages]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=INSTALL)
    except subprocess.SubprocessError as exc:
        pytest.skip(f"npm install failed: {exc}")
