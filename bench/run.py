"""Bench: what the proxy costs, beside its alternatives, in one run.

    python bench/run.py                           all of it, some minutes
    python bench/run.py --only streams,osp,nginx  some measures, some servers
    python bench/run.py --port 9001 --against mine=http://127.0.0.1:9000

It starts a canned Ollama, the proxy, and what is installed of nginx, a naive forwarder and LiteLLM,
and puts load on each in turn, round after round, so that a busy moment of the machine hits all of
them. Begin to read at `MEASURES`: each is a function that runs once a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import kinds, load, servers
from bench.load import Question, Rate
from bench.servers import Kind, Running
from bench.table import Report

CONNECTIONS = 16  # for requests
LONG_LIVED = 8  # connections for streams as fast as they go
STREAMS = 10_000  # after which memory is looked at
PATIENCE = 60  # seconds for so many
SLOW = 1000  # streams at the same time, of 20 frames a second
SLOW_SECONDS = 4
ALONE = 0.8  # of its core: what the proxy gets that has it for itself, where it has enough to do
DIRECT = "direct"


@dataclass
class Bench:
    """What a measure works with; what is in `running` runs all the time and is asked in turn."""

    report: Report
    folder: Path
    core: int | None
    seconds: int
    long: bool
    direct: Running
    kinds: list[Kind]
    questions: dict[str, Question]
    round: int = 0
    running: dict[str, Running] = field(default_factory=dict)

    def start(self, kind: Kind) -> Running:
        return servers.start(kind, self.core, self.folder / f"{kind.name}.log")

    def in_turn(self) -> Iterator[tuple[str, Running]]:
        """Yield each server, direct first; every round another one comes next."""
        names = list(self.running)
        first = self.round % max(len(names), 1)
        yield DIRECT, self.direct
        yield from ((name, self.running[name]) for name in names[first:] + names[:first])

    def rate(self, server: Running, question: str, connections: int) -> Rate:
        return load.rate(server, self.questions[question], connections, self.seconds)

    def cost(self, server: Running, question: str, connections: int) -> tuple[Rate, float]:
        """Return the rate, and what one answer takes in us: of the processor, where it is known."""
        before = server.cpu()
        rate = self.rate(server, question, connections)
        after = server.cpu()
        spent = rate.seconds if before is None or after is None else after - before
        return rate, spent / rate.count * 1e6

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Leave a server out of a measure that it fails, and say so."""
        try:
            yield
        except RuntimeError as exc:
            self.report.note(f"{name} failed: {exc}")


def throughput(bench: Bench) -> None:
    """A chat that no agent touches, and a request that is forwarded unread."""
    for name, server in bench.in_turn():
        with bench.noting(name):
            chat, chat_cost = bench.cost(server, "chat", CONNECTIONS)
            embed, embed_cost = bench.cost(server, "embed", CONNECTIONS)
            bench.report.add("chat", name, chat.per_second)
            bench.report.add("embed", name, embed.per_second)
            if name != DIRECT:
                bench.report.add("chat_cpu", name, chat_cost)
                bench.report.add("embed_cpu", name, embed_cost)
            if name == "osp":
                bench.report.add("untouched", name, 100 * (chat_cost / embed_cost - 1))
                if (share := chat_cost / 1e6 * chat.per_second) < ALONE:
                    bench.report.note(f"osp had {share:.0%} of its core in a round: a busy machine")


def layers(bench: Bench) -> None:
    """What the log, the id, the metrics and the guard cost: the proxy with and without them."""
    if osp := bench.running.get("osp"):
        with bench.start(kinds.bare(bench.direct.url)) as bare:
            _, with_them = bench.cost(osp, "embed", CONNECTIONS)
            _, without = bench.cost(bare, "embed", CONNECTIONS)
        bench.report.add("layers", "osp", 100 * (1 - without / with_them))


def latency(bench: Bench) -> None:
    """What one request takes longer than without a proxy; the column direct has all it takes."""
    direct = bench.rate(bench.direct, "chat", 1)
    for name, server in bench.in_turn():
        with bench.noting(name):
            rate = bench.rate(server, "chat", 1)
            base = direct if name != DIRECT else Rate(0, 0, 0, 0, 0)
            bench.report.add("p50", name, rate.p50 - base.p50)
            bench.report.add("p99", name, rate.p99 - base.p99)


def streams(bench: Bench) -> None:
    """Streams as fast as the upstream writes them, untouched, and edited by an agent."""
    for name, server in bench.in_turn():
        with bench.noting(name):
            rate, cost = bench.cost(server, "stream", LONG_LIVED)
            bench.report.add("stream", name, rate.per_second)
            if name != DIRECT:
                bench.report.add("stream_cpu", name, cost / load.FRAMES)
            if name == "osp":
                piece = bench.rate(server, "piece", LONG_LIVED)
                whole = bench.rate(server, "whole", LONG_LIVED)
                bench.report.add("piece", name, piece.per_second)
                bench.report.add("whole", name, whole.per_second)
                bench.report.add("edited", name, 100 * piece.per_second / rate.per_second)


def slow(bench: Bench) -> None:
    """Many streams at the pace of a model, through a fresh process."""
    direct = listen(bench, DIRECT, bench.direct)
    for kind in bench.kinds:
        with bench.noting(kind.name), bench.start(kind) as server:
            before = server.memory()
            seen = listen(bench, kind.name, server)
            bench.report.add("slow_p50", kind.name, seen.p50 - direct.p50)
            bench.report.add("slow_p99", kind.name, seen.p99 - direct.p99)
            if seen.streams and seen.cpu is not None and seen.memory and before:
                bench.report.add("slow_cpu", kind.name, 100 * seen.cpu)
                bench.report.add(
                    "slow_memory", kind.name, 1024 * (seen.memory - before) / seen.streams
                )


def listen(bench: Bench, name: str, server: Running) -> load.Slow:
    seen = load.slow(server, bench.questions["slow"], SLOW, SLOW_SECONDS)
    if name == DIRECT:
        bench.report.add("slow_p50", name, seen.p50)
        bench.report.add("slow_p99", name, seen.p99)
    if seen.streams < SLOW:
        bench.report.note(f"{name} had {seen.streams} slow streams, not {SLOW}")
    return seen


def memory(bench: Bench) -> None:
    """Resident memory after many streams, once, before anything else; and whether it grows."""
    for name, server in bench.in_turn():
        if bench.round or name == DIRECT:
            continue
        with bench.noting(name):
            stream_many(bench, name, server, STREAMS)
            before = server.memory()
            bench.report.add("memory", name, before)
            if bench.long and before is not None:
                stream_many(bench, name, server, 10 * STREAMS)
                bench.report.add("growth", name, (server.memory() or 0) - before)


def stream_many(bench: Bench, name: str, server: Running, number: int) -> None:
    done, deadline = 0, time.monotonic() + PATIENCE * number / STREAMS
    while done < number and time.monotonic() < deadline:
        done += load.rate(server, bench.questions["short"], CONNECTIONS, 2).count
    if done < number:
        bench.report.note(f"{name}: memory after {done:,} streams, more took too long")


def ready(bench: Bench) -> None:
    """How long a server takes to start, to the first answer that came through it."""
    for kind in bench.kinds:
        with bench.start(kind) as server:
            bench.report.add("ready", kind.name, server.ready * 1000)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "memory": memory,
    "ready": ready,
    "throughput": throughput,
    "layers": layers,
    "latency": latency,
    "streams": streams,
    "slow": slow,
}


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/run.py", description="What the proxy costs.")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many (default: 3)")
    parser.add_argument("--seconds", type=int, default=2, help="of each load (default: 2)")
    parser.add_argument("--long", action="store_true", help="look for growth in 100,000 streams")
    names = f"measures: {', '.join(MEASURES)}; servers: osp, nginx, naive, litellm, a NAME"
    parser.add_argument("--only", default="", help=f"with commas between them; {names}")
    parser.add_argument("--against", metavar="NAME=URL", action="append", default=[])
    parser.add_argument("--port", type=int, default=0, help="of the upstream, for --against")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def available(folder: Path, url: str, against: list[str], notes: list[str]) -> list[Kind]:
    """Return all servers that are on this machine, and note which are not."""
    ours: dict[str, Kind | None] = {
        "osp": kinds.osp(folder, url),
        "nginx": kinds.nginx(folder, url),
        "naive": kinds.naive(url),
        "litellm": kinds.litellm(folder, url),
    }
    notes += [f"{name} is not installed" for name, kind in ours.items() if kind is None]
    given = (item.partition("=") for item in against)
    return [*filter(None, ours.values()), *(Kind(name, url=address) for name, _, address in given)]


def choose(only: set[str], found: list[Kind]) -> tuple[list[Kind], list[str]]:
    """Return the servers and the measures that are named, all of them where none is.

    Raises SystemExit for a name that is neither.
    """
    if unknown := only - {kind.name for kind in found} - MEASURES.keys():
        raise SystemExit(f"--only: {', '.join(sorted(unknown))}: no measure, and no server here")
    chosen = [kind for kind in found if kind.name in only]
    return chosen or found, [name for name in MEASURES if name in only] or list(MEASURES)


def about_this(machine: tuple[int, int] | None, upstream: str) -> list[str]:
    """Say what the numbers were measured with, and what cannot be measured here."""
    loader = f"wrk, a client in {kinds.RUNTIME} for the slow streams"
    notes = [
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {kinds.RUNTIME}",
        f"upstream in {upstream}; load by {loader if load.has_wrk() else 'a client in Python'}",
        "osp writes its log to a file; nginx and naive keep none",
    ]
    if machine is None:
        notes.append("nothing is pinned to a core: there is one only, or the system cannot do it")
    if not Path("/proc/self/status").exists():
        notes.append("no /proc here: no memory, and the cost is time that passed, not processor's")
    if hasattr(os, "getloadavg"):
        notes.append(f"load of the machine before the run: {os.getloadavg()[0]:.2f}")
    return notes


def run(flags: argparse.Namespace, folder: Path, stack: ExitStack) -> Report:
    """Start everything and run every measure in every round."""
    machine, only = servers.cores(), set(filter(None, flags.only.split(",")))
    if machine:
        os.sched_setaffinity(0, {machine[0]})  # and with us the upstream and the load
    servers.allow_files()
    upstream = kinds.upstream(folder)
    direct = stack.enter_context(
        servers.start(upstream, None, folder / "upstream.log", port=flags.port)
    )
    notes = about_this(machine, upstream.name)
    found = available(folder, direct.url, flags.against, notes)
    chosen, measures = choose(only, found)
    report = Report([DIRECT, *(kind.name for kind in chosen)], notes)
    core, questions = machine[1] if machine else None, load.questions(folder)
    bench = Bench(report, folder, core, flags.seconds, flags.long, direct, chosen, questions)
    for kind in chosen:
        with bench.noting(kind.name):
            bench.running[kind.name] = stack.enter_context(bench.start(kind))
    bench.kinds = [kind for kind in chosen if kind.name in bench.running]
    for bench.round in range(flags.rounds):
        for name in measures:
            sys.stderr.write(f"round {bench.round + 1} of {flags.rounds}: {name}\n")
            MEASURES[name](bench)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_flags(arguments)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        report = run(flags, Path(folder), stack)
    for file, text in ((flags.json, report.json), (flags.svg, report.svg)):
        if file:
            file.write_text(text(), encoding="utf-8")
    sys.stdout.write(report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
