"""What each agent costs, on the built-in stand-in for Ollama: python bench/agents.py [NAME ...]

For each agent a proxy of its own runs with that agent alone (`OSP_PLUGINS`), and is asked the same
thing with and without its command, in turns. The table has medians, in milliseconds: how much later
the first frame comes, what a frame more costs, how much later the end comes behind the last text,
and the memory of the process (MiB) beside that of a proxy without agents. An agent that asks the
model itself (translate) waits for the stand-in, which answers at once: a real model takes longer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
WORDS = 300  # of the prompt, which the stand-in repeats: a frame for each
PATIENCE = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Times:
    """One streamed answer, in milliseconds."""

    first: float  # until the first frame
    frame: float  # from one text to the next
    end: float  # from the last text to the end


def main() -> None:
    parser = argparse.ArgumentParser(description="What each agent costs.")
    parser.add_argument("names", nargs="*", help="agents (default: all that load)")
    parser.add_argument("--rounds", type=int, default=30)
    flags = parser.parse_args()
    with proxy("off") as (port, pid):
        for _ in range(flags.rounds):
            ask(port, "")
        alone = resident(pid)
    names = flags.names or sorted(f.name.removesuffix("_agent") for f in folders())
    print(f"{'agent':<12}{'first':>9}{'a frame':>9}{'the end':>9}{'MiB':>7}{'+MiB':>7}")  # noqa: T201
    for name in names:
        print(f"{name:<12}{row(name, flags.rounds, alone)}")  # noqa: T201


def folders() -> Iterator[Path]:
    yield from (ROOT / "plugins").glob("*_agent")


def row(name: str, rounds: int, alone: float) -> str:
    """Return an agent's line of the table, but for its name."""
    with proxy(name) as (port, pid):
        if name not in health(port)["agents"]:
            return "   not measured: it is disabled, or does not load"
        ask(port, f"/{name} ")  # what is done once is not what a request costs
        pairs = [(ask(port, ""), ask(port, f"/{name} ")) for _ in range(rounds)]
        memory = resident(pid)
    plain, edited = ([pair[n] for pair in pairs] for n in (0, 1))
    costs = (
        median(getattr(times, part) for times in edited)
        - median(getattr(times, part) for times in plain)
        for part in ("first", "frame", "end")
    )
    shown = "".join(f"{cost:>+9.3f}" for cost in costs)
    return f"{shown}{memory:>7.1f}{memory - alone:>+7.1f}"


@contextmanager
def proxy(plugins: str) -> Iterator[tuple[int, int]]:
    """Run a proxy before the stand-in, with these agents; yield its port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "OSP_PLUGINS": plugins, "OSP_SERVER_DATA": folder}
        settings = Path(folder, "osp.toml")
        settings.write_text('[log]\nlevel = "error"\n', encoding="utf-8")
        command = [sys.executable, str(ROOT / "osp.py"), "--config", str(settings)]
        process = subprocess.Popen([*command, "--demo", "0", "--port", str(port)], env=environ)
        try:
            wait_for(port, process)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            health(port)
            return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"{process.args!r} does not answer")


def health(port: int) -> dict[str, Sequence[str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        answer: dict[str, Sequence[str]] = json.load(connection.getresponse())
    finally:
        connection.close()
    return answer


number = iter(range(1, sys.maxsize))  # so that no question is asked twice: one agent remembers


def ask(port: int, command: str) -> Times:
    """Ask for a streamed answer, and return when its parts came."""
    text = f"{command}question {next(number)} " + "word " * WORDS
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": text}]})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.connect()
    began = time.perf_counter()
    connection.request("POST", "/api/chat", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    lines = [(time.perf_counter(), line) for line in iter(answer.readline, b"")]
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{command}was answered {answer.status}: {lines}")
    texts = [at for at, line in lines if json.loads(line)["message"]["content"]]
    first, last, done = texts[0], texts[-1], lines[-1][0]
    each = (last - first) / max(1, len(texts) - 1)
    return Times((lines[0][0] - began) * 1e3, each * 1e3, (done - last) * 1e3)


def resident(pid: int) -> float:
    """Return a process's resident memory in MiB. Linux only."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
