"""Load: the questions, and who asks them: wrk where it is there, else a client of our own.

Everything here runs beside the upstream, on the core that the proxy does not have.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.servers import Running

HERE = Path(__file__).resolve().parent
SIZE = 1000  # bytes of a body, about
FRAMES = 200  # of a stream
UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}  # to milliseconds
WRK = """
local file = io.open({path!r}, "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/json"
"""


@dataclass(frozen=True)
class Question:
    """A body in a file and where it is posted to."""

    target: str
    file: Path


@dataclass(frozen=True)
class Rate:
    """What one load saw; p50 and p99 are milliseconds from question to whole answer."""

    count: int
    seconds: float
    failed: int
    p50: float
    p99: float

    @property
    def per_second(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True)
class Slow:
    """What many slow streams saw; p50 and p99 are milliseconds from upstream to client."""

    streams: int  # that were alive at the end
    p50: float
    p99: float
    cpu: float | None  # seconds of processor in one second
    memory: float | None  # MiB with all streams open


def questions(folder: Path) -> dict[str, Question]:
    """Write the bodies of all questions."""
    long = f"/api/chat?frames={FRAMES}"
    asked = {
        "chat": ("/api/chat", chat("", stream=False)),
        "embed": ("/api/embed", embed()),
        "stream": (long, chat("", stream=True)),
        "piece": (long, chat("/piece ", stream=True)),
        "whole": (long, chat("/whole ", stream=True)),
        "short": ("/api/chat?frames=20", chat("", stream=True)),
        "slow": ("/api/chat?frames=1000000&every=50", chat("", stream=True)),
    }
    written = {}
    for name, (target, body) in asked.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(body), encoding="utf-8")
        file.with_suffix(".lua").write_text(WRK.format(path=str(file)), encoding="utf-8")
        written[name] = Question(target, file)
    return written


def chat(command: str, *, stream: bool) -> dict[str, Any]:
    said = [{"role": "system", "content": "You answer in one sentence."}]
    for word in ("blue", "red"):
        said.append({"role": "user", "content": f"Why is the sky {word}? ".ljust(SIZE // 4, ".")})
        said.append({"role": "assistant", "content": "Because of the air.".ljust(SIZE // 8, ".")})
    said.append({"role": "user", "content": f"{command}And why is it not green?"})
    return {"model": "bench", "messages": said, "stream": stream}


def embed() -> dict[str, Any]:
    return {"model": "bench", "input": ["Why is the sky blue? ".ljust(SIZE - 50, ".")]}


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def rate(server: Running, question: Question, connections: int, seconds: int) -> Rate:
    """Ask as fast as answers come. Raises RuntimeError if an answer is no 200 or breaks off."""
    url, number, duration = server.url + question.target, str(connections), str(seconds)
    if has_wrk():
        command = [
            "wrk",
            "-t1",
            "-c",
            number,
            "-d",
            f"{duration}s",
            "--timeout",
            "60s",
            "--latency",
        ]
        script = str(question.file.with_suffix(".lua"))
        result = of_wrk(output([*command, "-s", script, url]))
    else:
        result = Rate(**json.loads(output(own("rate", url, question, number, duration))))
    if result.failed or not result.count:
        raise RuntimeError(f"{url}: {result.failed} of {result.count} answers failed")
    return result


def of_wrk(said: str) -> Rate:
    """Read what wrk prints."""
    count, seconds, unit = found(r"(\d+) requests in ([\d.]+)(us|ms|s|m)", said)
    failed = [int(n) for n in re.findall(r"(?:responses:|connect|read|write|timeout) (\d+)", said)]
    return Rate(
        count=int(count),
        seconds=float(seconds) * UNITS[unit] / 1000,
        failed=sum(failed),
        **{f"p{p}": milliseconds(found(rf" {p}% +([\d.]+)(us|ms|s|m)", said)) for p in (50, 99)},
    )


def found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if not match:
        raise RuntimeError(f"wrk said something else than it used to: {text}")
    return match.groups()


def milliseconds(value: tuple[str, ...]) -> float:
    return float(value[0]) * UNITS[value[1]]


def slow(server: Running, question: Question, streams: int, seconds: int) -> Slow:
    """Hold many streams open, and look how old their frames are."""
    url = server.url + question.target
    command = own("slow", url, question, str(streams), str(seconds))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        client.stdout.readline()  # all are open
        began, before = time.perf_counter(), server.cpu()
        client.stdout.readline()  # enough was seen, and all are still open
        took, after, memory = time.perf_counter() - began, server.cpu(), server.memory()
        result = json.loads(client.stdout.readline() or "{}")
    if not result:
        raise RuntimeError(f"{url}: the client failed, see above")
    cpu = (after - before) / took if after is not None and before is not None else None
    return Slow(**result, cpu=cpu, memory=memory)


def own(what: str, url: str, question: Question, number: str, seconds: str) -> list[str]:
    return [sys.executable, str(HERE / "client.py"), what, url, str(question.file), number, seconds]


def output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
