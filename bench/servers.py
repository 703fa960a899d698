"""Servers: starts one, on a core of its own, and says what the system knows of it.

A `Kind` is a server that can be started, over and over; `Running` is one that runs. The proxy has a
core for itself, the upstream and the load have another. Memory and processor time are read from
/proc, and are None where there is none.
"""

from __future__ import annotations

import http.client
import math
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PATIENCE = 60  # seconds that a server may take to start
LOOK = 0.002  # seconds between two looks whether it has
FILES = 8192  # that one process may open: a stream is two of them


@dataclass(frozen=True)
class Kind:
    """A server: `command` makes it listen on a port, or somebody else started it at `url`."""

    name: str
    command: Callable[[int], list[str]] | None = None
    ready: str = "/api/version"  # asked until it answers 200
    url: str = ""


class Running:
    """One server that listens at `url`; `process` is None for somebody else's."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None, ready: float) -> None:
        self.url = url
        self.ready = ready  # seconds from its start to its first answer
        self._process = process

    def memory(self) -> float | None:
        """Return the resident memory of its processes, in MiB."""
        sizes = [field(f"/proc/{pid}/status", "VmRSS:") for pid in self._pids()]
        return sum(sizes) / 1024 if sizes else None

    def cpu(self) -> float | None:
        """Return the processor time of its processes, in seconds."""
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in self._pids()]
        ticks = [sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None

    def _pids(self) -> list[int]:
        if self._process is None or not Path("/proc/self/status").exists():
            return []
        pids = [self._process.pid]
        for pid in pids:  # grows as we go
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def field(file: str, name: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def start(kind: Kind, core: int | None, log: Path, port: int = 0) -> Running:
    """Start a server on a core of its own. Raises RuntimeError, with its log, if it does not."""
    if kind.command is None:
        return Running(kind.url, None, math.nan)
    port = port or free_port()
    command = kind.command(port)
    with pinned(core), log.open("ab") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=out)
    while not answers(port, kind.ready):
        time.sleep(LOOK)
        if process.poll() is not None or time.perf_counter() - began > PATIENCE:
            process.kill()
            process.wait()
            end = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{kind.name} does not start: {end}")
    return Running(f"http://127.0.0.1:{port}", process, time.perf_counter() - began)


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Have what is started inside run on one core; None is any."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> tuple[int, int] | None:
    """Return a core for the load and one for the proxy, or None if this cannot be had."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    mine = sorted(os.sched_getaffinity(0))  # neighbours may be two halves of one core
    return (mine[0], mine[-1]) if len(mine) > 1 else None


def allow_files() -> None:
    """Raise the number of files that we and what we start may open."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
