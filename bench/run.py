"""Bench: what the proxy costs, beside its alternatives, in one run. README.md says how to use it.

Every round asks each server in turn, so that a busy moment of the machine hits all of them. Begin
to read at `MEASURES`: each is a function that runs once a round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import servers
from bench.servers import HERE, Kind, Server

TEXT = "what about and/or?"
NO_AGENTS = ("direct", "nginx", "naive", "answer", "relay")
TURN = [
    {"role": "user", "content": 'Is it either/or?\nSee "https://example.org/a/b", please. '},
    {"role": "assistant", "content": "It is neither/nor, for these reasons: " + 300 * "."},
]


def chat(size: int, text: str = TEXT, *, stream: bool = False) -> bytes:
    """Return a conversation of `size` bytes that ends with `text`. A `/` is in it, as in most."""
    messages: list[dict[str, str]] = []
    body: dict[str, Any] = {"model": "bench", "stream": stream, "messages": messages}
    last = {"role": "user", "content": text}
    while len(encoded({**body, "messages": [*messages, *TURN, last]})) <= size:
        messages += TURN
    missing = size - len(encoded({**body, "messages": [*messages, last]}))
    messages.append({**last, "content": text + max(0, missing) * "."})
    return encoded(body)


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Load:
    """What is asked, by how many connections at the same time, and what the answer must hold."""

    label: str
    path: str
    body: bytes
    connections: int = 16
    holds: bytes = b""


def stream(label: str, text: str, holds: bytes, frames: str = "200") -> Load:
    return Load(label, f"/api/chat?frames={frames}", chat(160, text, stream=True), 8, holds)


EMBED = encoded({"model": "bench", "input": ["and/or".ljust(130, ".")]})
LOADS = {
    "pass": Load("pass-through, 160 B", "/api/embed", EMBED),
    "chat160": Load("untouched chat, 160 B", "/api/chat", chat(160)),
    "chat1800": Load("untouched chat, 1.8 kB", "/api/chat", chat(1800)),
    "chat20k": Load("untouched chat, 20 kB", "/api/chat", chat(20_000)),
    "stream": stream("stream of 200 frames", TEXT, b" word"),
    "piece": stream("  edited by on_chunk", f"/piece {TEXT}", b" WORD"),
}
SHORT = stream("", TEXT, b" word", "20")
SLOW = stream("", TEXT, b"", "1000000&every=50")


@dataclass
class Report:
    """All samples of a run: {row: {column: {round: number}}}."""

    columns: list[str] = field(default_factory=list)
    ratios: list[str] = field(default_factory=list)  # columns that the first server is compared to
    notes: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, dict[int, float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def table(self) -> str:
        """Return medians, and the medians of the rounds' ratios with the least and the greatest."""
        first = next((name for name in self.columns if name != "direct"), "")
        others = [name for name in self.ratios if name != first]
        lines = [["", *self.columns, *(f"{first}/{name}" for name in others)]]
        for label, row in self.rows.items():
            cells = [
                shown(median(row[name].values())) if row[name] else "-" for name in self.columns
            ]
            lines.append([label, *cells, *(ratio(row[first], row[name]) for name in others)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join([a.ljust(widths[0]), *map(str.rjust, b, widths[1:])]) for a, *b in lines)
        return "\n".join([*table, "", *(f"- {note}" for note in self.notes)]) + "\n"


def shown(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> str:
    each = sorted(ours[round] / theirs[round] for round in ours if theirs.get(round))
    return f"{median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})" if each else "-"


@dataclass
class Bench:
    """What a measure works with: servers that run all the time, and kinds to start a fresh one."""

    flags: argparse.Namespace
    folder: Path
    direct: Server
    report: Report = field(default_factory=Report)
    kinds: list[Kind] = field(default_factory=list)
    running: list[Server] = field(default_factory=list)
    round: int = 0

    def add(self, label: str, server: Server | Kind, value: float) -> None:
        if math.isfinite(value):
            self.report.rows[label][server.name][self.round] = value

    def in_turn(self) -> Iterator[Server]:
        """Yield each server, direct first; every round another one comes next."""
        first = self.round % max(1, len(self.running))
        yield from (self.direct, *self.running[first:], *self.running[:first])

    def fresh(self, kind: Kind) -> AbstractContextManager[Server]:
        return servers.start(kind, self.folder / f"{kind.name}.log")

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Leave a server out of a measure that it fails, and say so."""
        try:
            yield
        except (RuntimeError, OSError, subprocess.SubprocessError) as exc:
            self.report.note(f"{name}: {exc}")

    def rate(self, server: Server, load: Load, connections: int = 0) -> dict[str, float]:
        """Ask as fast as answers come; return what wrk.lua prints. Raises RuntimeError."""
        url, file = server.url + load.path, self.folder / "body"
        file.write_bytes(load.body)
        check(url, load)
        # wrk knows whole seconds only, but prints its result when it is interrupted, too
        command = ["timeout", "--preserve-status", "-s", "INT", str(self.flags.seconds)]
        command += ["wrk", "-t1", f"-c{connections or load.connections}", "-d1h", "--timeout=60s"]
        command += ["-s", str(HERE / "wrk.lua"), url, "--", str(file)]
        command = servers.pin(command, proxy=False)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        if result["failed"] or not result["count"]:
            raise RuntimeError(f"{url}: {result['failed']} of {result['count']} answers failed")
        return result


def check(url: str, load: Load) -> None:
    """Raise RuntimeError or OSError unless the answer is a 200 that holds what it must."""
    if load.holds not in (answer := servers.ask(url, load.body)):
        raise RuntimeError(f"{url} answers without {load.holds!r}: {answer[:300]!r}")


def throughput(load: Load, bench: Bench) -> None:
    """Requests (or streams) a second, and what one takes of the processor."""
    for server in bench.in_turn():
        if b'"/' in load.body and server.name in NO_AGENTS:
            continue
        with bench.noting(server.name):
            before = server.cpu()
            result = bench.rate(server, load)
            spent = server.cpu() - before
            bench.add(f"{load.label}: per second", server, result["count"] / result["seconds"])
            if server is not bench.direct:
                bench.add(f"{load.label}: CPU us", server, spent / result["count"] * 1e6)


def command(bench: Bench) -> None:
    """Streams with the agent of --command, so that its own cost shows."""
    if text := bench.flags.command:
        throughput(stream(f"  with {text}", f"{text} {TEXT}", b";ok"), bench)


def latency(bench: Bench) -> None:
    """How long one request takes that is alone; what the proxy adds is the difference to direct."""
    for server in bench.in_turn():
        with bench.noting(server.name):
            result = bench.rate(server, LOADS["chat160"], connections=1)
            bench.add("one connection, us: median", server, 1000 * result["p50"])
            bench.add("  99th percentile", server, 1000 * result["p99"])


def slow(bench: Bench) -> None:
    """Many streams at the pace of a model, each through a fresh process."""
    watch(bench, bench.direct)
    for kind in bench.kinds:
        with bench.noting(kind.name), bench.fresh(kind) as server:
            watch(bench, server)


def watch(bench: Bench, server: Server) -> None:
    """Hold many streams open, and look how old their frames are. Raises RuntimeError."""
    file, number, seconds = bench.folder / "body", bench.flags.slow, 2 * bench.flags.seconds
    file.write_bytes(SLOW.body)
    check(server.url + SHORT.path, SHORT)
    command = [sys.executable, str(HERE / "slow.py"), server.url + SLOW.path, str(file)]
    command = servers.pin([*command, str(number), str(seconds)], proxy=False)
    memory, pipe = server.memory(), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as client:
        assert client.stdout
        client.stdout.readline()  # all streams flow
        cpu = server.cpu()
        seen: dict[str, float] = json.loads(client.stdout.readline() or '{"streams": 0}')
        cpu, memory = server.cpu() - cpu, server.memory() - memory
        client.communicate()
    if seen["streams"] < number:
        raise RuntimeError(f"held {seen['streams']} of {number} slow streams")
    bench.add(f"{number:,} slow streams, age of a frame in ms: median", server, seen["p50"])
    bench.add("  99th percentile of the age", server, seen["p99"])
    if server is not bench.direct:
        bench.add("  % of a core", server, 100 * cpu / seconds)
        bench.add("  KiB for each", server, 1024 * memory / number)


def start(bench: Bench) -> None:
    """How long a fresh process takes to its first answer, and its memory after many streams."""
    for kind in bench.kinds:
        with bench.noting(kind.name), bench.fresh(kind) as server:
            bench.add("ms from start to first answer", server, server.ready)
            streams = 0
            while server.pid and streams < bench.flags.streams:
                streams += int(bench.rate(server, SHORT)["count"])
            bench.add(f"MiB after {bench.flags.streams:,} streams", server, server.memory())


MEASURES: dict[str, Callable[[Bench], None]] = {
    **{name: partial(throughput, load) for name, load in LOADS.items()},
    "command": command,
    "latency": latency,
    "slow": slow,
    "start": start,
}


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/run.py", description="What the proxy costs.")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many (default: 3)")
    parser.add_argument("--seconds", type=float, default=2, help="of each load (default: 2)")
    parser.add_argument("--streams", type=int, default=10_000, help="before memory is looked at")
    parser.add_argument("--slow", type=int, default=1000, help="slow streams at the same time")
    names = f"measures: {', '.join(MEASURES)}; servers: osp, nginx, naive, a NAME, "
    names += f"and only if named {', '.join(servers.PIECES)}"
    parser.add_argument("--only", default="", help=f"with commas between them; {names}")
    where = "another checkout's folder, or a URL"
    parser.add_argument("--against", metavar="NAME=WHERE", action="append", default=[], help=where)
    parser.add_argument("--command", help="also streams with this agent of the checkout")
    parser.add_argument("--port", type=int, default=0, help="of the upstream, for a URL")
    parser.add_argument("--python", default=sys.executable, help="that runs the proxies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    return parser.parse_args(arguments)


def choose(only: set[str], found: dict[str, Kind]) -> tuple[list[Kind], list[str]]:
    """Return the servers and the measures that are named, or all. Raises SystemExit."""
    if unknown := only - found.keys() - MEASURES.keys():
        raise SystemExit(f"--only: {', '.join(sorted(unknown))}: no measure, and no server here")
    usual = [kind for name, kind in found.items() if name not in servers.PIECES]
    chosen = [kind for name, kind in found.items() if name in only]
    return chosen or usual, [name for name in MEASURES if name in only] or list(MEASURES)


def run(flags: argparse.Namespace, folder: Path, stack: ExitStack) -> Report:
    """Start everything and run every measure in every round."""
    canned = servers.canned(folder)
    log = folder / "upstream.log"
    direct = stack.enter_context(servers.start(canned, log, flags.port, proxy=False))
    found = servers.kinds(folder, direct.url, flags)
    kinds, measures = choose(set(filter(None, flags.only.split(","))), found)
    bench = Bench(flags, folder, direct)
    bench.report.note(about(flags.python))
    for kind in kinds:
        with bench.noting(kind.name):
            bench.running.append(stack.enter_context(bench.fresh(kind)))
            bench.kinds.append(kind)
    bench.report.columns = ["direct", *(kind.name for kind in bench.kinds)]
    bench.report.ratios = [item.partition("=")[0] for item in flags.against]
    for bench.round in range(flags.rounds):
        for name in measures:
            sys.stderr.write(f"round {bench.round + 1} of {flags.rounds}: {name}\n")
            MEASURES[name](bench)
    return bench.report


def about(python: str) -> str:
    """Say what the numbers were measured with."""
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
    load = f"load before the run {os.getloadavg()[0]:.2f}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {version}; {load}"


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_flags(arguments)
    if missing := [name for name in ("wrk", "go", "taskset") if not shutil.which(name)]:
        raise SystemExit(f"bench: {', '.join(missing)}: not here (apt: wrk golang util-linux)")
    servers.allow_files()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        report = run(flags, Path(folder), stack)
    if flags.json:
        flags.json.write_text(json.dumps(vars(report), indent=1), encoding="utf-8")
    sys.stdout.write(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
