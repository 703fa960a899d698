"""Reload: starts the serving process again whenever a file changes, for authors of agents.

uvicorn's supervisor keeps the listening socket open meanwhile, so no client is refused. Its own
watchers look at Python files only, and one of them does not see new files.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from uvicorn.supervisors.basereload import BaseReload

SUFFIXES = (".py", ".json", ".toml")


class Reloader(BaseReload):
    """Runs `target(sockets=...)` in a process; `watched` are files and folders."""

    def __init__(
        self, target: Callable[..., None], sockets: list[socket.socket], watched: Sequence[Path]
    ) -> None:
        super().__init__(uvicorn.Config("", log_config=None), target, sockets)
        self.reloader_name = "osp.py --reload"
        self._watched, self._stamps = watched, stamps(watched)

    def should_restart(self) -> list[Path] | None:
        self.pause()
        before, self._stamps = self._stamps, stamps(self._watched)
        return sorted({path for path, _ in before ^ self._stamps}) or None


def stamps(watched: Sequence[Path]) -> set[tuple[Path, int]]:
    """Return the files that count, each with the time of its last change."""
    files = [file for path in watched for file in [path, *path.rglob("*")]]
    return {(file, changed(file)) for file in files if file.suffix in SUFFIXES}


def changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # not there yet, or gone again
        return 0
