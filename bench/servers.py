"""Servers: how each one is started, on a core of its own, and what Linux says about it."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import socket
import subprocess
import time
import urllib.request
from argparse import Namespace as Flags
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATIENCE = 60  # seconds that a server may take to start
FILES = 8192  # that one process may open: a stream through a proxy is two of them
PIECES = ("answer", "relay", "quiet")  # parts of the proxy, see README.md

NGINX = """
daemon off; worker_processes 1; error_log stderr crit; pid {home}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_body_buffer_size 64k;
    client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
    keepalive_requests 1000000;
    upstream ollama {{ server {upstream}; keepalive 64; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://ollama; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 1h;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Kind:
    """A server: `command` makes it listen on a port; without one it runs already, at `url`."""

    name: str
    command: Callable[[int], list[str]] | None = None
    url: str = ""


@dataclass(frozen=True)
class Server:
    """A server that runs; what is not known of it (another machine's, say) is not a number."""

    name: str
    url: str
    pid: int | None = None
    ready: float = math.nan  # milliseconds from its start to its first answer

    def cpu(self) -> float:
        """Return the user and system time of its processes, in seconds."""
        stats = (Path(f"/proc/{pid}/stat").read_text() for pid in self._pids())
        ticks = [sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else math.nan

    def memory(self) -> float:
        """Return the resident memory of its processes, in MiB."""
        sizes = (Path(f"/proc/{pid}/statm").read_text() for pid in self._pids())
        pages = [int(size.split()[1]) for size in sizes]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages else math.nan

    def _pids(self) -> list[int]:
        pids = [self.pid] if self.pid else []
        for pid in pids:  # grows while it is read: children have children
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids


def kinds(folder: Path, upstream: str, flags: Flags) -> dict[str, Kind]:
    """Return every server that can be started here, and those of --against. Raises SystemExit."""
    proxy = partial(osp, folder, upstream, flags)
    python = partial(script, flags.python)
    found = {"osp": proxy("osp", HERE.parent)}
    if nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        found["nginx"] = Kind("nginx", nginx_command(nginx, folder, upstream))
    found["naive"] = Kind("naive", python("naive.py", upstream))
    for item in flags.against:
        name, _, where = item.partition("=")
        tree = Path(where).expanduser()
        if where.startswith("http"):
            found[name] = Kind(name, url=where)
        elif (tree / "osp.py").is_file():
            found[name] = proxy(name, tree)
        else:
            raise SystemExit(f"--against {item}: no URL, and no folder with an osp.py")
    for piece in ("answer", "relay"):
        found[piece] = Kind(piece, python("pieces.py", piece, upstream))
    return {**found, "quiet": proxy("quiet", HERE.parent)}


def osp(folder: Path, upstream: str, flags: Flags, name: str, tree: Path) -> Kind:
    """Return the proxy of a checkout, with the bench's agent; with its own ones for --command."""
    settings = folder / f"{name}.toml"
    plugins = [HERE / "plugins", *([tree.resolve() / "plugins"] if flags.command else [])]
    values = {
        "upstream.url": upstream,
        "plugins.dirs": list(map(str, plugins)),
        "server.data": str(folder / name),
        "log.level": "error" if name == "quiet" else "info",
    }
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    settings.write_text("".join(lines), encoding="utf-8")
    command = [flags.python, str(tree.resolve() / "osp.py"), "--config", str(settings), "--port"]
    return Kind(name, lambda port: [*command, str(port)])


def script(python: str, name: str, *arguments: str) -> Callable[[int], list[str]]:
    return lambda port: [python, str(HERE / name), str(port), *arguments]


def nginx_command(binary: str, folder: Path, upstream: str) -> Callable[[int], list[str]]:
    def command(port: int) -> list[str]:
        home = folder / f"nginx-{port}"
        home.mkdir()
        address = upstream.removeprefix("http://")
        settings = NGINX.format(home=home, upstream=address, port=port)
        (home / "nginx.conf").write_text(settings, encoding="utf-8")
        return [binary, "-p", str(home), "-c", str(home / "nginx.conf")]

    return command


def canned(folder: Path) -> Kind:
    """Build the upstream. Raises CalledProcessError."""
    binary = str(folder / "upstream")
    subprocess.run(["go", "build", "-o", binary, "."], cwd=HERE / "upstream", check=True)
    return Kind("direct", lambda port: [binary, f"127.0.0.1:{port}"])


def pin(command: list[str], *, proxy: bool) -> list[str]:
    """Return a command that runs on the proxies' core, or on that of upstream and load."""
    cores = sorted(os.sched_getaffinity(0))  # the first and the last: not two halves of one core
    return ["taskset", "-c", str(cores[0 if proxy else -1]), *command]


@contextmanager
def start(kind: Kind, log: Path, port: int = 0, *, proxy: bool = True) -> Iterator[Server]:
    """Run a server until the block ends. Raises RuntimeError if it does not start."""
    if kind.command is None:
        yield Server(kind.name, kind.url)
        return
    port = port or free_port()
    command = pin(kind.command(port), proxy=proxy)
    with log.open("ab") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        while not answers(port):
            time.sleep(0.002)
            if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                end = log.read_text(errors="replace")[-1000:]
                raise RuntimeError(f"does not start: {end}")
        ready = (time.perf_counter() - began) * 1000
        yield Server(kind.name, f"http://127.0.0.1:{port}", process.pid, ready)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with suppress(OSError, HTTPException):
        return bool(ask(f"http://127.0.0.1:{port}/api/version"))
    return False


def ask(url: str, body: bytes | None = None) -> bytes:
    """Return the headers and the body of a 200. Raises OSError and HTTPException."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body), timeout=PATIENCE) as answer:
        return bytes(answer.headers.as_bytes() + answer.read())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def allow_files() -> None:
    """Raise the number of files that this process, and what it starts, may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
