"""A real Ollama with two tiny models, and the proxy as a real process before it.

`direct` is the URL of the one, `proxied` that of the other: what is asked at both must come out
the same. Without an `ollama` binary the whole folder is skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START = 60.0  # seconds that a process has until it answers
STOP = 10.0  # and until it has ended

# Short answers, the same each time, also for clients that cannot ask for them.
PARAMETERS = {"temperature": 0, "seed": 7, "num_predict": 20}
TOOLS = (
    "{{ range .Tools }}{{ .Function.Name }} {{ end }}{{ range .Messages }}{{ .Content }} {{ end }}"
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny.gguf", {"parameters": PARAMETERS}),
    "tiny-tools": ("tiny.gguf", {"template": TOOLS}),  # no parameters: show gives them at random
    "tiny-embed": ("tiny-embed.gguf", {}),
}


@pytest.fixture(scope="session")
def binary() -> str:
    """The `ollama` to run; skips the test where there is none."""
    places = [os.environ.get("OLLAMA_BINARY"), shutil.which("ollama"), *in_go()]
    for place in filter(None, places):
        if os.access(place, os.X_OK):
            return place
    pytest.skip("no ollama on the PATH, in Go's bin folder or at OLLAMA_BINARY")


def in_go() -> list[str]:
    if not (go := shutil.which("go")):
        return []
    path = subprocess.run([go, "env", "GOPATH"], capture_output=True, text=True).stdout.strip()
    return [str(Path(path, "bin", "ollama"))]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of the server and of every command, so that nobody's own is touched."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def direct(binary: str, home: Path) -> Iterator[str]:
    """The URL of Ollama, which has the models and does one thing at a time."""
    address = f"127.0.0.1:{free_port()}"
    environ = {
        "OLLAMA_HOST": address,
        "OLLAMA_MODELS": str(home / "models"),
        "OLLAMA_NUM_PARALLEL": "1",
    }
    with running([binary, "serve"], home, environ, home / "ollama.log") as process:
        wait_for(f"http://{address}", process, home / "ollama.log")
        create_models(f"http://{address}")
        set_apart(home / "models")
        yield f"http://{address}"


@pytest.fixture(scope="session")
def proxied(direct: str, home: Path) -> Iterator[str]:
    """The URL of the proxy, which runs as one types it and must end cleanly on SIGTERM."""
    port = str(free_port())
    settings = home / "osp.toml"  # empty, so that nobody's own is read
    settings.touch()
    flags = ["--config", str(settings), "--port", port, "--upstream", direct]
    environ = {"OSP_SERVER_DATA": str(home / "data")}
    command = [sys.executable, str(ROOT / "osp.py"), *flags]
    with running(command, home, environ, home / "osp.log") as process:
        wait_for(f"http://127.0.0.1:{port}", process, home / "osp.log")
        yield f"http://127.0.0.1:{port}"
        assert stop(process) == 0, (home / "osp.log").read_text(encoding="utf-8")


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
            if httpx.get(f"{url}/api/version", trust_env=False).is_success:
                return
        time.sleep(0.02)  # between two looks; nothing tells us when a port opens
    pytest.fail(f"{process.args!r} does not answer:\n{log.read_text(encoding='utf-8')}")


def wait_for_models(url: str, home: Path, *names: str) -> None:
    """Wait until Ollama lists these models, which are presets, and set them apart."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        listed = httpx.get(f"{url}/api/tags", trust_env=False).json()["models"]
        if {*names} <= {model["name"] for model in listed}:
            return set_apart(home / "models")
        time.sleep(0.02)
    pytest.fail(f"Ollama does not list {', '.join(names)}")


def stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def create_models(url: str) -> None:
    with httpx.Client(base_url=url, timeout=START, trust_env=False) as client:
        for model, (file, fields) in MODELS.items():
            data = (HERE / file).read_bytes()
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            client.post(f"/api/blobs/{digest}", content=data).raise_for_status()
            body = {"model": model, "files": {file: digest}, "stream": False, **fields}
            client.post("/api/create", json=body).raise_for_status()


def set_apart(models: Path) -> None:
    """Give each model a second of its own: lists are sorted by that, and those of one by chance."""
    manifests = [path for path in models.glob("manifests/**/*") if path.is_file()]
    for number, path in enumerate(sorted(manifests)):
        os.utime(path, (number * 60, number * 60))


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """A client that follows nothing and takes no proxy from the environment."""
    with httpx.Client(timeout=30, trust_env=False) as client:
        yield client
