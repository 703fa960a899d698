"""Soak: a stand-in for Ollama and two proxies, asked all that goes well or wrong, for an hour.

    python bench/soak.py [--minutes 60] [--seed 1] [--clients 24] [--leak tasks|files|memory]

One of the proxies has a guard. Clients do what `KINDS` names, in the order of the seed, while the
stand-in is killed and started again; soak.toml holds the texts. The status is 1 when an answer was
wrong, when a proxy logged an error, or when there is more of something than after the warm-up, each
time that all is quiet. It needs Linux and the packages of the tests. `Soak.run` is the plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from bench.servers import Kind, Server, allow_files, free_port, start
from kernel.config import HOME
from tests.support import CHAT, COMPLETIONS, MESSAGES, PATHS, RESPONSES, chat, write_agent
from tests.test_faults import Reader, Writer, body_after, reset

TEXTS = tomllib.loads((HOME / "bench/soak.toml").read_text(encoding="utf-8"))
ENDS = {CHAT: '"done":true', COMPLETIONS: "[DONE]", MESSAGES: "message_stop"}
ENDS[RESPONSES] = "response.completed"
PLAIN, GUARDED = "plain", "guarded"  # the proxies
LISTENS = "0A"  # a state in /proc/net/tcp
TURN, IDLE = 600, 130  # seconds: all are busy, then idle for longer than connections live
PATIENCE = 60  # seconds for one request
Sample = dict[str, float]
T = TypeVar("T")


def stand_in() -> ASGIApp:
    """Return the demo, but the header X-Soak makes it break, or speak slowly."""
    app = demo.create_app(0.001)

    async def breaking(scope: Scope, receive: Receive, send: Send) -> None:
        how, sent = dict(scope.get("headers", ())).get(b"x-soak", b"").decode(), 0
        if not how:
            return await app(scope, receive, send)
        transport = send.__self__.transport  # type: ignore[attr-defined]  # uvicorn's

        async def sends(message: Message) -> None:
            nonlocal sent
            await send(message)
            sent += 1
            if how == "slowly":
                await asyncio.sleep(0.05)
            elif sent == 3:  # the head and two frames
                transport.write(b"zz\r\n" * (how == "nonsense"))
                transport.abort()

        if how == "silence":
            while (await receive())["type"] != "http.disconnect":
                pass
        elif how in ("slowly", "cut", "nonsense"):
            await app(scope, receive, sends)
        else:
            transport.write(b"220 mail ESMTP\r\n\r\n" * (how == "garbage"))
            transport.close()

    return breaking


def request(path: str, body: str = "", soak: str = "") -> bytes:
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"X-Soak: {soak}\r\n" * bool(soak) + f"Content-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def connect(proxy: Server) -> tuple[Reader, Writer]:
    return await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))


async def exchange(reader: Reader, writer: Writer, data: bytes) -> tuple[int, bytes]:
    """Return status and body. Raises OSError, and EOFError where the answer is not whole."""
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head[9:12]), await body_after(reader, head.lower())


class Wrong(Exception):
    """What a proxy did and must not."""


@dataclass
class Client:
    """Asks one thing after the other, mostly on one connection."""

    rng: Random
    proxy: Server
    opened: tuple[Reader, Writer] | None = None

    async def open(self) -> tuple[Reader, Writer]:
        if not self.opened or self.opened[0].at_eof() or self.rng.random() < 0.05:
            self.close()
            self.opened = await connect(self.proxy)
        return self.opened

    def close(self) -> None:
        if self.opened:
            (reset if self.rng.random() < 0.5 else Writer.close)(self.opened[1])
        self.opened = None

    def chat(self, *texts: str, soak: str = "", stream: bool = True) -> tuple[bytes, str, str]:
        """Return a request, and what its answer holds."""
        path, text = self.rng.choice(PATHS), self.rng.choice(texts or [*TEXTS["typed"]])
        word, some = f"q{self.rng.getrandbits(40)}z", f"k{self.rng.randrange(50)}z"
        holds = TEXTS["typed"].get(text, "").replace("#", word).replace("^", word.upper())
        typed = text.replace("#", word).replace("%", some)
        data = request(path, json.dumps(chat(path, typed, stream=stream)), soak)
        return data, holds.replace("%", some), ENDS[path] if stream else "}"

    async def expect(self, status: int, data: bytes, *holds: str) -> None:
        got, body = await exchange(*await self.open(), data)
        if got != status or any(text.encode() not in body for text in holds):
            raise Wrong(f"{data[:400]!r}: {got} {body[-200:]!r}, not {status} with {holds}")

    # What KINDS names. Each raises Wrong, or OSError and EOFError where an answer broke off.

    async def plain(self) -> None:
        """Ask what no agent sees."""
        case: dict[str, Any] = {"status": 200, "body": "", "times": 1, "holds": ""}
        case |= self.rng.choice(TEXTS["plain"])
        status = case.get("guarded" if self.proxy.name == GUARDED else "", case["status"])
        data = request(case["path"], case["body"] * case["times"])
        await self.expect(status, data, case["holds"])

    async def chats(self) -> None:
        texts = () if self.rng.random() < 0.5 else ("# and/or?",)
        await self.expect(200, *self.chat(*texts, stream=self.rng.random() < 0.7))

    async def slow(self) -> None:
        """Read a long answer slowly, or one that comes slowly."""
        soak = self.rng.choice(("", "slowly"))
        data, _, end = self.chat(" ".join(["x" * 20_000] * (3 if soak else 20)), soak=soak)
        reader, writer = await self.open()
        writer.write(data)
        body = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in body[:13]:
            raise Wrong(f"a long answer begins with {body!r}")
        while not body.endswith(b"0\r\n\r\n") or end.encode() not in body:
            piece = await reader.read(2**14)
            if not piece:
                raise EOFError
            body += piece
            await asyncio.sleep(0.01)

    async def malformed(self) -> None:
        self.close()
        reader, writer = await self.open()
        writer.write(self.rng.choice(TEXTS["malformed"]).encode())
        if not (got := await reader.read()).startswith(b"HTTP/1.1 4"):
            raise Wrong(f"a malformed request is answered with {got!r}")

    async def breaks(self) -> None:
        """Meet an upstream that breaks: a 502 or a broken answer, never a whole one."""
        soak = self.rng.choice(("cut", "nonsense", "garbage", "gone"))
        data, *_ = self.chat("# and/or?", "/piece #", "/shout #", "/time #", soak=soak)
        try:
            status, body = await exchange(*await self.open(), data)
        except (OSError, EOFError):
            return self.close()
        if status != 502:
            raise Wrong(f"{soak}: {status} {body!r}, not a broken answer")

    async def leaves(self) -> None:
        """Leave while uploading, while the model is silent, or while it speaks."""
        phase = self.rng.randrange(3)
        data, *_ = self.chat(soak=("", "silence", "slowly")[phase])
        reader, writer = await self.open()
        writer.write(data if phase else data[: self.rng.randrange(len(data))])
        if phase == 2:
            await reader.read(200)
        await asyncio.sleep(self.rng.choice((0, 0, 0.001, 0.02, 0.1)))
        self.close()


KINDS: dict[Callable[[Client], Awaitable[None]], float] = {  # and how often, against the others
    Client.plain: 400,
    Client.chats: 25,
    Client.leaves: 5,
    Client.breaks: 3,
    Client.malformed: 2,
    Client.slow: 0.3,
}


@dataclass
class Soak:
    """What runs, and what came of it."""

    flags: argparse.Namespace
    folder: Path
    upstream: int = field(default_factory=free_port)
    stand_in: ExitStack = field(default_factory=ExitStack)  # ends the process of that name
    away: tuple[float, float] = (0, 0)  # when it last was, and a moment more
    proxies: list[Server] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Warm up, then be busy and quiet by turns, and compare."""
        for name, code in TEXTS["agents"].items():
            write_agent(self.folder / "plugins", name, code)
        seconds, turns = 60 * self.flags.minutes, math.ceil(60 * self.flags.minutes / TURN)
        with self.stand_in, ExitStack() as stack:
            await self.restart()
            for name in (PLAIN, GUARDED):
                kind = Kind(name, partial(self.command, name))
                self.proxies += [stack.enter_context(start(kind, self.folder / f"{name}.log"))]
            rngs = [Random(f"{self.flags.seed} {n}") for n in range(self.flags.clients)]
            self.clients = [Client(rng, self.proxies[n % 2]) for n, rng in enumerate(rngs)]
            await self.busy(seconds / turns / 3)
            before = await self.quiet("warm")
            for turn in range(turns):
                await self.busy(seconds / turns - (0 if turn else seconds / turns / 3))
                await asyncio.sleep(IDLE if turns > 1 else 0)
                after = await self.quiet("quiet")
        for proxy, first, last in zip(self.proxies, before, after, strict=True):
            self.wrong += [
                f"{proxy.name}: {what} grew from {first[what]} to {last[what]}"
                for what, slack in TEXTS["slack"].items()
                if last[what] > first[what] + slack
            ]
            log = (self.folder / f"{proxy.name}.log").read_text(encoding="utf-8")
            self.wrong += re.findall(r'(?m)^(?:.*"level": "error".*|[^{\n].*)', log)

    def command(self, name: str, port: int) -> list[str]:
        """Return what starts a proxy."""
        known = {"home": HOME, "data": name, "port": port, "upstream": self.upstream}
        known |= {"guarded": json.dumps(name == GUARDED), "leak": self.flags.leak}
        known |= {"leaks": json.dumps(bool(self.flags.leak))}
        file = self.folder / f"{name}.toml"
        file.write_text(TEXTS["settings"].format_map(known), encoding="utf-8")
        return [sys.executable, str(HOME / "osp.py"), "--config", str(file)]

    async def restart(self) -> None:
        """Kill the stand-in, and start it again."""
        command = [sys.executable, "-m", "uvicorn", "--factory", "bench.soak:stand_in"]
        command += ["--app-dir", str(HOME), "--log-level", "critical", "--timeout-keep-alive", "3"]
        kind = Kind("stand-in", lambda port: [*command, "--port", str(port)])
        started = start(kind, self.folder / "stand-in.log", self.upstream, proxy=False)
        self.away = time.monotonic(), math.inf
        await asyncio.to_thread(self.stand_in.close)
        server = await asyncio.to_thread(self.stand_in.enter_context, started)
        self.stand_in.callback(os.kill, server.pid or 0, signal.SIGKILL)
        self.away = self.away[0], time.monotonic() + 0.5

    async def busy(self, seconds: float) -> None:
        """Let all clients ask, while the stand-in goes away now and then."""
        end, rng = time.monotonic() + seconds, Random(f"{self.flags.seed} {seconds}")
        work = asyncio.gather(*(self.work(client, end) for client in self.clients))
        minute = 0.0
        while not work.done():
            await asyncio.wait({work}, timeout=rng.uniform(0.2, 0.6) * min(seconds, 100))
            if not work.done():
                await self.restart()
            if time.monotonic() >= minute + 60:
                minute = time.monotonic()
                await self.look("busy")
        await work

    async def work(self, client: Client, end: float) -> None:
        while (began := time.monotonic()) < end:
            (kind,) = client.rng.choices([*KINDS], [*KINDS.values()])
            try:
                async with asyncio.timeout(PATIENCE):
                    await kind(client)
                outcome = "ok"
            except (Wrong, OSError, EOFError, TimeoutError) as exc:
                client.close()
                is_away = began < self.away[1] and time.monotonic() > self.away[0]
                outcome = "without the stand-in" if is_away else "wrong"
                if not is_away:
                    self.wrong.append(f"{client.proxy.name}: {kind.__name__}: {exc!r}")
            self.counts[f"{kind.__name__}, {outcome}"] += 1

    async def quiet(self, label: str) -> list[Sample]:
        """Wait until nothing runs, and look."""
        for client in self.clients:
            client.close()
        for _ in range(40):
            await asyncio.sleep(0.5)
            samples = [await sample(proxy, self.folder, self.upstream) for proxy in self.proxies]
            if not any(each["running"] or each["from"] for each in samples):
                break
        return await self.look(label)

    async def look(self, label: str) -> list[Sample]:
        """Say and return how much there is of everything in each proxy."""
        samples = [await sample(proxy, self.folder, self.upstream) for proxy in self.proxies]
        for proxy, each in zip(self.proxies, samples, strict=True):
            shown = " ".join(f"{what}={number}" for what, number in each.items())
            say(f"{label:5} {self.counts.total():>9,} requests, {proxy.name:7} {shown}")
        return samples


async def sample(proxy: Server, folder: Path, upstream: int) -> Sample:
    """Return how much there is of everything; `/soak` says what only the inside knows."""
    reader, writer = await connect(proxy)
    body = json.dumps(chat(CHAT, "/soak", stream=False))
    inside = (await exchange(reader, writer, request(CHAT, body)))[1]
    traces = (await exchange(reader, writer, request("/traces")))[1]
    proc, ports = Path(f"/proc/{proxy.pid}"), Counter[int]()
    files = [*seen((proc / "fd").iterdir(), os.readlink)]
    for line in (proc / "net/tcp").read_text().splitlines()[1:]:
        _, here, there, state, *rest = line.split()
        if f"socket:[{rest[5]}]" in files and state != LISTENS:
            ports.update((int(here[-4:], 16), int(there[-4:], 16)))
    writer.close()
    clients = ports[writer.get_extra_info("peername")[1]] - 1
    sizes = seen((folder / proxy.name).rglob("*"), os.path.getsize)
    return {
        "MiB": round(proxy.memory(), 1),
        "files": len(files) - 1 - clients - ports[upstream],
        "threads": len([*(proc / "task").iterdir()]),
        **json.loads(json.loads(inside)["message"]["content"]),
        "from": clients,
        "to": ports[upstream],
        "running": len(json.loads(traces)["running"]),
        "KiB": sum(sizes) // 1024,
    }


def seen(paths: Iterable[Path], look: Callable[[Path], T]) -> Iterator[T]:
    """Yield what there is to see of each path; some are gone meanwhile."""
    for path in paths:
        with suppress(OSError):
            yield look(path)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench/soak.py", description="Whether anything grows.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--leak", default="", help="have an agent leak: tasks, files or memory")
    allow_files()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(parser.parse_args(arguments), Path(folder))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(soak.run())
    for kind, number in sorted(soak.counts.items()):
        say(f"{number:>9,} {kind}")
    for text, number in Counter(soak.wrong).most_common(9):
        say(f"WRONG, {number} times: {text[:1000]}")
    say(f"{'FAILED' if soak.wrong else 'passed'}: {soak.counts.total():,} requests")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
